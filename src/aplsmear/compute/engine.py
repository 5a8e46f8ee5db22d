"""Where the partitions of a long work are done: here, or on the machines of a Dask cluster.

A stage maps one pure function over partitions (a smear and its cells, some batches of views). An engine gives
the results back in order, a few at a time, whoever computed them:

    stage -> engine.map(function, partitions) -> results, in order
               Here:    processes of this machine
               Cluster: workers of a Dask scheduler, started by whoever runs the cluster (docs/cluster.md)

A worker must do as this process does, or refuse: same code, same libraries, pinned CPU kernels, same card,
the same folder under the same name. All that are there are asked before the work starts, and each asks
itself again before its first partition, so that one who joins later is no exception. A partition whose worker
is killed goes to another one; nothing of it was written.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import secrets
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import joblib

from aplsmear import cpu
from aplsmear.compute.runtime import device, start_tensorflow
from aplsmear.errors import UserError, brief
from aplsmear.params import Params

ADDRESS_VARIABLE = "DASK_SCHEDULER_ADDRESS"  # beats params.yaml; Dask's own tools know it by this name
LIBRARIES = (
    "dask", "distributed", "h5py", "imgaug", "keras", "numpy", "opencv-python-headless", "pandas", "pillow",
    "pyarrow", "scikit-image", "scipy", "tensorflow", "torchstain",
)  # fmt: skip
AHEAD = 3  # partitions a worker that are asked for before the first of them is taken
_ANSWER = 5  # seconds for a scheduler to answer
_PATIENCE = 30  # seconds without a result after which it is looked whether any worker is left
_RETRIES = 2  # of a partition that failed by no fault of the data, such as a disk that did not answer
_LARGE = "256MB"  # of a partition, before Dask warns

P = TypeVar("P")
R = TypeVar("R")


class EngineError(UserError, RuntimeError):
    """The cluster cannot do the work as this machine would."""


class Engine(Protocol):
    """Does partitions of a work."""

    def map(self, function: Callable[[P], R], parts: Iterable[P], *, processes: bool = True) -> Iterator[R]:
        """The function of each part, in order.

        Args:
            function: pure, of a module's top level (or a `functools.partial` of one).
            parts: taken as they are needed: memory holds some parts and results, however many there are.
            processes: False where the function uses all cores by itself (TensorFlow does): on this machine
                the parts are then done one after another in this process.
        """


@dataclass(frozen=True)
class Here:
    """This machine."""

    workers: int = -1  # processes; -1: one a core (LOKY_MAX_CPU_COUNT may say fewer)

    def map(self, function: Callable[[P], R], parts: Iterable[P], *, processes: bool = True) -> Iterator[R]:
        """See `Engine.map`."""
        if not processes:
            return map(function, parts)
        parallel = joblib.Parallel(self.workers, return_as="generator", pre_dispatch=f"{AHEAD} * n_jobs")
        found: Iterator[R] = parallel(joblib.delayed(function)(part) for part in parts)
        return found


HERE = Here()


@dataclass(frozen=True)
class Terms:
    """What a worker must meet."""

    folder: Path  # the working directory of the work, seen by all under one name
    token: str  # the name of a file in it, and what it holds
    inputs: dict[str, str]  # path -> what is seen there
    sameness: dict[str, str]  # of `fingerprint`
    networks: bool
    device: str = ""  # that networks run on; '': any


@dataclass(frozen=True)
class _Work:
    """A partition on its way; one object, which Dask takes as it is."""

    terms: Terms
    function: Callable[[Any], Any]
    part: Any


@dataclass(frozen=True)
class _Failure:
    """What a user has to mend: no use in trying again."""

    error: UserError


class Cluster:
    """The workers of a Dask scheduler."""

    def __init__(self, client: Any, terms: Terms) -> None:
        """Take a connected `distributed.Client` and what its workers have to meet."""
        self._client, self._terms = client, terms

    def map(self, function: Callable[[P], R], parts: Iterable[P], *, processes: bool = True) -> Iterator[R]:
        """See `Engine.map`; a worker does one part at a time in its one process, whatever it is.

        Raises:
            EngineError: a worker that joined does not fit, a part has ended several workers, or the
                scheduler is gone.
        """
        del processes
        coming = iter(parts)
        asked: deque[Any] = deque()
        try:
            while True:
                room = AHEAD * max(1, self._workers()) - len(asked)
                for part in islice(coming, max(0, room)):
                    work = _Work(self._terms, function, part)
                    asked.append(self._client.submit(_done, work, pure=False, retries=_RETRIES))
                if not asked:
                    return
                result = self._awaited(asked.popleft())
                if isinstance(result, _Failure):
                    raise result.error
                yield result
        finally:
            if self._client.status == "running":
                self._client.cancel(list(asked))

    def _workers(self) -> int:
        try:
            return len(self._client.nthreads())
        except OSError as error:
            raise self._gone(error) from None

    def _awaited(self, future: Any) -> Any:
        """The result; says so where nobody is left who could give it."""
        from distributed.scheduler import KilledWorker

        told = False
        try:
            while True:
                try:
                    return future.result(timeout=_PATIENCE)
                except TimeoutError:
                    if future.done():  # the function itself has raised it
                        raise
                if not told and not self._workers():
                    print("no worker is left: waiting for one to join", file=sys.stderr)
                    told = True
        except KilledWorker as error:
            raise EngineError(
                f"one partition has ended {error.allowed_failures + 1} workers, the last was "
                f"{error.last_worker.address}: most likely it needs more memory than a worker has "
                "(`dask worker --memory-limit`, and what the queue grants)"
            ) from None
        except CancelledError as error:
            raise self._gone(error) from None

    def _gone(self, error: BaseException) -> EngineError:
        address = self._client.scheduler.address
        return EngineError(f"the scheduler at {address} is gone ({brief(error)}): start it again, then this")


@contextmanager
def engine_of(
    params: Params | None, inputs: Sequence[Path] = (), *, networks: bool = False
) -> Iterator[Engine]:
    """The engine that the environment (DASK_SCHEDULER_ADDRESS), or else params.yaml, asks for.

    Args:
        params: with `engine.address`; None: there is no params.yaml.
        inputs: files and folders that the functions will read, from the working directory.
        networks: whether they run networks.

    Raises:
        EngineError: no scheduler answers within seconds, or workers do not fit: all of them, with all that
            is wrong.
    """
    address = os.environ.get(ADDRESS_VARIABLE, params.engine.address if params else "")
    if not address:
        yield HERE
        return
    import dask

    token = f".engine-{secrets.token_hex(8)}"
    seen = {str(path): _seen(path) for path in inputs}
    terms = Terms(Path.cwd(), token, seen, fingerprint(), networks)
    with (
        dask.config.set({"distributed.admin.large-graph-warning-threshold": _LARGE}),
        _connected(address) as client,
        _token(terms),
    ):
        yield Cluster(client, _agreed(client, terms))


@contextmanager
def _token(terms: Terms) -> Iterator[None]:
    """A file that whoever shares the folder sees."""
    path = terms.folder / terms.token
    try:
        path.write_text(terms.token, encoding="utf-8")
    except OSError as error:
        raise EngineError(
            f"{terms.folder} cannot be written to ({error.strerror}): start in a folder that is shared with "
            "the workers"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of the scheduler, which runs what we run."""
    from distributed import Client

    try:
        asyncio.run(_call(address))  # first, because a client that found nobody is slow to go
        client = Client(address, timeout=_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"no Dask scheduler answers at {address} ({brief(error)}): start it, mend engine.address in "
            f"params.yaml or the variable {ADDRESS_VARIABLE}, or empty both to work on this machine"
        ) from None
    with client:
        try:
            wrong = list(_differences(client.run_on_scheduler(fingerprint), fingerprint()))
        except Exception as error:  # whatever its Python says where it cannot load ours
            wrong = [f"cannot run aplsmear ({brief(error)})"]
        if wrong:
            raise EngineError(
                f"the scheduler at {address} does not fit: it {', '.join(wrong)}. Start it in this "
                "environment"
            )
        yield client


