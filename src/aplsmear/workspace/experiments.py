"""Experiments in a table that fits a terminal: what each changed, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from rich.table import Table

DEEPENED = "finetuned/metrics.json"
NONE = "-"


@dataclass(frozen=True)
class Experiment:
    """What is known of one experiment, or of the commit that it started from.

    Attributes:
        name: as `dvc exp apply` takes it; that of a commit's branch or tag, or its hash.
        baseline: whether it is a commit, which the experiments behind it started from.
        state: queued, running or failed; empty: done.
        params: dotted name -> value.
        metrics: file -> dotted name -> value; empty where there are none yet.
    """

    name: str
    baseline: bool
    state: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """Texts of one number, a row each."""

    title: str
    cells: Sequence[str]

    @property
    def differs(self) -> bool:
        """Whether the rows that have the number do not all have the same."""
        return len({cell for cell in self.cells if cell != NONE}) > 1


def table(experiments: Sequence[Experiment], tasks: bool = False) -> Table:
    """A row an experiment: name, changed parameters, each AUROC with its 95 % interval below it.

    Args:
        experiments: each commit with its experiments behind it.
        tasks: also show the heads that `tune` chose, where they differ.

    Returns:
        The AUROC of ensembles and of the finetuned model that are not the same everywhere (if all are: all),
        and what finetuning gained over the frozen model.
    """
    found = _columns(experiments)
    heads = [column for column in found if _of_tune(column)]
    others = [column for column in found if column not in heads]
    shown = [column for column in others if column.differs] or others
    differing = [column for column in heads if column.differs]
    names = ", ".join(column.title.removeprefix("tuned ") for column in differing)
    drawn = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        caption_justify="left",
        caption=f"Tasks whose tuned heads differ, too (--tasks): {names}" if names and not tasks else None,
    )
    drawn.add_column("experiment", overflow="fold")
    drawn.add_column("changed", overflow="fold")
    shown += differing if tasks else []
    for column in shown:
        drawn.add_column(column.title, overflow="fold")
    for place, (experiment, what) in enumerate(zip(experiments, changed(experiments), strict=True)):
        name = experiment.name if experiment.baseline else f"  {experiment.name}"
        state = f" ({experiment.state})" if experiment.state else ""
        text = ", ".join(f"{key}={value}" for key, value in what.items())
        drawn.add_row(
            name + state, text, *(column.cells[place] for column in shown), style=_style(experiment)
        )
    return drawn


def changed(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Of each experiment, the parameters that are not as in its commit: dotted name -> value; None: gone."""
    found: list[dict[str, Any]] = []
    base: Mapping[str, Any] = {}
    for experiment in experiments:
        if experiment.baseline:
            base = experiment.params
        names = sorted({*experiment.params, *base}) if experiment.params else []
        now = {name: experiment.params.get(name) for name in names}
        found.append({name: value for name, value in now.items() if value != base.get(name)})
    return found


def _style(experiment: Experiment) -> str:
    return "bold" if experiment.baseline else ""


def _of_tune(column: Column) -> bool:
    return column.title.startswith("tuned ")


def _columns(experiments: Sequence[Experiment]) -> list[Column]:
    files = {file for experiment in experiments for file in experiment.metrics}
    columns = []
    for file in sorted(files, key=lambda file: (file.startswith("tuned/"), file != DEEPENED, file)):
        numbers = [experiment.metrics.get(file, {}) for experiment in experiments]
        if any("auroc.value" in each for each in numbers):
            folder = PurePosixPath(file).parent
            title = f"tuned {folder.name}" if folder.parts[0] == "tuned" else folder.name
            columns.append(Column(f"{title}\nAUROC", [_number(each, "auroc", "") for each in numbers]))
        if any("difference.value" in each for each in numbers):
            columns.append(
                Column("gain over\nfrozen", [_number(each, "difference", "+") for each in numbers])
            )
    return columns


def _number(numbers: Mapping[str, Any], name: str, sign: str) -> str:
    """The task, if there is one, the number, and its interval in a line below."""
    if f"{name}.value" not in numbers:
        return NONE
    value, low, high = (format(numbers[f"{name}.{part}"], f"{sign}.3f") for part in ("value", "low", "high"))
    task = f"{numbers['task']}\n" if "task" in numbers and name == "auroc" else ""
    return f"{task}{value}\n{low} to {high}"
