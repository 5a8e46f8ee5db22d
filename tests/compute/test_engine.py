"""A real Dask cluster gives the results of this machine, or an error gives the reason why not."""

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from distributed import Client
from test_predict import BACKBONE, KNOBS, SEED, Run, trained  # noqa: F401

from aplsmear.compute.engine import ADDRESS_VARIABLE, Cluster, EngineError, Here, Terms, engine_of
from aplsmear.data.dataset import read_data_set
from aplsmear.data.labels import tidy
from aplsmear.ensembles.bundle import read_bundle
from aplsmear.features import forward
from aplsmear.features.forward import FeatureRequest, batch_of, features_of_file
from aplsmear.features.store import write_features
from aplsmear.images.reading import ImageError, read_image
from aplsmear.images.view_store import read_index, view_writer
from aplsmear.params import LEVELS
from aplsmear.prediction import predict
from aplsmear.prediction.predict import Models, judge_patients
from clones import ROOT, run
from dask_servers import SRC, Servers, until, workers
from made_views import all_views
from onnx_files import backbone

# Keras 3.15 on NumPy 2, when it saves weights.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    """A scheduler, whose address is in the environment."""
    (tmp_path / "servers").mkdir()
    with Servers(tmp_path / "servers") as started:
        monkeypatch.setenv(ADDRESS_VARIABLE, started.address)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield started


@pytest.fixture
def client(servers: Servers) -> Iterator[Client]:
    """A client with which the test looks at the cluster."""
    with Client(servers.address, set_as_default=False) as looking:
        yield looking


def joined(client: Client, *names: str) -> bool:
    return set(names) <= set(workers(client))


def has_work(client: Client, name: str) -> bool:
    """Whether partitions are lost with this worker: in progress, or done and not yet fetched."""
    address = workers(client)[name]
    return bool(client.processing()[address] or client.has_what()[address])


