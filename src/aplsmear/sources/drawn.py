"""Synthetic marrow smears in the layout of the Kaggle data set, in any number.

Every cell is drawn; nothing is copied from a patient. The drawings show the features that a haematologist
uses in a May-Grünwald-Giemsa smear: ratio of nucleus to cytoplasm, shape of the nucleus, chromatin, nucleoli,
granules, Auer rods. They also show what misleads in practice: stain, light, focus, crowded cells, and a share
of abnormal cells that differs widely between patients. Only the cells depend on the diagnosis.

The bytes are the same on every x86-64 computer because pixels are computed with integers. Dyes absorb light
(Beer-Lambert), so optical densities are added in fixed point, and one table turns the sum into grey values.
Random numbers come from Philox streams with the seed (seed, patient, smear).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import TypeAdapter

from aplsmear.data.labels import DIAGNOSES
from aplsmear.data.schema import CELLS_FILE, IMAGE_FOLDER, KAGGLE_CELL_COLUMNS, SMEARS_FILE
from aplsmear.errors import UserError
from aplsmear.params import Diagnosis
from aplsmear.progress import progress
from aplsmear.tables import write_table

HEIGHT, WIDTH = 480, 640
CELL_SIZE = 64
CELLS_PER_SMEAR = 30
JPEG_QUALITY = 86
TWO_SMEARS_SHARE = 0.07  # of the patients
FLAW_EVERY = 20  # patients: one row without a box, one with a box of one pixel
TYPED_SHARE = 0.6  # of the cells

_Points = NDArray[np.float64]
_Mask = NDArray[np.uint8]
_Density = NDArray[np.int32]
_Rgb = tuple[float, float, float]

_UNIT = 1024  # optical density 1.0 (natural logarithm) in fixed point
_SHIFT = 4  # OpenCV draws at 1/16 pixel


# --- what cells look like ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """How one kind of cell is drawn: lengths in radii of the cell, colours as optical density (R, G, B)."""

    share: float  # of a normal marrow, per cent of the nucleated cells
    cell_type: str | None  # label in the data set, None: an object that annotators give no type
    diameter: tuple[float, float]  # mean and standard deviation, in units of `cell_size`
    nuclear: tuple[float, float]  # radius of the nucleus over that of the cell, mean and standard deviation
    shapes: tuple[str, ...]  # of the nucleus, one is chosen at random
    nucleus: _Rgb
    cytoplasm: _Rgb
    grain: float  # chromatin: size of the clumps, pixels at a cell of 64 px
    contrast: float  # chromatin: depth of the clumps
    granules: tuple[float, float] = (0.0, 0.0)  # azurophilic granules, share of pixels: lowest, highest
    specific: float = 0.0  # fine pinkish granules of the maturing granulocyte
    nucleoli: tuple[int, int] = (0, 0)
    hof: float = 0.0  # depth of the pale Golgi zone beside the nucleus
    eccentric: float = 0.3  # distance of the nucleus from the centre, 1: at the cell wall
    rough: float = 0.035  # unevenness of the outline


@dataclass(frozen=True)
class _Tables:
    """The parameters in drawn.json, beside this file."""

    looks: dict[str, _Look]  # by kind of cell
    # FAB class of an AML other than APL -> weight in the random choice, shares of its abnormal cells
    fab: dict[str, tuple[float, dict[str, float]]]


_TABLES = TypeAdapter(_Tables).validate_json(Path(__file__).with_suffix(".json").read_bytes())
_LOOKS, _FAB = _TABLES.looks, _TABLES.fab
KINDS: tuple[str, ...] = tuple(_LOOKS)

_GRANULE: _Rgb = (0.31, 0.96, 0.28)
_SPECIFIC: _Rgb = (0.10, 0.34, 0.12)
_ROD: _Rgb = (0.22, 1.10, 0.62)
_NUCLEOLUS: _Rgb = (-0.17, -0.44, -0.16)
_RED_CELL: _Rgb = (0.11, 0.36, 0.33)
_PLASMA: _Rgb = (0.035, 0.06, 0.025)


# --- sampling: tables only -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stain:
    """How a patient's slide was stained and photographed; independent of the diagnosis."""

    mix: NDArray[np.float64]  # (3, 3), from drawn to seen optical density
    red: NDArray[np.float64]  # optical density (R, G, B) of the red cells
    light: NDArray[np.float64]  # optical density (R, G, B) of the white point
    vignette: float  # darkness of the corners
    centre: tuple[float, float]  # brightest point, share of height and width
    blur: float  # of the focus, px
    noise: float  # of the camera, grey levels
    cover: float  # share of the field under red cells
    pallor: float  # paleness of the middle of red cells
    film: float  # strength of the plasma's tint


@dataclass(frozen=True)
class Patient:
    """What all smears of a patient have in common."""

    diagnosis: Diagnosis
    fab: str | None
    mix: dict[str, float]  # share of each kind of cell; the sum is 1
    rods: float  # probability that an immature myeloid cell has Auer rods
    faggots: float  # probability that an abnormal promyelocyte is a faggot cell
    granularity: float  # factor on the granules of abnormal promyelocytes; low: microgranular variant
    stain: Stain


