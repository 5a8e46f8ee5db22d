"""Files from strangers and texts in data sets run no code, leave no folder and show no secret."""

import ast
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aplsmear.errors import UserError
from aplsmear.features.backbones import cut_network
from aplsmear.features.store import read_features
from aplsmear.heads.head import read_average, read_heads
from aplsmear.heads.study import open_study
from aplsmear.params import Backbone, ParamsError, read_params
from aplsmear.secrets import HIDDEN, without_secrets
from aplsmear.workspace.profiles import with_settings

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("src", "stages", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
TRACE = "code has run"


class Trap:
    """A pickle that writes a file when it is opened."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(TRACE),)


@pytest.fixture
def untouched(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working directory; the test fails if code from a file has run in it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / TRACE).exists()


# --- what is loaded ---------------------------------------------------------------------------------

FORBIDDEN = re.compile(
    r"(pickle|cPickle|dill|cloudpickle|marshal|shelve)\.\w+|eval|exec|compile|__import__|os\.system|os\.popen"
    r"|joblib\.load|torch\.load|yaml\.(unsafe_load|full_load)|(\w+\.)*(load_model|model_from_json|deserialize_keras_object)"
    r"|(\w+\.)*(enable_unsafe_deserialization)|(pd|pandas)\.(read_pickle|eval|read_hdf)|tarfile\.\w+|(\w+\.)*extractall"
)  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_sources_call_nothing_that_runs_code_from_a_file_or_a_shell(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert not FORBIDDEN.fullmatch(ast.unparse(node.func)), ast.unparse(node)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert words.get("allow_pickle", "False") == "False", ast.unparse(node)
            assert words.get("shell", "False") == "False", ast.unparse(node)
            if ast.unparse(node.func) == "yaml.load":
                assert words.get("Loader") in ("yaml.SafeLoader", "yaml.CSafeLoader"), ast.unparse(node)


def network(weights: Path) -> Backbone:
    return Backbone(
        application="MobileNet",
        options={"alpha": 0.25},
        input_size={"cell": 32, "smear": 32},
        layer=["conv_pw_1_relu"],
        weights=str(weights),
        batch=2,
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_weights_with_code_or_with_a_size_of_terabytes_are_refused_or_harmless(untouched):
    good = untouched / "good.weights.h5"
    cut_network(network(Path("none")), "cell", 1)[0].save_weights(good)
    layer = {"class_name": "Lambda", "config": {"function": ["Path('sprung').touch()", None, None]}}
    config = {"class_name": "Functional", "config": {"layers": [layer]}}
    with h5py.File(good, "a") as file:  # every attribute from which Keras has ever run code
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"], file.attrs["backend"] = "2.2.4", "tensorflow"
        file.attrs["trap"] = np.void(pickle.dumps(Trap()))
    assert cut_network(network(good), "cell", 1)
    with h5py.File(good, "a") as file:
        names: list[str] = []
        file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        del file[names[0]]
        file.create_dataset(
            names[0], (10**6, 10**6), "f4", chunks=(1000, 1000)
        )  # 4 TB, in a file of a kilobyte
    with pytest.raises(UserError, match="it has 1,000,000,0"):
        cut_network(network(good), "cell", 1)
    pickled = untouched / "pickled.weights.h5"
    pickled.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="do not fit"):
        cut_network(network(pickled), "cell", 1)


def test_arrays_with_pickles_are_refused(untouched):
    traps = np.array([Trap()], dtype=object)
    np.savez(untouched / "heads.npz", features=traps, activation=traps, average=traps)
    for read in (read_heads, read_average):
        with pytest.raises(ValueError, match="allow_pickle"):
            read(untouched / "heads.npz")
    (untouched / "features" / "net").mkdir(parents=True)
    np.save(untouched / "features" / "net" / "layer.npy", traps)
    (untouched / "features" / "net" / "index.csv").write_text("item,view\n1,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="object"):
        read_features(untouched / "features", {"net"})


def test_a_parquet_file_with_a_pickled_type_is_harmless(untouched):
    """Versions of pyarrow before 14.0.1 opened the pickle (CVE-2023-47248)."""
    trap = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Trap()),
    }
    column = pa.field("outer_0", pa.float32(), metadata=trap)
    pq.write_table(pa.table([pa.array([0.5], pa.float32())], schema=pa.schema([column])), "scores.parquet")
    assert pd.read_parquet(untouched / "scores.parquet")["outer_0"].tolist() == [0.5]


START = {"op_code": 0, "worker_id": "x", "study_name": "s", "directions": [2]}
RUN = "__import__('pathlib').Path('sprung').touch()"
TRIAL = {
    "op_code": 4, "worker_id": "x", "study_id": 0, "distributions": {"a": RUN}, "params": {"a": 1},
    "state": 1, "datetime_start": "2020-01-01T00:00:00", "value": 0.5, "values": None, "user_attrs": {},
    "system_attrs": {}, "intermediate_values": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"no journal\n",
        pickle.dumps(Trap()) + b"\n",
        b"[1, 2]\n",
        b'{"op_code": 99, "worker_id": "x"}\n',
        json.dumps(START).encode() + b"\n" + json.dumps(TRIAL).encode() + b"\n",
        json.dumps(START | {"study_name": RUN, "op_code": RUN}).encode() + b"\n",
    ],
    ids=["text", "pickle", "list", "operation", "distribution", "code"],
)
def test_a_journal_of_trials_from_a_stranger_runs_nothing_and_is_named(untouched, content):
    (untouched / "s.journal").write_bytes(content)
    with pytest.raises(UserError, match=r"s\.journal is damaged"):
        open_study("s", untouched / "s.journal")


def test_texts_in_a_journal_of_trials_stay_text(untouched):
    held = {"py/object": "a", "x": RUN}
    trial = TRIAL | {"distributions": {}, "params": {}, "user_attrs": {"inner": held}}
    text = json.dumps(START) + "\n" + json.dumps(trial) + "\n"
    (untouched / "s.journal").write_text(text, encoding="utf-8")
    assert open_study("s", untouched / "s.journal").trials()[0].user_attrs == {"inner": held}


def test_a_profile_with_a_tag_runs_nothing(untouched):
    for tag in ("!!python/object/apply:pathlib.Path.touch [sprung]", "!!python/name:os.system"):
        text = with_settings(f"seed: {tag}\nother: 1\n", {"other": "2"})
        (untouched / "params.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ParamsError, match="is not valid YAML"):
            read_params(untouched / "params.yaml")


# --- what is printed and written -----------------------------------------------------------------------

SECRET = "Zq7-plAnted_9x"  # noqa: S105 (planted)


@pytest.fixture
def closed() -> Iterator[str]:
    """Host and port of a server that refuses every request and repeats its text."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        done = threading.Event()

        def refuse() -> None:
            while not done.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    asked = connection.recv(65536)
                    head = (
                        f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(asked)}\r\nConnection: close\r\n\r\n"
                    )
                    connection.sendall(head.encode() + asked)

        thread = threading.Thread(target=refuse)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        done.set()
        thread.join()


