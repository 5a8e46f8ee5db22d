"""The study of one task: an Optuna study that one worker or many fill, a generation of trials at a time.

A worker claims a generation by a lock, trains it, and stores all its results as one record; then finished
trials are told to Optuna in order, so a trial's number is the same whoever trained it. A lock dies with the
process or connection that holds it, so what a killed worker had claimed is free at once, and no finished
trial is trained again.

By default the study is a journal file with locks on bytes of a file beside it; with a PostgreSQL URL, workers
on many machines share it through its advisory locks.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from aplsmear.errors import UserError

STORAGE_VARIABLE = "APLSMEAR_STUDY_STORAGE"
WRITING, TELLING, GENERATIONS = 0, 1, 2  # what locks stand for; generation g is GENERATIONS + g

Record = dict[str, Any]


class StudyError(UserError):
    """The storage of the study cannot be used."""


class Locks(Protocol):
    """Locks by number that end with the process that holds them."""

    def take(self, number: int, wait: bool) -> bool:
        """Take a lock; whether it was had."""

    def give(self, number: int) -> None:
        """Give a lock back."""


class Study:
    """Trials of one task, kept where a kill cannot reach them."""

    def __init__(self, name: str, storage: Any, locks: Locks) -> None:
        """Open the study of this name, or make it."""
        import optuna

        self.name = name
        self._locks = locks
        self._study = optuna.create_study(
            study_name=name, storage=storage, direction="maximize", load_if_exists=True
        )

    # Each of these raises StudyError where the database no longer answers.

    def has(self, generation: int) -> bool:
        """Whether this generation is finished."""
        with _answered():
            return _attribute(generation) in self._study.user_attrs

    @contextmanager
    def claim(self, generation: int) -> Iterator[bool]:
        """Hold a generation; False where another worker holds it or has finished it."""
        with _answered():
            taken = self._locks.take(GENERATIONS + generation, wait=False)
        if not taken:
            yield False
            return
        try:
            yield not self.has(generation)
        finally:
            with _answered():
                self._locks.give(GENERATIONS + generation)

    def keep(self, generation: int, records: Sequence[Record], space: Mapping[str, Any]) -> None:
        """Store the results of a generation for good, all at once.

        Args:
            generation: its number.
            records: of its trials, in order: ``params``; ``value`` (None: it failed); ``attributes``,
                JSON-like; ``started`` and ``ended``, seconds since 1970.
            space: Optuna's distribution of every parameter.
        """
        # A worker that was cut off from its lock may come second, with the same bits.
        if not self.has(generation):
            with _answered():
                self._study.set_user_attr(_attribute(generation), list(records))
        self.tell(space)

    def tell(self, space: Mapping[str, Any]) -> None:
        """Hand finished trials to Optuna, in the order of their numbers, as far as there is no gap."""
        with _answered(), self._telling():
            told = len(self._study.get_trials(deepcopy=False))
            number = 0
            stored = self._study.user_attrs
            for generation in range(len(stored)):
                for record in stored.get(_attribute(generation), _NOTHING):
                    if number >= told:
                        self._study.add_trial(_frozen(record, space))
                    number += 1
                if _attribute(generation) not in stored:
                    return

    @contextmanager
    def _telling(self) -> Iterator[None]:
        self._locks.take(TELLING, wait=True)
        try:
            yield
        finally:
            self._locks.give(TELLING)

    def trials(self) -> list[Any]:
        """The optuna.trial.FrozenTrial of every finished trial, by number."""
        with _answered():
            return self._study.get_trials(deepcopy=False)


@contextmanager
def _answered() -> Iterator[None]:
    """What a database says that was there at the start and does not answer any more."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise StudyError(
            f"{_unusable(error)}. Finished generations are kept: once it answers, the same command goes on."
        ) from None


