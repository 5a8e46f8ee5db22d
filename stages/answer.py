"""Combine the ensembles to one answer: probabilities of healthy, other AML and APL that add to 1.

Usage: python stages/answer.py
"""

from pathlib import Path

from aplsmear.answer.coupling import FILE, judge_all, write_answers
from aplsmear.answer.report import results_of, write_results
from aplsmear.params import read_params
from aplsmear.runs.stage import run
from aplsmear.tables import read_table


def main() -> None:
    params = read_params(Path("params.yaml"))
    pairs = {name: (each.positive, each.negative) for name, each in params.ensembles.items()}
    tables = {name: read_table(Path(f"ensembles/{name}/logits.csv")) for name in pairs}
    judged = judge_all(tables, pairs)
    patients, sure = next(iter(tables.values())), params.answer.sure

    out = Path("answer")
    write_results(out, results_of(patients, judged, pairs, sure, params.combine.resamples, params.seed))
    manifests = {name: Path(f"ensembles/{name}/model/manifest.json") for name in pairs}
    write_answers(out / FILE, judged, pairs, manifests, patients["diagnosis"].tolist(), sure)


if __name__ == "__main__":
    run(main)
