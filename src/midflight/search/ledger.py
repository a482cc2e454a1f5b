"""Store the trials of all engines in one Optuna study, the ledger.

All engines share the code for storage, resuming and reports, and `optuna-dashboard` opens the study. User
attributes of a trial hold the path of its tuned hyperparameters, the trial it continues, and the process
that runs it.
"""

import math
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from midflight.errors import MissingExtra, UnknownName
from midflight.search.errors import SearchError, StorageLost
from midflight.search.space import Config, Space

DECLARATION = "midflight"  # user attribute of the study that holds its Declaration
SQLITE, JOURNAL = (".sqlite", ".sqlite3", ".db"), (".journal", ".log")
HEARTBEAT = 30.0  # seconds between two heartbeats of a searching process
HEARTBEAT_TIMEOUT = 5 * 60.0  # seconds without a heartbeat after which other processes take over its trials
ATTEMPTS = 5  # to open a database while another process creates its tables
CONNECT = {"postgresql": {"connect_timeout": 10}, "sqlite": {"timeout": 60}}  # seconds
PAUSE = 0.3  # seconds until two processes that claim one trial see each other's claim
STATES = {"RUNNING": "unfinished", "FAIL": "failed"}  # where ours differs from Optuna's in lower case


@dataclass(frozen=True)
class Record:
    """A stored trial.

    Attributes:
        number: number in its study, from 0.
        state: "unfinished" (running or interrupted), "complete", "pruned", "failed" or "waiting".
        config: active searched hyperparameters, as chosen by the engine or changed by population-based
            training.
        starts: initial values of the tuned hyperparameters.
        losses: epoch -> validation loss.
        trajectory: (epoch, {name: value}) of the tuned hyperparameters.
        extra: additional numbers of the last report.
        message: reason for a failure or an early stop.
        root: number of the first trial of this configuration, whose checkpoint it continues; else its own.
        checkpoint: name of that checkpoint's file.
        from_epoch: epochs taken from that checkpoint.
        seconds: from the start to the end, interruptions included.
        engine: name of the engine that proposed it.
    """

    number: int
    state: str
    config: Config
    starts: Config = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    trajectory: list[tuple[int, Config]] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)
    message: str = ""
    root: int = 0
    checkpoint: str = ""
    from_epoch: int = 0
    seconds: float = math.nan
    engine: str = ""

    @cached_property  # read for every trial whenever one starts or ends
    def epoch(self) -> int:
        """Epochs trained, including those of continued trials."""
        return max(self.losses, default=0)

    @cached_property
    def loss(self) -> float:
        """The last validation loss; NaN if there is none."""
        return self.losses[self.epoch] if self.losses else math.nan

    @property
    def online(self) -> Config:
        """The latest values of the tuned hyperparameters."""
        return self.trajectory[-1][1] if self.trajectory else self.starts

    @property
    def params(self) -> Config:
        """The whole configuration: searched values and latest tuned values."""
        return {**self.config, **self.online}


@dataclass(frozen=True)
class Declaration:
    """What a study searches; a resumed study must have the same declaration."""

    space: Space
    epochs: int
    seed: int
    objective: str = ""
    machine: str = ""


