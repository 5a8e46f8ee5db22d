"""Which modules of the library a script or module imports, and a hash of their code.

Stored results are valid only for the code that made them. A key that contains `code_hash` changes when any
module changes that could have changed the results: the same modules that ``dvc.yaml`` names for a stage.
"""

from __future__ import annotations

import hashlib
from modulefinder import ModuleFinder
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

# Modules that cannot change what a stage writes: where work is done, how progress and errors are shown, what
# is logged beside the outs, what repairs a killed run, the schema of params.yaml (a stage depends on values).
WITHOUT_EFFECT = {
    "compute.engine",
    "compute.runtime",
    "data.problems",
    "errors",
    "layers",
    "params",
    "progress",
    "runs.checksums",
    "runs.data_root",
    "runs.git",
    "runs.mend",
    "runs.stage",
    "runs.tracking",
    "secrets",
}


def imported_modules(path: Path) -> dict[str, Path]:
    """The modules of the library that a Python file imports, directly or through others, anywhere in them.

    Imports inside functions count. The file itself, the ``__init__.py`` of packages and the modules in
    `WITHOUT_EFFECT` do not. Nothing is executed.

    Returns:
        Name below ``aplsmear`` (``heads.stack``) -> file, sorted by name.
    """
    name = PACKAGE.name
    finder = ModuleFinder([str(PACKAGE.parent)], excludes=[f"{name}.{module}" for module in WITHOUT_EFFECT])
    finder.run_script(str(path))
    files = {module: Path(str(getattr(found, "__file__", ""))) for module, found in finder.modules.items()}
    return {
        module.removeprefix(f"{name}."): file
        for module, file in sorted(files.items())
        if module.startswith(f"{name}.") and file.name != "__init__.py"
    }


def code_hash(path: Path) -> str:
    """SHA-256, in hexadecimal, of a Python file and of all its `imported_modules`; comments count."""
    digest = hashlib.sha256()
    for name, file in {"": path, **imported_modules(path)}.items():
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
