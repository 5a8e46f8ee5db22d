"""`aplsmear null-check` finds an AUROC of 0.5 on permuted diagnoses, or reports a leak."""

import re
from pathlib import Path

import numpy as np
import pytest
from test_combination import people, scores_of
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.ensembles import combination as ensembles
from aplsmear.ensembles.pooling import summarise_patients
from aplsmear.params import read_params
from aplsmear.tables import write_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with members of 2 x 10 patients, without networks (they only take time)."""
    everybody = people(10, 5)
    knobs = read_params(ROOT / "params.yaml")
    ensemble = knobs.ensembles["apl_aml"]
    places = [tmp_path / "members" / "apl_aml" / f"{task}.scores.parquet" for task in ensemble.members]
    for seed, place in enumerate([*places, tmp_path / "tuned" / ensemble.weigh_by / "scores.parquet"]):
        place.parent.mkdir(parents=True, exist_ok=True)
        scores_of(everybody, seed, strength=2.0).to_parquet(place, index=False)
    write_table(tmp_path / "splits" / "folds.csv", everybody)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("      - network\n", ""), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(*arguments: str):
    return CliRunner().invoke(app, ["null-check", "--ensemble", "apl_aml", *arguments])


def test_the_command_prints_both_aurocs_and_writes_nothing(home: Path) -> None:
    before = sorted(home.rglob("*"))
    result = check("--repeats", "8")
    assert result.exit_code == 1, result.output
    _, first, second, last = result.stdout.splitlines() + result.stderr.splitlines()[-1:]
    assert re.fullmatch(r"  all pairs of patients: 0\.\d+ \(0\.\d+ to 0\.\d+\)", first)
    assert re.fullmatch(r"  pairs within a fold: 0\.\d+ \(0\.\d+ to 0\.\d+\)", second)
    assert re.search(r"No verdict: 8 permutations are too few .* `--repeats \d+`", last)
    assert sorted(home.rglob("*")) == before


def test_a_leak_ends_in_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(patients, members, candidates, repeats, seed):
        values = np.linspace(0.6, 0.7, repeats).tolist()
        return zip(values, values, strict=True)

    monkeypatch.setattr(ensembles, "null_check", leaky)
    result = check("--repeats", "5")
    assert result.exit_code == 1
    assert "A leak: held-out patients" in result.output


def test_a_missing_input_is_named_with_the_command_that_makes_it(home: Path) -> None:
    (home / "splits" / "folds.csv").unlink()
    result = check()
    assert result.exit_code == 1
    assert "splits/folds.csv does not exist: `dvc repro` makes it" in result.output


@pytest.mark.pipeline
def test_thirty_permutations_have_a_mean_auroc_of_a_half() -> None:
    everybody = people(24, 3)
    names = ("a", "b", "c", "d", "e")
    members = {
        name: summarise_patients(scores_of(everybody, 10 + seed, strength=1.5))
        for seed, name in enumerate(names)
    }
    patients = ensembles.patients_of(everybody, "apl", "healthy")
    knobs = read_params(ROOT / "params.yaml").combine.model_copy(update={"trials": 14})
    candidates = ensembles.draw_candidates(knobs, 1)
    assert {one.model for one in candidates} == {"logistic", "network"}
    found = np.mean(list(ensembles.null_check(patients, members, candidates, 30, 1)), axis=0)
    assert found == pytest.approx([0.5, 0.5], abs=0.04)