def test_results_are_those_of_this_machine_while_workers_are_killed_and_others_join(
    trained: Run,  # noqa: F811
    servers: Servers,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers.worker("a")
    until(lambda: joined(client, "a"))
    found = read_data_set(trained.data, {}, min_box=8, skip_bad_images=False)
    settings = KNOBS.model_copy(update={"extra_views": {"apl": 2}})
    root = trained.data.parent
    views = {level: tmp_path / f"{level}.parquet" for level in LEVELS}

    with engine_of(None, [trained.data]) as engine, view_writer(views) as write:
        made = all_views(
            trained.data,
            found.smears,
            found.cells,
            settings,
            SEED,
            engine,
        )
        write(next(made))
        for name in ("b", "c", "d"):
            servers.worker(name)
        until(lambda: joined(client, "b", "c", "d"))
        assert has_work(client, "a")
        servers.kill("a")  # the rest is computed by workers that joined later
        for of_smear in made:
            write(of_smear)
    for level, path in views.items():
        assert path.read_bytes() == (root / "augmented" / f"{level}.parquet").read_bytes()

    monkeypatch.setattr(forward, "_BATCHES", 1)
    with engine_of(None, list(views.values()), networks=True) as engine:
        for name, row in {"net": BACKBONE, "file": backbone(root / "own.onnx")}.items():
            for level, path in views.items():
                graph = root / "backbones" / name / f"{level}.onnx"
                request = FeatureRequest(name, graph, level, tuple(row.layer), batch_of(row, level))
                features = features_of_file(path, request, engine)
                first = next(features)
                if (name, level) == ("net", "cell"):
                    assert has_work(client, "b")
                    servers.kill("b")
                made = tmp_path / name / level
                write_features(made, read_index(path), row.layer, chain([first], features))
                for made_here in (root / "features" / level / name).iterdir():
                    assert (made / made_here.name).read_bytes() == made_here.read_bytes()

    monkeypatch.setattr(predict, "CHUNK", 20)
    bundle = read_bundle(trained.ensemble)
    models = Models(bundle, bundle.outer_fold_of(None), evidence=True)
    expected = list(judge_patients(models, trained.data, found.smears, found.cells, Here(1)))
    with engine_of(None, [trained.data, bundle.folder], networks=True) as engine:
        judging = judge_patients(models, trained.data, found.smears, found.cells, engine)
        first = next(judging)
        assert has_work(client, "c")
        servers.kill("c")
        judged = [first, *judging]
    assert repr(judged) == repr(expected)
    assert list(Path().iterdir()) == []


class Slow:
    """A result that cannot be fetched at first: its worker was killed, and another one computes it."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.attempts = 0

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> str:
        self.attempts += 1
        assert timeout is None or self.attempts == 1 or self.status == "finished"
        if self.status == "error":
            raise TimeoutError("of the function" if self.attempts > 1 else "of the client")
        if self.attempts == 1:
            raise TimeoutError("of the client")
        return "computed again"


def test_a_finished_result_is_awaited_again_if_its_worker_was_killed_before_it_was_fetched() -> None:
    class Scheduler:
        def nthreads(self) -> dict[str, int]:
            return {"another worker": 1}

    cluster = Cluster(Scheduler(), Terms(Path(), "", {}, {}, networks=False))
    assert cluster._result_of(Slow("finished")) == "computed again"
    with pytest.raises(TimeoutError, match="of the function"):
        cluster._result_of(Slow("error"))


def test_workers_of_another_environment_are_named_before_the_work_and_refuse_if_they_join_later(
    servers: Servers, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"  # code and a library of another version
    shutil.copytree(SRC, other)
    (other / "aplsmear" / "changed.py").write_text("")
    (other / "imgaug-0.3.0.dist-info").mkdir()
    (other / "imgaug-0.3.0.dist-info" / "METADATA").write_text("Name: imgaug\nVersion: 0.3.0\n")
    texts = [f"{n} " for n in range(30)]
    servers.worker("fit")
    until(lambda: joined(client, "fit"))
    with engine_of(None) as engine:
        tidied = engine.map(tidy, texts)
        assert next(tidied) == "0"
        servers.worker("other", src=str(other))
        servers.worker("loose", "--nthreads", "2")
        until(lambda: joined(client, "other", "loose"))
        with pytest.raises(EngineError, match="which joined"):
            list(tidied)
    addresses = workers(client)
    with pytest.raises(EngineError) as caught, engine_of(None):
        pass
    lines = str(caught.value).splitlines()[1:]
    assert all(addresses["fit"] not in line for line in lines)
    assert [line for line in lines if addresses["other"] in line and "imgaug 0.3.0, here 0.4.0" in line]
    assert [line for line in lines if addresses["other"] in line and "aplsmear's code" in line]
    assert [line for line in lines if addresses["loose"] in line and "--nthreads 1" in line]
    assert [line for line in lines if addresses["loose"] in line and "OPENBLAS_CORETYPE" in line]

    for name in ("other", "loose"):
        servers.kill(name)
    until(lambda: set(workers(client)) == {"fit"})
    here = os.open(".", os.O_RDONLY)
    monkeypatch.setattr(Path, "cwd", lambda: Path(f"/proc/self/fd/{here}"))  # no other process sees it
    with pytest.raises(EngineError, match=rf"{addresses['fit']}.*|must be shared"), engine_of(None):
        pass
    monkeypatch.undo()
    os.close(here)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "tcp://127.0.0.1:{listening}"])
def test_a_scheduler_that_does_not_answer_is_named_within_seconds(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = address.format(listening=server.getsockname()[1])
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        started = time.monotonic()
        with pytest.raises(EngineError, match=f"no Dask scheduler answers at {address}"), engine_of(None):
            pass
    assert time.monotonic() - started < 15


def test_an_error_in_the_data_is_reported_as_on_this_machine_and_the_end_of_the_scheduler_is_reported(
    servers: Servers, client: Client
) -> None:
    servers.worker("a")
    until(lambda: joined(client, "a"))
    Path("bad.png").write_bytes(b"no picture")
    for each in (Here(1), None):
        with engine_of(None) as engine, pytest.raises(ImageError, match=r"bad\.png") as caught:
            list((each or engine).map(read_image, [Path("bad.png")]))
        assert caught.value.fix
    client.close()  # one that loses its scheduler may fail to close
    with engine_of(None) as engine:
        tidied = engine.map(tidy, [f"{n} " for n in range(30)])
        next(tidied)
        servers.kill("scheduler")
        with pytest.raises(EngineError, match="is gone"):
            list(tidied)
    servers.scheduler()
    servers.worker("b")
    with Client(servers.address, set_as_default=False) as again:
        until(lambda: joined(again, "b"))
    with engine_of(None) as engine:
        assert list(engine.map(tidy, [f"{n} " for n in range(30)])) == [tidy(f"{n} ") for n in range(30)]


def test_the_job_scripts_in_the_documentation_start_suitable_workers(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown = [
        re.sub(r"ADDRESS[^\"]*", "127.0.0.1", block).split("    cluster.adapt")[0]
        + "    print(cluster.job_script())\n    cluster.close()\n"
        for block in blocks
    ]
    (tmp_path / "cluster.py").write_text("\n".join(shown))
    slurm, pbs = run(tmp_path, sys.executable, "cluster.py").split("#!/usr/bin/env bash")[1:]
    assert {"#SBATCH -p gpu", "#SBATCH --gres=gpu:v100:1", "#SBATCH --cpus-per-task=4"} <= set(
        slurm.splitlines()
    )
    assert {"#PBS -q cpu", "#PBS -l select=1:ncpus=16:mem=48gb"} <= set(pbs.splitlines())
    for script in (slurm, pbs):
        (command,) = (line for line in script.splitlines() if "dask_worker tcp://127.0.0.1" in line)
        assert "--nthreads 1 " in command
        assert " --preload-nanny aplsmear " in command
    assert "--nworkers 16 " in pbs
