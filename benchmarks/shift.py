"""How much accuracy is lost in another laboratory: held-out patients with changed stain, light and camera.

Usage: python benchmarks/shift.py [--workspace DIR] [--ensemble NAME] [--cells N]
           [--parts NAME ...] [--measures [NAME ...]] [--donors DIR]

DIR is a folder in which the ensemble has been made (default: this repository, after `make demo`). The smears
of each patient are changed as another laboratory would show them (laboratories.py). Their cells are cut out,
pass through the networks, and get scores from the heads and the combination that never saw the patient. They
are compared with the same cells without changes. Where a cohort adapts (`aplsmear.prediction.recalibration`),
it is the patients of one fold in one laboratory, without labels.

The part `components` shows which properties of strong laboratories cost most. The parts `colours_moved` and
`colours_changed` measure what is not built in: tables of 256 values change the colours of the cells of a
cohort, without labels (`RETOUCHES`). By some, scores of the cells as they are and with changed colours are
averaged. The part `donors` counts how many healthy donors are called positive with and without them. It needs
--donors: a folder with a folder of pictures for each kind of cell.

With --measures, changes of training are compared, too, with heads of their own: the pipeline's stages train
them in DIR/.shift on the same cells (at most N of a patient, drawn by a hash). Features are kept there, so
that an interrupted run continues. Results: benchmarks/results/shift.json.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import laboratories
import numpy as np
import pandas as pd
import yaml
from laboratories import KINDS, REAL, STRENGTHS, Colours, colours_of, draw_laboratory, recoloured, shifted
from record import commit, machine

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.data.tasks import task_items
from aplsmear.ensembles.combination import Verdicts, draw_candidates, judge, patients_of
from aplsmear.ensembles.familiarity import Cloud, Moments, make_cloud, stain_of
from aplsmear.ensembles.pooling import SUMMARIES, summarise_patients
from aplsmear.evaluation.calibration import calibration_slope_intercept
from aplsmear.features.forward import FeatureRequest, batch_of, features_of
from aplsmear.files import write_arrays, write_json
from aplsmear.heads.bags import attend
from aplsmear.heads.head import Head, read_average, read_heads, score
from aplsmear.images import views
from aplsmear.images.augmentation import Pyramid, source_factor
from aplsmear.images.reading import decode, read_image
from aplsmear.images.view_store import View
from aplsmear.images.views import cell_views, smear_views
from aplsmear.params import LEVELS, Combine, Level, Params, named, read_params
from aplsmear.prediction.recalibration import adapted
from aplsmear.progress import progress
from aplsmear.tables import read_table, write_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "shift.json"
LABORATORIES = 3
MORE = 12  # laboratories of each strength, of which the first three are those above
DRAWS = 1000  # of patients, for intervals
DIVISIONS = 30  # of the cells of donors
LOTS = 10  # of each division
TRIALS = 2  # of each task, when changes of training are compared
RIM = 16  # px around what is cut out of a smear: more than the radius of any blur
JPEG_BLOCK = 16  # px
SOURCES = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (laboratories, views)]
COLOUR = {"hue": 0, "saturation": 0, "brightness": 0.0, "blur": 0.0, "noise": 0.0}

MARGINS = (-0.2, 0.2)  # of the cells; 0.2 more shows the rims of neighbours on the pages of DeepAPL

IMMATURE = "myeloblast|promyelocyte|myelocyte|promonocyte"


def _few_immature(cells: pd.DataFrame) -> pd.Series:
    immature = cells["cell_type"].str.contains(IMMATURE, case=False)
    return ~immature | (cells["rank"].map(lambda text: int(text[-1], 16)) % 4 == 0)


# Cells that another laboratory might have taken, of those that are measured.
SELECTIONS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "half_of_the_cells": lambda cells: cells["rank"].map(lambda text: int(text[-1], 16)) % 2 == 0,
    "other_half_of_the_cells": lambda cells: cells["rank"].map(lambda text: int(text[-1], 16)) % 2 == 1,
    "a_quarter_of_the_immature_cells": _few_immature,
    "immature_cells_alone": lambda cells: cells["cell_type"].str.contains(IMMATURE, case=False),
}

PARTS = ("medium", "mild", "strong", "margins", "selections", "alone", "real_colours")  # by default
EXTRA_PARTS = ("more_laboratories", "components", "colours_changed", "colours_moved", "donors")

# Properties that strong laboratories change, some at a time, and the laboratories.
HARD = (6, 8, 9, 11)
COMPONENTS: dict[str, tuple[tuple[str, ...], Sequence[int]]] = {
    "all": (KINDS, range(MORE)),
    "colour": (("stain", "white_balance", "gamma"), range(MORE)),
    "focus_pixels_jpeg": (("blur", "resolution", "jpeg"), range(MORE)),
    "all_hard": (KINDS, HARD),
    **{f"{kind}_hard": ((kind,), HARD) for kind in KINDS},
}

# Changes of training: settings of `augment`, and of `tune`.
MEASURES: dict[str, dict[str, Any]] = {
    "no_augmentation_of_colour": COLOUR,
    "augmentation_as_shipped": {},
    "one_view": {"views": 1},
    "two_views": {"views": 2},
    "two_wider_views": {
        "views": 2,
        "hue": 12,
        "saturation": 30,
        "brightness": 0.2,
        "blur": 1.5,
    },
    "averaging_a_view_more": {"tune": {"average": 1}},
}


@dataclass(frozen=True)
class Condition:
    """Strength of the change, number of the laboratory, and the properties of images that it changes.

    With `colours`, cells also get the colours of this real laboratory, a name of `laboratories.REAL`.
    """

    strength: str
    laboratory: int
    kinds: tuple[str, ...] = KINDS
    colours: str = ""
    home: Colours | None = None  # colours of the cells as they are


@dataclass(frozen=True)
class Bench:
    """A finished workspace: its fitted models, and the items that are measured."""

    params: Params
    items: Mapping[Level, pd.DataFrame]  # with `item`, `patient`, `fold`
    patients: pd.DataFrame
    heads: Mapping[str, list[Head]]  # of each outer fold, by task
    averages: Mapping[str, int]  # augmented views that are averaged with the plain one, by task
    members: Sequence[str]
    weigh_by: str
    verdicts: Verdicts
    chosen: Verdicts  # with one summary, chosen among all except `blend`
    pictures: Mapping[str, Path]  # of each smear
    kept: Path  # folder for features
    typical: tuple[Level, str]  # level and name of the features that measure how unfamiliar a patient is


Features = Mapping[str, list[np.ndarray]]  # of each view of all items, by level and layer
Tables = Mapping[Level, Mapping[int, np.ndarray]]  # of colours, by level and fold
DENSITY = np.repeat(-np.log10((np.arange(256)[:, None] + 1) / 256), 3, axis=1)  # optical density of bytes
BACKGROUND = 95  # percent of the pixels of a view are darker


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, default=ROOT)
    parser.add_argument("--ensemble", default="", help="default: apl_aml, or the only one that was made")
    parser.add_argument("--cells", type=int, default=30, help="of a patient, at most")
    parser.add_argument(
        "--measures",
        nargs="*",
        metavar="NAME",
        choices=[*MEASURES],
        help=f"also train with these changes, one after another (default: all): {', '.join(MEASURES)}",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        metavar="NAME",
        choices=[*PARTS, *EXTRA_PARTS],
        help=f"measure these alone and keep the other results: {', '.join([*PARTS, *EXTRA_PARTS])}",
    )
    parser.add_argument("--donors", type=Path, metavar="DIR", help="pictures of cells of healthy donors")
    asked = parser.parse_args()
    if "donors" in (asked.parts or []) and asked.donors is None:
        parser.error("the part donors needs --donors")
    donors = asked.donors and asked.donors.resolve()
    os.chdir(asked.workspace)
    start_tensorflow()
    bench = open_bench(Path(), asked.ensemble, asked.cells, Path(".shift"))
    section = "demo" if Path().resolve() == ROOT else "real"
    found: dict[str, Any] = recorded().get(section, {}) if asked.parts else {}
    found |= {
        "patients": len(bench.patients),
        "cells_per_patient": asked.cells,
        "laboratories": LABORATORIES,
        "machine": machine(),
    }
    for part in asked.parts or PARTS:
        found[part] = measure(bench, part, donors)
        found.setdefault("commits", {})[part] = commit()
        record(section, found)
    for name in [] if asked.measures is None else asked.measures or MEASURES:
        other = variant(bench, asked.ensemble, asked.cells, name, MEASURES[name])
        found.setdefault("measures", {})[name] = held(
            other, [Condition("medium", number) for number in range(LABORATORIES)]
        )
        record(section, found)
    print(json.dumps(found, indent=2))


def measure(bench: Bench, part: str, donors: Path) -> dict[str, Any]:
    """The `losses` of one of `PARTS`, or the result of one of `EXTRA_PARTS`."""
    if part in STRENGTHS:
        return held(bench, [Condition(part, number) for number in range(LABORATORIES)])
    if part == "margins":
        others = {str(margin): with_margin(bench, margin) for margin in MARGINS}
        return {name: losses(bench, [(each, scored_features(each, None))]) for name, each in others.items()}
    if part == "selections":
        home = scored_features(bench, None)
        return {name: losses(bench, [selected(bench, home, wanted)]) for name, wanted in SELECTIONS.items()}
    made = {
        "real_colours": with_real_colours,
        "more_laboratories": more_laboratories,
        "components": components,
        "colours_changed": colours_changed,
        "colours_moved": colours_moved,
    }
    if part in made:
        return made[part](bench)
    if part == "donors":
        return called_positive(bench, donors)
    return {kind: held(bench, [Condition("medium", 0, (kind,))]) for kind in KINDS}


def with_real_colours(bench: Bench) -> dict[str, Any]:
    """`losses` with the colours of each real laboratory."""
    return {name: held(bench, [condition]) for name, condition in real_colours(bench).items()}


def real_colours(bench: Bench) -> dict[str, Condition]:
    """A laboratory with the colours of each real one."""
    home = home_colours(bench)
    return {name: Condition("medium", 0, ("blur", "resolution", "jpeg"), name, home) for name in REAL}


def more_laboratories(bench: Bench) -> dict[str, Any]:
    """`compared`: the cells at home, not adapted; the same cells in the laboratories of a strength."""
    home = judged(bench, scored_features(bench, None), adapt=False)
    found = {}
    for strength in ("medium", "strong"):
        away = [judged(bench, scored_features(bench, Condition(strength, n))) for n in range(MORE)]
        parts = {"the_first": away[:LABORATORIES], "the_others": away[LABORATORIES:], "all": away}
        found[strength] = {
            name: compared(bench, [(home, each) for each in part]) for name, part in parts.items()
        }
    return found


def components(bench: Bench) -> dict[str, Any]:
    """`compared`: the cells at home, not adapted; the same with `COMPONENTS` of strong laboratories."""
    label = bench.patients["label"].to_numpy()
    home = judged(bench, scored_features(bench, None), adapt=False)
    found = {}
    for name, (kinds, numbers) in COMPONENTS.items():
        away = [judged(bench, scored_features(bench, Condition("strong", n, kinds))) for n in numbers]
        each = {str(n): headline(label, one)["auroc"] for n, one in zip(numbers, away, strict=True)}
        found[name] = compared(bench, [(home, one) for one in away]) | {"auroc_of_each": each}
    return found


def colours_changed(bench: Bench) -> dict[str, Any]:
    """`compared`: adapted cohorts of strong laboratories as they are; with `RETOUCHES` that are not built in.

    They were looked at on the first six, `white_point` on the first three alone. The better one was then
    judged once on the next six.
    """
    strong: list[Condition | None] = [Condition("strong", n) for n in range(MORE)]
    groups = {
        "white_point": {"strong": strong[:LABORATORIES]},
        "lighter_and_darker": {"home": [None], "strong": strong[:6], "fresh_strong": strong[6:]},
    }
    return {
        how: {
            name: compared(bench, [retouched(bench, one, how) for one in conditions])
            for name, conditions in group.items()
        }
        for how, group in groups.items()
    }


def colours_moved(bench: Bench) -> dict[str, Any]:
    """`compared`: adapted cohorts as they are; the same with the scores of moved colours averaged in.

    The form was chosen on the first three laboratories. The next three were not looked at before.
    """
    numbers = {"": range(LABORATORIES), "fresh_": range(LABORATORIES, 2 * LABORATORIES)}
    groups: dict[str, list[Condition | None]] = {
        f"{new}{strength}": [Condition(strength, n) for n in laboratories]
        for new, laboratories in numbers.items()
        for strength in ("medium", "strong")
    }
    groups |= {name: [condition] for name, condition in real_colours(bench).items()} | {"home": [None]}
    found = {
        name: [retouched(bench, one, "moved") for one in conditions] for name, conditions in groups.items()
    }
    for new in numbers:
        found[f"{new}medium_and_strong"] = found[f"{new}medium"] + found[f"{new}strong"]
    return {name: compared(bench, pairs) for name, pairs in found.items()}


def retouched(bench: Bench, condition: Condition | None, how: str) -> tuple[np.ndarray, np.ndarray]:
    """`judged` of adapted cohorts as they are, and with their colours changed by one of `RETOUCHES`."""
    features = scored_features(bench, condition)
    tables = tables_to(bench, stains_of(bench, None), stains_of(bench, condition), how)
    shown = [scored_features(bench, condition, each) for each in tables]
    return judged(bench, features), judged(bench, averaged(shown))


def called_positive(bench: Bench, folder: Path) -> dict[str, Any]:
    """How many lots of cells of healthy donors the final models call positive, at both operating points.

    Cells are whole pictures, or their middle 70 %. They are divided by kind, and at random (means of
    `DIVISIONS` divisions).
    """
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    divisions = [[path.parent.name for path in files]]
    for number in range(DIVISIONS):
        random = np.random.Generator(np.random.Philox(number))
        divisions.append([f"lot {lot}" for lot in random.permutation(len(files)) % LOTS])
    home = stains_of(bench, None)["cell"].mean(0)
    found: dict[str, Any] = {}
    for name, margin in (("whole", 0.0), ("middle_70_percent", -0.3)):
        donors = with_margin(of_pictures(bench, files), margin)
        fold = int(donors.items["cell"]["fold"].iloc[0])
        here = stains_of(donors, None)["cell"].mean(0)
        arms = {"as_they_are": scored_features(donors, None)}
        for how, tables in RETOUCHES.items():
            one = [as_tables({("cell", fold): table}) for table in tables(here, home)]
            arms[how] = averaged([scored_features(donors, None, each) for each in one])
        for arm, shown in arms.items():
            for adapt in (False, True):
                counts = []
                for owner in divisions:
                    patients = pd.DataFrame({"patient": sorted(set(owner)), "fold": fold, "label": 0})
                    items = {"cell": donors.items["cell"].assign(patient=owner)}
                    lots = replace(donors, items=items, patients=patients)
                    _, call, alarm = judged(lots, shown, adapt)
                    counts.append([call.sum(), alarm.sum()])
                by_kind, at_random = np.array(counts[0]), np.mean(counts[1:], axis=0)
                found[f"{name}, {arm}{', adapted' if adapt else ''}"] = {
                    "kinds_called_at_balanced_and_sensitive_point": by_kind.tolist(),
                    "lots_called_at_balanced_and_sensitive_point": at_random.tolist(),
                }
    return found


def of_pictures(bench: Bench, files: Sequence[Path]) -> Bench:
    """The final models, and cells with a picture each, without diagnoses."""
    names = [path.stem for path in files]
    cells = pd.DataFrame({"item": names, "cell": names, "smear": names, "diagnosis": "", "cell_type": ""})
    height, width = np.transpose([read_image(path).shape[:2] for path in files])
    fold = len(bench.verdicts.combinations) - 1
    cells = cells.assign(y0=0, x0=0, y1=height, x1=width, fold=fold)
    pictures = dict(zip(names, files, strict=True))
    return replace(bench, items={"cell": cells}, pictures=pictures)


def recorded() -> dict[str, Any]:
    """The results so far; empty: there are none."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.is_file() else {}