@dataclass(frozen=True)
class CellPlan:
    """One cell before it is drawn; `typed`: an annotator gave it a type (else its row has only a box)."""

    kind: str
    typed: bool
    rods: int
    faggot: bool
    bilobed: bool
    mitosis: bool
    granularity: float

    @property
    def cell_type(self) -> str | None:
        """Label of this kind in the data set; None if it has no type."""
        return _LOOKS[self.kind].cell_type if self.typed else None

    @property
    def characteristics(self) -> tuple[str, ...]:
        """The special characteristics of a typed cell, sorted; ('None',) if it has none, () if untyped."""
        if not self.typed:
            return ()
        flags = {"Auer rods": self.rods, "Bilobed": self.bilobed, "Faggot cell": self.faggot}
        flags["Mitosis"] = self.mitosis
        return tuple(name for name, is_set in flags.items() if is_set) or ("None",)


def generator(*key: int) -> np.random.Generator:
    """The random stream of one item: the same for the same key, independent of all other streams."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))


def diagnosis_of(patient: int, seed: int) -> Diagnosis:
    """The diagnosis of patient 1, 2, ...; each group of three has one of each, in random order.

    So a third of the patients has each diagnosis, the id is no hint of it, and it does not depend on the
    number of patients.
    """
    block, place = divmod(patient - 1, len(DIAGNOSES))
    return DIAGNOSES[int(generator(seed, 0, block).permutation(len(DIAGNOSES))[place])]


def sample_patient(diagnosis: Diagnosis, rng: np.random.Generator) -> Patient:
    """Draw a patient at random: share of abnormal cells, FAB class, differential count, stain.

    The share varies widely on purpose: some APL marrows have hardly any abnormal promyelocytes, some other
    AML have promyelocytes, and some healthy marrows have a left shift.
    """
    stain = _sample_stain(rng)
    mix = {kind: look.share / 100 for kind, look in _LOOKS.items()}
    shift = float(rng.beta(1.0, 4.0))  # left shift: immature cells at the expense of the mature
    clone: dict[str, float] = {}
    burden, rods, faggots, fab = 0.0, 0.0, 0.0, None
    granularity = float(rng.uniform(0.4, 1.1))
    if diagnosis == "apl":
        fab = "m3"
        burden = _sample_burden(rng)
        blasts = float(rng.beta(1.3, 8.0))
        normal = float(rng.beta(2.0, 7.0))
        clone = {"abnormal promyelocyte": (1 - blasts) * (1 - normal)}
        clone |= {"promyelocyte": (1 - blasts) * normal, "myeloblast": blasts}
        granularity = float(rng.uniform(0.4, 1.2))
        rods, faggots = 0.165 * float(rng.beta(1.2, 1.8)), 0.22 * float(rng.beta(0.9, 1.6))
    elif diagnosis == "aml":
        names = list(_FAB)
        weights = np.array([_FAB[name][0] for name in names])
        fab = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        burden = _sample_burden(rng)
        clone = dict(_FAB[fab][1])
        rods = 0.12 * float(rng.beta(1.2, 2.0)) if rng.random() < 0.5 else 0.004
        faggots = 0.0015
    for kind, extra in (("promyelocyte", 0.18), ("myeloblast", 0.08), ("abnormal promyelocyte", 0.02)):
        mix[kind] += shift * extra
    total = sum(mix.values())
    shares = np.array([(1 - burden) * mix[k] / total + burden * clone.get(k, 0.0) for k in KINDS])
    shares = rng.dirichlet(np.maximum(shares * 60, 0.05))
    mix = dict(zip(KINDS, shares.tolist(), strict=True))
    return Patient(diagnosis, fab, mix, rods, faggots, granularity, stain)


def _sample_burden(rng: np.random.Generator) -> float:
    """Share of leukaemic cells in the marrow: mostly half and more, in one patient of ten very few."""
    low, high = float(rng.uniform(0.05, 0.27)), 0.42 + 0.53 * float(rng.beta(1.7, 1.1))
    return low if rng.random() < 0.1 else high


def _sample_stain(rng: np.random.Generator) -> Stain:
    strength = math.exp(rng.normal(0.0, 0.09))
    mix = np.diag(strength * np.exp(rng.normal(0.0, 0.045, 3))) + rng.normal(0.0, 0.02, (3, 3))
    red = np.array(_RED_CELL) * math.exp(rng.normal(0.0, 0.14)) * np.exp(rng.normal(0.0, 0.10, 3))
    light = rng.uniform(0.02, 0.11) + rng.normal(0.0, 0.016, 3)
    return Stain(
        mix=mix,
        red=red,
        light=np.maximum(light, 0.0),
        vignette=float(rng.uniform(0.0, 0.16)),
        centre=(float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.35, 0.65))),
        blur=float(rng.uniform(0.35, 0.85)),
        noise=float(rng.uniform(0.8, 2.2)),
        cover=float(rng.uniform(0.22, 0.62)),
        pallor=float(rng.uniform(0.45, 0.9)),
        film=float(rng.uniform(0.3, 1.6)),
    )


_IMMATURE = frozenset({"myeloblast", "monoblast", "promyelocyte", "abnormal promyelocyte"})


def sample_cells(patient: Patient, n_cells: int, rng: np.random.Generator) -> list[CellPlan]:
    """Draw the cells of one smear at random: kinds, Auer rods, and which of them an annotator typed."""
    shares = np.array([patient.mix[kind] for kind in KINDS])
    plans = []
    for index in rng.choice(len(KINDS), size=n_cells, p=shares / shares.sum()):
        kind = KINDS[int(index)]
        chance = rng.random(6)
        immature, abnormal = kind in _IMMATURE, kind == "abnormal promyelocyte"
        faggot = bool(abnormal and chance[0] < patient.faggots)
        has_rods = faggot or bool(immature and chance[1] < patient.rods)
        typed_share = 0.85 if has_rods else TYPED_SHARE + 0.01
        plans.append(
            CellPlan(
                kind=kind,
                typed=bool(_LOOKS[kind].cell_type is not None and chance[3] < typed_share),
                rods=int(rng.integers(9, 18)) if faggot else 1 + int(rng.random() < 0.3) if has_rods else 0,
                faggot=faggot,
                bilobed=bool(abnormal and chance[4] < 0.03),
                mitosis=bool(not has_rods and (immature or kind == "erythroblast") and chance[2] < 0.008),
                granularity=patient.granularity if abnormal else 1.0,
            )
        )
    return plans


# --- drawing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A drawn cell."""

    plan: CellPlan
    box: tuple[int, int, int, int]  # y0, x0, y1, x1 in px, end exclusive, clipped to the smear
    mask: NDArray[np.bool_]  # shape of the box: where the cell is
    rods: NDArray[np.bool_]  # shape of the box: where its Auer rods are


