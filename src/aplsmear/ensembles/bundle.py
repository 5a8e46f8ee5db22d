"""All that judging new patients needs, in one folder: ``ensembles/<name>/model``.

::

    manifest.json                             format, its version, SHA-256 of every file; checked before use
    model.json                                members, views, backbones, a combination for every outer fold
    heads/<task>.npz                          heads of every outer fold
    backbones/<backbone>/<level>.weights.h5   weights, up to the deepest layer used
    reference.npz                             where the training patients lie

No pickle, no code, no path out of the folder, and no network as a file: `aplsmear.features.backbones` builds
it from its name in keras.applications, so a stranger's folder has nothing that could run. (Keras's own
loading of
architectures, safe mode or not, had holes: CVE-2025-1550, -8747, -9906.)
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

import aplsmear
from aplsmear.ensembles.combination import Combination, as_json, combination_of
from aplsmear.ensembles.familiarity import COMMON, Cloud, describe_features, describe_stain, make_cloud
from aplsmear.errors import UserError
from aplsmear.features.store import Features
from aplsmear.files import copy_whole, sha256, write_arrays, write_json
from aplsmear.heads.head import Head, read_average, read_heads
from aplsmear.images.view_store import View
from aplsmear.params import Augment, Backbone, Level, TaskLevel

FORMAT, VERSION = "aplsmear ensemble", 2
MANIFEST, MODEL, REFERENCE = "manifest.json", "model.json", "reference.npz"
_DIGITS = 12  # of numbers in model.json, behind the point
_AGAIN = "copy the folder again from its source, or make it with `dvc repro`"


class BundleError(UserError, ValueError):
    """A folder is no bundle, or one that cannot be used; the message says why, and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Member(_Strict):
    """A task whose heads are in the bundle.

    Attributes:
        task: name.
        level: of its items.
        one_each: whether no patient of the training run had more than one item: nothing was summarised.
    """

    task: str
    level: TaskLevel
    one_each: bool = False

    @property
    def images(self) -> Level:
        """What an item is seen by: a patient by all its cells."""
        return "cell" if self.level == "patient" else self.level


class Model(_Strict):
    """What model.json holds.

    Attributes:
        name: of the ensemble.
        positive: diagnosis.
        negative: diagnosis.
        members: in the order of the combinations.
        weigh_by: the task that says how much a cell counts.
        seed: of the views and of untrained backbones.
        min_box: px; smaller boxes are left out.
        augment: how views are cut.
        backbones: as in params.yaml, without `weights` and their `sha256`.
        combinations: of every outer fold, see `aplsmear.ensembles.combination.as_json`; the last is for new
        patients.
        reference_level: whose items `reference_features` describe.
        reference_features: backbone/layer of the cloud of familiar patients.
        min_items: cells or smears of that level that 99 of 100 training patients had, or more.
        pictured_by: the member that says which cells tell most; '' for none.
        high_is_positive: whether a high score of it points to the positive diagnosis.
        inputs: file -> md5 of what the ensemble was made from, as dvc.lock has it.
    """

    name: str
    positive: str
    negative: str
    members: list[Member]
    weigh_by: Member
    seed: int
    min_box: int
    augment: Augment
    backbones: dict[str, dict[str, Any]]
    combinations: list[dict[str, Any]]
    reference_level: Level
    reference_features: str
    min_items: float
    pictured_by: str
    high_is_positive: bool
    inputs: dict[str, str]


@dataclass(frozen=True)
class Reference:
    """What is familiar; see `aplsmear.ensembles.familiarity`."""

    level: Level
    features: str  # backbone/layer
    min_items: float  # items of a patient
    typical: Cloud
    stain: Cloud


@dataclass(frozen=True)
class Scorer:
    """The heads of one task, one an outer fold."""

    member: Member
    heads: list[Head]
    average: int  # augmented views whose scores are averaged with that of the plain one

    @property
    def task(self) -> str:
        """Its name."""
        return self.member.task


@dataclass(frozen=True)
class Bundle:
    """A checked bundle, ready to use; networks are built later, from `backbone`."""

    folder: Path
    model: Model
    members: list[Scorer]
    weigher: Scorer
    combinations: list[Combination]  # of every outer fold
    reference: Reference

    def outer_fold_of(self, fold: int | None) -> int:
        """The outer fold whose models never saw this outer fold; None: that for new patients, the last one.

        Raises:
            BundleError: there is no such fold.
        """
        last = len(self.combinations) - 1
        if fold is not None and not 0 <= fold < last:
            raise BundleError(f"there is no fold {fold}: the training run had {last}, from 0")
        return last if fold is None else fold

    def backbone(self, name: str, level: Level) -> Backbone:
        """A backbone whose weights are those of the bundle."""
        weights = str(self.folder / _weights(name, level))
        return Backbone.model_validate(self.model.backbones[name] | {"weights": weights})