def record(section: str, found: Mapping[str, Any]) -> None:
    """Write the results so far. At the top level are those of the real cells, or else those of the demo."""
    results = recorded()
    results[section] = found
    if section == "real" or "real" not in results:
        results |= {strength: found[strength] for strength in STRENGTHS if strength in found}
    write_json(RESULTS, results)


def open_bench(folder: Path, ensemble: str, cells: int, kept: Path) -> Bench:
    """Read the outs of the pipeline in a folder."""
    params = read_params(folder / "params.yaml")
    made = [name for name in params.ensembles if made_in(folder, params, name)]
    name = ensemble or ("apl_aml" if "apl_aml" in made else made[0])
    asked = named(params.ensembles, name, "ensembles")
    folds = read_table(folder / "splits" / "folds.csv")
    patients = patients_of(folds, asked.positive, asked.negative)
    tasks = list(dict.fromkeys([*asked.members, asked.weigh_by]))
    scores = {task: pd.read_parquet(folder / "tuned" / task / "scores.parquet") for task in tasks}
    members = {task: summary_of(scores, task, asked.weigh_by, params) for task in asked.members}
    plain = [name for name in SUMMARIES if name != "blend"]
    verdicts, chosen = (
        judge(patients, members, draw_candidates(with_summaries(params, names), params.seed), 0, params.seed)
        for names in (params.combine.space.summary, plain)
    )
    items: dict[Level, pd.DataFrame] = {}
    for level in sorted({params.tasks[task].images for task in scores}):
        table = read_table(folder / "dataset" / f"{level}s.csv")
        table = table[table["patient"].isin(patients["patient"])]
        rank = table[level].map(lambda item: hashlib.sha256(f"{params.seed}/{item}".encode()).hexdigest())
        table = table.assign(item=table[level], rank=rank).sort_values("rank")
        drawn = table.groupby("patient").head(cells).sort_index().reset_index(drop=True)
        fold = drawn["patient"].map(folds.set_index("patient")["fold"])
        items[level] = drawn.assign(fold=fold.astype(np.int64))
    paths = {task: folder / "tuned" / task / "heads.npz" for task in scores}
    heads = {task: read_heads(path) for task, path in paths.items()}
    averages = {task: read_average(path) for task, path in paths.items()}
    smears = read_table(folder / "dataset" / "smears.csv")
    paths_of_smears = [Path(params.dataset.root) / image for image in smears["image"]]
    pictures = dict(zip(smears["smear"], paths_of_smears, strict=True))
    reference = next(head.features for head in heads[asked.members[0]])
    typical = (params.tasks[asked.members[0]].images, reference)
    return Bench(
        params,
        items,
        patients,
        heads,
        averages,
        asked.members,
        asked.weigh_by,
        verdicts,
        chosen,
        pictures,
        kept,
        typical,
    )


