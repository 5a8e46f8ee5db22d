"""Profiles: sets of parameters for real uses; and outputs that the present parameters no longer name."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark, YAMLError

from aplsmear.errors import UserError
from aplsmear.files import sha256
from aplsmear.params import Params, flat, no_yaml, renamed
from aplsmear.words import nearest, no_such

MADE = {"data", "kaggle"}  # data sets that the pipeline makes in the repository, and git ignores
BASE = "demo"  # the profile that is a whole params.yaml
# Tables that hold exactly the rows that a profile names. Other tables keep those rows of the demo that the
# profile does not name.
REPLACED = {"augment.extra_views", "backbones", "tasks", "overrides"}

# Names of the files in features, backbones, tuned and members.
_NAMES = re.compile(
    r"(\.gitignore|best\.yaml|metrics\.json|(index|predictions|roc|trials)\.csv|.*\.(npy|npz|onnx|parquet))(\.part)?"
)


class ProfileError(UserError, ValueError):
    """A profile or a setting that does not exist or cannot be used."""


def read_profile(folder: Path, name: str) -> str:
    """The text of params.yaml under a profile, the file ``NAME.yaml`` of the folder.

    ``demo.yaml`` is a whole params.yaml. Any other profile is a head of remarks, an empty line, and the
    parameters that differ from the demo's. A list replaces the demo's list, and so does a table of
    `REPLACED`; other tables are merged. A task without a row in the profile's `overrides` gets an empty row,
    because DVC needs one for each task. ``base: NAME`` names a profile that takes the place of the demo's. A
    remark of the demo stays where the profile has none.

    Raises ProfileError if there is no such profile (the message lists the known ones), or it is no table.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ProfileError(no_such("there is no profile", name, known))
    text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    if name == BASE:
        return text
    try:
        own = _editor().load(text)
    except YAMLError as error:
        raise ProfileError(no_yaml(folder / f"{name}.yaml", error)) from None
    if not isinstance(own, dict):
        raise ProfileError(f"{folder / name}.yaml holds no parameters")
    base = read_profile(folder, str(own.pop("base", BASE)))
    head = re.match(r"(#.*\n)*", text)
    return f"{head[0] if head else ''}\n{_laid_over(base, own)}"


def with_settings(text: str, settings: Mapping[str, str]) -> str:
    """Change some values of a params.yaml and keep all remarks. A row of `overrides` may get keys of `tune`.

    `settings` have dotted keys: ``{"dataset.root": "data", "split.folds": "10"}``. Where params.yaml takes
    text, the value is that text, unchanged. Other values (numbers, lists) are YAML. Raises ProfileError if
    some keys are not in the file, or some values cannot be read; the message lists all.
    """
    editor = _editor()
    tree = editor.load(text)
    old = renamed(settings)
    problems = [f"{key!r} {answer}" for key, answer in old.items()]
    known = [name for name, _ in flat(tree, tables=True)]
    for key in [key for key in settings if key not in old]:
        *path, last = key.split(".")
        row = re.match(r"overrides\.[^.]+(?=\.)", key)
        if key in known or (row and row[0] in known and f"tune{key[row.end() :]}" in known):
            place: Any = tree
            for part in path:
                place = place.setdefault(part, CommentedMap())
                place.fa.set_block_style()
            try:
                _put(place, last, _value(key, settings[key]))
            except ValueError as error:
                problems.append(str(error))
        else:
            problems.append(f"there is no {key!r}{nearest(key, known)}")
    if problems:
        raise ProfileError("; ".join(problems))
    return _text_of(editor, tree)


def _value(key: str, text: str) -> Any:
    """The value of a setting: text where the parameter takes this text, else YAML."""
    kind: Any = Params
    for part in key.split("."):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if part not in kind.model_fields:  # `read_params` refuses this key
                kind = Any
                break
            kind = kind.model_fields[part]
            kind = Annotated[kind.annotation, *kind.metadata] if kind.metadata else kind.annotation
        else:
            kind = get_args(kind)[-1] if get_origin(kind) is dict else Any
    if kind is not Any:
        with suppress(ValidationError):
            return TypeAdapter(kind).validate_python(text, strict=True)
    try:
        end = max(each.end_mark.index for each in yaml.scan(text) if each.start_mark.index < len(text))
        if not text[end:].strip():
            return YAML(typ="safe").load(text)
    except (YAMLError, yaml.YAMLError, ValueError):
        pass
    raise ProfileError(f"{key}: {text!r} is no value such as 10, 0.5, true or [a, b]")