class Ledger:
    """An Optuna study and the folder of its checkpoints; see `open_study` and `read_study`."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study = study
        self.folder = folder
        self.owner = uuid.uuid4().hex[:12]
        self._finished: dict[int, Record] = {}

    def records(self) -> list[Record]:
        """Return all trials, by number."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            found.append(self._finished.get(trial.number) or record(trial))
            if trial.state.is_finished():
                self._finished[trial.number] = found[-1]
        return found

    def record(self, trial: optuna.Trial) -> Record:
        """Return one trial."""
        return record(self.study._storage.get_trial(trial._trial_id))

    def checkpoint(self, trial: Record) -> Path:
        """Return the checkpoint file that a trial continues."""
        return self.folder / trial.checkpoint

    def clear_checkpoints(self) -> None:
        """Delete the checkpoints of this study that no trial can continue; keep the best trial's."""
        if not (paths := list(self.folder.glob("*.pt"))):
            return
        records = self.records()
        chosen = best(records)
        kept = {r.checkpoint for r in records if r.state == "unfinished" or r is chosen}
        names = {r.checkpoint for r in records} - kept
        for path in paths:
            if path.name in names:
                path.unlink(missing_ok=True)

    def claim_orphans(self) -> list[FrozenTrial]:
        """Claim the unfinished trials whose process died; return those that this process won."""
        beats = self.study.user_attrs.items()
        alive = {self.owner, *(key.removeprefix("owner:") for key, beat in beats if _is_alive(key, beat))}
        unfinished = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        dead = [t._trial_id for t in unfinished if not _has_owner(t, alive)]
        for trial_id in dead:
            self.study._storage.set_trial_user_attr(trial_id, "owner", self.owner)
        if dead and len(alive) > 1:
            time.sleep(PAUSE)  # the last process to write its claim wins (Fischer's mutual exclusion)
        claimed = map(self.study._storage.get_trial, dead)
        return [t for t in claimed if t.user_attrs["owner"] == self.owner and not t.state.is_finished()]

    @contextmanager
    def heartbeats(self) -> Iterator[None]:
        """Send heartbeats in the block, so that no other process takes over this process's trials.

        Optuna's own heartbeat would fail a trial and enqueue a new one; it knows no journal, and waits for
        minutes on the machine that sees at once that the process is gone.
        """
        key, ended = f"owner:{self.owner}", threading.Event()
        me = {"host": platform.node(), "pid": os.getpid(), "began": _start_of(os.getpid())}

        def beats() -> None:
            while not ended.wait(HEARTBEAT):
                with suppress(Exception):  # a lost storage raises in the main thread
                    self.study.set_user_attr(key, {**me, "seen": time.time()})
            self.study._storage.remove_session()

        self.study.set_user_attr(key, {**me, "seen": time.time()})
        thread = threading.Thread(target=beats, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(Exception):
                self.study.set_user_attr(key, {"seen": 0.0})


def record(trial: FrozenTrial) -> Record:
    """Convert a trial of Optuna."""
    attrs = {**trial.user_attrs, **trial.user_attrs.get("start", {})}
    root, duration = attrs.get("root", trial.number), trial.duration
    return Record(
        number=trial.number,
        state=STATES.get(trial.state.name, trial.state.name.lower()),
        config=dict(attrs.get("config", trial.params)),
        starts=attrs.get("starts", {}),
        losses=dict(sorted(trial.intermediate_values.items())),
        trajectory=[(epoch, values) for epoch, values in attrs.get("trajectory", [])],
        extra=attrs.get("extra", {}),
        message=attrs.get("message", ""),
        root=root,
        checkpoint=attrs.get("checkpoint", f"{root}.pt"),
        from_epoch=attrs.get("from_epoch", 0),
        seconds=duration.total_seconds() if duration else math.nan,
        engine=attrs.get("engine", ""),
    )


def best(records: list[Record]) -> Record | None:
    """Return the trial with the lowest loss among complete ones; if none is, among the longest trained."""
    good = [r for r in records if math.isfinite(r.loss) and r.state != "failed"]
    longest = max((r.epoch for r in good), default=0)
    ended = [r for r in good if r.state == "complete"] or [r for r in good if r.epoch == longest]
    return min(ended, key=lambda r: (r.loss, r.number), default=None)


@contextmanager
def open_study(
    storage: str | None, name: str, declaration: Declaration, folder: Path, **engine: Any
) -> Iterator[Ledger]:
    """Start or resume the study `name`; its storage is open in the block.

    Raises:
        SearchError: the storage cannot be reached, `name` is another search, or there can be no such folder.
    """
    with open_storage(storage) as backend:
        _make_folder("checkpoints", folder)
        study = optuna.create_study(
            storage=backend, study_name=name, direction="minimize", load_if_exists=True, **engine
        )
        # read before the declaration, because another process may add a declaration and then trials
        had_trials = bool(study.get_trials(deepcopy=False))
        if DECLARATION not in study.user_attrs:
            if had_trials:
                raise SearchError(
                    f"the study must be one of midflight, but {name!r} is not; choose another name."
                )
            study.set_user_attr(DECLARATION, {**vars(declaration), "space": declaration.space.to_json()})
        _check_same(name, _declaration(study), declaration)
        yield Ledger(study, folder)


@contextmanager
def read_study(storage: str, name: str) -> Iterator[tuple[Ledger, Declaration]]:
    """Open a stored search for a report; its storage is open in the block.

    Raises:
        SearchError: the storage cannot be reached, or the study is not a search of midflight.
        UnknownName: no study has this name.
    """
    with open_storage(storage, create=False) as backend:
        names = optuna.get_all_study_names(backend)
        if name not in names:
            raise UnknownName(f"a study in {without_password(storage)}", name, names or ["(none yet)"])
        study = optuna.load_study(storage=backend, study_name=name)
        if DECLARATION not in study.user_attrs:
            raise SearchError(f"the study must be one of midflight, but {name!r} is not.")
        yield Ledger(study, default_folder(storage, name)), _declaration(study)


@contextmanager
def open_storage(storage: str | None, create: bool = True) -> Iterator[optuna.storages.BaseStorage]:
    """Open an Optuna storage in the block; turn its errors there into `StorageLost`.

    Args:
        storage: one of
            None: memory;
            a path that ends in .sqlite, .sqlite3 or .db: a SQLite file;
            a path that ends in .journal or .log: a journal file of Optuna;
            a URL such as postgresql://user:password@host/database.
        create: whether to create a missing file.

    Raises:
        SearchError: `storage` is none of these, or it cannot be opened.
        MissingExtra: the driver of the database is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = optuna.storages.InMemoryStorage() if storage is None else _backend(storage, create)
    try:
        yield backend
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StorageLost(
            f"the storage {without_password(storage or 'memory')} failed: {_first_line(error)}. Stored "
            "trials are safe; run the same command again when the storage can be reached."
        ) from error
    finally:
        database = getattr(backend, "_backend", backend)
        if isinstance(database, optuna.storages.RDBStorage):
            database.scoped_session.remove()
            database.engine.dispose()


def _make_folder(what: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(
            f"the folder of the {what} cannot be created: {folder}: {error.strerror}."
        ) from error


def _check_same(name: str, before: Declaration, now: Declaration) -> None:
    for what in ("space", "epochs", "seed", "objective"):
        old, new = getattr(before, what), getattr(now, what)
        if old != new:
            differ = old.differences(new) if what == "space" else f"it has {old} and this search has {new}"
            raise SearchError(
                f"the study {name!r} must have the same {what} to be resumed, but {differ}; choose another "
                "name."
            )


def default_folder(storage: str | None, name: str) -> Path:
    """Return the folder of checkpoints and report: named like the study, beside its file or in runs."""
    path = _path(storage) if storage else None
    return (path.parent if path else Path("runs")) / name


def without_password(storage: str) -> str:
    """Return the address with its password hidden."""
    with suppress(ArgumentError, ValueError):
        return make_url(storage).render_as_string(hide_password=True)
    return re.sub("://.*", "://...", storage)


def _backend(storage: str, create: bool) -> optuna.storages.BaseStorage:
    path = _path(storage)
    if path is None:
        return _database(storage)
    if not create and not path.is_file():
        raise SearchError(f"the storage must be a file, but {path} does not exist; run the search first.")
    _make_folder(f"storage {path}", path.parent)
    return _journal(path, create) if path.suffix in JOURNAL else _database(f"sqlite:///{path}")


def _path(storage: str) -> Path | None:
    if storage.startswith("sqlite:///"):
        return Path(storage.removeprefix("sqlite:///"))
    if "://" in storage:
        return None
    path = Path(storage)
    if path.suffix not in SQLITE + JOURNAL:
        raise SearchError(
            f"the storage must be a file that ends in {', '.join(SQLITE + JOURNAL)}, or a URL such as "
            f"postgresql://user@host/database, but got {storage!r}."
        )
    return path


def _journal(path: Path, create: bool) -> optuna.storages.BaseStorage:
    try:
        backend = JournalFileBackend(str(path))
        journal = optuna.storages.JournalStorage(backend)  # raises if another line than the last is wrong
        if create:
            _cut_torn_line(path, backend)
        return journal
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:  # the last four: other lines
        raise SearchError(
            f"the storage must be a journal file of Optuna, but {path} is not: {error}."
        ) from error


def _cut_torn_line(path: Path, backend: JournalFileBackend) -> None:
    """Cut a last line that a full disk or a power failure tore; the next line would be appended to it."""
    with get_lock_file(backend._lock), path.open("r+b") as file:
        if end := file.read().rfind(b"\n") + 1:
            file.truncate(end)


def _database(url: str, attempts: int = ATTEMPTS) -> optuna.storages.BaseStorage:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise SearchError(
            "the storage must have an address such as postgresql://user@host:5432/database, but got "
            f"{without_password(url)}."
        ) from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    address = parsed.render_as_string(hide_password=False)
    options = {"pool_pre_ping": True, "connect_args": CONNECT.get(parsed.get_backend_name(), {})}
    try:
        return optuna.storages.get_storage(optuna.storages.RDBStorage(address, engine_kwargs=options))
    except (ImportError, NoSuchModuleError) as error:
        raise MissingExtra(
            f"the driver of {without_password(url)} is not installed ({_first_line(error)}); for PostgreSQL "
            "pip install 'midflight[postgres]'"
        ) from error
    except (SQLAlchemyError, OSError, RuntimeError, optuna.exceptions.StorageInternalError) as error:
        if attempts > 1 and (isinstance(error, IntegrityError) or "already exists" in str(error)):
            time.sleep(PAUSE)  # another process is creating the tables
            return _database(url, attempts - 1)
        raise SearchError(
            f"the storage must be a database that can be reached, but {without_password(url)} cannot: "
            f"{_first_line(error)}."
        ) from error


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(getattr(cause, "orig", cause)).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")


def _has_owner(trial: FrozenTrial, alive: set[str]) -> bool:
    owner = trial.user_attrs.get("owner")
    if owner is not None:
        return owner in alive
    # the process died before it wrote its name, or it is about to write it
    began = trial.datetime_start
    return len(alive) > 1 and began is not None and time.time() - began.timestamp() < HEARTBEAT_TIMEOUT


def _is_alive(key: str, beat: Any) -> bool:
    """Whether a user attribute of the study is the recent heartbeat of a process that is not known dead."""
    if not key.startswith("owner:") or time.time() - beat["seen"] > HEARTBEAT_TIMEOUT:
        return False
    if beat["host"] != platform.node():
        return True
    try:
        os.kill(beat["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(beat.get("began", "") == _start_of(beat["pid"]))


def _start_of(pid: int) -> str:
    """Return when a process began, because the system uses its number again; "" where it does not tell."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _declaration(study: Study) -> Declaration:
    stored = study.user_attrs[DECLARATION]
    return Declaration(**{**stored, "space": Space.from_json(stored["space"])})
