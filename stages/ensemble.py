"""Combine the members of one ensemble into a calibrated probability and a verdict per patient.

Usage: python stages/ensemble.py ENSEMBLE   (a name of `ensembles` in params.yaml)
"""

from pathlib import Path

from aplsmear.ensembles.run import judge_and_compare, read_inputs, write_model, write_results
from aplsmear.params import read_params
from aplsmear.reports import pages
from aplsmear.reports.ensemble import model_card, page, with_pictures
from aplsmear.runs.stage import run


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    inputs = read_inputs(name, params.ensembles, params.tasks, params.backbones)
    results = judge_and_compare(inputs, params.combine, params.seed)
    findings = with_pictures(results, Path("augmented/cell/views.parquet"))

    out = Path(f"ensembles/{name}")
    write_results(out, results)
    write_model(out / "model", results, params.backbones, params.augment, params.dataset.min_box, params.seed)
    pages.write(out / "report.html", page(findings))
    pages.write(out / "model_card.md", model_card(findings))


if __name__ == "__main__":
    run(main)
