"""Check params.yaml before any other stage runs, and write the page that `dvc plots show` fills in."""

import os
from pathlib import Path

from aplsmear.files import whole
from aplsmear.params import changes_since, read_params
from aplsmear.runs.git import git
from aplsmear.runs.stage import home, run
from aplsmear.secrets import without_secrets
from aplsmear.workspace.plots_page import plots_page

PARAMS = Path("params.yaml")
SHOWN = 8  # largest number of changes that are printed


def main() -> None:
    read_params(PARAMS)
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
        with whole(Path("prepared") / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run(main)
