"""The rooms of the library are in an order, and no module imports from a room above its own."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

CODE = Path(__file__).parents[2] / "src" / "aplsmear"

# From top to bottom: rooms, and single modules beside them.
ORDER = [
    "cli",
    "prediction",
    "workspace",
    "answer",
    "reports",
    "finetune",
    "ensembles",
    "heads",
    "exchange",
    "sources",
    "features",
    "data",
    "images",
    "compute",
    "runs",
    "evaluation",
    "params",
    "layers",
    "dino_variants",
    "secrets",
    "words",
    "tables",
    "files",
    "progress",
    "errors",
    "cpu",
]

MODULES = {
    ".".join(path.relative_to(CODE).with_suffix("").parts): path for path in sorted(CODE.rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """Modules of aplsmear that a file imports, anywhere in it, by their names below aplsmear."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "aplsmear":
            above = (node.module or "").split(".")[1:]
            found |= {".".join([*above, alias.name]) for alias in node.names} | {".".join(above)}
    return found & MODULES.keys()


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__init__")])
def test_no_module_imports_from_a_room_above_its_own(name: str) -> None:
    floor = ORDER.index(name.split(".", maxsplit=1)[0])
    above = {other for other in imported(MODULES[name]) if ORDER.index(other.split(".")[0]) < floor}
    assert above == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    order = list(TopologicalSorter({name: imported(path) for name, path in MODULES.items()}).static_order())
    assert len(order) == len(MODULES)


def test_every_room_says_what_it_is() -> None:
    rooms = [path for path in CODE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {room.name for room in rooms} <= set(ORDER)
    for room in rooms:
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))), room.name


@pytest.mark.parametrize(("folder", "longest"), [("src", 60), ("stages", 40)])
def test_a_function_fits_one_screen(folder: str, longest: int) -> None:
    lengths = {
        f"{path.name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in (CODE.parents[1] / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > longest} == {}
