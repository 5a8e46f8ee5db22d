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


GRAPH = """
import hashlib
from pathlib import Path
from aplsmear.features.backbones import write_graph
from aplsmear.params import Backbone
size = {"cell": 32, "smear": 32}
backbone = Backbone(
    application="MobileNet", input_size=size, layer=["conv_pw_2_relu"], weights="none", batch=1
)
write_graph(Path("graph"), backbone, "cell", 1)
print(hashlib.sha256(Path("graph").read_bytes()).hexdigest())
"""
KERAS = '{"floatx": "float64", "epsilon": 0.1, "backend": "jax", "image_data_format": "channels_first"}'
OTHERS = {
    "KERAS_BACKEND": "torch",
    "KERAS_MAX_EPOCHS": "many",
    "TF_USE_LEGACY_KERAS": "1",
    "OMP_NUM_THREADS": "0,1",
    "OMP_DISPLAY_ENV": "true",
    "OPENBLAS_VERBOSE": "2",
    "OPENCV_IPP": "disabled",
    "OPENCV_LOG_LEVEL": "verbose",
}


def test_settings_of_other_projects_for_keras_and_its_libraries_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = started(GRAPH, HOME=str(tmp_path / "empty"))
    Path("graph").unlink()
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text(KERAS)
    others = started(GRAPH, HOME=str(tmp_path), **OTHERS)
    assert (own.stdout, own.stderr) == (others.stdout, others.stderr)
    (tmp_path / ".keras" / "keras.json").write_text('{"floatx": "float128"}')
    with pytest.raises(subprocess.CalledProcessError) as refused:
        started("", HOME=str(tmp_path))
    assert "Correct or delete the file keras.json" in refused.value.stderr


def test_a_user_without_a_home_and_a_name_can_use_what_needs_them(tmp_path: Path) -> None:
    """Such as the user of a container, who has a number and no entry in passwd."""
    code = """
import pwd
def no_entry(_):
    raise KeyError("no such user")
pwd.getpwuid = no_entry
import aplsmear
import mlflow
from dvc.repo import Repo
Repo.init(no_scm=True).close()
"""
    unset = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CONFIG_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": SRC},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
