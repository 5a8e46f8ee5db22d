"""All that is needed to judge new patients, in one folder: ``ensembles/<name>/model``.

::

    manifest.json                             format, its version, SHA-256 of every file; checked before use
    model.json                                members, views, backbones, a combination for every outer fold
    heads/<task>.npz                          heads of every outer fold
    backbones/<backbone>/<level>.onnx         graph of a backbone, up to the deepest layer used
    reference.npz                             the training patients; the regression on pooled features

There is no pickle, no code and no path out of the folder. A graph is a list of operations of the ONNX
standard with their weights. `aplsmear.features.onnx_graph.read_graph` refuses all other operations, so a
folder from a stranger has nothing that could run. (Keras's own loading of architectures had holes, with and
without safe mode: CVE-2025-1550, -8747, -9906.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from pydantic import Field, ValidationError

import aplsmear
from aplsmear.ensembles.baselines import Baselines, Pooled
from aplsmear.ensembles.cell_curve import CellCurve
from aplsmear.ensembles.combination import Combination, combination_of
from aplsmear.ensembles.familiarity import Cloud, describe_features, describe_stain, make_cloud
from aplsmear.errors import UserError, brief
from aplsmear.features.forward import FeatureRequest, batch_of
from aplsmear.features.store import Features
from aplsmear.files import copy_whole, sha256, write_arrays, write_json
from aplsmear.heads.head import Head, read_average, read_heads
from aplsmear.images.view_store import View
from aplsmear.params import Augment, Backbone, Level, Strict, TaskLevel, of_backbones
from aplsmear.words import nearest

VERSION = 7  # of the format
MANIFEST, MODEL, REFERENCE = "manifest.json", "model.json", "reference.npz"
_DIGITS = 12  # decimals of numbers in model.json
_AGAIN = "copy the folder again from its source, or make it with `dvc repro`"


class Member(Strict):
    """A task whose heads are in the bundle."""

    task: str
    level: TaskLevel  # of its items
    one_each: bool = False  # no patient of the training run had more than one item: nothing was summarised

    @property
    def images(self) -> Level:
        """The images that its heads read: of a patient, all cells."""
        return "cell" if self.level == "patient" else self.level


class Model(Strict):
    """The content of model.json."""

    name: str
    positive: str  # diagnosis
    negative: str  # diagnosis
    members: list[Member]  # in the order of the combinations
    weigh_by: Member  # whose scores are the weights of the cells
    seed: int  # of the views
    min_box: int  # px; smaller boxes are left out
    augment: Augment  # how views are made
    backbones: dict[str, dict[str, Any]]  # as in params.yaml, without `weights` and their `sha256`
    combinations: list[dict[str, Any]]  # of every outer fold, by `as_json`; the last is for new patients
    reference_level: Level  # of the items of `reference_features`
    reference_features: str  # backbone/layer whose features describe the training patients
    cell_curve: CellCurve  # how the spread of a patient's logit falls with the number of cells
    min_items: float  # 99 % of the training patients had at least so many cells or smears of that level
    # Plain baselines on the share of positive cells, of members or of `weigh_by`, by `as_json`.
    shares: dict[str, dict[str, Any]]
    pooled_features: str  # backbone/layer of the baseline on mean-pooled features; empty: there is none
    held_out: dict[str, Any] = Field({})  # of `aplsmear.ensembles.combination.measure`; empty: not kept
    # How `aplsmear adapt` recalibrated it, and the gain; empty: it did not.
    adapted: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str]  # file -> MD5 of the tables that the ensemble was made from, as in dvc.lock


class Manifest(Strict, extra="ignore"):
    """The content of manifest.json."""

    format: Literal["aplsmear ensemble"] = "aplsmear ensemble"
    version: int = VERSION  # of the format
    aplsmear: str = aplsmear.__version__  # the version that wrote the folder
    files: dict[str, str]  # file -> SHA-256


@dataclass(frozen=True)
class Reference:
    """The training patients, as `aplsmear.ensembles.familiarity` describes them."""

    typical: Cloud
    stain: Cloud


@dataclass(frozen=True)
class Scorer:
    """The heads of one task, one for each outer fold."""

    member: Member
    heads: list[Head]
    average: int  # augmented views whose scores are averaged with that of the plain view

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.member.task


@dataclass(frozen=True)
class Bundle:
    """A checked bundle; the networks are built later, from `backbone`."""

    folder: Path
    model: Model
    members: list[Scorer]
    weigh_by: Scorer
    combinations: list[Combination]  # of every outer fold
    baselines: Baselines
    reference: Reference

    def outer_fold_of(self, fold: int | None) -> int:
        """The outer fold whose models never saw this fold; None: the last one, for new patients.

        Raises UserError if there is no such fold.
        """
        last = len(self.combinations) - 1
        if fold is not None and not 0 <= fold < last:
            raise UserError(f"there is no fold {fold}: the training run had {last}, from 0")
        return last if fold is None else fold

    def backbone(self, name: str, level: Level, layers: Sequence[str]) -> FeatureRequest:
        """What `aplsmear.features.forward` needs to compute layers of a backbone."""
        settings = Backbone.model_validate(self.model.backbones[name] | {"weights": ""})
        graph = self.folder / _graph(name, level)
        return FeatureRequest(name, graph, level, tuple(layers), batch_of(settings, level))


def reference_features(heads: Iterable[Sequence[Head]]) -> str:
    """The features that most final heads of some tasks read; among equals the first by name."""
    counts = Counter(each[-1].features for each in heads)
    return min(counts, key=lambda name: (-counts[name], name))


def make_reference(
    fold: Mapping[str, int], owner: Mapping[str, str], features: Features, views: Iterable[list[View]]
) -> Reference:
    """Describe training patients, from the features and views of their items.

    `fold` has the fold of each patient, `owner` the patient of each item.
    """
    typical, stain = (
        make_cloud(np.array(list(described.values())), np.array([fold[patient] for patient in described]))
        for described in (describe_features(features, owner), describe_stain(views, owner))
    )
    return Reference(typical, stain)


def write_bundle(
    folder: Path,
    model: Model,
    heads: Mapping[str, Path],
    backbones: Path,
    reference: Reference,
    pooled: Pooled | None,
) -> None:
    """Write a bundle: the same bytes from the same inputs. The manifest is written last.

    `heads` has a file of `aplsmear.heads.head.write_heads` for each member and for `Model.weigh_by`;
    `backbones` is the folder with ``<backbone>/<level>.onnx``; `pooled` is the baseline on
    `Model.pooled_features`.
    """
    read = {(model.reference_features, model.reference_level)}
    for member in [model.weigh_by, *model.members]:
        read |= {(head.features, member.images) for head in read_heads(heads[member.task])}
    if pooled:
        read.add((pooled.layer, "cell"))
    needed = {(part.split("/")[0], level) for features, level in read for part in of_backbones(features)}
    files = {_heads(task): path for task, path in heads.items()}
    files |= {_graph(name, level): backbones / name / f"{level}.onnx" for name, level in needed}
    for name, path in files.items():
        copy_whole(path, folder / name)
    write_json(folder / MODEL, model.model_dump(), digits=_DIGITS)
    parts = [(kind, vars(cloud)) for kind, cloud in vars(reference).items()]
    if pooled:
        parts.append(("pooled", {name: each for name, each in vars(pooled).items() if name != "layer"}))
    arrays = {f"{part}.{name}": np.asarray(each) for part, found in parts for name, each in found.items()}
    write_arrays(folder / REFERENCE, arrays)
    sums = {name: sha256(folder / name) for name in sorted([*files, MODEL, REFERENCE])}
    write_json(folder / MANIFEST, Manifest(files=sums).model_dump())


def write_changed(folder: Path, bundle: Bundle, model: Model) -> None:
    """Write a bundle with another model.json and otherwise the same files. The manifest is written last."""
    for name in _checked(bundle.folder).files:
        if name != MODEL:
            copy_whole(bundle.folder / name, folder / name)
    write_json(folder / MODEL, model.model_dump(), digits=_DIGITS)
    sums = _checked(bundle.folder).files | {MODEL: sha256(folder / MODEL)}
    write_json(folder / MANIFEST, Manifest(files=sums).model_dump())


def read_bundle(folder: Path) -> Bundle:
    """Read and check a bundle, or the one in ``<folder>/model``.

    Raises UserError if there is none; it has another version; files are missing, changed, or lead out of
    the folder (all of them are named); or the contents do not fit together.
    """
    folder = next((each for each in (folder / "model", folder) if (each / MANIFEST).is_file()), folder)
    manifest = _checked(folder)
    listed = set(manifest.files)
    try:
        model = Model.model_validate_json((folder / MODEL).read_text(encoding="utf-8"))
        scorers = {}
        for member in [*model.members, model.weigh_by]:
            name = _heads(member.task)
            if name not in listed:  # a listed file is in the folder
                raise ValueError(f"{name} is not in its manifest")
            scorers[member.task] = Scorer(member, read_heads(folder / name), read_average(folder / name))
        with np.load(folder / REFERENCE, allow_pickle=False) as arrays:
            reference = Reference(*(_cloud(arrays, each.name) for each in fields(Reference)))
            pooled = _pooled(arrays, model.pooled_features) if model.pooled_features else None
        bundle = Bundle(
            folder=folder,
            model=model,
            members=[scorers[each.task] for each in model.members],
            weigh_by=scorers[model.weigh_by.task],
            combinations=[combination_of(each) for each in model.combinations],
            baselines=Baselines({name: combination_of(each) for name, each in model.shares.items()}, pooled),
            reference=reference,
        )
        if problems := _misfits(bundle, listed):
            raise ValueError("; ".join(problems))
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, BadZipFile, UserError) as error:
        raise UserError(
            f"{folder}: its contents do not fit together ({_why(error)}). It was written by aplsmear "
            f"{manifest.aplsmear[:20]}, this is {aplsmear.__version__}: {_AGAIN}"
        ) from None
    return bundle


def _why(error: Exception) -> str:
    """An error in a few words; of one by pydantic the first three problems."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])
    return brief(error)


