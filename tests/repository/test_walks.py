"""The pages of docs/ can be walked: every command does what the page says."""

import re
from pathlib import Path

import pytest

from clones import ROOT
from walks import PAGES, clean, commands, copied, printed, refreshed, steps_of

WALKS = [path for path in PAGES if steps_of(path.read_text(encoding="utf-8"))]  # the rest is read


def stable(shown: list[str]) -> list[str]:
    """What does not hang on the data: lines without a figure, however wide their columns."""
    return [" ".join(line.split()) for line in shown if line.strip() and not re.search(r"[\d…]", line)]


@pytest.mark.pipeline
@pytest.mark.parametrize("path", WALKS, ids=lambda path: path.stem)
def test_a_page_can_be_walked(path: Path, small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path / "aplsmear")
    steps = steps_of(path.read_text(encoding="utf-8"))
    outputs = printed(folder, [step.typed for step in steps])
    for step, output in zip(steps, outputs, strict=True):
        said = stable(output)
        assert [line for line in stable(step.shown) if line not in said] == [], (
            f"$ {step.typed}\nprints another thing than {path.name} shows:\n" + "\n".join(output)
        )


# Commands of the README that need something of the reader, a network or another terminal.
NEEDS_MORE = re.compile(
    r"\b(DIR|FILE|URL)\b|^make (demo|test)\b|^mlflow ui\b|^dvc push\b|^source\b|profile kaggle"
)
# What the small clone has instead: it has no task `auer_rod` and no environment, and few trials.
IN_SMALL = {"auer_rod": "blast", "make experiments": "aplsmear experiments", "trials=24": "trials=3"}


def in_small(typed: str) -> str:
    """A command of the README, as it is typed in the small clone."""
    for name, other in IN_SMALL.items():
        typed = typed.replace(name, other)
    return re.sub(r"^make compare A=(\S+) B=(\S+)", r"aplsmear compare \1 \2", typed)


@pytest.mark.pipeline
def test_after_the_demo_the_commands_of_the_readme_work_in_their_order(small: Path, tmp_path: Path) -> None:
    """In one clone, one after another, as a reader types them."""
    folder = copied(small, tmp_path / "aplsmear")
    typed = [step.typed for step in steps_of((ROOT / "README.md").read_text(encoding="utf-8"))]
    able = [in_small(line) for line in typed if not NEEDS_MORE.search(line)]
    assert len(able) > 8
    outputs = dict(zip(able, printed(folder, able), strict=True))
    assert any("patients judged" in " ".join(output) for output in outputs.values())
    assert (folder / "compare.html").exists()


def test_the_index_leads_to_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in PAGES if path.name != "README.md" and f"({path.name})" not in index] == []
    assert "docs/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_outputs_are_put_below_their_commands_and_nowhere_else() -> None:
    left_out = "<!-- not in the test: slow -->\n```console\n$ three\nkept\n```\n"
    page = f"```console\n$ one\nold\n$ two\n```\n{left_out}"
    assert [step.typed for step in steps_of(page)] == ["one", "two"]
    again = refreshed(page, [["new", "newer"], []])
    assert again == page.replace("old", "new\nnewer")
    assert commands("$ one\nnew\n")[0].shown == ["new"]


def test_a_drawn_name_is_the_same_in_every_walk() -> None:
    drawn = [clean(f"Remote lab (/tmp/tmp.{name}/store): fine.") for name in ("unbRWutxgJ", "LdKP8E1qMl")]
    assert drawn[0] == drawn[1] == ["Remote lab (/tmp/tmp.XXXXXXXXXX/store): fine."]


def test_colours_and_progress_bars_are_not_shown() -> None:
    bars = "  0%|  | 0/2 [00:00<?, ? smears/s]\rpatients: 100%|##| 2/2 [00:01<00:00, 2it/s]done"
    assert clean(f"\n\x1b[1mbold\x1b[0m \n{bars}\n\n100 %\n\n") == ["bold", "done", "", "100 %"]
