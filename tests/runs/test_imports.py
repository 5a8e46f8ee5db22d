"""The hash of code changes with every module that the code imports, and with no other."""

from pathlib import Path

import pytest

from aplsmear.runs import imports
from aplsmear.runs.imports import PACKAGE, code_hash, imported_modules

FILES = {
    "__init__.py": "",
    "start.py": "import numpy as np\nfrom made.room import middle\n",
    "room/__init__.py": "",
    "room/middle.py": "def work():\n    from made.leaf import value\n    return value\n",
    "leaf.py": "import made.errors\nvalue = 1\n",
    "errors.py": "from made import unseen\n",
    "unseen.py": "",
    "other.py": "raise RuntimeError('code is read, not executed')\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few modules in place of the library."""
    top = tmp_path / "made"
    for name, text in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    monkeypatch.setattr(imports, "PACKAGE", top)
    return top


def test_imports_inside_functions_and_of_imported_modules_count(package: Path) -> None:
    found = imported_modules(package / "start.py")
    assert found == {"leaf": package / "leaf.py", "room.middle": package / "room" / "middle.py"}


@pytest.mark.parametrize("name", ["start.py", "room/middle.py", "leaf.py"])
def test_a_changed_module_changes_the_hash(package: Path, name: str) -> None:
    before = code_hash(package / "start.py")
    (package / name).write_text(FILES[name] + "# a remark\n")
    changed = code_hash(package / "start.py")
    assert changed != before
    (package / name).write_text(FILES[name])
    assert code_hash(package / "start.py") == before


@pytest.mark.parametrize("name", ["other.py", "errors.py", "unseen.py"])
def test_modules_that_are_not_imported_or_have_no_effect_do_not_change_the_hash(
    package: Path, name: str
) -> None:
    before = code_hash(package / "start.py")
    (package / name).write_text("changed = True\n")
    assert code_hash(package / "start.py") == before


def test_modules_without_effect_exist() -> None:
    for name in imports.WITHOUT_EFFECT:
        assert PACKAGE.joinpath(*name.split(".")).with_suffix(".py").is_file(), name
