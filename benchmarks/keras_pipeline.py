"""What a user would write without the pipeline: files, Keras's loader and augmentation, `predict`, `fit`.

Usage: python benchmarks/keras_pipeline.py DATA CELLS.CSV WEIGHTS TRIALS.CSV FOLDER

The same cells, network and weights as in benchmarks/scale.py, one plain and one augmented view of each, and
knobs of augmentation as near to those of params.yaml as Keras's layers come. Then the heads of TRIALS.CSV,
one `fit` a trial and pair of folds, and those that score every cell unseen (see aplsmear.evaluation.splits).
Features and scores go to FOLDER, and parts.json: CPU seconds of each part.
"""

import json
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
from keras import layers
from PIL import Image

SIZE, BATCH, CUT = 64, 64, "conv_pw_11_relu"
CLASSES, PER_PATIENT = ["healthy", "apl"], 50  # cells of a patient that heads are trained on


def write_cells(data: Path, cells: pd.DataFrame, folder: Path) -> None:
    """One file a cell, in a folder for its diagnosis."""
    images = {path.name: path for path in (data / "wsi").iterdir()}
    for name, of_smear in cells.groupby("image", sort=False):
        smear = Image.open(images[Path(str(name)).name]).convert("RGB")
        for cell in of_smear.itertuples():
            path = folder / str(cell.diagnosis) / f"{cell.cell}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            smear.crop((cell.x0, cell.y0, cell.x1, cell.y1)).resize((SIZE, SIZE)).save(path)


def make_features(weights: Path, folder: Path) -> tuple[list[np.ndarray], list[str]]:
    """Features of the plain and of the augmented views, and the name of each cell."""
    full = keras.applications.MobileNet(
        include_top=False, weights=None, alpha=0.5, input_shape=(SIZE, SIZE, 3)
    )
    keras.Model(full.input, full.get_layer(CUT).output).load_weights(weights)
    image = keras.Input((SIZE, SIZE, 3))
    cut = keras.Model(full.input, full.get_layer(CUT).output)
    pooled = layers.GlobalAveragePooling2D()(cut(layers.Rescaling(1 / 127.5, -1)(image)))
    network = keras.Model(image, pooled)
    augmentation = keras.Sequential(
        [
            layers.RandomFlip(),
            layers.RandomRotation(0.5, fill_mode="reflect"),
            layers.RandomZoom(0.15, fill_mode="reflect"),
            layers.RandomTranslation(0.06, 0.06, fill_mode="reflect"),
            layers.RandomHue(8 / 255),
            layers.RandomSaturation((0.46, 0.54)),
            layers.RandomBrightness(0.15),
            layers.RandomGaussianBlur(sigma=(0.05, 0.8)),
            layers.Rescaling(1 / 255),  # noise is of values up to 1
            layers.GaussianNoise(4 / 255),
            layers.Rescaling(255.0),
        ]
    )
    images = keras.utils.image_dataset_from_directory(
        folder / "cells", labels=None, image_size=(SIZE, SIZE), batch_size=BATCH, shuffle=False
    )
    views = images.map(lambda each: augmentation(each, training=True))
    features = [network.predict(each, verbose=0) for each in (images, views)]
    for name, each in zip(("plain", "augmented"), features, strict=True):
        np.save(folder / f"{name}.npy", each)
    return features, [Path(path).stem for path in images.file_paths]


def fit_head(trial: Any, x: np.ndarray, label: np.ndarray, inside: np.ndarray, judged: np.ndarray) -> Any:
    """A head on the cells `inside`, which looks at those `judged` after every epoch, if there are any."""
    model = keras.Sequential([keras.Input((x.shape[1],)), layers.Normalization()])
    model.layers[0].adapt(x[inside])
    for _ in range(trial.depth):
        model.add(layers.Dense(trial.width, activation=trial.activation))
        model.add(layers.Dropout(trial.dropout))
    model.add(layers.Dense(1, activation="sigmoid"))
    optimizer = keras.optimizers.AdamW(trial.learning_rate, weight_decay=trial.weight_decay)
    model.compile(optimizer, keras.losses.BinaryCrossentropy(label_smoothing=trial.smoothing))
    seen = (x[judged], label[judged]) if judged.any() else None
    model.fit(
        x[inside],
        label[inside],
        batch_size=trial.batch,
        epochs=trial.epochs,
        validation_data=seen,
        validation_batch_size=512,
        verbose=0,
    )
    return model


def make_heads(trials: pd.DataFrame, features: list[np.ndarray], cells: pd.DataFrame) -> np.ndarray:
    """The search, then scores of all cells by the heads of every world: float32 (heads, cells)."""
    fold = cells["fold"].to_numpy()
    label = (cells["diagnosis"] == CLASSES[1]).to_numpy(np.float32)
    few = (cells.groupby("patient").cumcount() < PER_PATIENT) & cells["diagnosis"].isin(CLASSES)
    pairs = list(combinations(np.unique(fold), 2))
    for trial in trials.itertuples():
        x = features[min(trial.views, 1)]
        for pair in pairs:
            held_out = np.isin(fold, pair)
            fit_head(trial, x, label, few & ~held_out, few & held_out)
    chosen = next(trials.itertuples())
    outer_folds = [*pairs, *((each,) for each in np.unique(fold)), ()]
    heads = [
        fit_head(chosen, features[0], label, few & ~np.isin(fold, each), few & False) for each in outer_folds
    ]
    return np.stack([head.predict(features[0], batch_size=2048, verbose=0)[:, 0] for head in heads])


def main(data: Path, table: Path, weights: Path, trials: Path, folder: Path) -> None:
    began = [time.process_time()]
    cells = pd.read_csv(table)
    write_cells(data, cells, folder / "cells")
    began.append(time.process_time())
    features, names = make_features(weights, folder)
    began.append(time.process_time())
    ordered = cells.set_index(cells["cell"].astype(str)).loc[names]
    np.save(folder / "scores.npy", make_heads(pd.read_csv(trials), features, ordered))
    began.append(time.process_time())
    parts = dict(zip(("start_and_cells", "features", "heads"), np.diff([0.0, *began[1:]]), strict=True))
    (folder / "parts.json").write_text(json.dumps(parts), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
