"""Where the partitions of a long computation are processed: here, or on the machines of a Dask cluster.

A stage maps one pure function over partitions (a smear with its cells, some batches of views). An engine
returns the results in order, a few at a time:

    stage -> engine.map(function, partitions) -> results, in order
               Here:    processes of this machine
               Cluster: workers of a Dask scheduler, which the user has started (docs/cluster.md)

A worker must give the same bytes as this process: same code, libraries and CPU settings, the same kind of
GPU, the same folder under the same name. All workers are checked before the computation starts. A worker that
joins later is checked before its first partition. If a worker is killed, its partitions go to another one.
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
from typing import Any, TypeVar

import joblib

from aplsmear import cpu
from aplsmear.compute.runtime import device
from aplsmear.errors import UserError, brief
from aplsmear.params import Params

ADDRESS_VARIABLE = "DASK_SCHEDULER_ADDRESS"  # Dask's own; it overrides params.yaml
LIBRARIES = (
    "dask", "distributed", "h5py", "imgaug", "keras", "numpy", "opencv-python-headless", "pandas", "pillow",
    "onnxruntime", "pyarrow", "scikit-image", "scipy", "tensorflow",
)  # fmt: skip
AHEAD = 3  # partitions per worker that are submitted before the first result is taken
_ANSWER = 5  # seconds in which a scheduler must answer
_PATIENCE = 30  # seconds without a result after which the number of workers is checked
_RETRIES = 2  # of a partition that failed, but not because of the data
_LARGE = "256MB"  # size of a partition above which Dask warns

P = TypeVar("P")
R = TypeVar("R")


class EngineError(UserError, RuntimeError):
    """The cluster cannot give the results that this machine would give."""


@dataclass(frozen=True)
class Here:
    """This machine."""

    workers: int = -1  # processes; -1: one per core (LOKY_MAX_CPU_COUNT may lower it)

    def map(self, function: Callable[[P], R], parts: Iterable[P], *, processes: bool = True) -> Iterator[R]:
        """The function of each part, in order.

        Args:
            function: pure, at the top level of a module (or a `functools.partial` of such a function).
            parts: read as they are needed, so that memory holds only a few parts and results.
            processes: False if the function itself uses all cores, as TensorFlow does: this machine then
                processes one part after another, in this process.
        """
        if not processes:
            return map(function, parts)
        parallel = joblib.Parallel(self.workers, return_as="generator", pre_dispatch=f"{AHEAD} * n_jobs")
        found: Iterator[R] = parallel(joblib.delayed(function)(part) for part in parts)
        return found


HERE = Here()


@dataclass(frozen=True)
class Terms:
    """The conditions for a worker."""

    folder: Path  # the working directory, which all machines see under this name
    token: str  # the name of a file in it, and the file's content
    inputs: dict[str, str]  # path -> `_seen` of it
    sameness: dict[str, str]  # see `fingerprint`
    networks: bool  # whether the functions run neural networks
    device: str = ""  # that they run on; '': any


@dataclass(frozen=True)
class _Work:
    """A part and its function; one object, which Dask does not take apart."""

    terms: Terms
    function: Callable[[Any], Any]
    part: Any


class Cluster:
    """The workers of a Dask scheduler."""

    def __init__(self, client: Any, terms: Terms) -> None:
        """Take a connected `distributed.Client`, and the conditions for its workers."""
        self._client, self._terms = client, terms

    def map(self, function: Callable[[P], R], parts: Iterable[P], *, processes: bool = True) -> Iterator[R]:
        """See `Here.map`; a worker always processes one part at a time, in one process.

        Raises:
            EngineError: a worker that joined does not meet the conditions, a part has killed several workers,
                or the scheduler has ended.
        """
        del processes
        coming = iter(parts)
        submitted: deque[Any] = deque()
        try:
            while True:
                room = AHEAD * max(1, self._workers()) - len(submitted)
                for part in islice(coming, max(0, room)):
                    work = _Work(self._terms, function, part)
                    submitted.append(self._client.submit(_done, work, pure=False, retries=_RETRIES))
                if not submitted:
                    return
                result = self._result_of(submitted.popleft())
                if isinstance(result, UserError):
                    raise result
                yield result
        finally:
            if self._client.status == "running":
                self._client.cancel(list(submitted))

    def _workers(self) -> int:
        try:
            return len(self._client.nthreads())
        except OSError as error:
            raise self._gone(error) from None

    def _result_of(self, future: Any) -> Any:
        """Wait for a result; print a line if there is no worker."""
        from distributed.scheduler import KilledWorker

        printed = False
        try:
            while True:
                try:
                    return future.result(timeout=_PATIENCE)
                except TimeoutError:
                    # A finished result may also take so long: its worker was killed, another one computes it.
                    if future.status == "error":
                        return future.result()  # raises the function's own error
                if not printed and not self._workers():
                    print("no worker is left: waiting for one to join", file=sys.stderr)
                    printed = True
        except KilledWorker as error:
            raise EngineError(
                f"one partition has ended {error.allowed_failures + 1} workers, the last was "
                f"{error.last_worker.address}: most likely it needs more memory than a worker has "
                "(`dask worker --memory-limit`, and the limit of the queue)"
            ) from None
        except CancelledError as error:
            raise self._gone(error) from None

    def _gone(self, error: BaseException) -> EngineError:
        address = self._client.scheduler.address
        return EngineError(
            f"the scheduler at {address} is gone ({brief(error)}): start it again, then the same command"
        )


Engine = Here | Cluster


@contextmanager
def engine_of(
    params: Params | None, inputs: Sequence[Path] = (), *, networks: bool = False
) -> Iterator[Engine]:
    """The engine that DASK_SCHEDULER_ADDRESS, or else params.yaml (None: there is none), asks for.

    `inputs` are the files and folders that the functions read, relative to the working directory; `networks`:
    they run neural networks.

    Raises:
        EngineError: no scheduler answers within seconds, or workers do not meet the conditions; the message
            has all workers and all that is wrong.
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
    """A file that every machine with the shared folder can see."""
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
    """A client of a scheduler that has our code and libraries."""
    from distributed import Client

    try:
        asyncio.run(_call(address))  # first, because a client without a scheduler takes long to end
        client = Client(address, timeout=_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"no Dask scheduler answers at {address} ({brief(error)}): start it, or correct engine.address "
            f"in params.yaml or the variable {ADDRESS_VARIABLE}, or empty both to compute on this machine"
        ) from None
    with client:
        try:
            wrong = list(_differences(client.run_on_scheduler(fingerprint), fingerprint()))
        except Exception as error:  # any error of a Python that cannot load our code
            wrong = [f"cannot run aplsmear ({brief(error)})"]
        if wrong:
            raise EngineError(
                f"the scheduler at {address} is of another environment: it {', '.join(wrong)}. Start it in "
                "this environment"
            )
        yield client


