"""Settings that make results independent of the processor: the same bytes on any x86-64 machine with AVX2.

OpenBLAS, NumPy, OpenCV and oneDNN choose their kernels by the processor, and different kernels add numbers in
different orders. Here each library is limited to the instructions that every such machine has. These settings
replace those of the user's environment. Linear algebra uses one thread, for the same reason; processes and
TensorFlow's own threads use the other cores.
"""

import os
import re
import sys
from pathlib import Path

_SKX = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
_ICL = {"avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq"}
# What OpenCV must not use -> what Linux calls the processor's parts of it.
_OPENCV = {"AVX512-SKX": _SKX, "AVX512-ICL": _SKX | _ICL}


def opencv_disable(cpuinfo: str) -> str:
    """The value of OPENCV_CPU_DISABLE: names, joined by commas, of what this processor has and others lack.

    OpenCV complains on stderr about names of what the processor does not have.

    Args:
        cpuinfo: from /proc/cpuinfo, at least the lines of the first processor; empty where there is none.
    """
    flags = re.search(r"^flags\s*:(.*)", cpuinfo, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    return ",".join(name for name, parts in _OPENCV.items() if parts <= has)


def lacking(cpuinfo: str) -> list[str]:
    """Those of AVX2 and FMA that the processor does not have; without them no result is the same bit by bit.

    Args:
        cpuinfo: as for `opencv_disable`; empty: nothing is known, so nothing is lacking.
    """
    flags = re.search(r"^flags\s*:(.*)", cpuinfo, re.MULTILINE)
    return [name for name in ("avx2", "fma") if flags and name not in flags[1].split()]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")  # Linux alone; a processor of a Mac has no AVX-512
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


_LACKING = lacking(_cpuinfo())

PINNED = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",  # NumPy ignores what is not there
    "OPENCV_CPU_DISABLE": opencv_disable(_cpuinfo()),
    "ONEDNN_MAX_CPU_ISA": "AVX2",
} | ({} if _LACKING else {"OPENBLAS_CORETYPE": "Haswell"})  # whose kernels would end the process


_late: set[str] = set()


def pin() -> None:
    """Set the environment variables; call it before NumPy is imported: libraries read them once."""
    if "numpy" in sys.modules:
        _late.update(name for name, value in PINNED.items() if os.environ.get(name, "") != value)
    os.environ.update(PINNED)


def note() -> str:
    """A line for the user of a processor without AVX2 or FMA; else ''."""
    names = " and ".join(_LACKING).upper()
    return f"This processor has no {names}: the last digits of all results differ." if names else ""


def late() -> list[str]:
    """The variables that had another value when NumPy, the first of these libraries, was imported."""
    return sorted(_late)