def with_summaries(params: Params, summaries: Sequence[str]) -> Combine:
    space = params.combine.space.model_copy(update={"summary": list(summaries)})
    return params.combine.model_copy(
        update={"space": space, "trials": max(params.combine.trials, len(summaries))}
    )


def made_in(folder: Path, params: Params, ensemble: str) -> bool:
    """Whether all members of an ensemble have been tuned."""
    return all(
        (folder / "tuned" / task / "heads.npz").is_file() for task in params.ensembles[ensemble].members
    )


def summary_of(scores: Mapping[str, pd.DataFrame], task: str, weigh_by: str, params: Params) -> pd.DataFrame:
    alike = params.tasks[task].level == params.tasks[weigh_by].level
    return summarise_patients(scores[task], scores[weigh_by] if alike else None)


def held(bench: Bench, conditions: Sequence[Condition]) -> dict[str, Any]:
    """`losses` of the same cells under some conditions."""
    return losses(bench, [(bench, scored_features(bench, condition)) for condition in conditions])


def losses(bench: Bench, away: Sequence[tuple[Bench, Features]]) -> dict[str, Any]:
    """AUROC, balanced accuracy, sensitivity, calibration and warnings, as means over cohorts elsewhere.

    ``as_shipped``: views are averaged as in the profile, and a cohort from another laboratory adapts. The
    other keys: without one of these. Losses are differences from the verdicts on the cells without changes,
    which do not adapt. ``home_adapted``: with adaptation there, too.
    """
    home = scored_features(bench, None)
    clouds = clouds_of(bench, home)
    treatments: dict[str, dict[str, Any]] = {
        "as_shipped": {},
        "not_adapted": {"adapt": False},
        "plain_view_alone": {"average": False},
        "one_summary_chosen": {"verdicts": bench.chosen},
    }
    found = {}
    for name, treatment in treatments.items():
        before = measured(bench, home, clouds, **(treatment | {"adapt": False}))
        each = [measured(other, features, clouds, **treatment) for other, features in away]
        after = {key: float(np.mean([one[key] for one in each])) for key in before}
        found[name] = {
            "auroc_loss": before["auroc"] - after["auroc"],
            "balanced_accuracy_loss": before["balanced_accuracy"] - after["balanced_accuracy"],
            **after,
            "lowest_sensitivity": min(one["sensitivity_at_sensitive_point"] for one in each),
            "lowest_balanced_accuracy": min(one["balanced_accuracy"] for one in each),
            "home": before,
        }
    home_adapted = measured(bench, home, clouds)
    return found.pop("as_shipped") | {"home_adapted": home_adapted} | found