async def _call(address: str) -> None:
    from distributed.comm import connect
    from distributed.security import Security

    asking = connect(address, timeout=_ANSWER, **Security().get_connection_args("client"))
    comm = await asyncio.wait_for(asking, _ANSWER + 1)  # Dask waits for ever for who listens and is silent
    await comm.close()


def _agreed(client: Any, terms: Terms) -> Terms:
    """The terms, with the device of the workers; every worker that is there meets them."""
    if not client.nthreads():
        print("the cluster has no worker yet: waiting for one to join", file=sys.stderr)
        client.wait_for_workers(1)
    answers = client.run(_answer, terms, on_error="return")
    devices = {each.device for each in answers.values() if isinstance(each, _Answer) and each.device}
    problems: dict[str, list[str]] = defaultdict(list)
    for worker, answer in sorted(answers.items()):
        if not isinstance(answer, _Answer):
            problems[f"cannot run aplsmear ({brief(answer)})"].append(worker)
            continue
        found = list(answer.problems)
        if answer.device and len(devices) > 1:
            found.append(f"{_RUNS_ON} {answer.device}, and all must run on the same")
        for problem in found:
            problems[problem].append(f"{worker} on {answer.host}")
    if problems:
        raise EngineError(_unfit(problems))
    print(f"{len(answers)} workers of the Dask scheduler {client.scheduler.address}", file=sys.stderr)
    return replace(terms, device="".join(devices))


