"""MLflow: every run and trial, for looking around. The record is what DVC tracks; losing MLflow loses
nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from aplsmear.files import hold
from aplsmear.secrets import without_secrets

log = logging.getLogger(__name__)

EXPERIMENT = "aplsmear"
NAMES = "DVC_EXP_NAME"  # tag: the experiments of DVC that a run belongs to, with blanks between
# MLflow would otherwise wait for a dead server for minutes, and report to its makers how it is used; a wish
# of the user comes first.
MANNERS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
LONGEST_TAG = 5000  # characters


def _experiment(client: Any, artifacts: str | None = None) -> str:
    """The id of this project's experiment, made if it is not there."""
    found = client.get_experiment_by_name(EXPERIMENT)
    return str(found.experiment_id if found else client.create_experiment(EXPERIMENT, artifacts))


def _with_names(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Tags that replace old ones; a run that serves several experiments keeps the names of all."""
    names = f"{old.get(NAMES, '')} {new.get(NAMES, '')}".split()
    return dict(new) | ({NAMES: " ".join(dict.fromkeys(names))} if names else {})


def _signed_in(server: str) -> str:
    """The address without user and password, which go where MLflow looks for them: it logs its address."""
    parts = urlsplit(server)
    if not parts.scheme.startswith("http") or parts.password is None:
        return server
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class Tracker:
    """A parent run and its nested trials. Where the server does not answer, it says so once and is silent
    after."""

    def __init__(
        self, folder: Path, name: str, key: str, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        """Open the run of this key, or go on with it if an earlier process did a part or all of it.

        Args:
            folder: gets mlflow.db and the folder mlartifacts, unless MLFLOW_TRACKING_URI names a server.
            name: what people see.
            key: names the run by what it depends on; with the same key, the same run.
            tags: those of an earlier process are replaced; names of DVC's experiments are added to.
            params: what the trials have in common.
        """
        self._client: Any = None
        self._run = self._experiment = ""
        self._trials: set[str] = set()
        self._cut: dict[str, str] = {}  # trials that a killed process logged in part, and their runs
        for variable, value in MANNERS.items():
            os.environ.setdefault(variable, value)
        self._guard(lambda: self._open(folder, name, key, dict(tags), dict(params)))

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
        """A finished trial as a nested run; a trial that is there already is not logged again.

        Args:
            number: of the trial.
            params: its recipe.
            metrics: finite numbers by name; others are left out.
            started: seconds since 1970.
            ended: seconds since 1970.
            failure: why the trial failed, if it did.
            name: what people see; empty: its number.
            curves: numbers by name, one an epoch.
        """

        def log() -> None:
            tags = {"mlflow.parentRunId": self._run, "trial": str(number)}
            tags |= {"failure": without_secrets(failure)[:LONGEST_TAG]} if failure else {}
            run = (
                self._cut.get(str(number))
                or self._client.create_run(
                    self._experiment,
                    run_name=name or f"trial {number}",
                    tags=tags,
                    start_time=int(started * 1000),
                ).info.run_id
            )
            self._log(self._client, run, params, dict(metrics) | {"seconds": ended - started})
            self._log_curves(run, curves or {})
            status = "FAILED" if failure else "FINISHED"
            self._client.set_terminated(run, status, int(ended * 1000))
            self._trials.add(str(number))

        if self._client and str(number) not in self._trials:
            self._guard(log)

    def log_model(self, model: Any) -> None:
        """A keras.Model that takes uint8 images, with its signature, below the run."""

        def log() -> None:
            from importlib.metadata import version

            import mlflow
            import numpy as np
            from mlflow.models import infer_signature

            example = np.zeros((1, *model.input_shape[1:]), np.uint8)
            signature = infer_signature(example, model(example, training=False).numpy())
            # Named, since MLflow would find them out by loading the model in a process of its own.
            needs = [f"{name}=={version(name)}" for name in ("tensorflow", "keras", "numpy")]
            with mlflow.start_run(self._run):
                mlflow.tensorflow.log_model(model, name="model", signature=signature, pip_requirements=needs)

        if self._client:
            self._guard(log)

    def log_pictures(self, folder: Path) -> None:
        """The files of a folder, below the run."""
        if self._client:
            self._guard(lambda: self._client.log_artifacts(self._run, str(folder), folder.name))

    def close(self, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """Log what came out of the whole and end its run."""
        if self._client:
            self._guard(lambda: self._close(tags, metrics))

    def _guard(self, action: Callable[[], None]) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            action()
        except (MlflowException, SQLAlchemyError, OSError) as error:
            self._client = None
            first = without_secrets(str(error).splitlines()[0])
            log.warning(
                "MLflow cannot be reached; this run goes on without it and loses nothing. (%s)", first
            )

    def _open(self, folder: Path, name: str, key: str, tags: dict[str, str], params: dict[str, Any]) -> None:
        import mlflow

        if server := os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(_signed_in(server))
            client = mlflow.MlflowClient()
            self._experiment = _experiment(client)
        else:
            database = (folder / "mlflow.db").resolve()
            mlflow.set_tracking_uri(f"sqlite:///{database}")
            # Two processes that make the tables at once would be in each other's way.
            with hold(database.with_name("mlflow.db.lock")):
                client = mlflow.MlflowClient()
                self._experiment = _experiment(client, database.with_name("mlartifacts").as_uri())
        runs = client.search_runs([self._experiment], f"tags.key = '{key}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            for tag, value in _with_names(runs[0].data.tags, tags).items():
                client.set_tag(self._run, tag, value)
        else:
            self._run = client.create_run(
                self._experiment, run_name=name, tags=tags | {"key": key}
            ).info.run_id
            self._log(client, self._run, params, {})
        token = None
        while True:
            page = client.search_runs(
                [self._experiment],
                f"tags.mlflow.parentRunId = '{self._run}'",
                max_results=1000,
                page_token=token,
            )
            for each in page:
                number = each.data.tags["trial"]
                if each.info.status == "RUNNING":
                    self._cut[number] = each.info.run_id
                else:
                    self._trials.add(number)
            token = page.token
            if not token:
                break
        self._client = client

    def _close(self, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        for tag, value in tags.items():
            self._client.set_tag(self._run, tag, str(value)[:LONGEST_TAG])
        self._log(self._client, self._run, {}, metrics)
        self._client.set_terminated(self._run)

    def _log_curves(self, run: str, curves: Mapping[str, Sequence[float]]) -> None:
        import math
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(key, value, now, step)
            for key, values in curves.items()
            for step, value in enumerate(values)
            if math.isfinite(value)
        ]
        for start in range(0, len(points), 1000):  # as many as MLflow takes at once
            self._client.log_batch(run, metrics=points[start : start + 1000])

    @staticmethod
    def _log(client: Any, run: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        import math
        import time

        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        client.log_batch(
            run,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items() if math.isfinite(value)],
            params=[Param(key, str(value)) for key, value in params.items()],
        )