def with_margin(bench: Bench, margin: float) -> Bench:
    """The same cells, cut out with another margin than the heads were trained with."""
    augment = bench.params.augment.model_copy(update={"margin": margin})
    return replace(bench, params=bench.params.model_copy(update={"augment": augment}))


def selected(
    bench: Bench, features: Features, wanted: Callable[[pd.DataFrame], pd.Series]
) -> tuple[Bench, Features]:
    """Some of the cells, with their features. A patient of whom none is left keeps all cells."""
    kept = {}
    for level, items in bench.items.items():
        chosen = wanted(items) if level == "cell" else pd.Series(True, items.index)
        kept[level] = np.flatnonzero(chosen | ~chosen.groupby(items["patient"]).transform("any"))
    items = {level: table.iloc[kept[level]].reset_index(drop=True) for level, table in bench.items.items()}
    fewer = {name: [view[kept[name.split("/")[0]]] for view in views] for name, views in features.items()}
    return replace(bench, items=items), fewer


def numbers_of(bench: Bench, features: Features) -> np.ndarray:
    """The features of each patient as `aplsmear.ensembles.familiarity` describes them, of plain views."""
    level, name = bench.typical
    of_patient, rows = bench.items[level].groupby("patient").indices, features[f"{level}/{name}"][0]
    described = []
    for patient in bench.patients["patient"]:
        moments = Moments()
        moments.add(rows[of_patient[patient]])
        described.append(moments.describe())
    return np.array(described)


