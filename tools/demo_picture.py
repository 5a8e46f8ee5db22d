"""Draw docs/demo_smears.png: the first smear of a healthy, another AML and an APL patient, side by side.

Usage: python tools/demo_picture.py [FILE]
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from aplsmear.sources.drawn import patient_smears

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "demo_smears.png"
PATIENTS = (11, 10, 24)  # of the demo
CAPTIONS = {"healthy": "healthy marrow", "aml": "other AML", "apl": "APL"}
SCALE = 0.8  # of the picture over the smears


def main(path: Path) -> None:
    columns = []
    for number in PATIENTS:
        patient, smear = next(patient_smears(number, seed=1))
        height, width = (round(side * SCALE) for side in smear.image.shape[:2])
        small = cv2.resize(smear.image, (width, height), interpolation=cv2.INTER_AREA)
        small = (small.astype(np.int32) + 2 >> 2 << 2).clip(0, 255).astype(np.uint8)  # halves the file
        strip = np.full((34, width, 3), 255, np.uint8)
        caption, font = CAPTIONS[patient.diagnosis], cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(strip, caption, (4, 24), font, 0.7, (40, 40, 40), 1, cv2.LINE_AA)
        column = np.vstack([strip, small])
        columns.append(cv2.copyMakeBorder(column, 0, 6, 4, 4, cv2.BORDER_CONSTANT, value=(255,) * 3))
    bgr = cv2.cvtColor(np.hstack(columns), cv2.COLOR_RGB2BGR)
    path.write_bytes(cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
