"""Small sources of each kind, as the programs' own documentation shows them: two pictures, three cells."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT = 200, 100
# picture, x0, y0, x1, y1, class
CELLS = [
    ("a.png", 20, 10, 60, 50, "Promyelocyte"),
    ("a.png", 100, 30, 150, 80, "Lymphocyte"),
    ("b.png", 40, 20, 80, 70, "Promyelocyte"),
]


def picture(path: Path, seed: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """A picture of its own for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rough = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(rough, shape[::-1], interpolation=cv2.INTER_CUBIC))


def pictures(folder: Path) -> None:
    """The two pictures."""
    for seed, name in enumerate(("a.png", "b.png")):
        picture(folder / name, seed)


def csv(folder: Path) -> Path:
    """Corners in px."""
    pictures(folder / "images")
    rows = [f"{name},{x0},{y0},{x1},{y1},{label}" for name, x0, y0, x1, y1, label in CELLS]
    path = folder / "boxes.csv"
    path.write_text("\n".join(["filename,xmin,ymin,xmax,ymax,class", *rows]) + "\n", encoding="utf-8")
    return path


def csv_shares(folder: Path) -> Path:
    """Centres as shares of the picture; the titles tell nothing."""
    pictures(folder)
    rows = [
        f"{name};{(x0 + x1) / 2 / WIDTH};{(y0 + y1) / 2 / HEIGHT};"
        f"{(x1 - x0) / WIDTH};{(y1 - y0) / HEIGHT};{label}"
        for name, x0, y0, x1, y1, label in CELLS
    ]
    path = folder / "boxes.csv"
    path.write_text("\n".join(["bild;mx;my;b;h2;art", *rows]) + "\n", encoding="utf-8")
    return path


TITLES = {"picture": "bild", "xc": "mx", "yc": "my", "width": "b", "height": "h2", "label": "art"}


def coco(folder: Path) -> Path:
    """https://cocodataset.org/#format-data"""
    pictures(folder / "train2017")
    names = ["Promyelocyte", "Lymphocyte"]
    content = {
        "info": {"year": 2026},
        "images": [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in "ab"],
        "categories": [{"id": n + 1, "name": name, "supercategory": "cell"} for n, name in enumerate(names)],
        "annotations": [
            {
                "id": number,
                "image_id": name[0],
                "category_id": names.index(label) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "segmentation": [],
                "iscrowd": 0,
            }
            for number, (name, x0, y0, x1, y1, label) in enumerate(CELLS)
        ],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def voc(folder: Path) -> Path:
    """As LabelImg writes it."""
    pictures(folder / "JPEGImages")
    for image in ("a", "b"):
        objects = "".join(
            f"<object><name>{label}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
            f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, x0, y0, x1, y1, label in CELLS
            if name == f"{image}.png"
        )
        path = folder / "Annotations" / f"{image}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"<annotation><folder>JPEGImages</folder><filename>{image}.png</filename>"
            f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>{objects}</annotation>",
            encoding="utf-8",
        )
    return folder


def yolo(folder: Path) -> Path:
    """https://docs.ultralytics.com/datasets/detect: a picture of the same name in two folders."""
    for seed, (part, name) in enumerate((("train", "a.png"), ("val", "b.png"))):
        picture(folder / "images" / part / name, seed)
        path = folder / "labels" / part / f"{name[0]}.txt"
        path.parent.mkdir(parents=True)
        lines = [
            f"{int(label == 'Lymphocyte')} {(x0 + x1) / 2 / WIDTH} {(y0 + y1) / 2 / HEIGHT} "
            f"{(x1 - x0) / WIDTH} {(y1 - y0) / HEIGHT}"
            for image, x0, y0, x1, y1, label in CELLS
            if image == name
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "data.yaml").write_text(
        "train: images/train\nval: images/val\nnames:\n  0: Promyelocyte\n  1: Lymphocyte\n",
        encoding="utf-8",
    )
    return folder


def kitti(folder: Path) -> Path:
    """https://github.com/bostondiditeam/kitti/blob/master/resources/devkit_object/readme.txt"""
    pictures(folder / "image_2")
    (folder / "label_2").mkdir()
    for image in ("a", "b"):
        lines = [
            f"{label} 0.00 0 0 {x0}.0 {y0}.0 {x1}.0 {y1}.0 0 0 0 0 0 0 0"
            for name, x0, y0, x1, y1, label in CELLS
            if name[0] == image
        ]
        (folder / "label_2" / f"{image}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def labelme(folder: Path) -> Path:
    """https://github.com/wkentaro/labelme/blob/main/examples/bbox_detection"""
    pictures(folder)
    for image in ("a", "b"):
        shapes = [
            {
                "label": label,
                "points": [[x1, y1], [x0, y0]]
                if label == "Promyelocyte"
                else [[x0, y0], [x1, y0], [x1, y1], [x0, y1]],
                "group_id": None,
                "shape_type": "rectangle" if label == "Promyelocyte" else "polygon",
                "flags": {},
            }
            for name, x0, y0, x1, y1, label in CELLS
            if name[0] == image
        ]
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"{image}.png",
            "imageData": None,
        }
        (folder / f"{image}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def geojson(folder: Path) -> Path:
    """What QuPath's "Export objects as GeoJSON" writes: a list of features, or a collection."""
    pictures(folder / "images")
    for image in ("a", "b"):
        features = [
            {
                "type": "Feature",
                "id": f"0000-{x0}",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]],
                },
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": label, "color": [200, 0, 0]},
                },
            }
            for name, x0, y0, x1, y1, label in CELLS
            if name[0] == image
        ]
        content = features if image == "a" else {"type": "FeatureCollection", "features": features}
        (folder / f"{image}.png.geojson").write_text(json.dumps(content), encoding="utf-8")
    return folder


def label_studio(folder: Path) -> Path:
    """https://labelstud.io/guide/task_format: names as Label Studio gives them to uploaded files."""
    pictures(folder / "images")
    tasks = []
    for number, image in enumerate(("a.png", "b.png")):
        results = [
            {
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": WIDTH,
                "original_height": HEIGHT,
                "image_rotation": 0,
                "value": {
                    "x": 100 * x0 / WIDTH,
                    "y": 100 * y0 / HEIGHT,
                    "width": 100 * (x1 - x0) / WIDTH,
                    "height": 100 * (y1 - y0) / HEIGHT,
                    "rotation": 0,
                    "rectanglelabels": [label],
                },
            }
            for name, x0, y0, x1, y1, label in CELLS
            if name == image
        ]
        data = {"image": f"/data/upload/1/12ab34cd-{image}"}
        tasks.append({"id": number, "data": data, "annotations": [{"id": 1, "result": results}]})
    path = folder / "project-1.json"
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return path


ALL = [csv, coco, voc, yolo, kitti, labelme, geojson, label_studio]
