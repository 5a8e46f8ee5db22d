"""TensorFlow, started alike everywhere: quiet when well, loud when not, deterministic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aplsmear.compute.runtime import start_tensorflow

SRC = str(Path(__file__).parents[2] / "src")


def test_it_says_one_line_and_sets_threads_and_determinism():
    code = """
from aplsmear.compute.runtime import start_tensorflow
tf = start_tensorflow(1)
again = start_tensorflow(1)
assert again is tf
assert tf.config.threading.get_intra_op_parallelism_threads() == 1
try:
    tf.random.normal((1,))
except RuntimeError as error:  # determinism asks for a seed
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": SRC, "CUDA_VISIBLE_DEVICES": "-1"},
        check=True,
        capture_output=True,
        text=True,
    )
    said = done.stderr.splitlines()
    assert len(said) == 2
    assert said[0] == said[1]
    assert said[0].startswith("TensorFlow 2.")
    assert said[0].endswith(" on CPU")
    assert done.stdout.strip() == "RuntimeError"


def test_what_was_kept_back_is_shown_when_the_import_fails(monkeypatch, capfd):
    class Broken:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "tensorflow":
                os.write(2, b"the reason, from C++\n")
                raise ImportError("broken")

    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.raises(ImportError, match="broken"):
        start_tensorflow()
    assert "the reason, from C++" in capfd.readouterr().err