def with_files(text: str) -> str:
    """Full paths of a data set or of weights outside of git in a params.yaml, and the `sha256` of weights.

    An experiment of `dvc exp run --temp` or of the queue runs in another folder and does not find relative
    paths (they start from the working directory). `data` and `kaggle` stay: the pipeline makes them in that
    folder. DVC tracks parameters and not weights: a new hash makes the stages that depend on them run again.
    """
    editor = _editor()
    tree = editor.load(text)
    rows: list[Any] = [each for each in tree["backbones"].values() if isinstance(each, dict)]
    weighted = [each for each in rows if Path(str(each.get("weights", ""))).is_file()]
    files = [(row, "weights") for row in weighted]
    if str(Path(str(tree["dataset"].get("root", "")))) not in MADE:
        files.append((tree["dataset"], "root"))
    relative = [(row, key) for row, key in files if not Path(str(row.get(key, ""))).is_absolute()]
    for row, key in relative:
        path = Path(str(row.get(key, "")))
        row[key] = str(path.resolve() if ".." in path.parts else path.absolute())
    for row in weighted:
        row.pop("sha256", None)
        row.insert(list(row).index("weights") + 1, "sha256", sha256(Path(row["weights"])))
    return _text_of(editor, tree) if relative or weighted else text


def leftovers(root: Path, params: Params) -> list[Path]:
    """Outputs of earlier parameters that no stage makes now (features, backbones, tuned tasks, members),
    sorted.

    They must be removed: for a stage that depends on a folder, DVC takes everything in it as input.
    """
    owned = {root / "features" / level / name for level in ("cell", "smear") for name in params.backbones}
    owned |= {root / "tuned" / task for task in params.tasks}
    owned |= {root / "backbones" / name for name in params.backbones}
    owned |= {
        root / "members" / name / f"{task}.{kind}"
        for name, ensemble in params.ensembles.items()
        for task in ensemble.members
        for kind in ("heads.npz", "scores.parquet")
    }
    found = [
        path
        for pattern in ("features/*/*", "backbones/*", "tuned/*", "members/*/*")
        for path in root.glob(pattern)
        if path not in owned and path.name != ".gitignore"
    ]
    return sorted(found)


def others_files(path: Path) -> list[Path]:
    """The files in an output, or the output itself, whose names no stage gives, and links to folders."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sorted(
        each for each in inside if (each.is_symlink() if each.is_dir() else not _NAMES.fullmatch(each.name))
    )


def _laid_over(base: str, own: dict[str, Any]) -> str:
    """The parameters of the demo with those of a profile in their place."""
    # ruamel keeps the lines between two sections with the last value of the upper section, which may be
    # replaced. A mark at the end of each section holds them instead.
    _, *sections = re.split(r"\n\n(?=\S)", base.strip())
    editor = _editor()
    tree = editor.load("\n\n".join(f"{part}\n_{place}: end" for place, part in enumerate(sections)))
    tree["overrides"] = CommentedMap()
    _lay_over(tree, own)
    rows = tree["overrides"]
    for place, task in enumerate(tree["tasks"]):
        if task not in rows:
            rows.insert(place, task, CommentedMap())
    return re.sub(r"^_\d+: end\n", "", _text_of(editor, tree), flags=re.MULTILINE)


def _lay_over(base: Any, over: Any, where: str = "") -> None:
    """Put the values and the remarks of a profile into the parameters of the demo."""
    for key, value in over.items():
        name = f"{where}{key}"
        if isinstance(value, dict) and isinstance(base.get(key), dict) and name not in REPLACED:
            _lay_over(base[key], value, f"{name}.")
        else:
            _put(base, key, value, over.ca.items.get(key))


def _put(table: Any, key: str, value: Any, remarks: list[Any] | None = None) -> None:
    """Replace a value, and its remarks if there are new ones; a remark stands one blank behind its value."""
    if isinstance(table.get(key), dict) and not isinstance(value, dict):
        raise ProfileError(f"{key!r} is a table of parameters and cannot be {value!r}")
    table[key] = value
    for inner in _within(value):
        inner.fa.set_block_style()  # as `dvc exp run -S` writes it
    if remarks:
        table.ca.items[key] = remarks
    for remark in table.ca.items.get(key, [])[2:3]:
        if remark:
            remark.start_mark = CommentMark(0)


def _within(value: Any) -> Iterator[CommentedMap | CommentedSeq]:
    """A value and all in it that holds other values."""
    if value and isinstance(value, CommentedMap | CommentedSeq):
        yield value
        for inner in value.values() if isinstance(value, CommentedMap) else value:
            yield from _within(inner)


def _editor() -> YAML:
    """A reader and writer of YAML that keeps remarks and layout."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 4096
    editor.indent(mapping=2, sequence=4, offset=2)
    return editor


def _text_of(editor: YAML, tree: Any) -> str:
    out = io.StringIO()
    editor.dump(tree, out)
    return out.getvalue()
