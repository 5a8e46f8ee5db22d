"""MLflow: every run and trial, for looking around. The record is what DVC tracks; losing MLflow loses nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlflow.db"
EXPERIMENT = "aplsmear"


class Tracker:
    """A parent run and its nested trials. Where the server does not answer, it says so once and is silent after."""

    def __init__(self, name: str, tags: Mapping[str, str]) -> None:
        """Open the run of this name and tags, or go on with it if an earlier process was cut off."""
        self._client: Any = None
        self._trials: set[str] = set()
        self._guard(self._open, name, dict(tags))

    def log_trial(self, number: int, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """A finished trial as a nested run; a trial that is there already is not logged again."""
        if str(number) not in self._trials:
            self._guard(self._log_trial, number, dict(params), dict(metrics))

    def close(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Log what came out of the whole study and end its run."""
        self._guard(self._close, dict(params), dict(metrics))

    def _guard(self, action: Any, *arguments: Any) -> None:
        from mlflow.exceptions import MlflowException

        if self._client is None and action != self._open:
            return
        try:
            action(*arguments)
        except (MlflowException, OSError) as error:
            self._client = None
            first = str(error).splitlines()[0]
            log.warning(
                "MLflow cannot be reached; this run goes on without it and loses nothing. (%s)", first
            )

    def _open(self, name: str, tags: dict[str, str]) -> None:
        import mlflow

        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI))
        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(EXPERIMENT)
        self._experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
        wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in sorted(tags.items()))
        runs = client.search_runs([self._experiment], f"{wanted} and attributes.status = 'RUNNING'")
        run = runs[0] if runs else client.create_run(self._experiment, run_name=name, tags=tags)
        self._run = run.info.run_id
        nested = client.search_runs(
            [self._experiment], f"tags.mlflow.parentRunId = '{self._run}'", max_results=50000
        )
        self._trials = {each.data.tags["trial"] for each in nested}
        self._client = client

    def _log_trial(self, number: int, params: dict[str, Any], metrics: dict[str, float]) -> None:
        tags = {"mlflow.parentRunId": self._run, "trial": str(number)}
        run = self._client.create_run(self._experiment, run_name=f"trial {number}", tags=tags)
        self._log(run.info.run_id, params, metrics)
        self._client.set_terminated(run.info.run_id)

    def _close(self, params: dict[str, Any], metrics: dict[str, float]) -> None:
        self._log(self._run, params, metrics)
        self._client.set_terminated(self._run)

    def _log(self, run: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
        import time

        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        self._client.log_batch(
            run,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
            params=[Param(key, str(value)) for key, value in params.items()],
        )
