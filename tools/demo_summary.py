"""Print the result of `make demo`, and where to look next."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METRICS = ROOT / "ensembles" / "apl_healthy" / "intervals.json"

NEXT = """\
Where to look next
  ensembles/apl_healthy/report.html       all results on one page: open it in a browser
  ensembles/apl_healthy/predictions.csv   the calibrated probability of APL of each patient
  source .venv/bin/activate               then you can type these commands:
  dvc metrics show                        all metrics of all tasks and ensembles
  dvc plots show                          ROC, precision-recall and calibration curves, as a page
  mlflow ui --backend-store-uri sqlite:///mlflow.db
                                          all runs and all trials of the tuning
"""


def summary(metrics: dict[str, Any]) -> str:
    """The metrics of `ensembles/<name>/intervals.json` as text.

    `auroc`, `sensitivity` and `specificity` are dicts with `value` and its 95 % interval, `low` and `high`;
    `n_patients` is a count. Raises KeyError if one of them is missing.
    """
    rows = {
        "AUROC": metrics["auroc"],
        "sensitivity at the operating point": metrics["sensitivity"],
        "specificity at the operating point": metrics["specificity"],
    }
    lines = [
        f"APL or healthy? {metrics['n_patients']} patients, each judged by models that had never seen them",
        *(
            f"  {name:<36}{row['value']:.3f}   95 % interval {row['low']:.3f} to {row['high']:.3f}"
            for name, row in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the summary of the last run; return 1 if there is none."""
    if not METRICS.exists():
        sys.stderr.write(f"{METRICS.relative_to(ROOT)} is not there: run `make demo` to its end first.\n")
        return 1
    sys.stdout.write("\n" + summary(json.loads(METRICS.read_text(encoding="utf-8"))) + "\n" + NEXT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
