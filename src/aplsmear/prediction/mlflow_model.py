"""An ensemble as a model of MLflow: `predict` takes folders of new patients.

MLflow stores this file as text and the bundle beside it (models from code), so no pickle is written or read:

    model = mlflow.pyfunc.load_model("runs:/<run>/model")
    model.predict(pandas.DataFrame({"folder": ["/data/new"]}))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from aplsmear.data.dataset import read_data_set
from aplsmear.ensembles.bundle import read_bundle
from aplsmear.prediction.predict import Models, check_input, judge_patients, verdict_table


class EnsembleModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """The models for new patients of a bundle."""

    def load_context(self, context: Any) -> None:
        """Read and check the bundle that is stored with the model."""
        self._bundle = read_bundle(Path(context.artifacts["bundle"]))

    def predict(self, model_input: pd.DataFrame) -> pd.DataFrame:
        """Judge the patients of the folders in the column ``folder``; each holds ``wsi.csv``, labels are not
        needed.

        Returns a row for each patient of each folder: ``folder``, then the columns of `verdict_table`. Raises
        DataSetError if a folder is no valid data set, UserError if it does not have what the ensemble
        needs.
        """
        models = Models(self._bundle, self._bundle.outer_fold_of(None))
        tables = []
        for folder in model_input["folder"]:
            found = read_data_set(
                Path(folder), {}, min_box=self._bundle.model.min_box, skip_bad_images=False, labelled=False
            )
            check_input(self._bundle, found.smears, found.cells, Path(folder))
            verdicts = list(judge_patients(models, Path(folder), found.smears, found.cells))
            table = verdict_table(verdicts, models.combination, self._bundle.model.cell_curve)
            tables.append(table.assign(folder=folder)[["folder", *table.columns]])
        return pd.concat(tables, ignore_index=True)


mlflow.models.set_model(EnsembleModel())
