"""Recognise acute promyelocytic leukaemia in bone marrow smear images.

Pure functions on arrays, tables and paths; the DVC stages in ``stages/`` call them.
"""

from aplsmear import cpu

__version__ = "0.1.0"

cpu.pin()  # before NumPy is imported by any other module of the package
