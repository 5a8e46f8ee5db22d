"""A reader for each kind of annotations: all of them return the same table of cells.

No living library reads them all: globox has no KITTI, Label Studio and QuPath, and ends with a traceback at a
damaged file; supervision needs opencv-python, which conflicts with the headless build; pycocotools reads COCO
only. Each reader checks the form of its file, and nothing of a file is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import yaml
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring
from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter

from aplsmear.data.csvfile import read_all
from aplsmear.errors import brief
from aplsmear.exchange.found import (
    ATTRIBUTES,
    Cell,
    ExchangeError,
    Found,
    Pictures,
    around,
    hull,
    json_of,
    text_of,
    validated,
)
from aplsmear.images.reading import SUFFIXES
from aplsmear.words import named

Box = tuple[float, float, float, float]
Point = Annotated[list[FiniteFloat], Field(min_length=2)]

_KITTI_FIELDS = (15, 16)  # the last one is a score
_WITHOUT_SIZE = "points, whose cells have no size (give it with --size)"
_CENTRES = ("xc", "yc", "width", "height")
_CORNERS = ("x0", "y0", "x1", "y1")
_SIDES = ("x0", "y0", "width", "height")
TITLES = {  # what a column holds -> its usual titles, without spaces, dashes and capital letters
    "picture": "imgname picture image filename imagename file imagepath filepath path img imageid",
    "label": "label celltype class classname labelname category type annotation",
    "x0": "x0 xmin bboxxmin bboxx left startx minx xstart x",
    "y0": "y0 ymin bboxymin bboxy top starty miny ystart y",
    "x1": "x1 xmax bboxxmax right endx maxx xend x2",
    "y1": "y1 ymax bboxymax bottom endy maxy yend y2",
    "width": "w width bboxwidth bboxw boxwidth",
    "height": "h height bboxheight bboxh boxheight",
    "xc": "xc cx xcenter xcentre centerx centrex",
    "yc": "yc cy ycenter ycentre centery centrey",
    "patient": "patient patientid subject subjectid case caseid",
    "diagnosis": "diagnosis baglabel",
    "site": "site hospital",
}


@dataclass
class Request:
    """What is read, and how."""

    source: Path  # a file or a folder
    files: list[Path]  # of annotations, sorted
    pictures: Pictures
    size: float | None = None  # px, side of the box around a point; None: points are left out
    columns: Mapping[str, str] = field(default_factory=dict)  # what a column of a CSV file holds -> its title

    def found(self, kind: str, more: str = "") -> Found:
        """What will be found: nothing yet."""
        files = self.files[0].name if len(self.files) == 1 else f"{len(self.files):,} files"
        return Found(f"{kind}, {files}{more}")


# --- Pascal VOC -----------------------------------------------------------------------------------


def voc(request: Request) -> Found:
    """Pascal VOC: an XML file for each picture."""
    found = request.found("Pascal VOC")
    for path in request.files:
        try:
            tree = fromstring(text_of(path))
        except (ParseError, DefusedXmlException, ValueError) as error:
            raise ExchangeError(f"{path} is not valid XML ({brief(error)}): export it again.") from error
        if tree.tag != "annotation":
            raise ExchangeError(f"{path} is no Pascal VOC file: its first tag is {tree.tag!r}.")
        picture = request.pictures.find(_tag(tree, "filename") or path.name)
        if picture is None:
            continue
        found.pictures.append(picture)
        for one in tree.iter("object"):
            y0, x0, y1, x1 = (
                _number(_tag(one, f"bndbox/{name}"), path) for name in ("ymin", "xmin", "ymax", "xmax")
            )
            found.cells.append(Cell(picture, _tag(one, "name"), (y0, x0, y1, x1)))
    return found


def _tag(element: Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _number(text: str, path: Path) -> float:
    """The finite number in a text; ExchangeError if it has none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ExchangeError(f"{path}: {text[:40]!r} is no number of px. Correct it.")
    return number


# --- COCO -----------------------------------------------------------------------------------------


class _CocoImage(BaseModel):
    id: int | str
    file_name: str


