"""The table of networks and layers agrees with the installed Keras."""

import json
import re
import runpy
from pathlib import Path

import pytest

from aplsmear.dino_variants import VARIANTS
from aplsmear.layers import TABLE

ROOT = Path(__file__).parents[1]
WRITTEN = json.loads(TABLE.read_text(encoding="utf-8"))
USED = set(
    re.findall(r"application: (\w+)", "".join(map(Path.read_text, (ROOT / "profiles").glob("*.yaml"))))
)


def test_it_was_written_by_the_installed_keras():
    import keras

    fix = "run tools/keras_layers.py"
    assert WRITTEN["keras"] == keras.__version__, fix
    assert list(WRITTEN["applications"]) == sorted(n for n in dir(keras.applications) if n[0].isupper()), fix


@pytest.mark.parametrize("name", sorted((USED - VARIANTS.keys()) | {"MobileNetV3Small", "EfficientNetV2B0"}))
def test_its_layers_are_those_of_keras(name):
    described = runpy.run_path(str(ROOT / "tools" / "keras_layers.py"))["described"]
    assert WRITTEN["applications"][name] == described(name)
