"""A damaged file of annotations gives a data set, or an error in words: never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import annotated
from aplsmear.errors import UserError
from aplsmear.exchange import importing, sources
from aplsmear.exchange.classes import known_classes
from aplsmear.exchange.found import ExchangeError

KNOWN = known_classes()
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from([[], {}, [[]], [None], "1e999", -1, 10**30, "a.png", "../a.png", {"x": {}}, [[1]], "|"]),
)  # fmt: skip
PARTS = [b"\0", b'"', b"[" * 10000, b"1e400", b"\x1b[2J"]
JSON = [annotated.coco, annotated.labelme, annotated.geojson, annotated.label_studio]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def judge(source: Path, size: float | None) -> str:
    """How an import without writing ends; another exception than a UserError fails the test."""
    try:
        found, root = sources.read_source(source, KNOWN, size=size)
        importing.planned(found, root, KNOWN, importing.FactSources(), keep_unknown=True)
    except UserError as error:
        return "refused" if 0 < len(str(error)) < 2000 or not isinstance(error, ExchangeError) else "too long"
    return "read"


def files_of(source: Path) -> list[Path]:
    folder = source if source.is_dir() else source.parent
    ends = {".csv", ".json", ".geojson", ".xml", ".txt", ".yaml"}
    return [path for path in sorted(folder.rglob("*")) if path.suffix in ends]


@pytest.mark.parametrize("kind", annotated.ALL, ids=lambda kind: kind.__name__)
def test_changed_bytes_give_a_data_set_or_an_error_in_words(kind, tmp_path):
    source = kind(tmp_path / "source")
    files = {path: path.read_bytes() for path in files_of(source)}
    ends = set()

    @QUICK
    @given(data=st.data())
    def survives(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(files)))
        sound = files[path]
        start = data.draw(st.integers(0, len(sound)))
        length = data.draw(st.integers(0, 20))
        other = data.draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"\0", b'"', b"[" * 10000, b"1e400"]))
        )
        path.write_bytes(sound[:start] + other + sound[start + length :])
        ends.add(judge(source, 20))
        path.write_bytes(sound)
        assert ends <= {"read", "refused"}

    survives()
    assert judge(source, None) == "read"
    assert "refused" in ends


def places(node: Any) -> list[tuple[Any, Any]]:
    """Each place of a JSON document: what holds it, and its key."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in inner for place in [(node, key), *places(value)]]


@pytest.mark.parametrize(
    "kind", [annotated.coco, annotated.labelme, annotated.geojson, annotated.label_studio]
)
def test_any_value_at_any_place_of_json_gives_a_data_set_or_an_error_in_words(kind, tmp_path):
    source = kind(tmp_path / "source")
    path = files_of(source)[0]
    sound = path.read_text()

    @QUICK
    @given(place=st.integers(0, 10**6), value=ODD, size=st.sampled_from([None, 20.0]))
    def survives(place: int, value: Any, size: float | None) -> None:
        document = json.loads(sound)
        every = places(document)
        holder, key = every[place % len(every)]
        holder[key] = value
        path.write_text(json.dumps(document))
        assert judge(source, size) in ("read", "refused")

    survives()