def reference_features(heads: Iterable[Sequence[Head]]) -> str:
    """Of some tasks, the features that most final heads read; among equals the first by name."""
    counts = Counter(each[-1].features for each in heads)
    return min(counts, key=lambda name: (-counts[name], name))


def make_reference(
    patients: pd.DataFrame,
    items: pd.DataFrame,
    level: Level,
    features: Features,
    views: Iterable[list[View]],
) -> Reference:
    """What is familiar to an ensemble.

    Args:
        patients: ``patient, fold`` of those that it is trained on.
        items: ``item, patient`` of the level, of these and others.
        level: cells, or smears where there are no cells.
        features: of the level.
        views: of the level, see `aplsmear.images.view_store.read_views`.
    """
    fold = dict(zip(patients["patient"], patients["fold"], strict=True))
    mine = items[items["patient"].isin(fold)]
    owner = dict(zip(mine["item"], mine["patient"], strict=True))
    clouds = []
    for described in (describe_features(features, owner), describe_stain(views, owner)):
        folds = np.array([fold[patient] for patient in described])
        clouds.append(make_cloud(np.array(list(described.values())), folds))
    min_items = float(np.quantile(mine["patient"].value_counts(), 1 - COMMON))
    return Reference(level, features.name, min_items, clouds[0], clouds[1])


def write_bundle(
    folder: Path,
    model: Model,
    heads: Mapping[str, Path],
    backbones: Path,
    reference: Reference,
) -> None:
    """Write a bundle; the same bytes from the same inputs. The manifest comes last.

    Args:
        folder: ``ensembles/<name>/model``.
        model: of it.
        heads: task -> file of `aplsmear.heads.head.write_heads`, of members and weigher.
        backbones: the folder with ``<backbone>/<level>.weights.h5``.
        reference: of `make_reference`.
    """
    levels = {member.task: member.images for member in [model.weigh_by, *model.members]}
    read = {task: read_heads(path) for task, path in heads.items()}
    needed = needed_backbones(levels, read) | {(reference.features.split("/")[0], reference.level)}
    files = {_heads(task): path for task, path in heads.items()}
    files |= {_weights(name, level): backbones / name / f"{level}.weights.h5" for name, level in needed}
    for name, path in files.items():
        copy_whole(path, folder / name)
    write_json(folder / MODEL, model.model_dump(), digits=_DIGITS)
    arrays: dict[str, np.ndarray] = {}
    for kind in ("typical", "stain"):
        cloud = getattr(reference, kind)
        arrays |= {f"{kind}.{each.name}": np.asarray(getattr(cloud, each.name)) for each in fields(Cloud)}
    write_arrays(folder / REFERENCE, arrays)
    sums = {name: sha256(folder / name) for name in sorted([*files, MODEL, REFERENCE])}
    described = {"format": FORMAT, "version": VERSION, "aplsmear": aplsmear.__version__, "files": sums}
    write_json(folder / MANIFEST, described)


def make_model(**settings: Any) -> Model:
    """A `Model`; `combinations` as objects, `backbones` as of params.yaml."""
    settings["combinations"] = [as_json(each) for each in settings["combinations"]]
    settings["backbones"] = {
        name: each.model_dump(exclude={"weights", "sha256"}) for name, each in settings["backbones"].items()
    }
    return Model(**settings)


def needed_backbones(
    levels: Mapping[str, Level], heads: Mapping[str, Sequence[Head]]
) -> set[tuple[str, Level]]:
    """The backbones, each with its level, whose features some heads read."""
    return {(head.features.split("/")[0], levels[task]) for task, each in heads.items() for head in each}


