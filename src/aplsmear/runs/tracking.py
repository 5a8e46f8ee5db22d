"""MLflow shows every run and trial. The results are what DVC tracks: nothing is lost without MLflow."""

from __future__ import annotations

import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from aplsmear.errors import brief
from aplsmear.files import hold
from aplsmear.runs.imports import PACKAGE
from aplsmear.secrets import without_secrets

log = logging.getLogger(__name__)

EXPERIMENT = "aplsmear"
NAMES = "DVC_EXP_NAME"  # tag: the DVC experiments that a run belongs to, separated by blanks
# Unless the user sets them: do not wait minutes for a dead server, send no usage data, print no notices.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
# Columns of the answer of a logged ensemble, with MLflow's types.
VERDICTS = {
    "folder": "string", "patient": "string", "probability": "double", "low": "double", "high": "double",
    "verdict": "long", "sensitive": "long", "alarm": "string", "more_cells": "string", "cells": "long",
    "smears": "long", "distance": "double", "stain": "double", "warning": "string",
}  # fmt: skip
LONGEST_TAG = 5000  # characters
_MOST_RUNS = 50_000  # that MLflow returns at once
_MOST_POINTS = 900  # that MLflow takes at once, beside 100 parameters


class Tracker:
    """A run and its nested trials. If the server does not answer, there is one warning, and no logging."""

    def __init__(
        self, folder: Path, name: str, key: str, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        """Open the run with this key, a hash of all its inputs; continue it if another process has begun it.

        The folder gets mlflow.db and mlartifacts, unless MLFLOW_TRACKING_URI names a server. Tags replace
        those of an earlier process; names of DVC experiments are added. All trials have `params` in common.
        """
        self._client: Any
        self._is_reachable = True
        self._run = self._experiment = ""
        self._trials: set[str] = set()
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        self._attempt(lambda: self._open(folder, name, key, dict(tags), dict(params)))

    def log_trial(
        self,
        number: int,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        *,
        started: float,
        ended: float,
        failure: str = "",
        name: str = "",
        curves: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Log a finished trial as a nested run, unless it has been logged before.

        Times are in seconds since 1970. Only finite numbers are logged. `failure` says why the trial failed,
        if it did; `name` is shown in place of its number; `curves` have one number per epoch.
        """

        def action() -> None:
            tags = {"mlflow.parentRunId": self._run, "trial": str(number)}
            tags |= {"failure": without_secrets(failure)[:LONGEST_TAG]} if failure else {}
            start, shown = int(started * 1000), name or f"trial {number}"
            run = self._client.create_run(self._experiment, start, tags, shown).info.run_id
            _log(self._client, run, params, dict(metrics) | {"seconds": ended - started}, curves or {})
            self._client.set_terminated(run, "FAILED" if failure else "FINISHED", int(ended * 1000))
            self._trials.add(str(number))

        if str(number) not in self._trials:
            self._attempt(action)

    def log_model(self, model: Any) -> None:
        """Log a keras.Model that takes uint8 images, with its signature."""

        def action() -> None:
            import mlflow
            import numpy as np
            from mlflow.models import infer_signature

            example = np.zeros((1, *model.input_shape[1:]), np.uint8)
            signature = infer_signature(example, model(example, training=False).numpy())
            # Given here; otherwise MLflow loads the model in another process to find them.
            needs = [f"{name}=={version(name)}" for name in ("tensorflow", "keras", "numpy")]
            with mlflow.start_run(self._run):
                mlflow.tensorflow.log_model(model, name="model", signature=signature, pip_requirements=needs)

        self._attempt(action, files=True)

    def log_ensemble(self, bundle: Path, report: Path) -> None:
        """Log the report of an ensemble, and its bundle as a model (`aplsmear.prediction.mlflow_model`).

        The model has this package beside it, and names the versions of the libraries that it needs.
        """

        def action() -> None:
            import mlflow
            from mlflow.models import ModelSignature
            from mlflow.types import ColSpec, Schema

            outputs = [ColSpec(kind, name) for name, kind in VERDICTS.items()]
            signature = ModelSignature(Schema([ColSpec("string", "folder")]), Schema(outputs))
            needs = [line for line in requires("aplsmear") or [] if "extra ==" not in line]
            names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needs]
            self._client.log_artifact(self._run, str(report))
            with mlflow.start_run(self._run), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it asks for an example, which it would judge at once
                mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(PACKAGE / "prediction" / "mlflow_model.py"),
                    artifacts={"bundle": str(bundle)},
                    code_paths=[str(PACKAGE)],
                    signature=signature,
                    pip_requirements=[f"{name}=={version(name)}" for name in names],
                )

        self._attempt(action, files=True)

    def log_pictures(self, folder: Path) -> None:
        """Log the files of a folder."""
        self._attempt(lambda: self._client.log_artifacts(self._run, str(folder), folder.name), files=True)

    def close(self, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """Log the results of the run, and end it."""

        def action() -> None:
            for tag, value in tags.items():
                self._client.set_tag(self._run, tag, str(value)[:LONGEST_TAG])
            _log(self._client, self._run, {}, metrics)
            self._client.set_terminated(self._run)

        self._attempt(action)

    def _attempt(self, action: Callable[[], None], *, files: bool = False) -> None:
        """Log something; a failure is a warning. Only `files` may be missing in a run that goes on."""
        if not self._is_reachable:
            return
        # A bad MLFLOW_* variable gives a ValueError.
        failures: tuple[type[Exception], ...] = (OSError, ValueError)
        try:
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            failures += (MlflowException, SQLAlchemyError)
            action()
        except failures as error:
            self._is_reachable = files
            what = "MLflow cannot store the files of this run" if files else "MLflow cannot be reached"
            reason = without_secrets(brief(error))
            log.warning("%s; this run continues without it and loses nothing. (%s)", what, reason)

    def _open(self, folder: Path, name: str, key: str, tags: dict[str, str], params: dict[str, Any]) -> None:
        import mlflow

        if server := os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(_signed_in(server))
            client = mlflow.MlflowClient()
            self._experiment = _experiment(client)
        else:
            database = (folder / "mlflow.db").resolve()
            # If names of folders have letters that mean something in a URL: the path from here.
            special = any(letter in str(database) for letter in "?#%")
            mlflow.set_tracking_uri(f"sqlite:///{os.path.relpath(database) if special else database}")
            with hold(database.with_name("mlflow.db.lock")):  # only one process may create the tables
                client = mlflow.MlflowClient()
                self._experiment = _experiment(client, database.with_name("mlartifacts").as_uri())
        runs = client.search_runs([self._experiment], f"tags.key = '{key}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            names = f"{runs[0].data.tags.get(NAMES, '')} {tags.pop(NAMES, '')}".split()
            tags |= {NAMES: " ".join(dict.fromkeys(names))} if names else {}
            for tag, value in tags.items():
                client.set_tag(self._run, tag, value)
        else:
            tags["key"] = key
            self._run = client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
            _log(client, self._run, params, {})
        nested = f"tags.mlflow.parentRunId = '{self._run}'"
        for each in client.search_runs([self._experiment], nested, max_results=_MOST_RUNS):
            if each.info.status == "RUNNING":
                client.delete_run(each.info.run_id)  # a killed process logged this trial only in part
            else:
                self._trials.add(each.data.tags["trial"])
        self._client = client


def _log(
    client: Any,
    run: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    curves: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Log parameters, numbers, and curves of one number per epoch; only finite numbers."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    settings = [Param(key, str(value)) for key, value in params.items()]
    points = [
        Metric(key, value, now, step)
        for key, values in ({key: [value] for key, value in metrics.items()} | dict(curves or {})).items()
        for step, value in enumerate(values)
        if math.isfinite(value)
    ]
    for start in range(0, max(1, len(points)), _MOST_POINTS):
        client.log_batch(run, points[start : start + _MOST_POINTS], [] if start else settings)


def _experiment(client: Any, artifacts: str | None = None) -> str:
    """The id of this project's experiment in MLflow, which is created if it is not there."""
    found = client.get_experiment_by_name(EXPERIMENT)
    return str(found.experiment_id if found else client.create_experiment(EXPERIMENT, artifacts))


def _signed_in(server: str) -> str:
    """The address without user and password, because MLflow logs it; they go into MLflow's own variables."""
    parts = urlsplit(server)
    if not parts.scheme.startswith("http") or parts.password is None:
        return server
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