def _unusable(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    reason = str(getattr(cause, "orig", None) or type(cause).__name__).splitlines()[0]
    return f"the storage of the study (tune.storage or {STORAGE_VARIABLE}) cannot be used: {reason}"


def past_studies(folder: Path, named: Collection[str]) -> list[Path]:
    """The journals of studies that are not among those named, and that nobody is at; sorted.

    Args:
        folder: ``.studies``.
        named: the studies that outs go back to.
    """
    return sorted(
        path for path in folder.glob("*.journal") if path.stem not in named and not _is_held(_locks_of(path))
    )


def remove_study(journal: Path) -> None:
    """Remove a journal and the locks beside it."""
    journal.unlink()
    _locks_of(journal).unlink(missing_ok=True)


def _locks_of(journal: Path) -> Path:
    return journal.with_suffix(".locks")


def _is_held(locks: Path) -> bool:
    """Whether another process holds any of the locks in this file."""
    if not locks.exists():
        return False
    with locks.open("rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


_NOTHING: tuple[Record, ...] = ()


def open_study(name: str, journal: Path, url: str = "") -> Study:
    """The study of this name, made if it is not there.

    Args:
        name: of `aplsmear.heads.search.study_key`.
        journal: the file that holds it, when there is no `url`.
        url: of a PostgreSQL database (``postgresql+psycopg://...``); it is written nowhere.

    Raises:
        StudyError: the database cannot be reached, its driver is not installed, or the journal is none.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url:
        return _open_database(name, url)
    from optuna.storages.journal import JournalFileBackend

    journal.parent.mkdir(parents=True, exist_ok=True)
    locks = _FileLocks(_locks_of(journal))
    lock: Any = _JournalLock(journal, locks)
    backend = JournalFileBackend(str(journal), lock_obj=lock)
    try:
        return Study(name, optuna.storages.JournalStorage(backend), locks)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise StudyError(
            f"{journal} is damaged, or no journal of Optuna ({type(error).__name__}): move it away, and the "
            "search starts anew"
        ) from None


def _open_database(name: str, url: str) -> Study:
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        locks = _DatabaseLocks(name, url)
        locks.take(WRITING, wait=True)  # several workers may start on an empty database at once
        try:
            return Study(name, optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True}), locks)
        finally:
            locks.give(WRITING)
    except ImportError:
        raise StudyError(
            "a study in PostgreSQL needs its driver: `.venv/bin/python -m pip install 'psycopg[binary]'`"
        ) from None
    except (SQLAlchemyError, ValueError) as error:
        raise StudyError(_unusable(error)) from None


def _attribute(generation: int) -> str:
    return f"generation {generation}"


def _frozen(record: Record, space: Mapping[str, Any]) -> Any:
    import optuna

    failed = record["value"] is None
    trial = optuna.trial.create_trial(
        state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
        params=record["params"],
        distributions=dict(space),
        value=record["value"],
        user_attrs=record["attributes"],
    )
    trial.datetime_start = datetime.fromtimestamp(record["started"])
    trial.datetime_complete = datetime.fromtimestamp(record["ended"])
    return trial


class _FileLocks:
    """POSIX locks on single bytes of a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self, number: int, wait: bool) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except BlockingIOError:
            return False
        return True

    def give(self, number: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)


class _JournalLock:
    """The lock under which Optuna appends to its journal.

    Optuna's own outlives a killed process by half a minute; and a line that a killed process wrote half would
    spoil the next. Whoever holds the lock is the only writer, so a last line without an end is a dead one's.
    """

    def __init__(self, journal: Path, locks: _FileLocks) -> None:
        self._journal, self._locks = journal, locks

    def acquire(self) -> bool:
        self._locks.take(WRITING, wait=True)
        with self._journal.open("rb+") as file:
            content = _last_line(file)
            if content and not content.endswith(b"\n"):
                file.seek(-len(content), os.SEEK_END)
                file.truncate()
        return True

    def release(self) -> None:
        self._locks.give(WRITING)


def _last_line(file: Any) -> bytes:
    """What follows the last line end but one (all, if there is none)."""
    size = file.seek(0, os.SEEK_END)
    length = 4096
    while True:
        start = max(size - length, 0)
        file.seek(start)
        tail: bytes = file.read()
        cut = tail.rfind(b"\n", 0, len(tail) - 1)
        if cut >= 0 or not start:
            return tail[cut + 1 :]
        length *= 16


class _DatabaseLocks:
    """PostgreSQL's advisory locks, on a connection of their own that keeps itself alive."""

    def __init__(self, name: str, url: str) -> None:
        import sqlalchemy

        # A client that vanished without a word (cable, power) is noticed by the server within a minute.
        alive = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"options": alive})
        self._name = name
        self._connection = engine.connect()

    def take(self, number: int, wait: bool) -> bool:
        call = "pg_advisory_lock" if wait else "pg_try_advisory_lock"
        return self._call(call, number) is not False

    def give(self, number: int) -> None:
        self._call("pg_advisory_unlock", number)

    def _call(self, function: str, number: int) -> Any:
        import sqlalchemy

        # Making the tables concerns every study of the database.
        name = "aplsmear" if number == WRITING else f"{self._name}/{number}"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        return self._connection.execute(sqlalchemy.text(f"select {function}(:key)"), {"key": key}).scalar()
