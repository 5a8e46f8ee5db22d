"""The table of experiments in a terminal: what each changed, and its AUROC."""

from io import StringIO

from rich.console import Console

from aplsmear.workspace.experiments import WORKSPACE, Experiment, advice, table

PARAMS = {"seed": 1, "task": "blast", "tune.space.width": [16, 32], "dataset.root": "data"}


def auroc(value: float, **others: float | str) -> dict[str, float | str]:
    return {"auroc.value": value, "auroc.low": value - 0.1, "auroc.high": value + 0.05} | others


def gain(value: float) -> dict[str, float]:
    return {"difference.value": value, "difference.low": value - 0.01, "difference.high": value + 0.01}


def drawn(experiments: list[Experiment], width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(table(experiments))
    return console.file.getvalue()


MAIN = Experiment(
    "main",
    True,
    params=PARAMS,
    metrics={
        "ensembles/apl_aml/metrics.json": auroc(0.9),
        "ensembles/apl_healthy/metrics.json": auroc(0.8),
        "finetuned/metrics.json": auroc(0.7, task="blast") | gain(0.0),
        "tuned/blast/metrics.json": auroc(0.6),
    },
)
FAGGOT = Experiment(
    "faggot",
    False,
    params=PARAMS | {"task": "faggot"},
    metrics=dict(MAIN.metrics) | {"finetuned/metrics.json": auroc(0.75, task="faggot") | gain(0.02)},
)
WAITING = Experiment("waiting", False, "queued", params=PARAMS | {"tune.space.width": [64]})


def test_only_numbers_and_parameters_that_differ_are_shown() -> None:
    shown = drawn([MAIN, FAGGOT])
    head = " ".join(shown.splitlines()[:2]).split()
    assert sorted(head) == ["AUROC", "changed", "experiment", "finetuned", "frozen", "gain", "over"]
    assert "apl_aml" not in shown
    assert "task=faggot" in shown
    assert "+0.020" in shown
    assert "+0.01 to +0.03" in shown
    assert "0.65 to 0.80" in shown
    assert "dataset.root" not in shown


def test_a_commit_without_experiments_shows_its_numbers() -> None:
    shown = drawn([MAIN], 120)
    assert all(name in shown for name in ("finetuned", "apl_aml", "apl_healthy", "0.900", "0.800"))
    assert "tuned blast" not in shown


def test_an_experiment_that_waits_has_its_state_and_no_numbers() -> None:
    lines = drawn([MAIN, FAGGOT, WAITING], 100).splitlines()
    (line,) = [line for line in lines if "waiting" in line]
    assert line.split() == ["waiting", "(queued)", "tune.space.width=[64]", "-", "-"]


def test_changes_are_shown_against_the_commit_that_an_experiment_started_from() -> None:
    older = Experiment("older", True, params=PARAMS | {"seed": 2})
    then = Experiment("then", False, params=PARAMS | {"seed": 2, "task": "faggot"})
    lines = drawn([MAIN, FAGGOT, older, then], 100).splitlines()
    (line,) = [line for line in lines if "then" in line]
    assert line.split()[:2] == ["then", "task=faggot"]
    assert "seed" not in "".join(lines)


def test_tuned_heads_are_shown_if_nothing_else_differs() -> None:
    better = Experiment(
        "better", False, params=PARAMS, metrics=dict(MAIN.metrics) | {"tuned/blast/metrics.json": auroc(0.65)}
    )
    shown = drawn([MAIN, better], 100)
    assert "tuned blast" in shown
    assert "0.650" in shown
    assert "apl_aml" not in shown
    assert "tuned blast" not in drawn([MAIN, FAGGOT, better], 100)


def test_it_fits_eighty_columns_with_long_names() -> None:
    many = [
        MAIN,
        *(
            Experiment(
                f"a-rather-long-name-{n}",
                False,
                params=PARAMS | {"tune.space.width": [1, 2, 3], "backbones.mobilenet.options.alpha": n},
                metrics={name: auroc(0.5 + n / 10, task="apl_healthy_smear") for name in MAIN.metrics},
            )
            for n in range(3)
        ),
    ]
    shown = drawn(many)
    assert max(map(len, shown.splitlines())) <= 80
    for n in range(3):
        assert f"-{n}" in shown.replace("\n", "")
        assert f"{0.5 + n / 10:.3f}" in shown


def test_the_workspace_is_a_row_with_advice_if_no_commit_has_its_results() -> None:
    """After the first run nobody has committed, and the commit has no number to compare with."""
    commit = Experiment("main", True, params=PARAMS)
    here = Experiment(WORKSPACE, False, params=PARAMS | {"seed": 7}, metrics=MAIN.metrics)
    (line,) = [line for line in drawn([commit, here, FAGGOT]).splitlines() if WORKSPACE in line]
    assert "seed=7" in line
    first, second = advice([commit, here, FAGGOT])
    assert "`git commit --all" in first
    assert "`git restore params.yaml`" in second
    assert list(advice([MAIN, FAGGOT])) == []
    assert [line[:13] for line in advice([MAIN])] == ["No experiment"]


def test_a_workspace_as_an_experiment_has_left_it_is_no_row_of_its_own() -> None:
    here = Experiment(WORKSPACE, False, params=FAGGOT.params, metrics=FAGGOT.metrics)
    assert WORKSPACE not in drawn([MAIN, here, FAGGOT])
    (line,) = advice([MAIN, here, FAGGOT])
    assert "`git restore params.yaml`" in line
