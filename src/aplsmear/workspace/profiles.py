"""Sets of parameters for real uses, and the leftovers of a set that is no longer in force."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from aplsmear.errors import UserError
from aplsmear.files import sha256
from aplsmear.params import Params, flat, nearest, renamed


class ProfileError(UserError, ValueError):
    """A profile or a setting that does not exist."""


def read_profile(folder: Path, name: str) -> str:
    """The text of ``folder/<name>.yaml``.

    Raises:
        ProfileError: there is none of that name; the message lists those that there are.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ProfileError(
            f"there is no profile {name!r}{nearest(name, known)}; there are: {', '.join(known)}"
        )
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def with_settings(text: str, settings: Mapping[str, str]) -> str:
    """A params.yaml with some values changed and all remarks kept.

    Args:
        text: of the file.
        settings: dotted key -> value as YAML, such as ``{"dataset.root": "data", "split.folds": "10"}``.

    Raises:
        ProfileError: a key that the file does not have; all such keys at once.
    """
    editor = _editor()
    tree = editor.load(text)
    old = renamed(settings)
    problems = [f"{key!r} {answer}" for key, answer in old.items()]
    for key in [key for key in settings if key not in old]:
        *path, last = key.split(".")
        place: Any = tree
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            place[last] = YAML(typ="safe").load(settings[key])
        else:
            known = [name for name, _ in flat(tree, tables=True)]
            problems.append(f"there is no {key!r}{nearest(key, known)}")
    if problems:
        raise ProfileError("; ".join(problems))
    return _text_of(editor, tree)


def with_sums(text: str) -> str:
    """A params.yaml with the `sha256` of each file that `weights` of a backbone names and that is there.

    Another file in its place is noticed by it, and a new sum makes stale what hangs on it.

    Args:
        text: of the file; paths count from the working directory.
    """
    editor = _editor()
    tree = editor.load(text)
    named = [each for each in tree["backbones"].values() if Path(str(each["weights"])).is_file()]
    for backbone in named:
        backbone.pop("sha256", None)
        below = list(backbone).index("weights") + 1
        backbone.insert(below, "sha256", sha256(Path(backbone["weights"])))
    return _text_of(editor, tree) if named else text


def leftovers(root: Path, params: Params) -> list[Path]:
    """What earlier parameters made and no stage of these makes: features, backbones, tuned tasks, members.

    DVC takes all that lies in a folder for inputs of the stage that depends on the folder, so they must go.

    Args:
        root: the workspace.
        params: in force.

    Returns:
        Folders and files, sorted.
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


def _editor() -> YAML:
    """Reads and writes YAML and keeps its remarks and its shape."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _text_of(yaml: YAML, tree: Any) -> str:
    out = io.StringIO()
    yaml.dump(tree, out)
    return out.getvalue()
