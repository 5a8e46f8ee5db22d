"""The schema of params.yaml: what each knob may be, checked whole before any work starts."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Level = Literal["cell", "smear"]
LEVELS: tuple[Level, ...] = ("cell", "smear")
Diagnosis = Literal["healthy", "aml", "apl"]
Condition = dict[str, list[str]]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]

CELL_COLUMNS = ("cell_type", "special_characteristics", "object_type", "diagnosis", "fab")
SMEAR_COLUMNS = ("diagnosis", "fab")


class ParamsError(ValueError):
    """params.yaml is not what the pipeline expects; the message lists every problem."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Compute(_Strict):
    """How much of the machine is used."""

    threads: int = Field(ge=1, le=64)


class Dataset(_Strict):
    """Where the smears lie and what may be left out."""

    root: str
    source: Literal["folder"]
    min_box: int = Field(ge=2)
    skip_bad_images: bool


class Split(_Strict):
    """The outer folds."""

    folds: int = Field(ge=3, le=20)  # nested inner folds need two folds beside the held-out one


class Augment(_Strict):
    """Plain and augmented views of cells and smears."""

    size: dict[Level, Annotated[int, Field(ge=16, le=2048)]]
    margin: float = Field(ge=0, le=2)
    views: int = Field(ge=0, le=50)
    more: dict[str, Annotated[int, Field(ge=1, le=50)]]
    rotate: float = Field(ge=0, le=180)
    scale: float = Field(ge=0, le=0.5)
    shift: float = Field(ge=0, le=0.5)
    hue: int = Field(ge=0, le=255)
    saturation: int = Field(ge=0, le=255)
    brightness: float = Field(ge=0, le=0.9)
    blur: float = Field(ge=0, le=10)
    noise: float = Field(ge=0, le=100)


class Backbone(_Strict):
    """A frozen network of keras.applications, cut at a named layer."""

    application: str
    options: dict[str, Any] = {}
    input_size: dict[Level, Annotated[int, Field(ge=16, le=2048)]]
    layer: list[str] = Field(min_length=1)
    weights: str
    batch: int = Field(ge=1, le=4096)


class Range(_Strict):
    """A number between two others."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError("a range with log: true starts above 0")
        return self


class Space(_Strict):
    """What the search over heads may choose from."""

    features: list[str] = Field(min_length=1)
    views: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    width: list[Annotated[int, Field(ge=0, le=4096)]] = Field(min_length=1)
    dropout: Range
    learning_rate: Range
    weight_decay: Range
    balance: Range
    batch: list[Annotated[int, Field(ge=2, le=65536)]] = Field(min_length=1)
    epochs: list[Annotated[int, Field(ge=1, le=10000)]] = Field(min_length=1)


class Tune(_Strict):
    """The search over heads on bottleneck features."""

    trials: int = Field(ge=1)
    generation: int = Field(ge=1, le=256)
    items_per_patient: int = Field(ge=1)
    space: Space


class Task(_Strict):
    """A binary question about cells or smears, as a row of data."""

    level: Level
    positive: Condition
    negative: Condition
    tune: dict[str, Any] = {}  # overrides of `tune` for this task alone

    @model_validator(mode="after")
    def _columns(self) -> Task:
        known = CELL_COLUMNS if self.level == "cell" else SMEAR_COLUMNS
        for condition in (self.positive, self.negative):
            for column, labels in condition.items():
                if column not in known:
                    raise ValueError(
                        f"a {self.level} has no column {column!r}{nearest(column, known)}; "
                        f"it has: {', '.join(known)}"
                    )
                if not labels:
                    raise ValueError(f"column {column!r} lists no label")
        return self


class Ensemble(_Strict):
    """A verdict per patient, from the scores of several tasks."""

    positive: Diagnosis
    negative: Diagnosis
    members: list[Name] = Field(min_length=1)


class Combine(_Strict):
    """How members become one probability per patient."""

    trials: int = Field(ge=1)
    resamples: int = Field(ge=100)
    refits: int = Field(ge=20)


class Params(_Strict):
    """All of params.yaml."""

    seed: int = Field(ge=0, lt=2**31)
    task: Name
    compute: Compute
    dataset: Dataset
    split: Split
    augment: Augment
    backbones: dict[Name, Backbone] = Field(min_length=1)
    tune: Tune
    tasks: dict[Name, Task] = Field(min_length=1)
    ensembles: dict[Name, Ensemble]
    combine: Combine

    @field_validator("backbones", "tasks", "ensembles")
    @classmethod
    def _not_empty(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            raise ValueError("at least one is needed")
        return value

    @model_validator(mode="after")
    def _names_fit(self) -> Params:
        problems = []
        if self.task not in self.tasks:
            problems.append(f"task: {self.task!r} is no task{nearest(self.task, self.tasks)}")
        for name, ensemble in self.ensembles.items():
            for member in ensemble.members:
                if member not in self.tasks:
                    problems.append(
                        f"ensembles.{name}.members: {member!r} is no task{nearest(member, self.tasks)}"
                    )
            if len(set(ensemble.members)) < len(ensemble.members):
                problems.append(f"ensembles.{name}.members: a member is named twice")
        for name, task in self.tasks.items():
            try:
                self.tune_of(name)
            except ValidationError as error:
                problems += [f"tasks.{name}.tune.{line}" for line in _lines(error)]
            _ = task
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def tune_of(self, task: str) -> Tune:
        """The search settings of one task: `tune`, overridden by the task's own row."""
        merged = _merge(self.tune.model_dump(), self.tasks[task].tune)
        return Tune.model_validate(merged)


def read_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: listing every problem: unknown keys (with the nearest known one), wrong types, values out of
            range, names that name nothing.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _lines(error))
        raise ParamsError(f"{path.name} does not fit:\n{lines}") from None


def nearest(word: str, known: Any) -> str:
    """' (did you mean X?)' for the known word nearest to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and "low" not in value
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{nearest(str(problem['loc'][-1]), _known_keys(problem['loc'][:-1]))}"
        elif problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] not in ("value_error",):
            message = f"{message}, not {problem['input']!r}"
        lines.append(f"{where}: {message}" if where else message)
    return lines


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the model at this place of params.yaml."""
    model: Any = Params
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[str(part)].annotation
        arguments = getattr(model, "__args__", ())
        if getattr(model, "__origin__", None) is dict and part not in ("backbones", "tasks", "ensembles"):
            model = arguments[1]
    return list(model.model_fields) if hasattr(model, "model_fields") else []
