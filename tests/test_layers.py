"""The table of networks and layers is that of the Keras which is installed."""

import json
import re
import runpy
from pathlib import Path

import pytest

from aplsmear.layers import TABLE

ROOT = Path(__file__).parents[1]
WRITTEN = json.loads(TABLE.read_text(encoding="utf-8"))
USED = set(
    re.findall(r"application: (\w+)", "".join(map(Path.read_text, (ROOT / "profiles").glob("*.yaml"))))
)


def test_it_was_written_by_the_keras_that_is_installed():
    import keras

    mend = "run tools/keras_layers.py"
    assert WRITTEN["keras"] == keras.__version__, mend
    assert list(WRITTEN["applications"]) == sorted(n for n in dir(keras.applications) if n[0].isupper()), mend


@pytest.mark.parametrize("name", sorted(USED | {"MobileNetV3Small", "EfficientNetV2B0"}))
def test_it_says_what_keras_says(name):
    described = runpy.run_path(str(ROOT / "tools" / "keras_layers.py"))["described"]
    assert WRITTEN["applications"][name] == described(name)