@dataclass(frozen=True)
class Smear:
    """A drawn field of view: `image`, uint8 RGB (height, width, 3), and its cells from top to bottom."""

    image: NDArray[np.uint8]
    cells: list[Cell]


def draw_smear(
    patient: Patient,
    rng: np.random.Generator,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    n_cells: int = CELLS_PER_SMEAR,
    cell_size: int = CELL_SIZE,
) -> Smear:
    """Draw one smear of a patient; the picture depends on the arguments alone.

    Fewer than `n_cells` nucleated cells are drawn if the field, `size` (height, width) in px, is full. The
    `cell_size` is the diameter of a promyelocyte in px; all other lengths follow from it.

    Raises:
        UserError: the field is too small for cells.
    """
    _check_size(size, cell_size)
    stain = patient.stain
    density = _background(size, cell_size, stain, rng)
    drawn = []
    plans = sample_cells(patient, n_cells, rng)
    radii = [_radius(plan, cell_size, rng) for plan in plans]
    uncut = [plan.rods > 0 for plan in plans]  # else labelled rods could lie outside the picture
    for plan, radius, centre in zip(plans, radii, _places(radii, uncut, size, rng), strict=True):
        if centre is not None:
            drawn.append(_place_cell(density, _draw_cell(plan, radius, cell_size, stain, rng), plan, centre))
    image = _photograph(density, stain, rng)
    cells = sorted((cell for cell in drawn if cell is not None), key=lambda cell: cell.box)
    return Smear(image, cells)


def _check_size(size: tuple[int, int], cell_size: int) -> None:
    if cell_size < 24 or min(size) < 2 * cell_size:
        raise UserError(
            f"A smear of {size[0]}x{size[1]} px with cells of {cell_size} px cannot be drawn. A cell needs "
            "24 px, and a smear needs room for two cells each way: use larger smears or smaller cells."
        )


