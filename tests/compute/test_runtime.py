"""TensorFlow starts in the same way everywhere: deterministic, and with one line of output."""

import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from aplsmear.compute import runtime
from aplsmear.compute.runtime import start_tensorflow

SRC = str(Path(__file__).parents[2] / "src")
HALF = """
half = tf.ones((8, 8), tf.float16)
tf.function(lambda a: tf.nn.relu(tf.matmul(a, a)))(half)  # oneDNN has no kernel for it without AVX-512
"""


def started(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code after `start_tensorflow`, in a process of its own that sees no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"from aplsmear.compute.runtime import start_tensorflow\ntf = start_tensorflow(1)\n{code}",
        ],
        env=environment | {"PYTHONPATH": SRC, "CUDA_VISIBLE_DEVICES": "-1"} | env,
        check=True,
        capture_output=True,
        text=True,
    )


def test_it_prints_one_line_and_sets_threads_and_determinism():
    done = started("""
again = start_tensorflow(1)
assert again is tf
assert tf.config.threading.get_intra_op_parallelism_threads() == 1
try:
    tf.random.normal((1,))
except RuntimeError as error:  # with determinism a seed is needed
    print(type(error).__name__)
""")
    printed = done.stderr.splitlines()
    assert len(printed) == 2
    assert printed[0] == printed[1]
    assert printed[0].startswith("TensorFlow 2.")
    assert done.stdout.strip() == "RuntimeError"


def test_tensorflow_prints_nothing_of_its_own_unless_asked():
    assert started(HALF).stderr.count("\n") == 1
    assert started(HALF, TF_CPP_MIN_LOG_LEVEL="0").stderr.count("\n") > 1


def test_a_gpu_that_tensorflow_does_not_see_is_reported(tmp_path):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    (line,) = started("", PATH=str(tmp_path)).stderr.splitlines()
    assert "on CPU, though there is an NVIDIA driver" in line


@pytest.mark.parametrize(
    ("there", "works", "chosen"),
    [
        (["CPUExecutionProvider"], False, "CPU"),
        (["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"], True, "CUDA"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], False, "CPU"),  # the package without a GPU
    ],
)
def test_networks_run_on_a_gpu_that_works_and_the_user_is_told(there, works, chosen, monkeypatch):
    class Session:
        def __init__(self, _: bytes, __: object, providers: list[str]) -> None:
            self.get_providers = lambda: providers if works else providers[-1:]

    runtime.providers.cache_clear()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert runtime.device() == chosen
    assert runtime.providers()[-1] == "CPUExecutionProvider"
    assert ("on a GPU (CUDA)" in runtime.device_note()) == (chosen == "CUDA")
    runtime.providers.cache_clear()


def test_an_empty_network_runs_on_the_cpu_where_a_provider_does_not_work():
    with pytest.warns(UserWarning, match="not in available provider names"):  # without onnxruntime-gpu
        session = runtime._session_on("CUDAExecutionProvider")
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_messages_of_libraries_are_shown_when_the_import_fails(monkeypatch, capfd):
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