def run_code(folder: Path, code: str, **environment: str) -> str:
    """What a Python process prints, and the content of all files that it writes."""
    (folder / "home").mkdir(exist_ok=True)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "HOME": str(folder / "home")} | environment,
        capture_output=True,
        check=False,
    )
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return b"\n".join([ended.stdout, ended.stderr, *written]).decode("utf-8", "replace")


OPEN = """
import os, sys, aplsmear.runs.stage
from pathlib import Path
def main():
    from aplsmear.heads.study import open_study
    open_study("s", Path("s.journal"), os.environ["APLSMEAR_STUDY_STORAGE"])
aplsmear.runs.stage.run(main, [])
"""
FALL = """
import os, aplsmear.runs.stage
def main():
    raise RuntimeError(f"cannot use {dict(os.environ)}")
aplsmear.runs.stage.run(main, [])
"""
TRACK = """
import logging
from pathlib import Path
logging.basicConfig(level=logging.INFO)
from aplsmear.runs.tracking import Tracker
tracker = Tracker(Path(), "n", "k", {"stage": "tune"}, {"seed": 1})
tracker.log_trial(0, {"a": 1}, {"b": 1.0}, started=0, ended=1)
tracker.close({"chosen": "0"}, {"auroc": 0.5})
"""


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:{}@127.0.0.1:1/db",
        "postgresql+psycopg://me:{}@@127.0.0.1:nonsense/db",
        "postgresql+psycopg://127.0.0.1:1/db?user=me&password={}",
        "nonsense://me:{}@host",
        "me:{}@host",
    ],
)
def test_the_password_of_a_database_is_in_no_message(tmp_path, url):
    printed = run_code(tmp_path, OPEN, APLSMEAR_STUDY_STORAGE=url.format(SECRET))
    assert "cannot be used" in printed
    assert SECRET not in printed


