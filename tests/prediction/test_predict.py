"""New patients get the probabilities that they got as held-out patients of the training run."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import logit
from test_bundle import augment
from typer.testing import CliRunner

import onnx_files
from aplsmear.answer.coupling import DIAGNOSES, judge_all, write_answers
from aplsmear.answer.report import results_of, write_results
from aplsmear.cli import app
from aplsmear.compute.runtime import start_tensorflow
from aplsmear.data.dataset import DataSet, read_data_set
from aplsmear.ensembles.baselines import (
    POOLED,
    baselines_of,
    pooled_baseline,
    pooled_features,
    share_of,
)
from aplsmear.ensembles.bundle import Member, Model, make_reference, read_bundle, write_bundle, write_changed
from aplsmear.ensembles.cell_curve import CellCurve
from aplsmear.ensembles.combination import Candidate, Verdicts, as_json, judge, logits_of_all, patients_of
from aplsmear.ensembles.pooling import summarise_patients
from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc
from aplsmear.exchange.classes import known_classes
from aplsmear.exchange.sources import read_source
from aplsmear.features.backbones import cut_network, write_graph
from aplsmear.features.forward import FeatureRequest, Network, batch_of, features_of
from aplsmear.features.store import Features, read_features, write_features
from aplsmear.heads.bags import attend
from aplsmear.heads.head import Head, score, write_heads
from aplsmear.images.view_store import read_index, read_views, view_writer
from aplsmear.images.views import BOX
from aplsmear.params import LEVELS, Backbone, Level
from aplsmear.prediction import predict as module
from aplsmear.prediction.predict import Models, judge_patients, judge_together, keep_pictures, verdict_table
from aplsmear.prediction.view import read_cells
from aplsmear.runs.tracking import Tracker
from aplsmear.sources.drawn import draw_data_set
from aplsmear.tables import read_table, write_table
from crops import cut_out
from made_views import all_views

# Keras 3.15 on NumPy 2, when it saves weights.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

FOLDS, SEED = 3, 1
BACKBONE = Backbone(
    application="MobileNet",
    options={"alpha": 0.25},
    input_size={"cell": 32, "smear": 48},
    layer=["conv_pw_1_relu", "conv_pw_2_relu"],
    weights="none",
    batch=16,
)
KNOBS = augment().model_copy(update={"margin": 0.1, "rotate": 30.0, "brightness": 0.2, "views": 2})
TASKS = {"nuclei": ("cell", 1), "granules": ("cell", 0), "field": ("smear", 0), "gate": ("cell", 0)}
TASKS |= {"crowd": ("patient", 1)}
MEMBERS = ("nuclei", "granules", "field", "crowd")
SHARES = ("nuclei", "gate")  # a member, and the task that weighs the cells
RIDGE = [Candidate(0, "logistic", "blend", 1.0, 0)]


@dataclass
class Run:
    """A small training run: its data, its bundle, its verdicts on held-out patients."""

    root: Path
    data: Path
    ensemble: Path
    verdicts: pd.DataFrame
    answer: Path  # of the one answer of three ensembles
    answers: pd.DataFrame  # the held-out ones


def random_heads(task: str, features: dict[str, Features]) -> list[Head]:
    """Of every outer fold; on standardised features, so that different items get different scores."""
    random = np.random.default_rng(list(task.encode()))
    layers = [name for name in sorted(features) if name.startswith("net/")]
    name = f"{layers[0]}+file/features" if task == "nuclei" else layers[len(task) % 2]
    values = features[name].values[:].astype(np.float32)
    mean, scale = values.mean(0), values.std(0) + 1e-3
    heads = []
    for _ in range(FOLDS + 1):
        kernel = (random.normal(size=len(mean)) / scale / 3).astype(np.float32)
        first = (kernel[:, None],), (-(mean @ kernel)[None],)
        if TASKS[task][0] != "patient":
            heads.append(Head(name, *first))
        else:
            second = (np.full((1, 1), 2, np.float32),), (np.zeros(1, np.float32),)
            gates = (np.ones((1, 2), np.float32), np.zeros(2, np.float32), np.full((1, 1), 3, np.float32))
            heads.append(Head(name, first[0] + second[0], first[1] + second[1], "tanh", gates))
    return heads


def scores_of(task: str, heads: list[Head], of: Features, patients: pd.Series, fold: dict) -> pd.DataFrame:
    """The scores that stages/tune.py writes to scores.parquet."""
    rows = of.index.reset_index(names="row").groupby("item", sort=False)["row"].agg(["min", "size"])
    if TASKS[task][0] == "patient":
        return bag_scores_of(task, heads, of, rows.assign(patient=patients.loc[rows.index]), fold)
    table = pd.DataFrame({"item": rows.index, "patient": patients.loc[rows.index].to_numpy()})
    table["fold"] = table["patient"].map(fold)
    for outer_fold, head in enumerate(heads):
        views = [rows["min"] + np.minimum(view, rows["size"] - 1) for view in range(TASKS[task][1] + 1)]
        each = [score(head, of.values, np.asarray(view)) for view in views]
        table[f"outer_{outer_fold}"] = np.mean(each, axis=0)
    return table


def bag_scores_of(task: str, heads: list[Head], of: Features, rows: pd.DataFrame, fold: dict) -> pd.DataFrame:
    """The same for a task whose items are patients."""
    table = []
    for patient, mine in rows.sort_index().groupby("patient"):
        row = {"item": patient, "patient": patient, "fold": fold[patient]}
        for outer_fold, head in enumerate(heads):
            views = [mine["min"] + np.minimum(view, mine["size"] - 1) for view in range(TASKS[task][1] + 1)]
            each = [np.float32(attend(head, of.values[np.asarray(view)])[0]) for view in views]
            row[f"outer_{outer_fold}"] = np.mean(each)
        table.append(row)
    return pd.DataFrame(table)


def baseline_of(share: Verdicts, member: pd.DataFrame, patients: pd.Series) -> np.ndarray:
    """The probabilities by a share of cells, of the model that was fitted to all patients."""
    last = member[member["outer_fold"] == FOLDS].set_index("patient")["share"]
    return share.combinations[-1].probability(last.loc[patients].to_numpy()[:, None])


def write_all_features(root: Path, backbones: dict[str, Backbone], level: Level, views: Path) -> None:
    """The work of the stage `bottleneck` for one level."""
    for name, row in backbones.items():
        graph = root / "backbones" / name / f"{level}.onnx"
        write_graph(graph, row, level, SEED)
        request = FeatureRequest(name, graph, level, tuple(row.layer), batch_of(row, level))
        made = features_of(read_views(views, request.batch), request)
        write_features(root / "features" / level / name, read_index(views), row.layer, made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """The work of the stages, one after another, with heads that were not trained."""
    start_tensorflow()
    root = tmp_path_factory.mktemp("trained")
    draw_data_set(root / "data", 18, 3, size=(240, 320), cells_per_smear=6)
    found = read_data_set(root / "data", {}, min_box=8, skip_bad_images=False, check_images=False)
    folds = found.smears.drop_duplicates("patient")[["patient", "diagnosis"]].sort_values("patient")
    folds["fold"] = np.arange(len(folds)) // 3 % FOLDS
    fold = dict(zip(folds["patient"], folds["fold"], strict=True))
    views = {level: root / "augmented" / f"{level}.parquet" for level in LEVELS}
    settings = KNOBS.model_copy(update={"extra_views": {"apl": 2}})
    with view_writer(views) as write:
        for of_smear in all_views(root / "data", found.smears, found.cells, settings, SEED):
            write(of_smear)
    features = {}
    own = onnx_files.backbone(onnx_files.convolutions(root / "own.onnx"), trained_on=["raabin"])
    backbones = {"net": BACKBONE, "file": own}
    for level in LEVELS:
        write_all_features(root, backbones, level, views[level])
        features[level] = read_features(root / "features" / level, backbones)
    owner = {
        "cell": found.cells.set_index("cell")["patient"],
        "smear": found.smears.set_index("smear")["patient"],
    }
    heads, scores = {}, {}
    for task, (level, average) in TASKS.items():
        heads[task] = root / f"{task}.npz"
        images = "cell" if level == "patient" else level
        mine = random_heads(task, features[images])
        write_heads(heads[task], mine, average)
        scores[task] = scores_of(task, mine, features[images][mine[0].features], owner[images], fold)
    summaries = {}
    for task in (*MEMBERS, "gate"):
        gate = scores["gate"] if TASKS[task][0] == "cell" else None
        write_table(root / f"{task}.csv", summarise_patients(scores[task], gate))
        summaries[task] = pd.read_csv(root / f"{task}.csv", dtype={"patient": str}, keep_default_na=False)
    members = {task: summaries[task] for task in MEMBERS}
    patients = patients_of(folds, "apl", "aml")
    verdicts = judge(patients, members, RIDGE, 20, SEED)
    counted = {share_of(task): (task, summaries[task]) for task in SHARES}
    judged = baselines_of(patients, members, dict(counted.values()), SEED)
    plain = pooled_features(features["cell"].values(), found.cells.rename(columns={"cell": "item"}), patients)
    _, pooled = pooled_baseline(patients, plain)
    items = {level: getattr(found, f"{level}s").rename(columns={level: "item"}) for level in LEVELS}
    chosen = features["cell"]["net/conv_pw_2_relu"]
    mine = items["cell"][items["cell"]["patient"].isin(patients["patient"])]
    owner = dict(zip(mine["item"], mine["patient"], strict=True))
    reference = make_reference(fold, owner, chosen, read_views(views["cell"], 64))
    of_task = {
        task: Member(task=task, level=level, one_each=level == "patient")
        for task, (level, _) in TASKS.items()
    }
    model = Model(
        name="apl_aml",
        positive="apl",
        negative="aml",
        members=[of_task[task] for task in MEMBERS],
        weigh_by=of_task["gate"],
        seed=SEED,
        min_box=8,
        augment=settings,
        backbones={
            name: row.model_dump(exclude={"weights", "sha256"}, exclude_unset=True)
            for name, row in backbones.items()
        },
        combinations=[as_json(each) for each in verdicts.combinations],
        reference_level="cell",
        reference_features=chosen.name,
        cell_curve=CellCurve(cells=[5, 10], spread=[1.0, 0.5], models=0.2),
        min_items=float(np.quantile(mine["patient"].value_counts(), 0.01)),
        shares={name: as_json(judged[name].combinations[-1]) for name in counted},
        pooled_features=pooled.layer,
        inputs={},
    )
    write_bundle(root / "apl_aml" / "model", model, heads, root / "backbones", reference, pooled)
    expected = {
        name: baseline_of(judged[name], table, patients["patient"]) for name, (_, table) in counted.items()
    }
    expected[POOLED] = pooled.probability(plain[pooled.layer])
    write_table(root / "baselines.csv", pd.DataFrame({"patient": patients["patient"], **expected}))
    write_table(root / "apl_aml" / "predictions.csv", verdicts.table)
    verdicts = read_table(root / "apl_aml" / "predictions.csv")
    write_ensembles(root, model, members, folds, heads, reference, pooled)
    answers = pd.read_csv(root / "answer" / "predictions.csv", dtype={"patient": str})
    return Run(root, root / "data", root / "apl_aml", verdicts, root / "answer" / "answer.json", answers)


PAIRS = {"apl_aml": ("apl", "aml"), "apl_healthy": ("apl", "healthy"), "aml_healthy": ("aml", "healthy")}
MEMBERS_OF = {"apl_aml": MEMBERS, "apl_healthy": ("nuclei", "field"), "aml_healthy": ("granules", "crowd")}


def write_ensembles(root, model, members, folds, heads, reference, pooled) -> None:
    """Three ensembles of different members, and their one answer."""
    tables = {}
    for name, (positive, negative) in PAIRS.items():
        mine = {task: members[task] for task in MEMBERS_OF[name]}
        verdicts = judge(patients_of(folds, positive, negative), mine, RIDGE, 0, SEED)
        logits = logits_of_all(verdicts, folds, mine, SEED)
        write_table(root / "ensembles" / name / "logits.csv", logits)
        tables[name] = read_table(root / "ensembles" / name / "logits.csv")
        row = {"name": name, "positive": positive, "negative": negative, "shares": {}}
        row["members"] = [each for each in model.members if each.task in mine]
        row["combinations"] = [as_json(each) for each in verdicts.combinations]
        own = {task: heads[task] for task in (*mine, "gate")}
        bundle = root / "ensembles" / name / "model"
        write_bundle(bundle, model.model_copy(update=row), own, root / "backbones", reference, pooled)
    judged, diagnoses = judge_all(tables, PAIRS), tables["apl_aml"]["diagnosis"].tolist()
    manifests = {name: root / "ensembles" / name / "model" / "manifest.json" for name in PAIRS}
    write_results(root / "answer", results_of(tables["apl_aml"], judged, PAIRS, 0.5, 100, SEED))
    write_answers(root / "answer" / "answer.json", judged, PAIRS, manifests, diagnoses, 0.5)


@pytest.fixture(scope="module")
def final(trained) -> Models:
    bundle = read_bundle(trained.ensemble)
    return Models(bundle, bundle.outer_fold_of(None), evidence=True)


@pytest.fixture
def data(trained, tmp_path) -> Path:
    """A copy of the data that a test may change."""
    return Path(shutil.copytree(trained.data, tmp_path / "data"))


def read(folder: Path) -> DataSet:
    return read_data_set(folder, {}, min_box=8, skip_bad_images=False, check_images=False, labelled=False)


def predicted(models: Models, folder: Path, patients: set[str] | None = None) -> pd.DataFrame:
    found = read(folder)
    smears, cells = found.smears, found.cells
    if patients is not None:
        smears, cells = (table[table["patient"].isin(patients)] for table in (smears, cells))
    judged = list(judge_patients(models, folder, smears, cells))
    return verdict_table(judged, models.combination, models.bundle.model.cell_curve).set_index("patient")


def rewrite(path: Path, change) -> None:
    """Change the rows of a CSV file, a list of dicts."""
    with path.open(newline="") as file:
        rows = change(list(csv.DictReader(file)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# --- a labelled cohort ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> Path:
    """A folder of `aplsmear evaluate`, on the training patients, at two sites."""
    data = Path(shutil.copytree(trained.data, tmp_path_factory.mktemp("cohort") / "Raabin-WBC"))
    rewrite(
        data / "wsi.csv",
        lambda rows: [
            row | {"site": "Dresden" if place < 14 else "Leipzig"} for place, row in enumerate(rows)
        ],
    )
    (data / "wsi" / "smear_0001.jpg").rename(data / "wsi" / "smear_0001.JPG")
    out = data.parent / "evaluated"
    asked = [
        "--ensemble",
        str(trained.ensemble),
        "--data",
        str(data),
        "--out",
        str(out),
        "--resamples",
        "100",
    ]
    done = CliRunner().invoke(app, ["evaluate", *asked])
    assert done.exit_code == 0, done.output
    assert "12 patients (6 aml, 6 apl): AUROC" in done.output
    assert "left out: patients with another diagnosis: 6" in done.output
    for remark in (
        "but for the case of the ending, or the Unicode form: rows 2",
        "`trained_on` in params.yaml says that raabin trained the weights of the backbone file",
    ):
        assert remark in done.output
        assert remark in (out / "report.html").read_text(encoding="utf-8")
    return out


def test_a_cohort_is_judged_as_new_patients_are(trained, final, evaluated) -> None:
    found = pd.read_csv(evaluated / "predictions.csv", dtype={"patient": str}).set_index("patient")
    assert (found["label"] == (found["diagnosis"] == "apl")).all()
    expected = predicted(final, trained.data, set(found.index))
    assert [f"{value:.6g}" for value in expected["probability"]] == [
        f"{value:.6g}" for value in found["probability"]
    ]
    assert (expected[["verdict", "sensitive"]] == found[["verdict", "sensitive"]]).all(axis=None)
    order = found["probability"].rank()
    assert (found["adapted"].rank() == order).all()  # all logits are shifted by the same number


def test_the_baselines_of_training_judge_the_same_patients(trained, evaluated) -> None:
    held = pd.read_csv(trained.root / "baselines.csv", dtype={"patient": str}).set_index("patient")
    label = pd.read_csv(evaluated / "predictions.csv", dtype={"patient": str}).set_index("patient")["label"]
    compared = pd.read_csv(evaluated / "comparison.csv").set_index("against")["auroc"]
    baselines = [*map(share_of, SHARES), POOLED]
    assert set(compared.index) == {"the ensemble", *baselines}
    for name in baselines:
        scores = held.loc[label.index, name].to_numpy()
        assert compared[name] == pytest.approx(auroc(label.to_numpy(), scores), abs=1e-6)


def test_the_numbers_of_a_cohort_are_those_of_its_table(evaluated) -> None:
    table = pd.read_csv(evaluated / "predictions.csv", dtype={"patient": str}, keep_default_na=False)
    numbers, more = (
        json.loads((evaluated / name).read_text(encoding="utf-8"))
        for name in ("metrics.json", "intervals.json")
    )
    assert numbers["n_patients"] == len(table) == 12
    assert numbers["auroc"]["value"] == pytest.approx(auroc(table["label"], table["probability"]), abs=1e-4)
    positive = table[table["label"] == 1]
    assert numbers["sensitivity"] == pytest.approx(positive["verdict"].mean(), abs=1e-4)
    assert more["at_sensitive"]["sensitivity"]["value"] == pytest.approx(positive["sensitive"].mean())
    assert numbers["adapted"]["sensitivity"] == pytest.approx(positive["adapted_verdict"].mean(), abs=1e-4)
    wrong = table["verdict"] != table["label"]
    assert more["unfamiliar"]["wrong"] == wrong.sum()
    assert more["unfamiliar"]["wrong_and_warned"] == (wrong & (table["warning"] != "")).sum()
    assert set(more["sites"]) <= {"Dresden", "Leipzig"}
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert f"{numbers['auroc']['value']:.3f}" in page
    assert "Decision curve" in page
    summary = (evaluated / "summary.svg").read_text(encoding="utf-8")  # for the report of the ensemble
    assert f">{numbers['auroc']['value']:.3f} (" in summary
    assert "12 patients: " in summary


def test_a_cohort_with_a_picture_of_training_is_refused(trained, data, tmp_path) -> None:
    """The picture has another name, and is a PNG."""
    draw_data_set(tmp_path / "other", 9, 50, size=(240, 320), cells_per_smear=6)
    with Image.open(data / "wsi" / "smear_0003.jpg") as picture:
        picture.save(tmp_path / "other" / "wsi" / "new.png")
    rewrite(
        tmp_path / "other" / "wsi.csv",
        lambda rows: [row | {"imgName": "new.png" if row["id"] == "5" else row["imgName"]} for row in rows],
    )
    asked = ["--ensemble", str(trained.ensemble), "--data", str(tmp_path / "other"), "--out"]
    asked += [str(tmp_path / "out"), "--trained-on", str(data)]
    done = CliRunner().invoke(app, ["evaluate", *asked])
    assert done.exit_code == 1
    assert "new.png" in done.output
    assert "smear_0003.jpg" in done.output
    assert not (tmp_path / "out").exists()


def test_a_cohort_without_a_diagnosis_or_a_folder_in_use_is_refused(trained, data, evaluated) -> None:
    asked = ["evaluate", "--ensemble", str(trained.ensemble), "--data", str(data), "--out"]
    done = CliRunner().invoke(app, [*asked, str(evaluated)])
    assert done.exit_code == 1
    assert "--overwrite" in done.output
    rewrite(data / "wsi.csv", lambda rows: [row for row in rows if "m3" not in row["label"]])
    (data / "labeled_cells.csv").unlink()
    done = CliRunner().invoke(app, [*asked, str(data.parent / "out")])
    assert done.exit_code == 1
    assert "0 with apl" in " ".join(done.output.split())
    assert not (data.parent / "out").exists()


# --- the same as in training ----------------------------------------------------------------------


@pytest.mark.parametrize("fold", range(FOLDS))
def test_held_out_patients_get_the_probabilities_of_training_to_the_last_digit(trained, fold) -> None:
    bundle = read_bundle(trained.ensemble)
    mine = trained.verdicts[trained.verdicts["fold"] == fold].set_index("patient")
    found = predicted(Models(bundle, bundle.outer_fold_of(fold)), trained.data, set(mine.index))
    assert [f"{value:.6g}" for value in found["probability"]] == [
        f"{value:.6g}" for value in mine["probability"].loc[found.index]
    ]
    for call in ("verdict", "sensitive"):
        assert found[call].tolist() == mine[call].loc[found.index].astype(int).tolist()
    assert len(set(mine["probability"])) > 1


def test_order_and_labels_and_other_patients_change_no_result(trained, final, data, monkeypatch) -> None:
    expected = predicted(final, trained.data)
    labels = {"label", "cellType", "specialCharacteristics", "objectType", "segmentationQuality"}
    for name in ("wsi.csv", "labeled_cells.csv"):
        rewrite(
            data / name,
            lambda rows: [{k: v for k, v in row.items() if k not in labels} for row in reversed(rows)],
        )
    monkeypatch.setattr(module, "CHUNK", 1)  # every smear goes through the networks alone
    found = predicted(final, data)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    some = set(expected.index[::4])
    pd.testing.assert_frame_equal(predicted(final, data, some), expected.loc[sorted(some)], check_exact=True)


def test_a_member_that_also_gives_weights_is_used_where_no_summary_is_weighted(trained) -> None:
    bundle = read_bundle(trained.ensemble)
    plain = [replace(each, summary="mean") for each in bundle.combinations]
    changed = replace(bundle, weigh_by=bundle.members[0], combinations=plain)
    judge = Models(changed, changed.outer_fold_of(None))
    assert [each.task for each in judge.scorers["cell"]] == ["nuclei", "granules", "crowd"]
    assert [each.task for each in Models(bundle, 0).scorers["cell"]] == [
        "nuclei",
        "granules",
        "crowd",
        "gate",
    ]


def test_the_task_that_weighs_cells_scores_them_for_its_baseline_in_any_case(
    trained,
) -> None:
    bundle = read_bundle(trained.ensemble)
    plain = replace(bundle, combinations=[replace(each, summary="mean") for each in bundle.combinations])
    scored = [
        {each.task for each in Models(plain, 0, baselines=wanted).scorers["cell"]} for wanted in (True, False)
    ]
    assert scored[0] - scored[1] == {"gate"}


# --- warnings -------------------------------------------------------------------------------------


def lit(folder: Path, red: float, green: float, blue: float) -> None:
    """Change the colour of the light of its smears."""
    for path in (folder / "wsi").iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
        Image.fromarray((pixels * [red, green, blue]).astype(np.uint8)).save(path, quality=95)


def test_another_stain_gets_a_warning_and_the_same_stain_gets_none(final, data, tmp_path) -> None:
    draw_data_set(tmp_path / "new", 18, 77, size=(240, 320), cells_per_smear=6)
    same = predicted(final, tmp_path / "new")
    assert (same["stain"] > 1).mean() < 0.3
    lit(data, 0.75, 0.85, 1.0)
    blue = predicted(final, data)
    assert (blue["stain"] > 1).all()
    assert blue["warning"].str.contains(r"unfamiliar stain or camera \(.*bluer").all()


def test_a_patient_with_few_cells_or_none_is_judged_by_the_rest_with_a_warning(trained, final, data) -> None:
    cells = read(data).cells
    few, none = sorted(set(cells["patient"]))[:2]
    kept = {few: cells[cells["patient"] == few]["cell"].iloc[0]}
    gone = {row.cell for row in cells.itertuples() if row.patient in (few, none)} - set(kept.values())
    rewrite(data / "labeled_cells.csv", lambda rows: [row for row in rows if row["id"] not in gone])
    found = predicted(final, data)
    assert found.loc[few, "cells"] == 1
    assert "few cells: 1" in found.loc[few, "warning"]
    assert found.loc[none, "cells"] == 0
    assert "no cells: there are no scores of nuclei, granules, crowd" in found.loc[none, "warning"]
    assert 0 < found.loc[none, "probability"] < 1
    all_patients = predicted(final, trained.data)
    others = all_patients.index.drop([few, none])
    pd.testing.assert_frame_equal(found.loc[others], all_patients.loc[others], check_exact=True)


# --- one answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", range(FOLDS))
def test_held_out_patients_get_the_one_answer_of_training(trained, tmp_path, fold) -> None:
    out, page = tmp_path / "out.csv", tmp_path / "page.html"
    words = ("--answer", trained.answer, "--data", trained.data, "--out", out, "--report", page)
    code, output = command(*words, "--fold", fold)
    assert code == 0, output
    mine = trained.answers[trained.answers["fold"] == fold].set_index("patient")
    found = pd.read_csv(out, dtype={"patient": str}, keep_default_na=False).set_index("patient")
    assert len(found) == 18
    chances = found.loc[mine.index, list(DIAGNOSES)]
    np.testing.assert_allclose(chances, mine[list(DIAGNOSES)], rtol=2e-6)
    np.testing.assert_allclose(found[list(DIAGNOSES)].sum(axis=1), 1, atol=3e-6)
    assert found.loc[mine.index, "answer"].tolist() == mine["answer"].tolist()
    assert ((found["reason"] != "") == (found["answer"] == "unsure")).all()
    assert "What a call is worth" in page.read_text(encoding="utf-8")
    assert "as in training" in output


def test_several_ensembles_in_one_pass_give_what_each_gives_alone(trained) -> None:
    found = read(trained.data)
    bundles = [read_bundle(trained.root / "ensembles" / name) for name in PAIRS]
    several = [Models(bundle, bundle.outer_fold_of(None)) for bundle in bundles]
    together = list(judge_together(several, trained.data, found.smears, found.cells))
    for place, models in enumerate(several):
        alone = list(judge_patients(models, trained.data, found.smears, found.cells))
        mine = [each[place] for each in together]
        curve = models.bundle.model.cell_curve
        tables = [verdict_table(each, models.combination, curve) for each in (mine, alone)]
        pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_prevalence_moves_the_answers_and_what_a_call_is_worth(trained, tmp_path) -> None:
    words = ("--answer", trained.answer, "--data", trained.data, "--out")
    tables = {}
    for shares in ("", "apl=0.05,aml=0.15", f"apl={1 / 3},aml={1 / 3},healthy={1 / 3}"):
        more = ("--prevalence", shares) if shares else ()
        code, output = command(*words, tmp_path / "out.csv", *more, "--overwrite")
        assert code == 0, output
        tables[shares] = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
        if "0.05" in shares:
            assert "Where 80 % are healthy, 15 % have other AML and 5 % have APL" in output
    as_trained, rare, same = tables.values()
    pd.testing.assert_frame_equal(as_trained, same)  # there are as many of each diagnosis
    assert (rare["apl"] < as_trained["apl"]).all()
    odds = (rare["apl"] / rare["healthy"]) / (as_trained["apl"] / as_trained["healthy"])
    np.testing.assert_allclose(odds, 0.05 / 0.8, rtol=1e-4)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--prevalence", "apl=0.05"), "the third is the rest"),
        (("--prevalence", "apl=0.7,aml=0.6"), "add to 1"),
        (("--prevalence", "apl=0,aml=0.5"), "between 0 and 1"),
        (("--prevalence", "apl=nan,aml=0.5"), "between 0 and 1"),
        (("--prevalence", "apl=0.2,aml=0.2,healthy=0.5"), "add to 1"),
        (("--prevalence", "apl=some,aml=0.5"), "needs a number"),
        (("--prevalence", "apl=0.1,apl=0.2"), "twice"),
        (("--prevalence", "apll=0.1,aml=0.2"), "did you mean 'apl'"),
        (("--adapt",), "one --ensemble"),
        (("--fold", "9"), "no fold 9"),
        (("--answer", "nowhere.json"), "healthy patients"),
    ],
    ids=str,
)
def test_what_the_one_answer_cannot_do_is_refused_plainly(trained, tmp_path, words, why) -> None:
    asked = ("--answer", trained.answer, "--data", trained.data, "--out", tmp_path / "out.csv")
    code, output = command(*asked, *words)
    assert code == 1
    assert why in " ".join(output.split())
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.usefixtures("no_work")
def test_ensembles_of_another_run_have_no_one_answer_together(trained, tmp_path) -> None:
    words = ("--answer", trained.answer, "--data", trained.data, "--out", tmp_path / "out.csv")
    other = trained.root / "ensembles" / "apl_healthy"
    code, output = command(*words, "--ensemble", trained.ensemble, "--ensemble", other)
    assert (code, "same run" in output) == (1, True), output
    code, output = command(*words, "--ensemble", other, "--prevalence", "apl=0.1,aml=0.1")
    assert (code, "give several" in output) == (1, True), output


# --- what is written ------------------------------------------------------------------------------


def test_only_the_patients_with_the_highest_probabilities_keep_their_pictures(trained, final) -> None:
    found = read(trained.data)
    judged = list(judge_patients(final, trained.data, found.smears, found.cells))
    assert all(each.pictures[0] or each.pictures[1] for each in judged)
    for each in judged:
        for side, sign in zip(each.pictures, (1, -1), strict=True):
            evidence = [sign * picture.evidence for picture in side]
            assert evidence == sorted(evidence, reverse=True)
            assert all(value > 0 for value in evidence)
    kept = keep_pictures(iter(judged), 3)
    assert [each.patient for each in kept] == [each.patient for each in judged]
    pictured = {each.patient for each in kept if each.pictures != ([], [])}
    bare = Models(final.bundle, final.outer_fold)  # as `evaluate` and `adapt` judge
    assert next(judge_patients(bare, trained.data, found.smears, found.cells)).evidence is None
    assert pictured == {each.patient for each in sorted(judged, key=lambda each: -each.probability)[:3]}


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["predict", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, done.output


def test_local_diagnoses_correct_an_ensemble_whose_probabilities_are_too_low(trained, data, tmp_path) -> None:
    """The new ensemble is used like any other; without a gain nothing is written."""
    bundle = read_bundle(trained.ensemble)
    low = replace(bundle.combinations[-1], offset=bundle.combinations[-1].offset - 6.0)
    model = bundle.model.model_copy(update={"combinations": [*bundle.model.combinations[:-1], as_json(low)]})
    write_changed(tmp_path / "low" / "model", bundle, model)
    known = trained.answers[["patient", "diagnosis"]]
    known.to_csv(tmp_path / "known.csv", index=False)
    asked = ["adapt", "--data", str(data), "--labels", str(tmp_path / "known.csv"), "--ensemble"]
    done = CliRunner().invoke(app, [*asked, str(tmp_path / "low"), "--out", str(tmp_path / "right")])
    assert done.exit_code == 0, done.output
    assert "log loss" in done.output
    means = []
    for name in ("low", "right"):
        table = tmp_path / f"{name}.csv"
        assert command("--ensemble", tmp_path / name, "--data", data, "--out", table)[0] == 0
        shown = pd.read_csv(table).merge(known, on="patient")
        means.append(shown["probability"][shown["diagnosis"].isin(["apl", "aml"])].mean())
    assert means[0] < 0.05
    assert means[1] == pytest.approx(0.5, abs=0.15)
    done = CliRunner().invoke(app, [*asked, str(trained.ensemble), "--out", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert not (tmp_path / "none").exists()


def test_the_command_writes_a_table_and_a_page_twice_the_same(trained, data, tmp_path) -> None:
    evil = "<script>alert(1)</script>"

    def renamed(rows: list[dict]) -> list[dict]:
        return [
            row | {"patient": evil if row["patient"] == rows[0]["patient"] else row["patient"]}
            for row in rows
        ]

    rewrite(data / "wsi.csv", renamed)
    bundle = shutil.copytree(trained.ensemble / "model", tmp_path / "elsewhere")
    for run in ("a", "b"):
        outs = ("--out", tmp_path / f"{run}.csv", "--report", tmp_path / f"{run}.html")
        code, output = command("--ensemble", bundle, "--data", data, *outs)
        assert (code, "18 patients judged" in output) == (0, True), output
    for kind in ("csv", "html"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    table, page = pd.read_csv(tmp_path / "a.csv"), (tmp_path / "a.html").read_text(encoding="utf-8")
    assert list(table.columns) == [
        *("patient", "probability", "low", "high", "verdict", "sensitive", "alarm", "more_cells"),
        *("cells", "smears"),
        *("distance", "stain", "warning"),
    ]
    assert ((table["low"] <= table["probability"]) & (table["probability"] <= table["high"])).all()
    assert (table["low"] < table["high"]).any()
    assert evil in set(table["patient"])
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") > 18
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#patient-)", page)
    assert "research only" in page.lower()
    assert page.count('class="cell" tabindex="0"') == page.count(": evidence ") > 18
    assert "score nuclei: " in page
    assert 'href="#patient-1"' in page
    assert str(data) not in page
    code, output = command("--ensemble", bundle, "--data", data, "--out", tmp_path / "a.csv")
    assert (code, "--overwrite" in output) == (1, True)
    code, output = command("--ensemble", bundle, "--data", data, "--out", tmp_path / "c.csv", "--adapt")
    assert (code, "Adapted to these 18 patients" in output) == (0, True), output
    moved = logit(pd.read_csv(tmp_path / "c.csv")["probability"]) - logit(table["probability"])
    assert moved.std() < 1e-3 < abs(moved.mean())


# --- the cells that decide ------------------------------------------------------------------------


def test_evidence_of_cells_adds_up_to_the_logit_and_qupath_reads_the_boxes(trained, data, tmp_path) -> None:
    """Cells and field of view together explain the whole logit; here the members on cells alone."""
    cells, boxes = tmp_path / "cells.csv", tmp_path / "boxes"
    words = ("--ensemble", trained.ensemble, "--data", data, "--fold", 0, "--out", tmp_path / "out.csv")
    code, output = command(*words, "--cells", cells, "--geojson", boxes)
    assert (code, "files for QuPath" in output) == (0, True), output
    found, table = read(data), read_cells(cells)
    assert list(table) == [
        *("patient", "smear", "cell", "image", "y0", "x0", "y1", "x1"),
        *("score_nuclei", "score_granules", "score_crowd", "attention_crowd", "evidence_apl_aml"),
    ]
    assert sorted(table["cell"]) == sorted(found.cells["cell"])
    attention = table.groupby("patient")["attention_crowd"].sum()
    np.testing.assert_allclose(attention, 1, rtol=1e-5)

    models = Models(read_bundle(trained.ensemble), 0)
    verdict = next(judge_patients(models, data, found.smears, found.cells))
    at = models.combination.members.index("field")
    logits = np.stack([verdict.logits, models.combination.fitted.mean])
    logits[:, at] = models.combination.fitted.mean[at]
    own, mean = models.combination.logit(logits)
    evidence = table.groupby("patient")["evidence_apl_aml"].sum()
    assert evidence[verdict.patient] == pytest.approx(own - mean, abs=1e-4)

    read_again, _ = read_source(boxes, known_classes(), images=data / "wsi")
    again = {cell.attributes["id"]: tuple(cell.box) for cell in read_again.cells}
    assert again == {row["cell"]: tuple(row[end] for end in BOX) for row in table.to_dict("records")}
    written = [json.loads(path.read_text()) for path in sorted(boxes.rglob("*.geojson"))]
    assert len(written) == len(found.smears)
    for feature in (feature for each in written for feature in each["features"]):
        check_feature(feature)
        assert set(feature["properties"]["measurements"]) == set(table.columns[8:])


def check_feature(feature: dict) -> None:
    """A feature as QuPath 0.4 and later reads it (`qupath.lib.io.PathObjectTypeAdapters`)."""
    UUID(feature["id"])
    (ring,) = feature["geometry"]["coordinates"]
    assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
    assert (len(ring), ring[0]) == (5, ring[-1])
    properties = feature["properties"]
    assert set(properties) == {"objectType", "metadata", "classification", "color", "measurements"}
    assert properties["objectType"] in ("annotation", "detection")
    for color in (properties["color"], properties["classification"]["color"]):
        assert all(isinstance(each, int) and 0 <= each < 256 for each in color)
        assert len(color) == 3
    assert all(isinstance(each, str) for each in properties["metadata"].values())
    assert all(isinstance(each, float | int) for each in properties["measurements"].values())


def test_cells_of_several_ensembles_and_with_a_picture_each_are_in_one_table(trained, tmp_path) -> None:
    cells = tmp_path / "cells.csv"
    words = ("--answer", trained.answer, "--data", trained.data, "--out", tmp_path / "out.csv")
    assert command(*words, "--cells", cells)[0] == 0
    several = read_cells(cells)
    assert {f"evidence_{name}" for name in PAIRS} < set(several)
    assert several.columns.is_unique
    assert not several.isna().any(axis=None)
    # Pictures of the cells alone: an ensemble without members on smears.
    cut_out(trained.data, tmp_path / "crops")
    ensemble = tmp_path / "alone"
    bundle = read_bundle(trained.root / "ensembles" / "aml_healthy")
    write_changed(ensemble / "model", bundle, bundle.model)
    words = ("--ensemble", ensemble, "--data", tmp_path / "crops", "--out", tmp_path / "crops.csv")
    code, output = command(*words, "--geojson", tmp_path / "boxes")
    assert (code, "a picture each" in output) == (1, True)
    assert command(*words, "--cells", tmp_path / "crops_cells.csv")[0] == 0
    crops = read_cells(tmp_path / "crops_cells.csv")
    assert (crops["smear"] == "").all()
    assert all((tmp_path / "crops" / image).is_file() for image in crops["image"])
    assert not crops["evidence_aml_healthy"].isna().any()


# --- bad input, before the long work -----------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch) -> Iterator[None]:
    """The test fails if a network would be built."""

    def refuse(*_: object) -> None:
        raise AssertionError("the long work has started")

    monkeypatch.setattr(module, "features_of_views", refuse)
    return


@pytest.mark.usefixtures("no_work")
def test_all_problems_of_the_data_are_listed_before_the_work(trained, data, tmp_path) -> None:
    images = sorted((data / "wsi").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:500])
    images[1].unlink()
    out = tmp_path / "out.csv"
    code, output = command("--ensemble", trained.ensemble, "--data", data, "--out", out)
    assert code == 1
    assert images[0].name in output
    assert images[1].name in output
    assert "params.yaml" not in output
    assert not out.exists()


@pytest.mark.usefixtures("no_work")
def test_without_cells_the_message_names_the_command_that_finds_them(trained, data, tmp_path) -> None:
    (data / "labeled_cells.csv").unlink()
    code, output = command("--ensemble", trained.ensemble, "--data", data, "--out", tmp_path / "out.csv")
    assert (code, f"aplsmear cells {data}" in output, "nuclei, granules, crowd" in output) == (1, True, True)


@pytest.mark.usefixtures("no_work")
def test_members_that_need_smears_are_named_if_all_cells_are_pictures(trained, tmp_path) -> None:
    cut_out(trained.data, tmp_path / "crops")
    words = ("--ensemble", trained.ensemble, "--data", tmp_path / "crops", "--out", tmp_path / "out.csv")
    code, output = command(*words)
    assert (code, "the members field need smears" in output.replace("\n", " ")) == (1, True)


def test_a_patient_has_the_same_scores_of_cells_from_smears_and_from_pictures_of_the_cells(
    trained, final, data, tmp_path
) -> None:
    """Nearly: boxes that are no squares or are at the edge of their smear lack what is around them."""
    cut_out(data, tmp_path / "crops")
    members = [scorer.member.images == "cell" for scorer in final.bundle.members]
    logits = []
    for folder in (data, tmp_path / "crops"):
        found = read(folder)
        judged = list(judge_patients(final, folder, found.smears, found.cells))
        counts = found.cells["patient"].value_counts().sort_index()
        assert {each.patient: each.cells for each in judged} == counts.to_dict()
        logits.append(np.array([each.logits for each in judged]))
    assert np.isnan(logits[1][:, ~np.array(members)]).all()
    differ = np.abs(logits[0] - logits[1])[:, members]
    assert np.median(differ) < 0.5


@pytest.mark.usefixtures("no_work")
def test_a_fold_that_does_not_exist_is_refused(trained, tmp_path) -> None:
    words = ("--ensemble", trained.ensemble, "--data", trained.data, "--out", tmp_path / "out.csv")
    code, output = command(*words, "--fold", 3)
    assert (code, "no fold 3" in output) == (1, True)


# --- a stranger's bundle -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Lambda", "layers.Lambda", "custom>Lambda", "os.system"])
def test_only_networks_of_keras_applications_are_built(name) -> None:
    with pytest.raises(UserError, match="has no"):
        cut_network(BACKBONE.model_copy(update={"application": name}), "cell", 1)


def test_weights_that_link_to_another_file_are_refused(tmp_path) -> None:
    path = tmp_path / "linked.weights.h5"
    cut_network(BACKBONE, "cell", SEED)[0].save_weights(path)
    names: list[str] = []
    with h5py.File(path, "r+") as file:
        file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        shape, kind = file[names[0]].shape, file[names[0]].dtype
        del file[names[0]]
        file.create_dataset(names[0], shape, kind, external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(UserError, match="another file"):
        cut_network(BACKBONE.model_copy(update={"weights": str(path)}), "cell", 1)


def test_the_graph_of_a_bundle_gives_the_features_of_training(trained) -> None:
    request = read_bundle(trained.ensemble).backbone("net", "cell", BACKBONE.layer)
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    own = Network(trained.root / "backbones" / "net" / "cell.onnx", BACKBONE.layer).features(images)
    theirs = Network(request.graph, request.layers).features(images)
    for one, other in zip(own, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_new_patients_are_judged_without_tensorflow(trained, tmp_path) -> None:
    words = ["predict", "--ensemble", str(trained.ensemble), "--data", str(trained.data)]
    code = (
        "import sys\nfrom aplsmear.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'tensorflow' not in sys.modules"
    )
    out = ["--out", str(tmp_path / "out.csv")]
    subprocess.run([sys.executable, "-c", code, *words, *out], check=True, capture_output=True)
    assert (tmp_path / "out.csv").exists()


# Of MLflow on import.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*type hint.*:UserWarning")
def test_mlflow_serves_the_bundle_with_the_same_probabilities(
    trained, final, data, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    report = tmp_path / "report.html"
    report.write_text("<p>held-out patients</p>", encoding="utf-8")
    for _ in range(2):  # the stage is run again, with the same inputs
        tracker = Tracker(tmp_path, "ensemble apl_aml", "key", {}, {})
        tracker.log_ensemble(trained.ensemble / "model", report)
        tracker.close({}, {"auroc.value": 0.9})
    import mlflow

    (logged,) = mlflow.MlflowClient().search_runs(["1"])
    run = logged.info.run_id
    assert logged.data.metrics == {"auroc.value": 0.9}
    assert [file.path for file in mlflow.MlflowClient().list_artifacts(run)] == ["report.html"]
    model = mlflow.pyfunc.load_model(f"runs:/{run}/model")
    found = model.predict(pd.DataFrame({"folder": [str(data)]}))
    assert list(found.columns) == model.metadata.signature.outputs.input_names()
    assert found["folder"].unique() == [str(data)]
    expected = predicted(final, data)
    pd.testing.assert_frame_equal(found.set_index("patient")[expected.columns], expected)
    assert not list((tmp_path / "mlartifacts").rglob("*.pkl"))