async def _call(address: str) -> None:
    from distributed.comm import connect
    from distributed.security import Security

    asking = connect(address, timeout=_ANSWER, **Security().get_connection_args("client"))
    comm = await asyncio.wait_for(asking, _ANSWER + 1)  # Dask would wait for ever for a port that is silent
    await comm.close()


def _agreed(client: Any, terms: Terms) -> Terms:
    """Check all workers; return the conditions with the device that they have."""
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
        unlike = answer.device and len(devices) > 1
        more = [f"{_RUNS_ON} {answer.device}, and all must run on the same"] if unlike else []
        for problem in [*answer.problems, *more]:
            problems[problem].append(f"{worker} on {answer.host}")
    if problems:
        raise EngineError(_unfit(problems))
    print(f"{len(answers)} workers of the Dask scheduler {client.scheduler.address}", file=sys.stderr)
    return replace(terms, device="".join(devices))


def _unfit(problems: Mapping[str, Sequence[str]]) -> str:
    lines = [f"  {problem}: {', '.join(workers)}" for problem, workers in problems.items()]
    return "\n".join(["these workers would give other results than this machine (docs/cluster.md):", *lines])


@cache
def fingerprint() -> dict[str, str]:
    """Code, Python and libraries of this process: they must be the same on all machines.

    The code is read once; code that is changed later is not used by this process either.
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
    """The size of a file; of a folder, a hash of the names and sizes in it."""
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
_met: set[str] = set()  # tokens of the conditions that this process meets


@dataclass(frozen=True)
class _Answer:
    """The result of the check of a worker."""

    host: str
    device: str
    problems: list[str]


async def _answer(terms: Terms, dask_worker: Any) -> _Answer:
    """Check this worker; in threads, so that it still answers its scheduler meanwhile."""
    problems = await asyncio.to_thread(lambda: list(_problems(terms, dask_worker)))
    where = await asyncio.to_thread(device) if terms.networks and not problems else ""
    return _Answer(platform.node(), where, problems)


def _done(work: _Work) -> Any:
    """The function of a part, in the folder of the client.

    An error that the user must correct is returned: Dask would try again after one that is raised.
    """
    from distributed import get_worker

    terms = work.terms
    if terms.token not in _met:
        worker = get_worker()
        if problems := list(_problems(terms, worker)):
            where = f"{worker.address} on {platform.node()}, which joined"
            return EngineError(_unfit({problem: [where] for problem in problems}))
        _met.add(terms.token)
    try:
        with chdir(terms.folder):
            return work.function(work.part)
    except UserError as error:
        return error


def _problems(terms: Terms, worker: Any) -> Iterator[str]:
    if worker.state.nthreads != 1:
        yield f"runs {worker.state.nthreads} partitions at once in one process (start it with --nthreads 1)"
    if late := cpu.late():
        yield f"loaded NumPy before {', '.join(late)} was set (start it with --preload-nanny aplsmear)"
    yield from _differences(fingerprint(), terms.sameness)
    try:
        seen = (terms.folder / terms.token).read_text(encoding="utf-8") == terms.token
    except OSError:
        seen = False
    if not seen:
        yield f"does not see the folder {terms.folder} (it must be shared, under the same name)"
        return
    for path, needed in terms.inputs.items():
        found = _seen(terms.folder / path)
        if found != needed:
            yield f"sees {found} at {path}, here {needed}"
    if terms.networks and terms.device and device() != terms.device:
        yield f"{_RUNS_ON} {device()}, the others on {terms.device}"
