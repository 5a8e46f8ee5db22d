"""The study of one task: an Optuna study that one worker or several workers fill.

All trials are in the study from the start, as waiting trials, so the number of a trial does not depend on the
worker that trains it. A worker claims a trial with a lock, trains it and stores its result. A lock ends with
the process or connection that holds it: the trial of a killed worker is free at once, and a finished trial is
never trained again.

The study is a journal file of Optuna, with locks in a file beside it. With a PostgreSQL URL, workers on many
machines share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aplsmear.errors import UserError

STORAGE_VARIABLE = "APLSMEAR_STUDY_STORAGE"
WRITING, QUEUEING, TRIALS = 0, 1, 2  # numbers of locks; that of trial t is TRIALS + t


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Turn a database that does not answer into a UserError; as a decorator too."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or type(cause).__name__).splitlines()[0]
        raise UserError(
            f"the storage of the study (tune.storage or {STORAGE_VARIABLE}) cannot be used: {reason}. "
            "Finished trials are kept: start the same command again once it answers."
        ) from None


class Study:
    """The trials of one task, in a storage that survives a kill.

    Each method raises UserError if the database does not answer.
    """

    def __init__(self, name: str, storage: Any, locks: _DatabaseLocks | _FileLocks) -> None:
        """Open the study of this name, or create it."""
        import optuna

        self.name = name
        self._storage, self._locks = storage, locks
        self._study = optuna.create_study(
            study_name=name, storage=storage, direction="maximize", load_if_exists=True
        )

    @_storage_errors()
    def queue(self, params: Sequence[Mapping[str, Any]], space: Mapping[str, Any]) -> None:
        """Add the trials that are not in the study yet.

        `params` are those of all trials, by number; `space` is Optuna's distribution of each parameter.
        """
        from optuna.trial import TrialState, create_trial

        self._locks.take(QUEUEING, wait=True)
        for each in params[len(self.trials()) :]:
            trial = create_trial(state=TrialState.WAITING, params=dict(each), distributions=dict(space))
            self._study.add_trial(trial)
        self._locks.give(QUEUEING)

    @_storage_errors()
    def trials(self) -> list[Any]:
        """All trials (optuna.trial.FrozenTrial), by number."""
        return self._study.get_trials(deepcopy=False)

    @contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Hold a trial; False if it is finished, or another worker holds it."""
        taken = self._locks.take(TRIALS + number, wait=False)
        try:
            yield taken and self._start(number)
        finally:
            if taken:
                self._locks.give(TRIALS + number)

    @_storage_errors()
    def _start(self, number: int) -> bool:
        """Mark a trial as running; False if it is finished."""
        from optuna.trial import TrialState

        trial = self.trials()[number]
        if not trial.state.is_finished():
            self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        return not trial.state.is_finished()

    @_storage_errors()
    def finish(self, number: int, value: float | None, attributes: Mapping[str, Any]) -> None:
        """Store the value of a trial (None: it failed) and JSON-like attributes, unless it has a result."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial = self.trials()[number]._trial_id
        # A worker that lost its lock with its connection may come second, with the same result.
        with suppress(UpdateFinishedTrialError):
            for name, attribute in attributes.items():
                self._storage.set_trial_user_attr(trial, name, attribute)
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            self._storage.set_trial_state_values(trial, state, None if value is None else [value])


def open_study(name: str, journal: Path, url: str = "") -> Study:
    """Open the study of this name, or create it, in a journal file or, with a URL, in a database.

    The URL is that of a PostgreSQL database (``postgresql+psycopg://...``); it is written nowhere.

    Raises UserError: the database cannot be reached or the journal is damaged.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url:
        return _open_database(name, url)
    journal.parent.mkdir(parents=True, exist_ok=True)
    locks: Any = _FileLocks(journal)
    backend = JournalFileBackend(str(journal), lock_obj=locks)
    try:
        return Study(name, optuna.storages.JournalStorage(backend), locks)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{journal} is damaged, or not a journal of Optuna ({type(error).__name__}): move it away, and "
            "the search starts anew"
        ) from None


@_storage_errors()
def _open_database(name: str, url: str) -> Study:
    import optuna

    try:
        locks = _DatabaseLocks(name, url)
        locks.take(WRITING, wait=True)  # several workers may start on an empty database at once
        study = Study(name, optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True}), locks)
        locks.give(WRITING)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"the storage of the study (tune.storage or {STORAGE_VARIABLE}) cannot be used: its URL must be "
            f"postgresql+psycopg://USER@HOST/DATABASE ({type(error).__name__})"
        ) from None
    return study


class _DatabaseLocks:
    """Numbered locks as of `_FileLocks`: PostgreSQL's advisory locks, on a connection that is kept alive."""

    def __init__(self, name: str, url: str) -> None:
        import sqlalchemy

        # The server notices within a minute that a client is gone (cable, power).
        alive = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"options": alive})
        self._name = name
        self._connection = engine.connect()

    def take(self, number: int, wait: bool) -> bool:
        return self._call("pg_advisory_lock" if wait else "pg_try_advisory_lock", number) is not False

    def give(self, number: int) -> None:
        self._call("pg_advisory_unlock", number)

    @_storage_errors()
    def _call(self, function: str, number: int) -> Any:
        import sqlalchemy

        # All studies of the database share its tables, so they share the lock to create them.
        name = "aplsmear" if number == WRITING else f"{self._name}/{number}"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        return self._connection.execute(sqlalchemy.text(f"select {function}(:key)"), {"key": key}).scalar()


class _FileLocks:
    """POSIX locks on single bytes of a file beside the journal; they end with the process that holds them.

    `take` returns False if another process holds the lock, never with `wait`. WRITING is Optuna's own lock of
    the journal, which blocks others for half a minute after a kill. It also cannot read a journal in which a
    killed process wrote half a line and another process went on; here half a line is removed.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        # Never closed: that would release the locks.
        self._file = os.open(_locks_of(journal), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self, number: int, wait: bool) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except BlockingIOError:
            return False
        return True

    def give(self, number: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def acquire(self) -> bool:
        """Called by Optuna before it writes."""
        self.take(WRITING, wait=True)
        with self._journal.open("rb+") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Called by Optuna when it has written."""
        self.give(WRITING)


def past_studies(folder: Path, named: Collection[str]) -> list[Path]:
    """The journals in ``.studies`` that are not `named` and that no worker uses, sorted."""
    journals = sorted(path for path in folder.glob("*.journal") if path.stem not in named)
    return [path for path in journals if not _is_used(_locks_of(path))]


def remove_study(journal: Path) -> None:
    """Remove a journal and the locks beside it."""
    journal.unlink()
    _locks_of(journal).unlink(missing_ok=True)


def _locks_of(journal: Path) -> Path:
    return journal.with_suffix(".locks")


def _is_used(locks: Path) -> bool:
    """Whether another process holds any of the locks in this file."""
    if not locks.exists():
        return False
    with locks.open("rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
