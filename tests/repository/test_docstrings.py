"""A docstring that lists arguments or attributes lists all of them, and none that does not exist."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CODE = Path(__file__).parents[2] / "src" / "aplsmear"
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
FILES = [path for path in sorted(CODE.rglob("*.py")) if path.name != "__init__.py"]


def public(body: list[ast.stmt], above: str = "") -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and methods by their dotted names; `__init__` with its class's name."""
    for node in body:
        if isinstance(node, Definition) and (not node.name.startswith("_") or node.name == "__init__"):
            yield f"{above}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{above}{node.name}.")


def listed(node: Definition, section: str) -> list[str] | None:
    """The names in a section of a docstring, or None where there is no such section."""
    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    return re.findall(r"^    \*{0,2}(\w+):", found[1], re.MULTILINE) if found else None


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of all arguments, but for that of the object itself."""
    given = node.args
    names = [each.arg for each in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    return [
        *(name for name in names if name not in ("self", "cls")),
        *(each.arg for each in (given.vararg, given.kwarg) if each),
    ]


def attributes(node: ast.ClassDef) -> list[str]:
    """The public fields of a class, and what its `__init__` sets on the object."""
    fields = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
    set_in_init = [
        target
        for each in node.body
        if isinstance(each, ast.FunctionDef) and each.name == "__init__"
        for inner in ast.walk(each)
        if isinstance(inner, ast.Assign | ast.AnnAssign)
        for whole in (inner.targets if isinstance(inner, ast.Assign) else [inner.target])
        for target in (whole.elts if isinstance(whole, ast.Tuple) else [whole])
        if isinstance(target, ast.Attribute)
    ]
    names = [each.id for each in fields if isinstance(each, ast.Name)]
    names += [each.attr for each in set_in_init if isinstance(each.value, ast.Name)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def problems(name: str, node: Definition) -> Iterator[str]:
    """What a docstring lists and its definition has not, and the other way round."""
    if isinstance(node, ast.ClassDef):
        pairs = [("Attributes", attributes(node))]
    else:
        pairs = [("Args", arguments(node))]
    for section, real in pairs:
        documented = listed(node, section)
        if documented is None:
            continue
        yield from (
            f"{name}: {each} is documented and does not exist" for each in documented if each not in real
        )
        yield from (f"{name}: {each} is not documented" for each in real if each not in documented)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CODE)))
def test_docstrings_list_the_arguments_and_attributes_that_there_are(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert [problem for name, node in public(body) for problem in problems(name, node)] == []


def test_an_argument_swallowed_by_its_neighbour_is_found() -> None:
    text = '''
class Cell:
    """A cell.

    Attributes:
        box: in px.
    """

    box: tuple[int, ...]
    image: bytes

    def grow(self, by: int, *, unit: str, **others: int) -> None:
        """Grow it.

        Args:
            by: how much, in
                unit: px or mm.
            most: at most.
        """
'''
    (body,) = [ast.parse(text).body]
    assert [problem for name, node in public(body) for problem in problems(name, node)] == [
        "Cell: image is not documented",
        "Cell.grow: most is documented and does not exist",
        "Cell.grow: unit is not documented",
        "Cell.grow: others is not documented",
    ]