def _unfit(problems: Mapping[str, Sequence[str]]) -> str:
    lines = [f"  {problem}: {', '.join(workers)}" for problem, workers in problems.items()]
    return "\n".join(["workers cannot do as this machine would (docs/cluster.md):", *lines])


@cache
def fingerprint() -> dict[str, str]:
    """What must be the same wherever partitions of one work are done: code, Python, libraries.

    Of this process: code that is changed later is seen by the next one only, as it is run by the next only.
    """
    digest = hashlib.sha256()
    code = Path(__file__).parents[1]
    for path in sorted(code.rglob("*.py")):
        digest.update(path.relative_to(code).as_posix().encode() + b"\0" + path.read_bytes())
    found = {
        "aplsmear's code": digest.hexdigest()[:12],
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def _differences(found: Mapping[str, str], needed: Mapping[str, str]) -> Iterator[str]:
    for name, ours in needed.items():
        if found.get(name) != ours:
            yield f"has {name} {found.get(name)}, here {ours}"


def _seen(path: Path) -> str:
    """A file's size; of a folder, names and sizes of what lies in it."""
    try:
        if not path.is_dir():
            return f"{path.stat().st_size:,} bytes"
        listed = sorted(
            f"{each.name} {each.stat().st_size if each.is_file() else ''}"
            for each in path.iterdir()
            if not each.name.startswith(".")
        )
        return f"{len(listed)} files ({hashlib.sha256(repr(listed).encode()).hexdigest()[:8]})"
    except OSError as error:
        return f"nothing ({error.strerror})"


# --- on a worker ----------------------------------------------------------------------------------

_RUNS_ON = "runs networks on"
_met: set[str] = set()  # tokens of terms that this process has found met


@dataclass(frozen=True)
class _Answer:
    """What a worker says of itself."""

    host: str
    device: str
    problems: list[str]


async def _answer(terms: Terms, dask_worker: Any) -> _Answer:
    """Whether this worker meets the terms; it goes on answering its scheduler meanwhile."""
    problems = await asyncio.to_thread(lambda: list(_problems(terms, dask_worker)))
    where = await asyncio.to_thread(_device) if terms.networks and not problems else ""
    return _Answer(platform.node(), where, problems)


def _done(work: _Work) -> Any:
    """The function of a part, in the folder of the client; refused where other bytes might come of it."""
    from distributed import get_worker

    terms = work.terms
    if terms.token not in _met:
        worker = get_worker()
        problems = list(_problems(terms, worker))
        if problems:
            where = f"{worker.address} on {platform.node()}, which joined"
            return _Failure(EngineError(_unfit({problem: [where] for problem in problems})))
        _met.add(terms.token)
    try:
        with chdir(terms.folder):
            return work.function(work.part)
    except UserError as error:
        return _Failure(error)


def _problems(terms: Terms, worker: Any) -> Iterator[str]:
    if worker.state.nthreads != 1:
        yield f"does {worker.state.nthreads} partitions at once in one process (start it with --nthreads 1)"
    late = cpu.late()
    if late:
        yield f"loaded NumPy before {', '.join(late)} was set (start it with --preload-nanny aplsmear)"
    yield from _differences(fingerprint(), terms.sameness)
    try:
        seen = (terms.folder / terms.token).read_text(encoding="utf-8") == terms.token
    except OSError:
        seen = False
    if not seen:
        yield f"does not see the folder {terms.folder} as it is here (it must be shared, under the same name)"
        return
    for path, needed in terms.inputs.items():
        found = _seen(terms.folder / path)
        if found != needed:
            yield f"sees {found} at {path}, here {needed}"
    if terms.networks and terms.device and _device() != terms.device:
        yield f"{_RUNS_ON} {_device()}, the others on {terms.device}"


@cache
def _device() -> str:
    """What this process runs networks on."""
    start_tensorflow()
    return device()