def read_bundle(folder: Path) -> Bundle:
    """Read and check a bundle, or the one in ``<folder>/model``.

    Raises:
        BundleError: there is none; it is of another version; files are missing or altered (all of them are
            named), or lead out of the folder; or what they hold does not fit together.
    """
    folder = next((each for each in (folder / "model", folder) if (each / MANIFEST).is_file()), folder)
    listed = _checked(folder)
    try:
        model = Model.model_validate_json((folder / MODEL).read_text(encoding="utf-8"))
        combinations = [combination_of(each) for each in model.combinations]
        scorers = {each.task: _scorer(folder, each, listed) for each in [*model.members, model.weigh_by]}
        with np.load(folder / REFERENCE, allow_pickle=False) as arrays:
            reference = Reference(
                model.reference_level,
                model.reference_features,
                model.min_items,
                _cloud(arrays, "typical"),
                _cloud(arrays, "stain"),
            )
        bundle = Bundle(
            folder=folder,
            model=model,
            members=[scorers[each.task] for each in model.members],
            weigher=scorers[model.weigh_by.task],
            combinations=combinations,
            reference=reference,
        )
        _check_fit(bundle, listed)
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        if isinstance(error, BundleError):
            raise
        writer = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("aplsmear")
        raise BundleError(
            f"{folder}: what it holds does not fit together ({_brief(error)}). It was written by aplsmear "
            f"{str(writer)[:20]}, this is {aplsmear.__version__}: {_AGAIN}"
        ) from None
    return bundle


def _checked(folder: Path) -> set[str]:
    """The files of a bundle, each there and as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, sums = manifest["version"], manifest["files"]
        if manifest["format"] != FORMAT or not all(isinstance(each, str) for each in sums.values()):
            raise ValueError("not in the format of this program")
    except FileNotFoundError:
        raise BundleError(
            f"{folder} has no {MANIFEST}: give the folder of an ensemble, such as ensembles/apl_aml "
            "(`dvc repro` makes it), or a copy of its folder `model`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder / MANIFEST} cannot be used ({_brief(error)}); {_AGAIN}") from None
    if version != VERSION:
        raise BundleError(
            f"{folder} has version {version!r} of the format, this program reads {VERSION}: "
            f"use the aplsmear that wrote it ({str(manifest.get('aplsmear', 'unknown'))[:20]}), "
            "or make the ensemble again with `dvc repro`"
        )
    problems = []
    for name, expected in sorted(sums.items()):
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name!r} leads out of the folder")
        elif not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != expected:
            problems.append(f"{name} is not what it was when the bundle was written")
    problems += [f"{name} is not in its manifest" for name in (MODEL, REFERENCE) if name not in sums]
    if problems:
        raise BundleError("\n  ".join([f"{folder} cannot be used:", *problems, _AGAIN]))
    return set(sums)


def _check_fit(bundle: Bundle, listed: set[str]) -> None:
    """Check that every outer fold has its heads, and every head its backbone, and weights."""
    model, outer_folds = bundle.model, len(bundle.combinations)
    scorers = [*bundle.members, bundle.weigher]
    names = tuple(each.task for each in bundle.members)
    problems = [
        f"{each.task} has {len(each.heads)} heads for {outer_folds} outer folds"
        for each in scorers
        if len(each.heads) != outer_folds
    ]
    problems += ["a combination is of other members" for each in bundle.combinations if each.members != names]
    used = {(head.features, each.member.images) for each in scorers for head in each.heads}
    used.add((bundle.reference.features, bundle.reference.level))
    for features, level in sorted(used):
        name, _, layer = features.partition("/")
        if layer not in model.backbones.get(name, {}).get("layer", []):
            problems.append(f"there is no backbone that gives {features}")
        elif _weights(name, level) not in listed:
            problems.append(f"{_weights(name, level)} is not in its manifest")
        else:
            bundle.backbone(name, level)
    if outer_folds < 2 or problems:
        raise ValueError("; ".join(problems) or "no combination")


def _scorer(folder: Path, member: Member, listed: set[str]) -> Scorer:
    name = _heads(member.task)
    if name not in listed:  # whatever is listed lies in the folder
        raise ValueError(f"{name} is not in its manifest")
    return Scorer(member, read_heads(folder / name), read_average(folder / name))


def _cloud(arrays: Mapping[str, np.ndarray], kind: str) -> Cloud:
    found = {each.name: arrays[f"{kind}.{each.name}"] for each in fields(Cloud)}
    rest, limit = float(found.pop("rest")), float(found.pop("limit"))
    return Cloud(**found, rest=rest, limit=limit)


def _heads(task: str) -> str:
    return f"heads/{task}.npz"


def _weights(backbone: str, level: Level) -> str:
    return f"backbones/{backbone}/{level}.weights.h5"


def _brief(error: Exception) -> str:
    """The first lines of what was said."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])
    return " ".join(str(error).split())[:200] or type(error).__name__
