"""Print the result of `make demo`, and where to look next."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENSEMBLES = {"apl_healthy": "APL or healthy?", "apl_aml": "APL or other AML?"}
ANSWER = "answer/intervals.json"

NEXT = """\
Where to look next
  answer/report.html                      healthy, other AML or APL: open it in a browser
  ensembles/apl_healthy/report.html       APL or healthy, with the members and the cells; so for each ensemble
  answer/predictions.csv                  the three probabilities of each patient, which add to 1
  source .venv/bin/activate               then you can type these commands:
  aplsmear predict --data DIR --out new.csv
                                          the same for new patients
  dvc metrics show                        all metrics of all tasks and ensembles
  dvc plots show                          ROC, precision-recall and calibration curves, as a page
  mlflow ui --backend-store-uri sqlite:///mlflow.db
                                          all runs and all trials of the tuning
"""


def summary(question: str, metrics: dict[str, Any]) -> str:
    """The metrics of `ensembles/<name>/intervals.json` as text.

    `auroc`, `sensitivity` and `specificity` are dicts with `value` and its 95 % interval, `low` and `high`;
    `n_patients` is a count. Raises KeyError if one of them is missing.
    """
    return _text(
        f"{question} {metrics['n_patients']} patients, each judged by models that had never seen them",
        {
            "AUROC": metrics["auroc"],
            "sensitivity at the operating point": metrics["sensitivity"],
            "specificity at the operating point": metrics["specificity"],
        },
    )


def answer_summary(metrics: dict[str, Any]) -> str:
    """The metrics of `answer/intervals.json` as text. Raises KeyError if one of them is missing."""
    return _text(
        f"Healthy, other AML or APL? {metrics['n_patients']} patients, one answer of three ensembles",
        {
            "accuracy of the most probable one": metrics["accuracy"],
            "APL or not: AUROC": metrics["of"]["apl"]["auroc"],
            "unsure": metrics["unsure"],
            **(
                {"accuracy where it is not unsure": metrics["accuracy_of_calls"]}
                if "accuracy_of_calls" in metrics
                else {}
            ),
        },
    )


def _text(title: str, rows: dict[str, dict[str, float]]) -> str:
    lines = [
        title,
        *(
            f"  {name:<36}{row['value']:.3f}   95 % interval {row['low']:.3f} to {row['high']:.3f}"
            for name, row in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the summary of the last run; return 1 if there is none."""
    paths = [f"ensembles/{name}/intervals.json" for name in ENSEMBLES]
    if absent := [path for path in [*paths, ANSWER] if not (ROOT / path).exists()]:
        sys.stderr.write(f"{absent[0]} is not there: run `make demo` to its end first.\n")
        return 1
    *each, answer = (json.loads((ROOT / path).read_text(encoding="utf-8")) for path in [*paths, ANSWER])
    texts = [summary(question, found) for question, found in zip(ENSEMBLES.values(), each, strict=True)]
    sys.stdout.write("\n" + "\n".join([*texts, answer_summary(answer), NEXT]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
