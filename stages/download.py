"""Check the whole data set and write its tables of smears and cells; images are not copied."""

import os
from pathlib import Path

from aplsmear.compute.engine import engine_of
from aplsmear.data.dataset import DataSetError, print_problems, read_data_set
from aplsmear.data.pseudonyms import Pseudonyms, read_key
from aplsmear.data.tasks import levels_of
from aplsmear.files import write_json
from aplsmear.params import read_params
from aplsmear.runs.stage import home, run
from aplsmear.tables import write_table

OUT = Path("dataset")


def main() -> int:
    params = read_params(Path("params.yaml"))
    root = Path(params.dataset.root)
    pseudonyms = Pseudonyms(read_key(os.environ, home())) if params.dataset.pseudonymise else None
    try:
        with engine_of(params, [root]) as engine:
            found = read_data_set(
                root,
                params.tasks,
                min_box=params.dataset.min_box,
                skip_bad_images=params.dataset.skip_bad_images,
                engine=engine,
                pseudonyms=pseudonyms,
            )
    except DataSetError as error:
        print_problems(error.problems)
        return 1
    write_table(OUT / "smears.csv", found.smears)
    write_table(OUT / "cells.csv", found.cells)
    write_table(OUT / "levels.csv", levels_of(params.tasks))
    write_json(OUT / "report.json", found.report)
    for remark in found.report["remarks"]:
        print(remark)
    print("{smears} smears of {patients} patients, {cells} cells".format(**found.report))
    return 0


if __name__ == "__main__":
    run(main)
