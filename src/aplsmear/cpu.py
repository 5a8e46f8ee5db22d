"""Settings that make results independent of the processor: the same bytes on any x86-64 with AVX2 and FMA.

OpenBLAS, NumPy, OpenCV and oneDNN choose their kernels by the processor, and different kernels add numbers in
different orders. Here each library is limited to the instructions that every such machine has. These settings
replace those of the user's environment, and other settings of these libraries are removed, as are Keras's.
Linear algebra uses one thread, for the same reason; processes and TensorFlow's own threads use the other
cores.
"""

import getpass
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_SKX = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
_ICL = {"avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq"}
# What OpenCV must not use -> what Linux calls the processor's parts of it.
_OPENCV = {"AVX512-SKX": _SKX, "AVX512-ICL": _SKX | _ICL}
# The libraries whose arithmetic the results are made of, in the versions of requirements.lock.
LOCKED = {
    "numpy": "2.4.6",
    "onnxruntime": "1.32.0",
    "opencv-python-headless": "4.14.0.94",
    "pillow": "13.0.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.17.1",
}
_BUNDLED = (".libs", ".dylibs")  # ends of the folders of wheels with the libraries that they bring along
_KERNELS = "Haswell"  # of OpenBLAS: those for AVX2 and FMA


def opencv_disable(cpuinfo: str) -> str:
    """The value of OPENCV_CPU_DISABLE: names, joined by commas, of what this processor has and others lack.

    OpenCV complains on stderr about names of what the processor does not have.
    """
    return ",".join(name for name, parts in _OPENCV.items() if parts <= _flags(cpuinfo))


def lacking(cpuinfo: str) -> list[str]:
    """Those of AVX2 and FMA that the processor lacks; without them no result is the same bit by bit."""
    flags = _flags(cpuinfo)  # empty: nothing is known, so nothing is lacking
    return [name for name in ("avx2", "fma") if flags and name not in flags]


def _flags(cpuinfo: str) -> set[str]:
    found = re.search(r"^flags\s*:(.*)", cpuinfo, re.MULTILINE)
    return set(found[1].split()) if found else set()


def cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")  # Linux alone; a processor of a Mac has no AVX-512
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


_LACKING = lacking(cpuinfo())

PINNED = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",  # NumPy ignores what is not there
    "OPENCV_CPU_DISABLE": opencv_disable(cpuinfo()),
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "KERAS_BACKEND": "tensorflow",
    "TF_USE_LEGACY_KERAS": "0",
} | ({} if _LACKING else {"OPENBLAS_CORETYPE": _KERNELS})  # whose kernels would end the process

# Settings of these libraries in the user's environment: they change results, print text, or end the process.
_OTHERS = (
    "GOMP_", "KERAS_MAX_", "KERAS_NNX_", "KMP_", "MKL_", "NPY_", "OMP_", "ONEDNN_", "OPENBLAS_", "OPENCV_",
    "TQDM_",
)  # fmt: skip

_late: set[str] = set()


def pin() -> None:
    """Set the environment variables; call it before NumPy is imported: libraries read them once."""
    if "numpy" in sys.modules:
        _late.update(name for name, value in PINNED.items() if os.environ.get(name, "") != value)
    for name in [name for name in os.environ if name.startswith(_OTHERS)]:
        del os.environ[name]
    os.environ.update(PINNED)
    # The user of a container may have no home and no name, and MLflow and DVC need both.
    if not Path(os.path.expanduser("~")).is_absolute():  # noqa: PTH111 (Path.home() raises an error)
        os.environ["HOME"] = tempfile.gettempdir()
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())


def note() -> str:
    """A line for the user of another processor or of other libraries, whose results differ; else ''.

    The BLAS libraries are those that this process has loaded by now.
    """
    reasons = "; ".join(_reasons())
    return f"The last digits of results differ from those of other computers: {reasons}." if reasons else ""


def _reasons() -> Iterator[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        yield f"the processor is no x86-64 ({platform.machine()})"
        return
    if _LACKING:
        yield f"the processor has no {' and '.join(map(str.upper, _LACKING))}"
    for name, locked in LOCKED.items():
        if (found := _version(name)) != locked:
            yield f"{name} is {found}, not {locked}"
    if "numpy" in sys.modules and not _LACKING:
        yield from _other_blas()


def _version(name: str) -> str:
    for package in (name, f"{name}-gpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "missing"


def _other_blas() -> Iterator[str]:
    """Each loaded BLAS that no package has brought along, or that has other kernels than the pinned ones."""
    from threadpoolctl import threadpool_info

    for each in threadpool_info():
        own = Path(each["filepath"]).parent.name.endswith(_BUNDLED)
        if each["user_api"] == "blas" and not (own and each.get("architecture") == _KERNELS):
            kernels = f" with kernels for {each['architecture']}" if "architecture" in each else ""
            yield f"BLAS is {each['filepath']}{kernels}"


def late() -> list[str]:
    """The variables that had another value when NumPy, the first of these libraries, was imported."""
    return sorted(_late)
