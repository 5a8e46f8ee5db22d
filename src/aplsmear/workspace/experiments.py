"""Experiments in a table that fits a terminal: what each changed, and its AUROC with 95 % interval.

`dvc exp show` has the same numbers in columns named after file and metric, of which 100 characters hold one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from rich.table import Table

from aplsmear.params import changes

# Numbers with an interval: their key in metrics.json, title, and formats of the number and of its limits.
_SHOWN = {"auroc": ("{}\nAUROC", ".3f", ".2f"), "difference": ("gain over\nfrozen", "+.3f", "+.2f")}


WORKSPACE = "workspace"  # DVC's name for the files as they are now


@dataclass(frozen=True)
class Experiment:
    """An experiment, the commit that it started from, or the workspace."""

    name: str  # as `dvc exp apply` takes it; of a commit its branch or tag, or else its hash
    is_commit: bool  # the experiments behind it started from it
    state: str = ""  # queued, running or failed; empty: done
    params: Mapping[str, Any] = field(default_factory=dict)  # dotted name -> value
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # file -> dotted name -> value


def table(experiments: Sequence[Experiment]) -> Table:
    """A table with a row for each experiment: its name, what it changed, and its AUROC with interval.

    Each commit is followed by its experiments. The workspace is left out if it is as an experiment has left
    it. The columns are of the finetuned model and the ensembles, those that differ between experiments. If
    none does: those of tuned heads that differ. If none of these does either: all of the first.
    """
    experiments = [each for each in experiments if not _is_another(each, experiments)]
    cells = [_cells(experiment.metrics) for experiment in experiments]
    titles = list(dict.fromkeys(title for row in cells for title in row))
    differ = [title for title in titles if len({row[title] for row in cells if title in row}) > 1]
    first = [title for title in titles if not title.startswith("tuned ")]
    shown = [title for title in differ if title in first] or differ or first
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("experiment", "changed", *shown):
        drawn.add_column(title, overflow="fold", no_wrap=title == "experiment")
    base: Mapping[str, Any] = {}
    for experiment, row in zip(experiments, cells, strict=True):
        base = experiment.params if experiment.is_commit else base
        name = experiment.name if experiment.is_commit else f"  {experiment.name}"
        state = f" ({experiment.state})" if experiment.state else ""
        changed = ", ".join(f"{key}={value}" for key, value in changes(base, experiment.params).items())
        style = "bold" if experiment.is_commit else ""
        drawn.add_row(name + state, changed, *(row.get(title, "-") for title in shown), style=style)
    return drawn


def _is_another(here: Experiment, experiments: Sequence[Experiment]) -> bool:
    """Whether the workspace is as an experiment has left it."""
    return here.name == WORKSPACE and any(
        each is not here and (each.params, each.metrics) == (here.params, here.metrics)
        for each in experiments
    )


def advice(experiments: Sequence[Experiment]) -> Iterator[str]:
    """What to do about the rows of `table`, if something is to be done."""
    commit, *others = experiments
    here = next((each for each in others if each.name == WORKSPACE), None)
    if here and here.metrics != commit.metrics and not _is_another(here, others):
        yield (
            f"The workspace has results that {commit.name} lacks: `git commit --all --message 'Results'` "
            "keeps them, and experiments are then compared with them."
        )
    if here and changes(commit.params, here.params):
        yield (
            "params.yaml differs from the commit, and so will the next experiment: "
            "`git restore params.yaml` takes this back."
        )
    if all(each.is_commit for each in others if each is not here):
        yield "No experiment on this commit yet: `dvc exp run -S KEY=VALUE --name NAME` makes one."


def _cells(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Title -> the task if it can change, the number, and its interval in a line below."""
    found = {}
    for file in sorted(metrics, key=lambda file: (not file.startswith("finetuned"), file)):
        numbers, folder = metrics[file], PurePosixPath(file).parent
        for key, (title, form, short) in _SHOWN.items():
            if f"{key}.value" in numbers:
                value = format(numbers[f"{key}.value"], form)
                low, high = (format(numbers[f"{key}.{part}"], short) for part in ("low", "high"))
                task = f"{numbers['task']}\n" if "task" in numbers and key == "auroc" else ""
                name = f"tuned {folder.name}" if folder.parts[0] == "tuned" else folder.name
                found[title.format(name)] = f"{task}{value}\n{low} to {high}"
    return found
