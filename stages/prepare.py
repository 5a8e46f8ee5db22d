"""Check params.yaml before any other stage runs, and write two kinds of files for pages.

`dvc plots show` fills in the first. The report of an ensemble shows the second: its cohorts of `external`.
"""

import os
from pathlib import Path

from aplsmear.params import changes_since, read_params
from aplsmear.reports import pages
from aplsmear.runs.git import git
from aplsmear.runs.stage import home, run
from aplsmear.secrets import without_secrets
from aplsmear.workspace.plots_page import plots_page

PARAMS = Path("params.yaml")
SHOWN = 8  # largest number of changes that are printed


def main() -> None:
    params = read_params(PARAMS)
    base = os.environ.get("DVC_EXP_BASELINE_REV", "HEAD")
    committed = git(Path(), "show", f"{base}:./{PARAMS}", fails=128)  # 128: no git, or no such file
    changed = changes_since(committed, PARAMS) if committed else {}
    if changed:
        shown = ", ".join(f"{key}={value}" for key, value in list(changed.items())[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        print(f"Changed in params.yaml since the last commit: {without_secrets(shown)}{more}.")
        if home() == Path():  # not in the folder of its own of `dvc exp run --temp`
            print("The next experiment has these changes, too. `git restore params.yaml` takes them back.")
    # The first file is always the same, so no later stage becomes stale.
    for name, text in (("params.txt", "params.yaml is valid\n"), ("plots.html", plots_page())):
        pages.write(Path("prepared") / name, text)
    for ensemble in params.ensembles:
        cohorts = [name for name, row in params.external.items() if row.ensemble == ensemble]
        page = pages.render("reports/templates/cohorts.svg.j2", cohorts=cohorts)
        pages.write(Path(f"prepared/cohorts/{ensemble}.svg"), page)


if __name__ == "__main__":
    run(main)
