"""MLflow gets everything once; if it does not answer, this is logged once."""

import logging
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aplsmear.runs.tracking import EXPERIMENT, Tracker

# Warnings about MLflow's use of SQLAlchemy and SQLite.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning"),
]

TAGS = {"stage": "tune", "task": "blast", "optuna_study": "abc", "git_commit": "f00", "data_version": "d41"}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return mlflow.MlflowClient(uri)


def runs(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id]))


def study(tags: dict[str, str], trials: int) -> Tracker:
    tracker = Tracker(Path(), "tune blast", "abc", tags, {"trials": 3})
    for number in range(trials):
        failure = "loss not finite" if number == 2 else ""
        metrics = {"auroc": float("nan") if failure else 0.7 + number / 10, "auroc_fold_0": 0.6}
        tracker.log_trial(number, {"width": 16}, metrics, started=1000.0, ended=1012.5, failure=failure)
    return tracker


def test_trials_are_nested_runs_and_a_resumed_study_logs_none_twice(client: Any) -> None:
    study(TAGS, 2)  # killed: never closed
    study(TAGS | {"DVC_EXP_NAME": "later"}, 3).close({"chosen": "1"}, {"auroc": 0.75})
    study(TAGS, 3).close({"chosen": "0"}, {"auroc": 0.75})  # the same study again, with another choice
    found = runs(client)
    (parent,) = [run for run in found if "trial" not in run.data.tags]
    nested = {run.data.tags["trial"]: run for run in found if "trial" in run.data.tags}
    assert len(found) == 4
    assert sorted(nested) == ["0", "1", "2"]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested.values()} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    assert TAGS.items() <= parent.data.tags.items()
    assert parent.data.tags["DVC_EXP_NAME"] == "later"
    assert parent.data.tags["chosen"] == "0"
    assert parent.data.metrics["auroc"] == 0.75
    assert parent.data.params == {"trials": "3"}
    first, failed = nested["0"], nested["2"]
    assert first.data.params == {"width": "16"}
    assert first.data.metrics == {"auroc": 0.7, "auroc_fold_0": 0.6, "seconds": 12.5}
    assert first.info.end_time - first.info.start_time == 12500
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure"] == "loss not finite"
    assert "auroc" not in failed.data.metrics


def test_a_trial_that_a_killed_process_logged_in_part_is_finished_by_the_next(client: Any) -> None:
    study(TAGS, 1)
    (parent,) = [run for run in runs(client) if "trial" not in run.data.tags]
    tags = {"mlflow.parentRunId": parent.info.run_id, "trial": "1"}
    client.create_run(parent.info.experiment_id, tags=tags)  # killed here
    study(TAGS, 3).close({}, {})
    found = runs(client)
    assert sorted(run.data.tags.get("trial", "") for run in found) == ["", "0", "1", "2"]
    assert {run.info.status for run in found} == {"FINISHED", "FAILED"}
    (cut,) = [run for run in found if run.data.tags.get("trial") == "1"]
    assert cut.data.metrics["auroc"] == pytest.approx(0.8)


def test_a_model_and_pictures_come_back_as_they_were_logged(client: Any, tmp_path: Path) -> None:
    import keras
    import mlflow

    image = keras.Input((8, 6, 3), dtype="uint8")
    signal = keras.layers.Flatten()(keras.ops.cast(image, "float32") / 255)
    model = keras.Model(image, keras.layers.Dense(1, activation="sigmoid")(signal))
    (tmp_path / "explanations").mkdir()
    (tmp_path / "explanations" / "true_positive_1.png").write_bytes(b"picture")
    tracker = Tracker(Path(), "finetune blast", "abc", TAGS, {})
    tracker.log_model(model)
    tracker.log_pictures(tmp_path / "explanations")
    tracker.close({}, {"auroc": 0.75})

    (run,) = runs(client)
    assert run.info.status == "FINISHED"
    kept = client.download_artifacts(run.info.run_id, "explanations/true_positive_1.png")
    assert Path(kept).read_bytes() == b"picture"
    (logged,) = client.search_logged_models([run.info.experiment_id])
    back = mlflow.pyfunc.load_model(logged.model_uri)
    images = np.random.Generator(np.random.Philox(1)).integers(0, 256, (3, 8, 6, 3)).astype(np.uint8)
    np.testing.assert_allclose(back.predict(images), model(images).numpy(), atol=1e-6)
    with pytest.raises(mlflow.MlflowException, match="schema"):  # the signature says: uint8
        back.predict(images.astype(np.float32))