def _checked(folder: Path) -> Manifest:
    """The manifest of a bundle whose files are all present and unchanged."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = [each.parent.parent.name for each in folder.parent.glob(f"*/model/{MANIFEST}")]
        raise UserError(
            f"{folder} has no {MANIFEST}{nearest(folder.name, there)}: give the folder of an ensemble, such "
            "as ensembles/apl_aml (`dvc repro` makes it), or a copy of its folder `model`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be used ({_why(error)}); {_AGAIN}") from None
    if manifest.version != VERSION:
        raise UserError(
            f"{folder} has version {manifest.version} of the format, this program reads {VERSION}: "
            f"use the aplsmear that wrote it ({manifest.aplsmear[:20]}), or make the ensemble again with "
            "`dvc repro`"
        )
    sums = manifest.files
    problems = []
    for name, expected in sorted(sums.items()):
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name!r} leads out of the folder")
        elif not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != expected:
            problems.append(f"{name} has changed since the bundle was written")
    problems += [f"{name} is not in its manifest" for name in (MODEL, REFERENCE) if name not in sums]
    if problems:
        raise UserError("\n  ".join([f"{folder} cannot be used:", *problems, _AGAIN]))
    return manifest


def _misfits(bundle: Bundle, listed: set[str]) -> list[str]:
    """Outer folds without heads, heads without backbone or weights, combinations of other members."""
    outer_folds = len(bundle.combinations)
    scorers = [*bundle.members, bundle.weigh_by]
    names = tuple(each.task for each in bundle.members)
    problems = [
        f"{each.task} has {len(each.heads)} heads for {outer_folds} outer folds"
        for each in scorers
        if len(each.heads) != outer_folds
    ]
    problems += ["a combination is of other members" for each in bundle.combinations if each.members != names]
    shares, tasks = bundle.baselines.shares.items(), {each.task for each in scorers}
    problems += [f"{name} is of another task" for name, each in shares if {*each.members} - tasks]
    used = {(head.features, each.member.images) for each in scorers for head in each.heads}
    used.add((bundle.model.reference_features, bundle.model.reference_level))
    if bundle.model.pooled_features:
        used.add((bundle.model.pooled_features, "cell"))
    for features, level in sorted({(part, level) for name, level in used for part in of_backbones(name)}):
        name, _, layer = features.partition("/")
        if layer not in bundle.model.backbones.get(name, {}).get("layer", []):
            problems.append(f"there is no backbone with the features {features}")
        elif _graph(name, level) not in listed:
            problems.append(f"{_graph(name, level)} is not in its manifest")
        else:
            bundle.backbone(name, level, [layer])
    return problems or ["there are too few combinations"] * (outer_folds < 2)


def _cloud(arrays: Mapping[str, np.ndarray], kind: str) -> Cloud:
    found: dict[str, Any] = {each.name: arrays[f"{kind}.{each.name}"] for each in fields(Cloud)}
    found |= {name: float(array) for name, array in found.items() if not array.ndim}
    return Cloud(**found)


def _pooled(arrays: Mapping[str, np.ndarray], layer: str) -> Pooled:
    found = Pooled(layer, *(arrays[f"pooled.{name}"] for name in ("mean", "scale", "weights", "intercept")))
    if not found.mean.ndim == 1 or not found.mean.shape == found.scale.shape == found.weights.shape:
        raise ValueError("the arrays of the regression on pooled features do not fit together")
    return found


def _heads(task: str) -> str:
    return f"heads/{task}.npz"


def _graph(backbone: str, level: Level) -> str:
    return f"backbones/{backbone}/{level}.onnx"
