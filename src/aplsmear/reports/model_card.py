"""What an ensemble is for, how good it is and where its limits are, in a text beside its model."""

from __future__ import annotations

from pathlib import Path

from aplsmear.reports import pages
from aplsmear.reports.ensemble import Findings, content


def model_card(found: Findings) -> str:
    """The card in Markdown: numbers of the cohort, no patient's name. Equal findings give equal text."""
    shown = content(found)
    thresholds = found.verdicts.combinations[-1].thresholds
    return pages.render(
        "reports/templates/model_card.md.j2", **shown, thresholds=thresholds, seed=found.settings["seed"]
    )


def write_model_card(path: Path, found: Findings) -> None:
    """Write `model_card`."""
    pages.write(path, model_card(found))
