"""What people who write Python read can be run: docs/library.md and the notebooks."""

import doctest
import json
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from clones import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells_of(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.pipeline
def test_the_page_on_the_library_does_what_it_shows(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    page = ROOT / "docs" / "library.md"
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 30
    assert result.failed == 0


@pytest.mark.pipeline
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_draws_a_finished_run(
    path: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small)
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.switch_backend("agg")
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells_of(path)), encoding="utf-8")
    runpy.run_path(str(script))
    figures = [axes for number in plt.get_fignums() for axes in plt.figure(number).axes]
    plt.close("all")
    assert len(figures) == 3
    assert all(axes.lines or axes.collections for axes in figures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_outputs(path: Path) -> None:
    """Outputs may show patients, and they change with each run."""
    assert [cell for cell in cells_of(path) if cell["outputs"] or cell["execution_count"]] == []