class _CocoAnnotation(BaseModel):
    image_id: int | str
    category_id: int | str
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    attributes: dict[str, Any] = {}


class _CocoCategory(BaseModel):
    id: int | str
    name: str


class _Coco(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoAnnotation]
    categories: list[_CocoCategory]


def coco(request: Request) -> Found:
    """COCO: a JSON file for many pictures; bbox is x, y, width, height in px."""
    found = request.found("COCO")
    for path in request.files:
        content = validated(_Coco, json_of(path), path)
        names = {one.id: one.name for one in content.categories}
        pictures = {one.id: request.pictures.find(one.file_name) for one in content.images}
        found.pictures += filter(None, pictures.values())
        for one in content.annotations:
            if one.image_id not in pictures or one.category_id not in names:
                what = "image" if one.image_id not in pictures else "category"
                raise ExchangeError(f"{path}: an annotation names an {what} that the file lacks.")
            picture = pictures[one.image_id]
            if one.bbox is None:
                found.left_out["annotations without a box"].append(path.name)
            elif picture:
                x, y, width, height = one.bbox
                box = y, x, y + height, x + width
                found.cells.append(Cell(picture, names[one.category_id], box, _attributes(one.attributes)))
    return found


def _attributes(given: Mapping[str, Any]) -> dict[str, str]:
    """Those that `aplsmear.exchange.export` writes."""
    return {name: str(given[name]) for name in ATTRIBUTES if name in given}


# --- LabelMe --------------------------------------------------------------------------------------


class _Shape(BaseModel):
    label: str
    points: Annotated[list[Point], Field(min_length=1)]
    shape_type: str = "polygon"


class _LabelMe(BaseModel):
    shapes: list[_Shape]
    imagePath: str


def labelme(request: Request) -> Found:
    """LabelMe: a JSON file for each picture."""
    found = request.found("LabelMe")
    for path in request.files:
        content = validated(_LabelMe, json_of(path), path)
        picture = request.pictures.find(content.imagePath)
        if picture is None:
            continue
        found.pictures.append(picture)
        for shape in content.shapes:
            _add(found, picture, shape.label, _labelme_box(shape, request.size), path.name)
    return found