def _fill(mask: _Mask, points: _Points, value: int = 255) -> None:
    """Fill the polygon `points` (n, 2), x and y in px, into `mask`, with smooth edges."""
    corners = np.rint(points * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(mask, [corners], value, lineType=cv2.LINE_AA, shift=_SHIFT)


def _blur(mask: _Mask, sigma: float) -> _Mask:
    """Gaussian blur; OpenCV computes it with integers for bytes, so it is the same on every computer."""
    if sigma < 0.2:
        return mask
    blurred: _Mask = cv2.GaussianBlur(mask, (0, 0), round(sigma, 3))
    return blurred


def _texture(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> _Density:
    """Smooth noise, int32 around 0 with a standard deviation of about 64; `sigma` is the grain in px."""
    noise = rng.integers(0, 256, size=shape, dtype=np.uint8)
    smooth = _blur(noise, sigma).astype(np.int32) - 128
    gain = 64.0 / 74.0 * max(1.0, 2.0 * math.sqrt(math.pi) * sigma)
    return (smooth * round(gain * 256)) >> 8


def _outline(radius: float, rough: float, rng: np.random.Generator, squash: float = 0.0) -> _Points:
    """A closed, slightly uneven outline around the origin, (n, 2), x and y; `squash` makes it oval."""
    n_points = 40
    angle = np.arange(n_points) * (2 * math.pi / n_points)
    scale = np.ones(n_points)
    for wave in range(2, 6):
        scale += rough / (wave - 1) * rng.normal() * np.cos(wave * angle + rng.uniform(0, 2 * math.pi))
    oval = np.column_stack([np.cos(angle) * (1 + squash), np.sin(angle) * (1 - squash)])
    return _turn(radius * scale[:, None] * oval, rng.uniform(0, 2 * math.pi))


def _turn(points: _Points, angle: float) -> _Points:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.column_stack([points[:, 0] * cos - points[:, 1] * sin, points[:, 0] * sin + points[:, 1] * cos])


def _background(size: tuple[int, int], cell_size: int, stain: Stain, rng: np.random.Generator) -> _Density:
    """Optical density (3, height, width) of the plasma film, the red cells, platelets and vacuoles."""
    height, width = size
    density = np.zeros((3, height, width), np.int32)
    film = np.maximum(256 + _texture_wide(size, cell_size, rng) * 2, 0)
    _add(density, film, np.array(_PLASMA) * stain.film)
    typical = cell_size * 0.235  # radius: 7.5 µm where a promyelocyte measures 16 µm
    n_cells = round(stain.cover * height * width / (math.pi * typical**2))
    spread = rng.uniform(0.05, 0.10)
    layers = 3
    for _ in range(layers):
        body = np.zeros(size, np.uint8)
        hollow = np.zeros(size, np.uint8)
        for _ in range(n_cells // layers):
            radius = typical * math.exp(rng.normal(0.0, spread))
            centre = np.array([rng.uniform(-radius, width + radius), rng.uniform(-radius, height + radius)])
            shape = _outline(radius, 0.035, rng, abs(rng.normal(0.0, 0.05)))
            depth = round(215 + 26 * rng.uniform(-1, 1))
            _fill(hollow, centre + shape, 0)
            _fill(body, centre + shape, depth)
            pale = min(255, round(255 * stain.pallor * rng.uniform(0.55, 1.1)))
            _fill(hollow, centre + rng.normal(0, 0.06 * radius, 2) + shape * rng.uniform(0.42, 0.62), pale)
        pale_zone = _blur(hollow, typical * 0.2).astype(np.int32)
        thick = _blur(body, 0.6).astype(np.int32) * (255 - pale_zone) // 255
        _add(density, thick, stain.red)
    _platelets(density, cell_size, stain, rng)
    return density


def _texture_wide(size: tuple[int, int], cell_size: int, rng: np.random.Generator) -> _Density:
    """Noise that varies over a few cells: drawn small, then enlarged with integers."""
    small = (size[0] // cell_size + 3, size[1] // cell_size + 3)
    noise = _blur(rng.integers(0, 256, size=small, dtype=np.uint8), 1.0)
    wide = cv2.resize(noise, (size[1], size[0]), interpolation=cv2.INTER_LINEAR_EXACT)
    return np.asarray(wide, np.int32) - 128


def _platelets(density: _Density, cell_size: int, stain: Stain, rng: np.random.Generator) -> None:
    height, width = density.shape[1:]
    mask = np.zeros((height, width), np.uint8)
    for _ in range(rng.poisson(height * width / (cell_size**2) * 0.09)):
        middle = np.array([rng.uniform(0, width), rng.uniform(0, height)])
        for _ in range(1 + rng.poisson(0.5)):
            spot = middle + rng.normal(0, cell_size * 0.08, 2)
            shape = spot + _outline(cell_size * rng.uniform(0.045, 0.085), 0.12, rng)
            _fill(mask, shape, int(rng.integers(110, 210)))
    _add(density, _blur(mask, 0.7).astype(np.int32), stain.mix @ np.array((0.40, 0.66, 0.24)))


def _add(density: _Density, weight: _Density, colour: NDArray[np.float64]) -> None:
    """Add `weight` / 255 times `colour` (optical density R, G, B) to `density`."""
    for channel in range(3):
        density[channel] += weight * round(float(colour[channel]) * _UNIT) // 255


def _radius(plan: CellPlan, cell_size: int, rng: np.random.Generator) -> float:
    mean, spread = _LOOKS[plan.kind].diameter
    return 0.5 * cell_size * float(np.clip(rng.normal(mean, spread), mean - 2 * spread, mean + 2 * spread))


def _places(
    radii: list[float], uncut: list[bool], size: tuple[int, int], rng: np.random.Generator
) -> list[tuple[float, float] | None]:
    """A centre (y, x) for each cell, so that cells do not overlap; None if there is no room.

    As in a photograph, the edge of the field cuts a few cells, but none that must stay `uncut`.
    """
    height, width = size
    taken = np.empty((0, 3))
    places: list[tuple[float, float] | None] = []
    for radius, is_uncut in zip(radii, uncut, strict=True):
        inset = radius * (0.35 if rng.random() < 0.12 and not is_uncut else 1.06)
        found = None
        for _ in range(60):
            y, x = rng.uniform(inset, height - inset), rng.uniform(inset, width - inset)
            reach = taken[:, 2] + radius
            if np.all((taken[:, 0] - y) ** 2 + (taken[:, 1] - x) ** 2 >= (1.02 * reach) ** 2):
                found = (float(y), float(x))
                taken = np.vstack([taken, [y, x, radius]])
                break
        places.append(found)
    return places


@dataclass(frozen=True)
class _Shape:
    """Outline of a cell and of its nucleus: masks (side, side), lengths in px."""

    body: _Mask
    nucleus: _Mask
    radius: float  # of the cell
    nuclear: float  # radius of the nucleus
    centre: _Points  # of the nucleus
    direction: float  # from the centre of the cell to that of the nucleus, radians
    scale: float  # px per px of a cell of `CELL_SIZE`


def _draw_cell(
    plan: CellPlan, radius: float, cell_size: int, stain: Stain, rng: np.random.Generator
) -> tuple[_Density, _Mask, _Mask]:
    """Density (3, side, side) of a cell, and masks (side, side) of the cell and of its Auer rods."""
    look = _vary(_LOOKS[plan.kind], plan, rng)
    shape = _draw_shape(plan, look, radius, cell_size / CELL_SIZE, rng)
    scale = shape.scale
    soft = _blur(shape.nucleus, 0.55 * scale).astype(np.int32)
    inside = _blur(shape.body, 0.6 * scale).astype(np.int32)
    plain = _cytoplasm(shape, look, stain, rng)
    dark = _chromatin(shape, soft, look, stain, rng)
    density = (plain * (255 - soft) + dark * soft) // 255
    _add_granules(density, soft, rng.uniform(*look.granules) * plan.granularity, scale, stain, rng)
    if look.specific:
        fine = _scatter(soft.shape, look.specific, 0.6 * scale, rng) * (255 - soft) // 255
        _add(density, fine, stain.mix @ np.array(_SPECIFIC))
    rods = np.zeros_like(shape.body)
    if plan.rods:
        rods = _draw_rods(shape, plan.faggot, plan.rods, rng)
        _add(density, rods.astype(np.int32), stain.mix @ np.array(_ROD))
    density = np.maximum(density, 0) * inside // 255
    return density, inside.astype(np.uint8), rods


def _draw_shape(plan: CellPlan, look: _Look, radius: float, scale: float, rng: np.random.Generator) -> _Shape:
    """The outlines of a cell and of its nucleus, which lies off the centre in a random direction."""
    side = 2 * math.ceil(radius * 1.45) + 4
    body = np.zeros((side, side), np.uint8)
    _fill(body, side / 2 + _outline(radius, look.rough, rng, abs(rng.normal(0.0, 0.045))))
    ratio = float(np.clip(rng.normal(*look.nuclear), 0.3, 0.93))
    if plan.faggot:
        ratio = min(ratio, 0.62)
    direction = rng.uniform(0, 2 * math.pi)
    offset = radius * (1 - ratio) * look.eccentric * rng.uniform(0.5, 1.0)
    centre = side / 2 + offset * np.array([math.cos(direction), math.sin(direction)])
    kind = "mitosis" if plan.mitosis else "bilobed" if plan.bilobed else ""
    kind = kind or look.shapes[int(rng.integers(len(look.shapes)))]
    nucleus = np.zeros_like(body)
    _draw_nucleus(nucleus, centre, radius * ratio, kind, direction, rng=rng)
    nucleus = np.minimum(nucleus, body)
    if kind == "smudge":
        nucleus, body = _smear_out(nucleus, scale, rng), _smear_out(body, scale, rng)
    return _Shape(body, nucleus, radius, radius * ratio, centre, direction, scale)


def _cytoplasm(shape: _Shape, look: _Look, stain: Stain, rng: np.random.Generator) -> _Density:
    """Optical density of the cytoplasm: cloudy, bluer towards the cell wall, paler in the Golgi zone."""
    body, scale = shape.body, shape.scale
    cloud = 256 + (_texture(body.shape, 2.2 * scale, rng) * 34 >> 6)
    wall = 255 - _blur(body, 3.2 * scale).astype(np.int32)
    cloud += wall * 150 // 255
    if look.hof:
        hof = np.zeros_like(body)
        towards = np.array([math.cos(shape.direction), math.sin(shape.direction)])
        beside = shape.centre - 1.15 * shape.nuclear * towards
        _fill(hof, beside + _outline(shape.radius * 0.42, 0.06, rng))
        cloud -= _blur(hof, 2.4 * scale).astype(np.int32) * round(look.hof * 200) // 255
    density = np.zeros((3, *body.shape), np.int32)
    _add(density, np.maximum(cloud, 40), stain.mix @ np.array(look.cytoplasm))
    return density


def _chromatin(
    shape: _Shape, soft: _Density, look: _Look, stain: Stain, rng: np.random.Generator
) -> _Density:
    """Optical density of the nucleus: clumps of chromatin, a darker membrane, pale nucleoli."""
    nucleus, scale = shape.nucleus, shape.scale
    clumps = 256 + (_texture(nucleus.shape, look.grain * scale, rng) * round(look.contrast * 256) >> 6)
    membrane = np.clip(soft - _blur(nucleus, 2.0 * scale).astype(np.int32), 0, 255)
    clumps += membrane * 50 // 100
    density = np.zeros((3, *nucleus.shape), np.int32)
    _add(density, np.clip(clumps, 90, 460), stain.mix @ np.array(look.nucleus))
    spots = np.zeros_like(nucleus)
    for _ in range(int(rng.integers(look.nucleoli[0], look.nucleoli[1] + 1))):
        angle, reach = rng.uniform(0, 2 * math.pi), shape.nuclear * 0.6 * math.sqrt(rng.random())
        spot = shape.centre + reach * np.array([math.cos(angle), math.sin(angle)])
        _fill(spots, spot + _outline(shape.nuclear * rng.uniform(0.14, 0.23), 0.06, rng))
    pale = _blur(np.minimum(spots, nucleus), 0.8 * scale).astype(np.int32)
    _add(density, pale, stain.mix @ np.array(_NUCLEOLUS))
    return density


def _add_granules(
    density: _Density, soft: _Density, share: float, scale: float, stain: Stain, rng: np.random.Generator
) -> None:
    """Add azurophilic granules over the cytoplasm and, if there are many, over the nucleus too."""
    visible = 255 - soft * round(225 - 70 * min(1.0, 3 * share)) // 255
    fine = _scatter(soft.shape, share, 0.62 * scale, rng) * visible // 255
    coarse = _scatter(soft.shape, 0.16 * share, 1.05 * scale, rng) * visible // 255
    _add(density, np.minimum(fine + coarse, 255), stain.mix @ np.array(_GRANULE))


def _vary(look: _Look, plan: CellPlan, rng: np.random.Generator) -> _Look:
    """The look of one cell: its colour varies a little; erythroblasts mature from blue to pink."""
    tint = np.exp(rng.normal(0.0, 0.07, 3))
    tone = math.exp(rng.normal(0.0, 0.10))
    cytoplasm = np.array(look.cytoplasm)
    nuclear = look.nuclear
    if plan.kind == "erythroblast":
        age = rng.random()
        cytoplasm = (1 - age) * np.array((0.56, 0.48, 0.14)) + age * np.array((0.16, 0.40, 0.30))
        nuclear = (0.78 - 0.2 * age, 0.03)
    elif plan.kind in {"promyelocyte", "abnormal promyelocyte"} and plan.faggot:
        cytoplasm = np.array((0.20, 0.34, 0.14))
    red, green, blue = (cytoplasm * tint).tolist()
    deep = [value * tone for value in look.nucleus]
    return replace(look, cytoplasm=(red, green, blue), nucleus=(deep[0], deep[1], deep[2]), nuclear=nuclear)


def _draw_nucleus(
    mask: _Mask, centre: _Points, radius: float, shape: str, direction: float, *, rng: np.random.Generator
) -> None:
    if shape in {"round", "smudge"}:
        _fill(mask, centre + _outline(radius, 0.03, rng, 0.02))
    elif shape == "oval":
        _fill(mask, centre + _outline(radius, 0.035, rng, rng.uniform(0.06, 0.14)))
    elif shape in {"notched", "kidney", "folded"}:
        depth = {"notched": 0.22, "folded": 0.34, "kidney": 0.58}[shape] * rng.uniform(0.75, 1.2)
        points = _outline(radius * 1.04, 0.07 if shape == "folded" else 0.03, rng, 0.05)
        angle = np.arctan2(points[:, 1], points[:, 0])
        notch = direction + math.pi + rng.normal(0.0, 0.5)
        for turn in (0.0, rng.uniform(1.8, 2.8)) if shape == "folded" else (0.0,):
            gap = np.angle(np.exp(1j * (angle - notch - turn)))
            points *= 1 - depth * np.exp(-0.5 * (gap / rng.uniform(0.38, 0.55)) ** 2)[:, None]
        _fill(mask, centre + points)
    elif shape == "bilobed":
        axis = rng.uniform(0, 2 * math.pi)
        bend = rng.uniform(0.15, 0.5)
        part = rng.uniform(0.48, 0.62)
        for side in (-1.0, 1.0):
            lobe = _ellipse(radius * rng.uniform(0.48, 0.58), radius * rng.uniform(0.78, 0.94))
            lobe = _turn(lobe, side * bend) + np.array([side * part * radius, 0.0])
            _fill(mask, centre + _turn(lobe, axis))
    elif shape == "band":
        _stroke(mask, centre + _arc(radius * 0.72, rng.uniform(3.4, 4.3), direction, 24), radius * 0.27)
    elif shape == "segmented":
        n_lobes = int(rng.choice([2, 3, 4, 5], p=[0.2, 0.42, 0.3, 0.08]))
        path = _arc(radius * 0.66, 1.25 * n_lobes * rng.uniform(0.9, 1.1), direction, n_lobes)
        path = path + rng.normal(0.0, 0.07 * radius, path.shape)
        _stroke(mask, centre + path, radius * 0.08)
        for spot in path:
            lobe = _outline(radius * rng.uniform(0.30, 0.42), 0.06, rng, rng.uniform(0.0, 0.15))
            _fill(mask, centre + spot + lobe)
    else:
        axis = rng.uniform(0, 2 * math.pi)
        plates = (0.0,) if rng.random() < 0.6 else (-0.42, 0.42)
        for place in plates:
            bar = _ellipse(radius * 0.20, radius * rng.uniform(0.62, 0.8))
            bar += rng.normal(0.0, 0.05 * radius, bar.shape)
            _fill(mask, centre + _turn(bar + np.array([place * radius, 0.0]), axis))


def _ellipse(across: float, along: float) -> _Points:
    angle = np.arange(28) * (2 * math.pi / 28)
    return np.column_stack([across * np.cos(angle), along * np.sin(angle)])


def _arc(radius: float, span: float, start: float, n_points: int) -> _Points:
    angle = start + np.linspace(-span / 2, span / 2, n_points)
    return radius * np.column_stack([np.cos(angle), np.sin(angle)])


def _stroke(mask: _Mask, path: _Points, half_width: float) -> None:
    """A thick line with round ends along `path` (n, 2)."""
    disc = _ellipse(half_width, half_width)
    for spot in path:
        _fill(mask, spot + disc)
    for first, second in pairwise(path):
        step = second - first
        normal = half_width * np.array([-step[1], step[0]]) / max(float(np.hypot(*step)), 1e-6)
        _fill(mask, np.array([first + normal, second + normal, second - normal, first - normal]))


def _smear_out(mask: _Mask, scale: float, rng: np.random.Generator) -> _Mask:
    """Turn a mask into strands, as in a cell that was crushed when the smear was made."""
    frayed = _texture(mask.shape, 3.0 * scale, rng)
    soft = _blur(mask, 3.5 * scale).astype(np.int32)
    strands: _Mask = np.clip((soft - 118 + frayed) * 3, 0, 235).astype(np.uint8)
    return strands


def _scatter(shape: tuple[int, ...], share: float, sigma: float, rng: np.random.Generator) -> _Density:
    """Granules: dots of `sigma` px on a share of the pixels, values 0 to 255."""
    if share <= 0:
        return np.zeros(shape, np.int32)
    thinning = max(1.0, (sigma / 0.62) ** 2)
    dots = np.where(rng.random(shape) < share / thinning, 255, 0).astype(np.uint8)
    gain = round(256 * 2 * math.pi * max(sigma, 0.55) ** 2 * 0.85)
    granules: _Density = np.minimum(_blur(dots, sigma).astype(np.int32) * gain >> 8, 255)
    return granules


def _draw_rods(shape: _Shape, faggot: bool, count: int, rng: np.random.Generator) -> _Mask:
    """Thin needles in the cytoplasm, each the best placed of several; in bundles in a faggot cell."""
    body, nucleus = shape.body, shape.nucleus
    rods = np.zeros_like(body)
    room = (_blur(body, 2.0 * shape.scale) > 215) & (nucleus < 60)
    weight = room.astype(np.int32) - (body < 200) * 3 - (nucleus > 60) * (1 if faggot else 2)
    ys, xs = np.nonzero(room if room.any() else body > 200)
    along = rng.uniform(0, math.pi)
    for _ in range(count):
        best, best_score = np.empty((0, 2)), None
        for _ in range(6 if faggot else 24):
            pick = int(rng.integers(len(ys)))
            angle = along + rng.normal(0.0, 0.35) if faggot else rng.uniform(0, math.pi)
            half = shape.radius * rng.uniform(0.26, 0.46)
            thick = shape.scale * rng.uniform(0.66, 0.95)
            tip = np.array([(-half, 0.0), (-0.67 * half, thick), (0.67 * half, thick)])
            needle = _turn(np.vstack([tip, -tip]), angle) + np.array([xs[pick], ys[pick]])
            trial = np.zeros_like(body)
            _fill(trial, needle)
            score = int((weight * (trial > 100)).sum())
            if best_score is None or score > best_score:
                best, best_score = needle, score
        _fill(rods, best)
    return np.minimum(rods, body)


def _place_cell(
    density: _Density, drawn: tuple[_Density, _Mask, _Mask], plan: CellPlan, centre: tuple[float, float]
) -> Cell | None:
    """Draw a cell over the field, which almost covers what is below it, and measure its box."""
    own, cover, rods = drawn
    height, width = density.shape[1:]
    side = cover.shape[0]
    top, left = round(centre[0]) - side // 2, round(centre[1]) - side // 2
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, height), min(left + side, width)
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    cover = cover[part]
    below = density[:, y0:y1, x0:x1]
    below[:] = below * (255 - cover.astype(np.int32) * 235 // 255) // 255 + own[:, *part]
    mask = cover > 100
    x, y, across, down = cv2.boundingRect(mask.astype(np.uint8))
    if not across:
        return None
    first, last = max(y - 1, 0), min(y + down + 1, y1 - y0)  # a margin of one pixel
    start, end = max(x - 1, 0), min(x + across + 1, x1 - x0)
    inner = (slice(first, last), slice(start, end))
    box = (y0 + first, x0 + start, y0 + last, x0 + end)
    return Cell(plan, box, mask[inner], (rods[part][inner] > 60) & mask[inner])


def _photograph(density: _Density, stain: Stain, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn optical density into grey values: lamp, dark corners, focus, noise of the camera."""
    height, width = density.shape[1:]
    rows = (np.arange(height) / height - stain.centre[0]) ** 2
    columns = (np.arange(width) / width - stain.centre[1]) ** 2
    shade = np.rint(stain.vignette * _UNIT * 2.0 * (rows[:, None] + columns[None, :])).astype(np.int32)
    table = np.rint(255 * np.exp(-np.arange(6 * _UNIT) / _UNIT)).astype(np.uint8)
    image = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        lamp = round(float(stain.light[channel]) * _UNIT)
        image[..., channel] = table.take(density[channel] + (shade + lamp), mode="clip")
    image = np.asarray(_blur(image, stain.blur), np.uint8)
    noise = np.rint(rng.standard_normal((height, width)) * (stain.noise * 64)).astype(np.int32)
    return np.clip(image.astype(np.int32) + (noise[..., None] + 32 >> 6), 0, 255).astype(np.uint8)


# --- writing -------------------------------------------------------------------------------------------


def draw_data_set(
    folder: Path,
    patients: int,
    seed: int,
    *,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    cells_per_smear: int = CELLS_PER_SMEAR,
    cell_size: int = CELL_SIZE,
) -> None:
    """Write a synthetic data set in the Kaggle layout: ``wsi.csv``, ``labeled_cells.csv``, ``wsi/*.jpg``.

    A third of the patients each has APL, another AML, a healthy marrow. Patient k is the same for any number
    of patients. Another seed (at least 0) gives other patients, with other names (P7-001; P001 for seed 1).
    Size, number and size of cells are as of `draw_smear`. One image is in memory at a time. The tables are
    written last, so a folder that was cut off is not taken for a data set.

    Raises:
        UserError: the field is too small, or the folder has files.
    """
    _check_size(size, cell_size)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: name a new folder, or empty this one first.")
    (folder / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    smears: list[list[Any]] = []
    cells: list[list[Any]] = []
    names = "P" if seed == 1 else f"P{seed}-"  # of another seed: other patients
    for number in progress(range(1, patients + 1), "patients", patients):
        for patient, smear in patient_smears(number, seed, size, cells_per_smear, cell_size):
            smear_id = len(smears) + 1
            name = f"smear_{smear_id:04d}.jpg"
            (folder / IMAGE_FOLDER / name).write_bytes(_jpeg(smear.image))
            smears.append([smear_id, name, _literal(smear_labels(patient)), f"{names}{number:03d}"])
            for row in _rows(smear, number):
                cells.append([len(cells) + 1, 1, smear_id, *row])
    write_table(folder / SMEARS_FILE, pd.DataFrame(smears, columns=["id", "imgName", "label", "patient"]))
    write_table(folder / CELLS_FILE, pd.DataFrame(cells, columns=[*KAGGLE_CELL_COLUMNS]))


def patient_smears(
    number: int,
    seed: int,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    n_cells: int = CELLS_PER_SMEAR,
    cell_size: int = CELL_SIZE,
) -> Iterator[tuple[Patient, Smear]]:
    """Patient `number` (1, 2, ...) of the data set `seed`, with each of the patient's one or two smears."""
    rng = generator(seed, number)
    patient = sample_patient(diagnosis_of(number, seed), rng)
    for view in range(2 if rng.random() < TWO_SMEARS_SHARE else 1):
        yield patient, draw_smear(patient, generator(seed, number, 1 + view), size, n_cells, cell_size)


def smear_labels(patient: Patient) -> tuple[str, ...]:
    """The labels of a patient's smears: ('healthy',), or ('aml', FAB class) with m3 for APL."""
    return ("healthy",) if patient.fab is None else ("aml", patient.fab)


def _literal(labels: Sequence[str]) -> str:
    """Labels as in the data set: a Python set literal, or an empty text."""
    return "{" + ", ".join(f"'{label}'" for label in labels) + "}" if labels else ""


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _rows(smear: Smear, number: int) -> list[list[str]]:
    """The rows of one smear of patient `number`, from cellType on.

    Some patients have a row without a box or with a box of one pixel, as in the real table.
    """
    rows = []
    for cell in smear.cells:
        kind = [cell.plan.cell_type] if cell.plan.cell_type else []
        thing = ["Smudge"] if cell.plan.kind == "smudge" else ["Cell"] if kind else []
        labels = (kind, ["Good"] if kind else [], cell.plan.characteristics, thing)
        rows.append([*map(_literal, labels), json.dumps(cell.box), *_measures(cell, smear.image)])
    if number % FLAW_EVERY == 2:
        rows.append([""] * (len(KAGGLE_CELL_COLUMNS) - 3))
    if number % FLAW_EVERY == 3:
        y, x = smear.image.shape[0] // 3, smear.image.shape[1] // 3
        measures = ("1.0", "0.0", "1.1284", "0.0", "0.5", "1.0", "1.0")
        rows.append([""] * 4 + [json.dumps([y, x, y + 1, x + 1]), *measures])
    return rows


def _measures(cell: Cell, image: NDArray[np.uint8]) -> list[str]:
    """The values of `aplsmear.data.schema.MEASURES` of a cell, with four decimals.

    Rounding keeps the last bits of the arithmetic, which differ between computers, out of the file.
    """
    mask = cell.mask
    y0, x0, y1, x1 = cell.box
    ys, xs = np.nonzero(mask)
    area = len(ys)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = np.zeros(mask.shape, np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(np.vstack(contours)), 1)
    (yy, xy), (_, xx) = np.cov(np.vstack([ys, xs]).astype(np.float64), bias=True)
    spread = math.hypot(yy - xx, 2 * xy)
    small, large = (yy + xx - spread) / 2, (yy + xx + spread) / 2
    values = (
        float(hull.sum()),
        math.sqrt(max(0.0, 1 - small / large)) if large > 0 else 0.0,
        math.sqrt(4 * area / math.pi),
        float(sum(cv2.arcLength(contour, closed=True) for contour in contours)),
        float(image[y0:y1, x0:x1][mask].astype(np.int64).sum()) / (3 * 255 * area),
        1.0,
        area / mask.size,
    )
    return [str(round(value, 4)) for value in values]
