"""Are the cells with the most evidence of a patient immature cells, by the labels of experts?

Usage: python benchmarks/evidence.py DIR [--ensemble apl_aml]

DIR is a clone in which `dvc repro ensemble_NAME` has run. Of each held-out patient, the share of each type
among the 10 cells with the most evidence for the positive diagnosis (by models that never saw the patient) is
compared with the share among all cells of the patient. Cells without a type count as cells of another type.
Means over patients; the interval of the difference is a bootstrap over patients.
Results: benchmarks/results/evidence.json.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from record import ROOT, commit, machine

from aplsmear.files import write_json
from aplsmear.tables import read_table

RESULTS = ROOT / "benchmarks" / "results" / "evidence.json"
MOST = 10
TYPES = {
    "promyelocyte": ("Promyelocyte",),
    "promyelocyte or blast": ("Promyelocyte", "Myeloblast"),
    "lymphocyte": ("Lymphocyte",),
}
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--ensemble", default="apl_aml", metavar="NAME")
    asked = parser.parse_args()
    table = pd.read_parquet(asked.folder / "ensembles" / asked.ensemble / "evidence.parquet")
    kinds = read_table(asked.folder / "dataset" / "cells.csv")[["cell", "diagnosis", "cell_type"]]
    table = table.merge(kinds, on="cell").sort_values(f"evidence_{asked.ensemble}", ascending=False)
    rows = [
        {"diagnosis": diagnosis, "type": name, **compared(mine, kind)}
        for diagnosis, mine in table.groupby("diagnosis")
        for name, kind in TYPES.items()
    ]
    write_json(RESULTS, {"rows": rows, "machine": machine(), "commit": commit()}, digits=4)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


def compared(cells: pd.DataFrame, kind: tuple[str, ...]) -> dict[str, float]:
    """The share of some types among the cells with the most evidence, and among all, over patients."""
    is_kind = cells["cell_type"].isin(kind).groupby(cells["patient"])
    among_most = is_kind.apply(lambda mine: mine.head(MOST).mean()).to_numpy()
    among_all = is_kind.mean().to_numpy()
    difference, random = among_most - among_all, np.random.default_rng(1)
    drawn = random.integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.quantile(difference[drawn].mean(axis=1), [0.025, 0.975])
    return {
        "patients": len(difference), "among_most": among_most.mean(), "among_all": among_all.mean(),
        "difference": difference.mean(), "low": low, "high": high,
    }  # fmt: skip


if __name__ == "__main__":
    main()
