"""A data set of patients in the repository never gets into git, or the stage refuses."""

import subprocess
from pathlib import Path

import pytest

from aplsmear.errors import UserError
from aplsmear.runs.data_root import check_root
from aplsmear.runs.stage import check_data_root
from clones import ROOT, run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with this repository's .gitignore, and a data set beside it."""
    top = tmp_path / "top"
    top.mkdir()
    run(top, "git", "init", "--quiet")
    (top / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    data_set(tmp_path / "outside")
    monkeypatch.chdir(top)
    return top


def data_set(folder: Path) -> Path:
    (folder / "wsi").mkdir(parents=True)
    for name in ("wsi.csv", "labeled_cells.csv", "wsi/1.PNG", "wsi/2.jpg", "wsi/3.svs", "wsi/no ending"):
        (folder / name).write_bytes(b"a patient")
    return folder


def seen_by_git(top: Path) -> str:
    return run(top, "git", "status", "--porcelain", "--untracked-files=all")


@pytest.mark.parametrize("root", ["our_smears", "docs/smears", "src/aplsmear/smears", "demo/more", ".venv/x"])
def test_git_sees_no_file_of_a_data_set_that_lies_in_the_repository(place: Path, root: str) -> None:
    before = seen_by_git(place)
    data_set(place / root)
    assert seen_by_git(place) == before
    check_root(Path(root), place)
    check_root(place / root, place)


def test_a_data_set_whose_files_git_would_store_is_refused(place: Path) -> None:
    (data_set(place / "docs" / "smears") / "remarks.md").write_text("a patient")
    for root in (Path("docs/smears"), Path("docs/../docs/smears"), place / "docs" / "smears", Path()):
        with pytest.raises(UserError, match="Move the data set out of the repository"):
            check_root(root, place)


def test_a_data_set_that_git_has_already_is_refused(place: Path) -> None:
    data_set(place / "our_smears")
    run(place, "git", "add", "--force", "our_smears/wsi.csv")
    with pytest.raises(UserError, match=r"our_smears/wsi\.csv"):
        check_root(Path("our_smears"), place)


def test_exclusions_that_an_experiment_in_another_folder_does_not_have_do_not_count(place: Path) -> None:
    (place / ".gitignore").unlink()
    (place / ".git" / "info" / "exclude").write_text("our_smears\n")
    data_set(place / "our_smears")
    with pytest.raises(UserError):
        check_root(Path("our_smears"), place)


@pytest.mark.parametrize("ignored", [True, False])
def test_a_link_in_the_repository_to_a_data_set_elsewhere_counts_as_in_the_repository(
    place: Path, ignored: bool
) -> None:
    if not ignored:
        (place / ".gitignore").unlink()
    (place / "linked").symlink_to(place.parent / "outside")
    if ignored:
        check_root(Path("linked"), place)
    else:
        with pytest.raises(UserError):
            check_root(Path("linked"), place)


def test_a_data_set_outside_of_the_repository_is_no_problem(place: Path) -> None:
    (place / ".gitignore").unlink()
    check_root(Path("../outside"), place)
    check_root(place.parent / "outside", place)
    check_root(place.parent / "not there", place)


def test_git_tracks_no_file_that_it_would_not_store_again() -> None:
    """Else a file of a kind that .gitignore does not name would be missing in a later commit."""
    command = ("git", "ls-files", "--cached", "--ignored", "--exclude-per-directory=.gitignore")
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""


def test_a_cohort_of_external_in_the_repository_is_refused(place: Path) -> None:
    """Its row in params.yaml is checked like `dataset.root`."""
    data_set(place / "docs")
    (place / ".gitignore").unlink()
    text = "dataset: {root: ../outside}\nexternal: {dresden: {ensemble: apl_aml, root: docs}}\n"
    (place / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"external\.dresden\.root is docs"):
        check_data_root()
