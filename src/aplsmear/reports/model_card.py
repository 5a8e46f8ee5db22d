"""What an ensemble is for, how good it is and where it ends, on a page of text that travels with it.

The headings follow Mitchell et al., Model Cards for Model Reporting, FAT* 2019, doi:10.1145/3287560.3287596.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import aplsmear
from aplsmear.files import whole
from aplsmear.reports.ensemble import Findings, calls, limits, measures


def model_card(found: Findings) -> str:
    """The card in Markdown: numbers of the cohort alone, no patient's name; equal findings, equal text."""
    table = found.verdicts.table
    counts = [int((table["label"] == label).sum()) for label in (1, 0)]
    last, combination = found.verdicts.combinations[-1], found.verdicts.chosen[-1]
    named = {"balanced": "both errors weigh the same", "sensitive": f"no {found.positive} is to be missed"}
    points = {point: calls(found, point) for point in named}
    baselines = found.comparison.iloc[1:]
    best = baselines.nlargest(1, "auroc").iloc[0] if len(baselines) else None
    parts = [
        f"# {found.name}: {found.positive} or {found.negative}?",
        "**For research only. Not a medical device; no diagnosis may rest on it.**",
        "## Use",
        "Judges a patient by smears and the cells cut out of them: a calibrated probability of "
        f"{found.positive}, given that it is {found.positive} or {found.negative}. Meant for reproducing, "
        "comparing and retrospective studies. Not meant for care, for other questions, or for anybody who "
        "may have neither.",
        f"`aplsmear predict --ensemble ensembles/{found.name} --data DIR --out predictions.csv`",
        "## Cohort",
        f"{len(table)} patients, {counts[0]} {found.positive} and {counts[1]} {found.negative}, in "
        f"{table['fold'].nunique()} folds stratified by diagnosis.",
        "## How it was validated",
        "Nested cross-validation by patient: each patient was judged by members, a combination, a "
        "calibration and operating points that were fitted and chosen without the patients of the same "
        "fold. Not validated on another hospital's patients.",
        "## Numbers",
        "On held-out patients, with 95 % intervals over patients.",
        _table(
            ("measure", "value", "95 % interval"),
            [(title, *_measured(value)) for title, _, value in measures(found)],
        ),
    ]
    if best is not None:
        parts.append(
            f"The best baseline, {best['against']}: AUROC {best['auroc']:.3f}; the ensemble minus that "
            f"{best['difference']:+.3f} ({best['difference_low']:+.3f} to {best['difference_high']:+.3f})."
        )
    parts += [
        "## Operating points",
        "For new patients; a probability at the threshold or above is a call.",
        _table(
            ("point", "meaning", "threshold", "held-out sensitivity", "held-out specificity"),
            [
                (
                    point,
                    meaning,
                    f"{last.thresholds[point]:.3f}",
                    *(
                        " (".join(_measured(points[point][key])) + ")"
                        for key in ("sensitivity", "specificity")
                    ),
                )
                for point, meaning in named.items()
            ],
        ),
        "## What it is made of",
        f"Members: {', '.join(f'`{member}`' for member in last.members)}. For new patients: "
        f"{combination.model} on the summary `{combination.summary}` of each member's scores of a patient, "
        "then Platt's calibration.",
        "## Limits",
        "\n".join(f"- {text}" for text in limits(found)),
        "## Versions",
        f"aplsmear {aplsmear.__version__}, seed {found.settings['seed']}. `git log -S MD5 -- dvc.lock` "
        "finds the commit with the code, parameters and data:",
        _table(("input", "md5"), [(name, f"`{digest}`") for name, digest in sorted(found.inputs.items())]),
    ]
    return "\n\n".join(parts) + "\n"


def write_model_card(path: Path, found: Findings) -> None:
    """Write `model_card`."""
    with whole(path) as part:
        part.write_text(model_card(found), encoding="utf-8")


def _measured(value: Mapping[str, float]) -> tuple[str, str]:
    return f"{value['value']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
