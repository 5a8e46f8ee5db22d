"""What depends on the CPU, pinned in one place: the same input gives the same bytes on any x86-64 with AVX2.

OpenBLAS, NumPy, OpenCV and oneDNN choose their kernels by the processor, and kernels sum in different orders.
Here all of them are told to use what every such machine has, whatever the caller's environment says. Threads
of linear algebra are one, for the same reason; processes and TensorFlow's own thread pools use the cores.
"""

import os
import sys

PINNED = {
    "OPENBLAS_CORETYPE": "Haswell",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "OPENCV_CPU_DISABLE": "AVX512-SKX,AVX512-ICL",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


_late: set[str] = set()


def pin() -> None:
    """Set the environment that these libraries read when they are first imported, so call it before that."""
    if "numpy" in sys.modules:
        _late.update(name for name, value in PINNED.items() if os.environ.get(name) != value)
    os.environ.update(PINNED)


def late() -> list[str]:
    """The variables that had another value when NumPy, the first of these libraries, was imported."""
    return sorted(_late)