def clouds_of(bench: Bench, home: Features) -> dict[int, Cloud]:
    """For each outer fold, where the patients of the other folds are."""
    numbers, fold = numbers_of(bench, home), bench.patients["fold"].to_numpy()
    return {each: make_cloud(numbers[fold != each], fold[fold != each]) for each in np.unique(fold).tolist()}


def measured(
    bench: Bench,
    features: Features,
    clouds: Mapping[int, Cloud],
    adapt: bool = True,
    average: bool = True,
    verdicts: Verdicts | None = None,
) -> dict[str, float]:
    """AUROC, balanced accuracy, calibration slope and warnings of the held-out verdicts from these features.

    ``wrong``: calls at the balanced point; ``wrong_and_unfamiliar``: those whose features are beyond the
    limit (1) of `clouds`; ``missed``, ``missed_and_unfamiliar``: the same of positive patients at the
    sensitive point; ``unfamiliar``: all such patients.
    """
    fold, label = bench.patients["fold"], bench.patients["label"].to_numpy()
    probability, call, alarm = found = judged(bench, features, adapt, average, verdicts)
    numbers = numbers_of(bench, features)
    far = np.array([clouds[own].distance(each) > 1 for own, each in zip(fold, numbers, strict=True)])
    wrong, missed = call != label, (label == 1) & (alarm == 0)
    return headline(label, found) | {
        "specificity_at_sensitive_point": float(1 - alarm[label == 0].mean()),
        "calibration_slope": calibration_slope_intercept(label, probability)[0],
        "unfamiliar": float(far.sum()),
        "wrong": float(wrong.sum()),
        "wrong_and_unfamiliar": float(far[wrong].sum()),
        "missed": float(missed.sum()),
        "missed_and_unfamiliar": float(far[missed].sum()),
    }


