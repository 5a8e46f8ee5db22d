"""The same bytes on other processors: the user's environment does not change the kernels."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from processors import INSTALL, can_emulate, output_of

from aplsmear import cpu

# Lines of /proc/cpuinfo, shortened.
HASWELL = "processor\t: 0\nflags\t\t: fpu avx avx2 fma\n"
SKYLAKE = HASWELL.replace("avx2", "avx2 avx512f avx512cd avx512bw avx512dq avx512vl")
ICE_LAKE = SKYLAKE.replace(
    "fma", "avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq"
)

ROOT = Path(__file__).parents[1]
SRC = str(ROOT / "src")


def test_a_processor_without_avx2_or_fma_is_recognised():
    assert cpu.lacking(HASWELL) == cpu.lacking(SKYLAKE) == cpu.lacking("") == []
    assert cpu.lacking("processor\t: 0\nflags\t\t: fpu avx\n") == ["avx2", "fma"]
    assert cpu.lacking(HASWELL.replace(" fma", "")) == ["fma"]


def test_a_line_is_printed_only_where_bytes_differ(monkeypatch):
    np.linalg.svd(np.eye(2))
    assert cpu.note() == ""
    monkeypatch.setattr(cpu, "_LACKING", ["avx2", "fma"])
    assert cpu.note() == (
        "The last digits of results differ from those of other computers: the processor has no AVX2 and FMA."
    )
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert cpu.note().endswith(": the processor is no x86-64 (arm64).")


def test_another_version_of_a_library_is_named(monkeypatch):
    monkeypatch.setitem(cpu.LOCKED, "numpy", "1.0")
    monkeypatch.setitem(cpu.LOCKED, "opencv-nowhere", "4.0")
    note = cpu.note()
    assert f": numpy is {np.__version__}, not 1.0; opencv-nowhere is missing, not 4.0." in note
    assert "\n" not in note


def test_the_versions_that_are_expected_are_those_of_the_lock_file():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    for name, locked in cpu.LOCKED.items():
        assert [re.split("==| ", line)[1] for line in lines if line.startswith(f"{name}==")] == [locked]


def test_another_blas_is_named(monkeypatch):
    """MKL in place of OpenBLAS, as threadpoolctl reports it."""
    mkl = {"user_api": "blas", "internal_api": "mkl", "filepath": "/opt/conda/lib/libmkl_rt.so.2"}
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: [mkl])
    assert cpu.note().endswith(": BLAS is /opt/conda/lib/libmkl_rt.so.2.")


def test_a_blas_that_started_with_other_kernels_is_named():
    """NumPy was imported before aplsmear, in an environment that asks for other kernels."""
    code = "import numpy, aplsmear; from aplsmear import cpu; print(cpu.note())"
    line = output_of(code, OPENBLAS_CORETYPE="Nehalem")
    assert re.search(r": BLAS is .*numpy\.libs/libscipy_openblas.* with kernels for Nehalem\.$", line)


@pytest.mark.pipeline
@pytest.mark.skipif(not can_emulate(), reason=INSTALL)
def test_a_processor_without_avx2_computes_and_says_that_its_bytes_differ():
    """Emulated; /proc/cpuinfo, which qemu does not emulate, is replaced."""
    code = """
import pathlib
real = pathlib.Path.read_text
pathlib.Path.read_text = lambda path, *words, **more: (
    "flags : sse4_2" if str(path) == "/proc/cpuinfo" else real(path, *words, **more)
)
import aplsmear, numpy
print(numpy.ones((9, 9)).dot(numpy.ones(9))[0], aplsmear.cpu.note())
"""
    line = output_of(code, processor="Nehalem")
    assert line.startswith("9.0 The last digits of results differ")
    assert line.endswith(": the processor has no AVX2 and FMA.")


CHAIN = """
{first}
import hashlib
import cv2
import numpy as np
import tensorflow as tf
rng = np.random.default_rng(1)
digest = hashlib.sha256()
a, b = rng.standard_normal((2, 257, 301)).astype(np.float32)
digest.update((a @ b.T).tobytes())
digest.update(np.exp(a).tobytes() + np.log(np.abs(a)).tobytes() + np.tanh(a).sum(axis=0).tobytes())
digest.update(np.linalg.svd(a.astype(np.float64))[1].tobytes())
image = rng.integers(0, 256, (97, 131, 3)).astype(np.uint8)
turn = cv2.getRotationMatrix2D((50, 50), 33, 1.1)
digest.update(cv2.warpAffine(image, turn, (90, 90)).tobytes())
small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
digest.update(cv2.GaussianBlur(small, (5, 5), 0.7).tobytes())
x = tf.constant(rng.standard_normal((2, 24, 24, 16)).astype(np.float32))
kernel = tf.constant(rng.standard_normal((3, 3, 16, 32)).astype(np.float32))
y = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"))
digest.update(tf.reduce_mean(y, axis=(1, 2)).numpy().tobytes())
digest.update((tf.reshape(y, (-1, 32)) @ tf.ones((32, 8))).numpy().tobytes())
print(digest.hexdigest())
"""


def start(pinned: bool, **asked: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in cpu.PINNED}
    environment |= {"PYTHONPATH": SRC, "TF_CPP_MIN_LOG_LEVEL": "3"} | asked
    code = CHAIN.format(first="import aplsmear" if pinned else "")
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_settings_of_the_users_environment_change_no_bit():
    asked = {"ONEDNN_MAX_CPU_ISA": "AVX", "OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "2"}
    running = [start(pinned=True), start(pinned=True, **asked), start(pinned=False, **asked)]
    plain, other, unpinned = (each.communicate()[0].strip() for each in running)
    assert plain
    assert other == plain
    assert unpinned != plain  # so the chain can tell


def test_pins_are_set_when_the_package_is_imported(monkeypatch):
    for key in cpu.PINNED:
        monkeypatch.setenv(key, "other")
    cpu.pin()
    assert {key: os.environ[key] for key in cpu.PINNED} == cpu.PINNED


@pytest.mark.parametrize(
    ("cpuinfo", "disabled"),
    [
        (HASWELL, ""),
        (SKYLAKE, "AVX512-SKX"),
        (ICE_LAKE, "AVX512-SKX,AVX512-ICL"),
        ("Features\t: fp asimd\n", ""),  # ARM
        ("", ""),  # macOS
    ],
)
def test_opencv_is_asked_to_leave_out_only_what_the_processor_has(cpuinfo, disabled):
    assert cpu.opencv_disable(cpuinfo) == disabled


def test_libraries_complain_about_no_pin_on_this_processor():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import aplsmear, numpy, cv2"],
        env=os.environ | {"PYTHONPATH": SRC},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    "module", ["aplsmear.images.views", "aplsmear.evaluation.splits", "aplsmear.cli", "aplsmear.runs.stage"]
)
def test_numpy_never_comes_before_the_pins(module):
    """Any module of the package may be imported first: the environment is set before NumPy reads it."""
    code = f"""
import sys, importlib.abc, os
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("numpy", "cv2", "scipy", "pandas"):
            assert os.environ.get("OPENBLAS_CORETYPE") == "Haswell", name
sys.meta_path.insert(0, Watch())
import {module}
"""
    environment = {key: value for key, value in os.environ.items() if key not in cpu.PINNED} | {
        "PYTHONPATH": SRC
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_settings_of_progress_bars_do_not_end_the_work():
    code = "from aplsmear.progress import progress; print(sum(progress([1, 2], 'cells', 2)))"
    environment = os.environ | {"PYTHONPATH": SRC, "TQDM_MININTERVAL": "often"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True
    )
    assert done.stdout == "3\n", done.stderr
