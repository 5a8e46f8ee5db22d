"""What a user would write without the pipeline: files, Keras's loader and augmentation, `predict`.

Usage: python benchmarks/keras_pipeline.py DATA CELLS.CSV WEIGHTS FOLDER

The same cells, network and weights as in benchmarks/scale.py, one plain and one augmented view of each, and
knobs of augmentation as near to those of params.yaml as Keras's layers come. Features go to FOLDER.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import layers
from PIL import Image

SIZE, BATCH, CUT = 64, 64, "conv_pw_11_relu"


def write_cells(data: Path, cells: pd.DataFrame, folder: Path) -> None:
    """One file a cell, in a folder for its diagnosis."""
    images = {path.name: path for path in (data / "wsi").iterdir()}
    for name, of_smear in cells.groupby("image", sort=False):
        smear = Image.open(images[Path(str(name)).name]).convert("RGB")
        for cell in of_smear.itertuples():
            path = folder / str(cell.diagnosis) / f"{cell.cell}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            smear.crop((cell.x0, cell.y0, cell.x1, cell.y1)).resize((SIZE, SIZE)).save(path)


def main(data: Path, table: Path, weights: Path, folder: Path) -> None:
    cells = pd.read_csv(table)
    write_cells(data, cells, folder / "cells")
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
    np.save(folder / "plain.npy", network.predict(images, verbose=0))
    views = images.map(lambda each: augmentation(each, training=True))
    np.save(folder / "augmented.npy", network.predict(views, verbose=0))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