def headline(label: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Measures of probabilities, calls and alarms, of `judged`."""
    probability, call, alarm = found
    order = np.sign(probability[label == 1][:, None] - probability[label == 0])
    return {
        "auroc": float((order.mean() + 1) / 2),
        "balanced_accuracy": float(call[label == 1].mean() + 1 - call[label == 0].mean()) / 2,
        "sensitivity_at_sensitive_point": float(alarm[label == 1].mean()),
    }


def compared(bench: Bench, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """`headline` of the first and the second of each pair (of `judged`), and the gain, as means over pairs.

    The 95 % interval of the gain is over patients, drawn within each diagnosis, the same for all pairs.
    """
    label = bench.patients["label"].to_numpy()
    random = np.random.Generator(np.random.Philox(0))
    each = [np.flatnonzero(label == diagnosis) for diagnosis in (0, 1)]
    draws = [np.concatenate([random.choice(one, len(one)) for one in each]) for _ in range(DRAWS)]

    def means(place: int, drawn: np.ndarray | slice) -> np.ndarray:
        found = [[*headline(label[drawn], pair[place][:, drawn]).values()] for pair in pairs]
        return np.mean(found, axis=0)

    before, after = (means(place, slice(None)) for place in (0, 1))
    low, high = np.quantile([means(1, drawn) - means(0, drawn) for drawn in draws], [0.025, 0.975], axis=0)
    columns = {"without": before, "with": after, "gain": after - before, "low": low, "high": high}
    names = headline(label, pairs[0][0])
    return {name: {key: float(one[n]) for key, one in columns.items()} for n, name in enumerate(names)}


def judged(
    bench: Bench,
    features: Features,
    adapt: bool = True,
    average: bool = True,
    verdicts: Verdicts | None = None,
) -> np.ndarray:
    """The probability of each patient, the call and the alarm, by models that did not see the patient.

    Returns float64 (3, patients).
    """
    tasks = dict.fromkeys([*bench.members, bench.weigh_by])
    scores = {task: scores_of(bench, task, features, average) for task in tasks}
    summaries = {task: summary_of(scores, task, bench.weigh_by, bench.params) for task in bench.members}
    fold = bench.patients["fold"].to_numpy()
    probability, call, alarm = (np.zeros(len(bench.patients)) for _ in range(3))
    for outer_fold in np.unique(fold):
        here = np.flatnonzero(fold == outer_fold)
        combination = (verdicts or bench.verdicts).combinations[outer_fold]
        logits = np.stack(
            [
                table[table["outer_fold"] == outer_fold].set_index("patient")[combination.summary]
                .reindex(bench.patients["patient"].iloc[here]).to_numpy(dtype=np.float64)
                for table in summaries.values()
            ],
            axis=1,
        )  # fmt: skip
        combination = adapted(combination, logits) if adapt else combination
        probability[here] = combination.probability(logits)
        call[here] = probability[here] >= combination.thresholds["balanced"]
        alarm[here] = probability[here] >= combination.thresholds["sensitive"]
    return np.stack([probability, call, alarm])


def scores_of(bench: Bench, task: str, features: Features, average: bool) -> pd.DataFrame:
    """A table as in scores.parquet, by the heads that score the held-out patients of each fold."""
    level, images = bench.params.tasks[task].level, bench.params.tasks[task].images
    seen = bench.items[images]
    table = task_items(seen, level)[["item", "patient"]]
    of_patient = seen.groupby("patient").indices
    outer_folds = {}
    for outer_fold, head in enumerate(bench.heads[task]):
        used, name = bench.averages[task] + 1 if average else 1, f"{images}/{head.features}"
        others = [views[:used] for key, views in features.items() if key.endswith(f":{name}")]
        shown = sum(others, features[name][:used])
        each = [
            [attend(head, values[of_patient[patient]])[0] for patient in table["patient"]]
            if level == "patient"
            else score(head, values, np.arange(len(table)))
            for values in shown
        ]
        outer_folds[f"outer_{outer_fold}"] = np.mean(each, axis=0)
    fold = table["patient"].map(bench.patients.set_index("patient")["fold"])
    return table.assign(fold=fold, **outer_folds)


def stains_of(bench: Bench, condition: Condition | None) -> dict[Level, np.ndarray]:
    """Optical densities of red, green and blue of the plain views of all items: float64 (items, 9).

    `aplsmear.ensembles.familiarity.stain_of`, and those of the background.
    """
    return {
        level: np.array(
            [
                [*stain_of(view), *background(decode(view.image))]
                for view in all_shown(bench, level, items, condition, count=0)
            ]
        )
        for level, items in bench.items.items()
    }


def background(image: np.ndarray) -> np.ndarray:
    return np.asarray(-np.log10((np.percentile(image.reshape(-1, 3), BACKGROUND, axis=0) + 1) / 256))


def tables_to(
    bench: Bench, home: Mapping[Level, np.ndarray], here: Mapping[Level, np.ndarray], how: str
) -> list[Tables | None]:
    """The tables of one of `RETOUCHES` for each fold, from its own colours here to those of the other folds.

    Colours are those of `stains_of`. None: the cells as they are.
    """
    found: dict[tuple[Level, int], list[np.ndarray | None]] = {}
    for level, items in bench.items.items():
        fold = items["fold"].to_numpy()
        for each in np.unique(fold).tolist():
            colours = here[level][fold == each].mean(0), home[level][fold != each].mean(0)
            found[level, each] = RETOUCHES[how](*colours)
    every = list(zip(*found.values(), strict=True))
    return [as_tables(dict(zip(found, each, strict=True))) for each in every]


def as_tables(tables: Mapping[tuple[Level, int], np.ndarray | None]) -> Tables | None:
    """Tables by level and fold; None if there are none."""
    found: dict[Level, dict[int, np.ndarray]] = {}
    for (level, fold), table in tables.items():
        if table is not None:
            found.setdefault(level, {})[fold] = table
    return found or None


def moved_to(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Move the mean and the spread of optical densities, of `stains_of`, from here to there."""
    return as_table((DENSITY - here[:3]) * there[3:6] / here[3:6] + there[:3])


def white_to(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Move the optical density of the background, of `stains_of`, from here to there."""
    return as_table(DENSITY - here[6:] + there[6:])


def as_table(density: np.ndarray) -> np.ndarray:
    """A table for cv2.LUT, uint8 (1, 256, 3), to these optical densities (256, 3) instead of `DENSITY`."""
    return np.rint(np.clip(256 * 10**-density - 1, 0, 255)).astype(np.uint8)[None]


# Changes of the colours of a cohort before it is scored, from `stains_of` its cells and those of training,
# as means over cells. The scores of several are averaged; None: the cells as they are.
RETOUCHES: Mapping[str, Callable[[np.ndarray, np.ndarray], list[np.ndarray | None]]] = {
    "moved": lambda here, there: [None, moved_to(here, there)],
    "white_point": lambda here, there: [white_to(here, there)],
    "lighter_and_darker": lambda *_: [None, *(as_table(DENSITY * factor) for factor in (0.8, 1.25))],
}


def averaged(shown: Sequence[Features]) -> Features:
    """Features of the same items in several colours; `scores_of` has the mean of their scores."""
    first, *others = shown
    return {**first} | {
        f"{n}:{name}": views for n, other in enumerate(others) for name, views in other.items()
    }


def scored_features(bench: Bench, condition: Condition | None, tables: Tables | None = None) -> Features:
    """Features of all items under a condition (None: no change): of the plain view, then of the others.

    With `tables`, the colours of each fold are moved by its table.
    """
    found: dict[str, list[np.ndarray]] = {}
    for level, items in bench.items.items():
        names = {head.features for heads in bench.heads.values() for head in heads}
        for backbone in sorted({name.split("/")[0] for name in names}):
            path = bench.kept / f"{key_of(bench, level, backbone, condition, tables)}.npz"
            if not path.is_file():
                forward(bench, level, items, backbone, condition, tables, path)
            with np.load(path) as file:
                for layer in file.files:
                    found[f"{level}/{backbone}/{layer}"] = list(file[layer])
    return found


def key_of(
    bench: Bench, level: Level, backbone: str, condition: Condition | None, tables: Tables | None
) -> str:
    """A hash of everything that the features depend on."""
    params = bench.params
    depends_on = [
        level,
        params.seed,
        params.dataset.root,
        max(bench.averages.values()),
        params.augment.model_dump(),
        params.backbones[backbone].model_dump(),
        bench.items[level]["item"].tolist(),
        vars(condition) if condition else None,
        *SOURCES,
    ]
    if tables:
        depends_on.append({fold: table.tolist() for fold, table in tables[level].items()})
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def forward(
    bench: Bench,
    level: Level,
    items: pd.DataFrame,
    backbone: str,
    condition: Condition | None,
    tables: Tables | None,
    path: Path,
) -> None:
    settings = bench.params.backbones[backbone]
    batch = batch_of(settings, level)
    shown = list(all_shown(bench, level, items, condition, tables))
    batches = [shown[start : start + batch] for start in range(0, len(shown), batch)]
    what = "unchanged" if condition is None else f"{condition.strength}, laboratory {condition.laboratory}"
    what += ", colours moved" if tables else ""
    graph = Path("backbones") / backbone / f"{level}.onnx"
    request = FeatureRequest(backbone, graph, level, tuple(settings.layer), batch)
    passed = features_of(progress(batches, f"{level}s {what}", len(batches)), request)
    parts = list(passed)
    count = max(bench.averages.values()) + 1
    arrays = {}
    for place, layer in enumerate(settings.layer):
        values = np.concatenate([part[place] for part in parts])
        arrays[layer] = values.reshape(len(items), count, -1).transpose(1, 0, 2)
    write_arrays(path, arrays)


def all_shown(
    bench: Bench,
    level: Level,
    items: pd.DataFrame,
    condition: Condition | None,
    tables: Tables | None = None,
    count: int | None = None,
) -> Iterator[View]:
    """The views of all items, in the order of the items, from smears under a condition.

    `count` augmented views of each; None: as many as are averaged.
    """
    params = bench.params
    found = {}
    count = max(bench.averages.values()) if count is None else count
    for smear, rows in items.groupby("smear", sort=False):
        image = read_image(bench.pictures[smear])
        shown: dict[tuple[int, ...], Pyramid] = {}
        for row in rows.itertuples(index=False):
            box = (row.y0, row.x0, row.y1, row.x1) if level == "cell" else None
            y0, x0, y1, x1 = seen = (
                surroundings(box, params, image.shape) if box else (0, 0, *image.shape[:2])
            )
            if seen not in shown:
                part = under(image[y0:y1, x0:x1], condition, params)
                if tables:
                    part = cv2.LUT(np.ascontiguousarray(part), tables[level][row.fold])
                shown[seen] = Pyramid(part)
            found[row.item] = list(
                cell_views(
                    shown[seen],
                    (box[0] - y0, box[1] - x0, box[2] - y0, box[3] - x0),
                    row.item,
                    count,
                    params.augment,
                    params.seed,
                )
                if box
                else smear_views(shown[seen], row.item, count, params.augment, params.seed)
            )
    for item in items["item"]:
        yield from found[item]


def under(image: np.ndarray, condition: Condition | None, params: Params) -> np.ndarray:
    """A smear, or a part of it, under a condition."""
    if condition is None:
        return image
    laboratory = draw_laboratory(params.seed, condition.laboratory)
    if condition.home:
        image = recoloured(image, condition.home, REAL[condition.colours])
    return shifted(image, laboratory, STRENGTHS[condition.strength], condition.kinds)


def home_colours(bench: Bench) -> Colours:
    """Colours of the plain views of the cells that are measured."""
    shown = all_shown(bench, "cell", bench.items["cell"], None, count=0)
    return colours_of([decode(view.image) for view in shown])


def surroundings(
    box: tuple[int, int, int, int], params: Params, shape: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """The part of a smear that the views of a cell need, with a rim for blur, aligned with JPEG blocks."""
    side = max(box[2] - box[0], box[3] - box[1]) * (1 + params.augment.margin) * source_factor(params.augment)
    radius = int(side / 2) + RIM
    y, x = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    y0, x0 = (max(centre - radius, 0) // JPEG_BLOCK * JPEG_BLOCK for centre in (y, x))
    return y0, x0, min(y + radius, shape[0]), min(x + radius, shape[1])


def variant(bench: Bench, ensemble: str, cells: int, name: str, settings: Mapping[str, Any]) -> Bench:
    """The same cells with other settings (`MEASURES`), by the stages of the pipeline."""
    params = bench.params.model_dump()
    params["augment"] |= {name: value for name, value in settings.items() if name != "tune"}
    params["tune"] |= {"trials": TRIALS, "average": 0} | settings.get("tune", {})
    params["tune"]["space"]["views"] = [params["augment"]["views"]]
    params["overrides"] = {task: {} for task in params["tasks"]}
    params["dataset"]["root"] = str(Path(params["dataset"]["root"]).resolve())
    for backbone in params["backbones"].values():
        if Path(backbone["weights"]).is_file():
            backbone["weights"] = str(Path(backbone["weights"]).resolve())
    home = bench.kept / re.sub(r"\W+", "-", name)
    for level in LEVELS:
        items = bench.items.get(level)
        table = items.drop(columns=["item", "rank", "fold"]) if items is not None else None
        source = Path("dataset") / f"{level}s.csv"
        write_table(home / source, read_table(source) if table is None or level == "smear" else table)
    write_table(home / "splits" / "folds.csv", read_table(Path("splits/folds.csv")))
    (home / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    used = sorted({head.features.split("/")[0] for heads in bench.heads.values() for head in heads})
    stages = [["augment"], *(["bottleneck", one] for one in used), *(["tune", task] for task in bench.heads)]
    for stage in stages:
        done = home / f"{'-'.join(stage)}.done"
        if not done.exists():
            script = [sys.executable, "-P", str(ROOT / "stages" / f"{stage[0]}.py"), *stage[1:]]
            subprocess.run(script, cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, check=True)
            done.touch()
    return open_bench(home, ensemble, cells, bench.kept)


if __name__ == "__main__":
    main()
