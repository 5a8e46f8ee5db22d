"""Combine the members of one ensemble into a calibrated probability and a verdict per patient.

Usage: python stages/ensemble.py ENSEMBLE   (a name of `ensembles` in params.yaml)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aplsmear.ensembles.bundle import MANIFEST
from aplsmear.ensembles.run import judge_and_compare, read_inputs, write_model, write_results
from aplsmear.params import flat, read_params
from aplsmear.reports import pages
from aplsmear.reports.ensemble import model_card, page, read_pictures
from aplsmear.runs.checksums import md5
from aplsmear.runs.stage import home, origin, run
from aplsmear.runs.tracking import Tracker


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    inputs = read_inputs(name, params.ensembles, params.tasks, params.backbones)
    results = judge_and_compare(inputs, params.combine, params.seed)
    pictures = read_pictures(results, Path("augmented/cell/views.parquet"))

    out = Path(f"ensembles/{name}")
    write_results(out, results)
    write_model(out / "model", results, params.backbones, params.augment, params.dataset.min_box, params.seed)
    pages.write(out / "report.html", page(results, pictures))
    pages.write(out / "model_card.md", model_card(results))
    log(name, out, params.combine.model_dump() | {"seed": params.seed})


def log(name: str, out: Path, settings: Mapping[str, Any]) -> None:
    """Log the numbers, the report and the bundle in MLflow; the same bundle is the same run."""
    key = f"{name}-{md5(out / 'model' / MANIFEST)}"
    tracker = Tracker(home(), f"ensemble {name}", key, origin("ensemble", name), dict(flat(settings)))
    tracker.log_ensemble(out / "model", out / "report.html")
    numbers = dict(flat(json.loads((out / "metrics.json").read_text(encoding="utf-8"))))
    tracker.close({}, {key: value for key, value in numbers.items() if isinstance(value, int | float)})


if __name__ == "__main__":
    run(main)