def _add(
    found: Found,
    picture: str,
    label: str,
    box: Box | None,
    name: str,
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Add a cell; without a box it is left out under this name."""
    if box is None:
        found.left_out[_WITHOUT_SIZE].append(name)
    else:
        found.cells.append(Cell(picture, label, box, attributes or {}))


def _labelme_box(shape: _Shape, size: float | None) -> Box | None:
    (x, y), last = shape.points[0][:2], shape.points[-1]
    if shape.shape_type == "circle":  # its centre, and a point of its edge
        side = 2 * math.hypot(last[0] - x, last[1] - y)
        return around(x, y, side, side)
    if shape.shape_type == "point":
        return around(x, y, size, size) if size else None
    return hull(shape.points)


# --- QuPath ---------------------------------------------------------------------------------------


class _Geometry(BaseModel):
    type: Literal["Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon"]
    coordinates: Annotated[list[Any], Field(min_length=1)]


class _Class(BaseModel):
    name: str = ""


class _Properties(BaseModel):
    classification: _Class | None = None
    metadata: dict[str, Any] = {}


class _Feature(BaseModel):
    geometry: _Geometry
    properties: _Properties = _Properties()


class _Features(BaseModel):
    features: list[_Feature]


_POINTS = TypeAdapter(Annotated[list[Point], Field(min_length=1)])


def geojson(request: Request) -> Found:
    """QuPath: a GeoJSON file for each picture, with its name; px from the upper left."""
    found = request.found("QuPath GeoJSON")
    for path in request.files:
        picture = request.pictures.find(str(path.relative_to(request.source.parent)))
        if picture is None:
            continue
        found.pictures.append(picture)
        content = json_of(path)
        features = content["features"] if isinstance(content, dict) and "features" in content else content
        listed = {"features": features if isinstance(features, list) else [features]}
        for feature in validated(_Features, listed, path).features:
            classification = feature.properties.classification
            label = classification.name if classification else ""
            attributes = _attributes(feature.properties.metadata)
            for box in _geometry_boxes(feature.geometry, request.size, path):
                _add(found, picture, label, box, path.name, attributes)
    return found


def _geometry_boxes(geometry: _Geometry, size: float | None, path: Path) -> Iterator[Box | None]:
    """One box for a shape; one for each of several points; None for a point without a size."""
    given = geometry.coordinates
    try:
        if geometry.type.endswith("Point"):
            for x, y, *_ in _POINTS.validate_python([given] if geometry.type == "Point" else given):
                yield around(x, y, size, size) if size else None
        else:
            parts = [given] if geometry.type == "LineString" else given
            parts = [part[0] for part in parts] if geometry.type == "MultiPolygon" else parts
            yield hull([point for part in parts for point in _POINTS.validate_python(part)])
    except (ValueError, TypeError, LookupError) as error:
        raise ExchangeError(f"{path}: a {geometry.type} has wrong coordinates. Export it again.") from error


# --- Label Studio ---------------------------------------------------------------------------------


class _Result(BaseModel):
    type: str = ""
    original_width: FiniteFloat = 0
    original_height: FiniteFloat = 0
    value: dict[str, Any] = {}
    meta: dict[str, Any] = {}


class _LabelStudioAnnotation(BaseModel):
    result: list[_Result]
    was_cancelled: bool = False


class _Task(BaseModel):
    data: dict[str, Any]
    annotations: list[_LabelStudioAnnotation] = []


class _Tasks(BaseModel):
    tasks: list[_Task]


class _Percent(BaseModel):
    """The place of a shape in percent of the picture; degrees clockwise about the upper left."""

    x: FiniteFloat = 0
    y: FiniteFloat = 0
    width: FiniteFloat = 0
    height: FiniteFloat = 0
    rotation: FiniteFloat = 0
    radiusX: FiniteFloat = 0
    radiusY: FiniteFloat = 0
    points: list[Point] = []


def label_studio(request: Request) -> Found:
    """Label Studio: a JSON file (its export "JSON") for many pictures."""
    found = request.found("Label Studio")
    for path in request.files:
        for task in validated(_Tasks, {"tasks": json_of(path)}, path).tasks:
            texts = (value for value in task.data.values() if isinstance(value, str))
            named = next((text for text in texts if text.lower().endswith(SUFFIXES)), None)
            if named is None:
                raise ExchangeError(f"{path}: the data of a task name no picture. Export it as JSON.")
            picture = request.pictures.find(named)
            given = [one for one in task.annotations if not one.was_cancelled]
            if picture is None:
                continue
            found.pictures.append(picture)
            if len(given) > 1:
                found.left_out["annotations after the first one of a picture"].append(picture)
            for result in given[0].result if given else ():
                _add_result(found, result, picture, request, path)
    return found


def _add_result(found: Found, result: _Result, picture: str, request: Request, path: Path) -> None:
    """Add one shape of Label Studio to the cells, or to what was left out."""
    labels: Any = next((value for key, value in result.value.items() if key.endswith("labels")), [])
    kind = result.type.removesuffix("labels")
    if kind not in ("rectangle", "polygon", "ellipse", "keypoint"):
        found.left_out[f"results of the type {result.type!r}"].append(picture)
        return
    height, width = result.original_height, result.original_width
    if not (height > 0 and width > 0):
        height, width = request.pictures.size(picture)
    place = validated(_Percent, result.value, path)
    x, y, w, h = place.x * width, place.y * height, place.width * width, place.height * height
    rx, ry = place.radiusX * width, place.radiusY * height
    angle = math.radians(place.rotation)
    cos, sin = math.cos(angle), math.sin(angle)
    if kind == "polygon":
        if not place.points:
            raise ExchangeError(f"{path}: a polygon has no points. Export it again.")
        box = hull([(one[0] * width, one[1] * height) for one in place.points])
    elif kind == "ellipse":
        box = around(x, y, 2 * math.hypot(rx * cos, ry * sin), 2 * math.hypot(rx * sin, ry * cos))
    elif kind == "rectangle":
        corners = [(0, 0), (w, 0), (w, h), (0, h)]
        box = hull([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in corners])
    elif request.size:
        box = around(x, y, 100 * request.size, 100 * request.size)
    else:
        found.left_out[_WITHOUT_SIZE].append(picture)
        return
    y0, x0, y1, x1 = (each / 100 for each in box)
    label = str(labels[0]) if isinstance(labels, list) and labels else ""
    found.cells.append(Cell(picture, label, (y0, x0, y1, x1), _attributes(result.meta)))


# --- YOLO and KITTI -------------------------------------------------------------------------------


def yolo(request: Request) -> Found:
    """YOLO: a text file for each picture, a line for each cell: class, then shares of the picture.

    A line has a centre, a width and a height, perhaps a score, or the corners of a polygon. The names of the
    classes are in data.yaml, classes.txt or obj.names; without them a class is its number.
    """
    names, said = _yolo_names(request.source)
    found = request.found("YOLO", said)
    for path, picture, lines in _texts(request, found):
        height, width = request.pictures.size(picture)
        for words in lines:
            numbers = [_number(word, path) for word in words]
            place, values = int(numbers[0]), numbers[1:]
            if len(values) in (4, 5):
                box = around(values[0] * width, values[1] * height, values[2] * width, values[3] * height)
            elif len(values) >= 6 and len(values) % 2 == 0:
                box = hull([(x * width, y * height) for x, y in zip(values[::2], values[1::2], strict=True)])
            else:
                raise ExchangeError(
                    f"{path}: a line has {len(words)} numbers; a box has 5, a polygon 7 or more."
                )
            found.cells.append(Cell(picture, names.get(place, str(place)), box))
    return found


def _yolo_names(source: Path) -> tuple[dict[int, str], str]:
    """Number -> name of the classes, and where they are from."""
    folder = source if source.is_dir() else source.parent
    for place in (folder, folder.parent):
        for name in ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names"):
            if (path := place / name).is_file():
                return _names_in(path), f", classes of {name}"
    return {}, ", classes without names"


def _names_in(path: Path) -> dict[int, str]:
    text = text_of(path)
    if path.suffix not in (".yaml", ".yml"):
        return {place: line.strip() for place, line in enumerate(text.splitlines()) if line.strip()}
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ExchangeError(f"{path} is not valid YAML ({brief(error)}). Correct it.") from error
    names = content.get("names") if isinstance(content, dict) else None
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if isinstance(names, dict) and all(isinstance(place, int) for place in names):
        return {place: str(name) for place, name in names.items()}
    raise ExchangeError(f"{path} has no list `names` of the classes. Add it.")


def kitti(request: Request) -> Found:
    """KITTI: a text file for each picture, a line for each cell; px from left, top to right, bottom."""
    found = request.found("KITTI")
    for path, picture, lines in _texts(request, found):
        for words in lines:
            if len(words) not in _KITTI_FIELDS:
                raise ExchangeError(f"{path}: a line has {len(words)} fields instead of 15 or 16.")
            x0, y0, x1, y1 = (_number(word, path) for word in words[4:8])
            found.cells.append(Cell(picture, words[0], (y0, x0, y1, x1)))
    return found


def _texts(request: Request, found: Found) -> Iterator[tuple[Path, str, list[list[str]]]]:
    """Each text file, its picture, and the words of its lines; the picture is added to `found`."""
    base = request.source if request.source.is_dir() else request.source.parent
    for path in request.files:
        lines = [line.split() for line in text_of(path).splitlines() if line.strip()]
        picture = request.pictures.find(str(path.relative_to(base)))
        if picture is not None:
            found.pictures.append(picture)
            yield path, picture, lines


def text_kind(path: Path) -> str:
    """``yolo`` or ``kitti`` by the first line of a text file, '' if it is none of both."""
    words = next((line.split() for line in text_of(path).splitlines() if line.strip()), [])
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return "kitti" if len(words) in _KITTI_FIELDS else ""
    return "yolo" if len(numbers) >= 5 and numbers[0] >= 0 and numbers[0].is_integer() else ""


# --- CSV ------------------------------------------------------------------------------------------


def columns_of(titles: Sequence[str], given: Mapping[str, str], path: Path) -> dict[str, str]:
    """What each column holds -> its title: as `given` (ExchangeError if it is not there), else guessed."""
    plain = {"".join(filter(str.isalnum, title.lower())): title for title in titles}
    guessed = {
        what: plain[name]
        for what, names in TITLES.items()
        for name in reversed(names.split())
        if name in plain
    }
    if missing := [title for title in given.values() if title not in titles]:
        raise ExchangeError(f"{path} has no column {missing[0]!r}; it has {named(titles, 12)}.")
    if "x1" in guessed and plain.get("x1") == guessed["x1"] and "x2" in plain:  # x1, y1, x2, y2
        corners = {"x0": "x1", "y0": "y1", "x1": "x2", "y1": "y2"}
        guessed |= {what: plain[name] for what, name in corners.items() if name in plain}
    return guessed | dict(given)


def form_of(columns: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the four numbers of a box that a table has; empty if it has no boxes."""
    forms = (_CORNERS, _CENTRES, _SIDES)
    return next((form for form in forms if "picture" in columns and columns.keys() >= set(form)), ())


def table(request: Request) -> Found:
    """CSV files with a row for each cell: picture, class, and a box in one of three forms.

    Numbers are shares of the picture if none of a file is above 1, else px. Without columns of boxes, each
    row names the picture of one cell.
    """
    found = Found("")
    found.what = "; ".join(_add_rows(found, request, path) for path in request.files)
    return found


def _add_rows(found: Found, request: Request, path: Path) -> str:
    """Add the cells of one CSV file; what the file is."""
    rows = read_all(path)
    columns = columns_of(list(rows.columns), request.columns, path)
    form = form_of(columns)
    if not form and not {"picture", "label"} <= columns.keys():
        raise ExchangeError(
            f"{path} has no known columns of boxes; it has {named(rows.columns, 12)}. Name them: "
            "--column picture=TITLE --column x0=TITLE, then y0, x1 and y1, or width and height with x0, y0 "
            "(upper left) or xc, yc (centre)."
        )
    texts = rows[[columns[what] for what in form]].to_numpy()
    numbers = np.array(
        [[_number(text.replace(",", "."), path) if text else math.nan for text in row] for row in texts]
    ).reshape(len(rows), -1)
    shares = bool(np.nanmax(np.abs(numbers), initial=0) <= 1)
    for place, row in enumerate(rows.to_dict("records")):
        picture = request.pictures.find(row[columns["picture"]], path.parent)
        if picture is None:
            continue
        found.pictures.append(picture)
        if np.isnan(numbers[place]).any():
            found.left_out["rows without a box"].append(f"row {rows.index[place]}")
            continue
        scale = request.pictures.size(picture) if form and shares else (1, 1)
        box = _csv_box(form, numbers[place].tolist(), scale) if form else None
        more = {what: row[columns[what]] for what in ("patient", "diagnosis") if what in columns}
        found.cells.append(Cell(picture, row[columns["label"]] if "label" in columns else "", box, **more))
    shown = ", ".join(f"{what}={columns[what]}" for what in ("picture", "label", *form) if what in columns)
    kind = ("shares of the picture" if shares else "px") if form else "single cells"
    return f"CSV, {path.name}: {shown}; {kind}"


def _csv_box(form: tuple[str, ...], numbers: Sequence[float], scale: tuple[float, float]) -> Box:
    """The box of four numbers; `scale` is the height and width of the picture, or 1 for px."""
    (a, b, c, d), (height, width) = numbers, scale
    sides = (b, a, b + d, a + c) if form == _SIDES else around(a, b, c, d)
    y0, x0, y1, x1 = (b, a, d, c) if form == _CORNERS else sides
    return y0 * height, x0 * width, y1 * height, x1 * width


READERS: dict[str, Callable[[Request], Found]] = {
    "voc": voc, "coco": coco, "labelme": labelme, "geojson": geojson, "label-studio": label_studio,
    "yolo": yolo, "kitti": kitti, "csv": table,
}  # fmt: skip