def test_a_traceback_shows_no_secret_of_the_environment(tmp_path):
    names = ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD")
    names += ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "APLSMEAR_PSEUDONYM_KEY")
    planted = {name: f"{SECRET}{place}" for place, name in enumerate(names)}
    planted["MLFLOW_TRACKING_URI"] = planted["APLSMEAR_STUDY_STORAGE"] = f"https://me:{SECRET}@host/x"
    printed = run_code(tmp_path, FALL, **planted)
    assert "RuntimeError: cannot use" in printed
    assert HIDDEN in printed
    assert SECRET not in printed


def test_user_and_password_of_an_mlflow_server_are_sent_and_never_printed(tmp_path, closed):
    for place in (f"http://me:{SECRET}@{closed}", f"http://me:{SECRET}@127.0.0.1:1"):
        printed = run_code(tmp_path, TRACK, MLFLOW_TRACKING_URI=place)
        assert "MLflow cannot be reached" in printed
        assert SECRET not in printed
        assert b64encode(f"me:{SECRET}".encode()).decode() not in printed


def test_mlflow_sends_no_usage_data(monkeypatch):
    from aplsmear.runs.tracking import Tracker

    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(Tracker, "_attempt", lambda *_: None)
    Tracker(Path(), "n", "k", {}, {})
    assert os.environ.pop("MLFLOW_DISABLE_TELEMETRY") == "true"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("tune.storage", f"postgresql+psycopg://me:{SECRET}@host/db"),
        ("tune.storage", f"postgresql+psycopg://host/db?user=me&password={SECRET}"),
        ("tune.storage", [f"postgresql+psycopg://me:{SECRET}@host/db"]),
        ("tune.storage", f"mysql://me:{SECRET}@host/db"),
        ("tune", f"postgresql+psycopg://me:{SECRET}@host/db"),
        ("dataset.source", f"s3://me:{SECRET}@host/db"),
    ],
)
def test_a_password_in_params_is_refused_and_not_printed(tmp_path, place, value):
    from test_params import changed

    with pytest.raises(ParamsError) as error:
        read_params(changed(tmp_path, (place, value)))
    assert SECRET not in str(error.value)


def test_a_text_without_secrets_stays_as_it_is(monkeypatch):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("A_KEY", "1")  # too short for a secret
    for text in ("see https://example.org/a:b?x=1", "a@b.org: 1:2", "C:\\x", ""):
        assert without_secrets(text) == text


# --- servers ----------------------------------------------------------------------------------------


def test_every_server_that_is_started_listens_on_this_machine_only():
    asked = [*SOURCES, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]
    for path in [path for path in asked if path != Path(__file__)]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"0\.0\.0\.0|\[::\]|INADDR_ANY|--host[ =]\*", text), path
        for server in re.findall(r"(?:HTTPServer|create_server)\(\(([^,]+),", text):
            assert server.strip("\"'") in ("127.0.0.1", "localhost"), path


def test_a_table_with_a_formula_and_html_is_read_back_as_text(tmp_path):
    from aplsmear.tables import read_table, write_table

    table = pd.DataFrame({"patient": ["=HYPERLINK(1)"], "labels": ["<img src=x>|=1"], "probability": [0.5]})
    write_table(tmp_path / "a.csv", table)
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.csv"), table, check_dtype=False)
