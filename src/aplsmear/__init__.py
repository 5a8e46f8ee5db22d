"""Recognise acute promyelocytic leukaemia in bone marrow smear images.

Pure functions on arrays, tables and paths; the DVC stages in ``stages/`` call them.
"""

import sys
from pathlib import Path

from aplsmear import cpu

__version__ = "0.1.0"

# `python stages/tune.py` puts stages/ before all libraries, and pandas would import stages/bottleneck.py.
sys.path[:] = [folder for folder in sys.path if not Path(folder, "bottleneck.py").is_file()]
cpu.pin()  # before NumPy is imported by any other module of the package