def test_a_server_that_does_not_answer_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "aplsmear"):
        study(TAGS, 3).close({}, {})
    assert [record.message for record in caplog.records if "cannot be reached" in record.message] == [
        record.message for record in caplog.records if record.name == "aplsmear.runs.tracking"
    ]
    assert sum(record.name == "aplsmear.runs.tracking" for record in caplog.records) == 1


def test_a_server_that_stops_is_logged_once(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = study(TAGS, 1)

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection reset")

    monkeypatch.setattr(tracker._client, "create_run", gone)
    with caplog.at_level(logging.WARNING, "aplsmear"):
        for number in (1, 2):
            tracker.log_trial(number, {}, {}, started=0, ended=1)
        tracker.close({}, {})
    assert sum(record.name == "aplsmear.runs.tracking" for record in caplog.records) == 1
    assert len(runs(client)) == 2


def test_a_run_whose_files_cannot_be_stored_ends_nevertheless(
    client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlartifacts").write_text("a file in the way")
    (tmp_path / "explanations").mkdir()
    (tmp_path / "explanations" / "true_positive_1.png").write_bytes(b"picture")
    tracker = Tracker(Path(), "finetune blast", "abc", TAGS, {})
    with caplog.at_level(logging.WARNING, "aplsmear"):
        tracker.log_pictures(tmp_path / "explanations")
        tracker.close({}, {"auroc": 0.75})
    (run,) = runs(client)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["auroc"] == 0.75
    (warning,) = [each.message for each in caplog.records if each.name == "aplsmear.runs.tracking"]
    assert "cannot store the files" in warning


def test_the_names_of_all_experiments_that_a_run_belongs_to_are_kept(client: Any) -> None:
    for name in ("one", "two", "one"):
        study(TAGS | {"DVC_EXP_NAME": name}, 1).close({}, {})
    (parent,) = [run for run in runs(client) if "trial" not in run.data.tags]
    assert parent.data.tags["DVC_EXP_NAME"] == "one two"


def test_two_processes_that_begin_at_once_lose_nothing(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from aplsmear.runs.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), "tune", sys.argv[2], {"DVC_EXP_NAME": sys.argv[2]}, {})
for number in range(5):
    tracker.log_trial(number, {"width": number}, {"auroc": 0.5}, started=1.0, ended=2.0)
tracker.close({}, {"auroc": 0.5})
"""
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), folder.name],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    printed = "".join(process.communicate()[1] for process in started)
    assert [process.returncode for process in started] == [0, 0], printed
    assert "cannot be reached" not in printed
    found = runs(pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"))
    assert sorted(run.data.tags.get("DVC_EXP_NAME", "trial") for run in found) == ["a", "b", *["trial"] * 10]
    artifacts = {run.info.artifact_uri.split("/mlartifacts/")[0] for run in found}
    assert artifacts == {tmp_path.as_uri()}
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_letters_of_a_url_in_the_name_of_a_folder_change_nothing(tmp_path: Path) -> None:
    place = tmp_path / "p 20%c?x#y"
    beside = place / ".dvc" / "tmp"
    beside.mkdir(parents=True)
    code = """
from pathlib import Path
from aplsmear.runs.tracking import Tracker
tracker = Tracker(Path("../.."), "tune blast", "abc", {}, {})
tracker.log_pictures(Path())
tracker.close({}, {"auroc": 0.5})
"""
    (beside / "picture.png").touch()
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    subprocess.run([sys.executable, "-c", code], cwd=beside, env=environment, check=True)
    with closing(sqlite3.connect(place / "mlflow.db")) as database:
        assert database.execute("select count(*) from runs").fetchall() == [(1,)]
    assert len(list((place / "mlartifacts").rglob("picture.png"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert [path.name for path in beside.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    "setting",
    [
        "MLFLOW_TRACKING_URI=http://[bad",
        "MLFLOW_LOGGING_LEVEL=nonsense",
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE=many",
    ],
)
def test_a_setting_that_mlflow_cannot_use_is_one_warning(tmp_path: Path, setting: str) -> None:
    code = """
from pathlib import Path
from aplsmear.runs.tracking import Tracker
tracker = Tracker(Path(), "tune blast", "abc", {}, {})
tracker.close({}, {"auroc": 0.5})
"""
    name, value = setting.split("=")
    environment = {key: other for key, other in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {name: value}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "this run continues without it" in line
