"""Judge a finished ensemble on a labelled cohort that took no part in training.

Usage: python stages/evaluate.py COHORT   (a name of `external` in params.yaml)
"""

import os
from pathlib import Path

from aplsmear.compute.engine import engine_of
from aplsmear.data.pseudonyms import Pseudonyms, read_key
from aplsmear.ensembles.bundle import read_bundle
from aplsmear.params import named, read_params
from aplsmear.prediction.cohort import evaluate, write_evaluation
from aplsmear.runs.stage import home, run


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    cohort = named(params.external, name, "external")
    bundle, root = read_bundle(Path(f"ensembles/{cohort.ensemble}/model")), Path(cohort.root)
    names = Pseudonyms(read_key(os.environ, home())) if params.dataset.pseudonymise else None
    training = Path(params.dataset.root)
    with engine_of(params, [root, training, bundle.folder], networks=True) as engine:
        found = evaluate(bundle, root, params.combine.resamples, params.seed, engine, names, training)
    write_evaluation(Path(f"evaluated/{name}"), found)


if __name__ == "__main__":
    run(main)
