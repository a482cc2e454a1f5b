"""The ledger: every trial of a search, whichever engine proposed it, in one Optuna study.

So `optuna-dashboard` opens it, and storage, resuming and reports are one piece of code. Beside Optuna's own
columns a trial carries user attributes: where its tuned hyperparameters started and went, what it
continues, and who runs it.
"""

import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from midflight.errors import MissingExtra, UnknownName
from midflight.search.errors import SearchError, StorageLost
from midflight.search.space import Config, Space

DECLARATION = "midflight"  # the attribute of a study that says what it searches
SQLITE, JOURNAL = (".sqlite", ".sqlite3", ".db"), (".journal", ".log")
BEAT = 30.0  # seconds between two signs of life of a searching process
STALE = 5 * 60.0  # seconds without one after which its trials are taken over
TRIES = 5  # to find the tables of a database as another process makes them
PAUSE = 0.3  # seconds in which two claims to one trial meet in the storage

STATES = {
    TrialState.RUNNING: "unfinished",
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Record:
    """A trial as it is stored.

    Attributes:
        number: in its study, from 0.
        state: "unfinished" (running, or cut off and to be continued), "complete", "pruned" or "failed".
        config: what the engine chose, or what population-based training made of it; active
            hyperparameters only.
        starts: where those that are tuned inside began.
        losses: epoch -> validation loss.
        trajectory: [epoch, {name: value}] of what is tuned inside.
        extra: the further numbers of its last report.
        message: why it failed or stopped.
        root: number of the first trial of this configuration, whose checkpoint it continues; its own if none.
        from_epoch: epochs that it did not train itself, but found in a checkpoint of an earlier trial.
        seconds: from its beginning to its end.
        engine: that proposed it.
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
    from_epoch: int = 0
    seconds: float = math.nan
    engine: str = ""

    @property
    def epoch(self) -> int:
        """Epochs trained, those of the trials that it continues included."""
        return max(self.losses, default=0)

    @property
    def loss(self) -> float:
        """The last validation loss; NaN if there is none."""
        return self.losses[self.epoch] if self.losses else math.nan

    @property
    def online(self) -> Config:
        """The tuned values now."""
        return self.trajectory[-1][1] if self.trajectory else self.starts

    @property
    def params(self) -> Config:
        """The whole configuration: what was searched, and what was tuned where it ended."""
        return {**self.config, **self.online}


@dataclass(frozen=True)
class Declaration:
    """What a study searches; the same whenever it is resumed."""

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

    def records(self) -> list[Record]:
        """All trials, by number."""
        return [record(trial) for trial in self.study.get_trials(deepcopy=False)]

    def record(self, number: int) -> Record:
        """One trial."""
        return record(self.study.get_trials(deepcopy=False)[number])

    def checkpoint(self, root: int) -> Path:
        """The file of the training that trial `root` began."""
        return self.folder / f"{root}.pt"

    def clear_checkpoints(self) -> None:
        """Delete what no trial will continue, all but the best one's."""
        records = self.records()
        chosen = best(records)
        kept = {r.root for r in records if r.state == "unfinished"} | ({chosen.root} if chosen else set())
        for path in self.folder.glob("*.pt"):
            if path.stem.isdigit() and int(path.stem) not in kept:
                path.unlink(missing_ok=True)

    def orphans(self) -> list[FrozenTrial]:
        """Unfinished trials whose process is gone, now claimed by this one."""
        owners = self._owners()
        others_live = any(_lives(beat) for name, beat in owners.items() if name != self.owner)
        dead = [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if not self._is_cared_for(trial, owners, others_live)
        ]
        for trial in dead:
            self._set(trial, "owner", self.owner)
        if dead and others_live:
            time.sleep(PAUSE)  # of two processes that claim one trial, the last to write has it (Fischer)
        mine = {trial.number for trial in dead}
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if trial.number in mine and trial.user_attrs.get("owner") == self.owner
        ]

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life in the block, so that nobody else takes over the trials of this process."""
        key, ended = f"owner:{self.owner}", threading.Event()

        def beat() -> None:
            self.study.set_user_attr(key, {"host": platform.node(), "pid": os.getpid(), "seen": time.time()})

        def beats() -> None:
            while not ended.wait(BEAT):
                with suppress(Exception):  # the storage's trouble is told by those who need an answer from it
                    beat()
            self.study._storage.remove_session()

        beat()
        thread = threading.Thread(target=beats, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(Exception):
                self.study.set_user_attr(key, {"seen": 0.0})

    def _owners(self) -> dict[str, dict[str, Any]]:
        attrs = self.study.user_attrs.items()
        return {key.removeprefix("owner:"): value for key, value in attrs if key.startswith("owner:")}

    def _is_cared_for(
        self, trial: FrozenTrial, owners: Mapping[str, dict[str, Any]], others_live: bool
    ) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner is not None:
            return owner == self.owner or _lives(owners.get(owner, {"seen": 0.0}))
        # its process died, or is about to write its name
        began = trial.datetime_start
        return others_live and began is not None and time.time() - began.timestamp() < STALE

    def _set(self, trial: FrozenTrial, key: str, value: Any) -> None:
        self.study._storage.set_trial_user_attr(trial._trial_id, key, value)


def record(trial: FrozenTrial) -> Record:
    """What a stored trial says."""
    attrs = trial.user_attrs
    duration = trial.duration
    return Record(
        number=trial.number,
        state=STATES[trial.state],
        config=dict(attrs.get("config", trial.params)),
        starts=attrs.get("starts", {}),
        losses=dict(sorted(trial.intermediate_values.items())),
        trajectory=[(epoch, values) for epoch, values in attrs.get("trajectory", [])],
        extra=attrs.get("extra", {}),
        message=attrs.get("message", ""),
        root=attrs.get("root", trial.number),
        from_epoch=attrs.get("from_epoch", 0),
        seconds=duration.total_seconds() if duration else math.nan,
        engine=attrs.get("engine", ""),
    )


def best(records: list[Record]) -> Record | None:
    """The trial of least loss among those trained to the end; if there is none, among the longest trained."""
    good = [r for r in records if math.isfinite(r.loss) and r.state != "failed"]
    ended = [r for r in good if r.state == "complete"]
    if not ended:
        longest = max((r.epoch for r in good), default=0)
        ended = [r for r in good if r.epoch == longest]
    return min(ended, key=lambda r: (r.loss, r.number), default=None)


@contextmanager
def open_study(
    storage: str | None, name: str, declaration: Declaration, folder: Path, **engine: Any
) -> Iterator[Ledger]:
    """Begin the study `name`, or go on with it; its storage is open in the block.

    Raises:
        SearchError: the storage cannot be reached, or `name` is another search there.
    """
    with _opened(storage) as backend:
        study = optuna.create_study(
            storage=backend, study_name=name, direction="minimize", load_if_exists=True, **engine
        )
        # looked for first: another process may declare the study, and begin trials, at any moment
        had_trials = bool(study.get_trials(deepcopy=False))
        if DECLARATION not in study.user_attrs:
            if had_trials:
                raise SearchError(f"the study {name!r} is not one of midflight; choose another name.")
            study.set_user_attr(DECLARATION, {**vars(declaration), "space": declaration.space.to_json()})
        _check_same(name, _declaration(study), declaration)
        yield Ledger(study, folder)


@contextmanager
def read_study(storage: str, name: str) -> Iterator[tuple[Ledger, Declaration]]:
    """A stored search, for a report; its storage is open in the block.

    Raises:
        SearchError: the storage cannot be reached, or holds no search of midflight under this name.
        UnknownName: there is no such study.
    """
    with _opened(storage, create=False) as backend:
        names = [summary.study_name for summary in optuna.get_all_study_summaries(backend)]
        if name not in names:
            raise UnknownName(f"a study in {shown(storage)}", name, names or ["(none yet)"])
        study = optuna.load_study(storage=backend, study_name=name)
        if DECLARATION not in study.user_attrs:
            raise SearchError(f"the study {name!r} is not one of midflight's searches.")
        yield Ledger(study, default_folder(storage, name)), _declaration(study)


def open_storage(storage: str | None, create: bool = True) -> optuna.storages.BaseStorage:
    """An Optuna storage: memory, a SQLite file, a journal file, or a database by its URL.

    Args:
        storage: None; a path that ends in .sqlite, .sqlite3 or .db, or in .journal or .log; or a URL such as
            postgresql://user:password@host/database.
        create: whether a file may be made.

    Raises:
        SearchError: it is none of these, or cannot be reached.
        MissingExtra: the database's driver is not installed.
    """
    if storage is None:
        return optuna.storages.InMemoryStorage()
    path = _path(storage)
    if path is not None:
        if not create and not path.is_file():
            raise SearchError(f"the storage must be a file, but {path} is not there; run the search first.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SearchError(
                f"the folder of the storage {path} cannot be made: {error.strerror}."
            ) from error
        if path.suffix in JOURNAL:
            return _journal(path)
    return _database(storage if path is None else f"sqlite:///{path}")


def _check_same(name: str, before: Declaration, now: Declaration) -> None:
    for what in ("space", "epochs", "seed", "objective"):
        if getattr(before, what) != getattr(now, what):
            raise SearchError(
                f"the study {name!r} has another {what} than this search "
                f"({_shown(before, what)}, not {_shown(now, what)}); give this one a name of its own."
            )


def default_folder(storage: str | None, name: str) -> Path:
    """Where a study's checkpoints and report go: a folder of its name beside its file, or in runs."""
    path = _path(storage) if storage else None
    return (path.parent if path else Path("runs")) / name


def shown(storage: str) -> str:
    """The address without its password."""
    if "://" not in storage:
        return storage
    with suppress(ArgumentError, ValueError):
        return make_url(storage).render_as_string(hide_password=True)
    return storage.split("://")[0] + "://..."


@contextmanager
def _opened(storage: str | None, create: bool = True) -> Iterator[optuna.storages.BaseStorage]:
    """An open storage; in the block, trouble with it becomes a `StorageLost`."""
    backend = open_storage(storage, create)
    try:
        yield backend
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StorageLost(
            f"the storage {shown(storage or 'memory')} failed: {_first_line(error)}; what was stored is "
            "safe, run the same command again when it can be reached."
        ) from error
    finally:
        database = getattr(backend, "_backend", backend)
        if isinstance(database, optuna.storages.RDBStorage):
            database.scoped_session.remove()
            database.engine.dispose()


def _path(storage: str) -> Path | None:
    if storage.startswith("sqlite:///"):
        return Path(storage.removeprefix("sqlite:///"))
    if "://" in storage:
        return None
    path = Path(storage)
    if path.suffix not in SQLITE + JOURNAL:
        raise SearchError(
            f"a storage must be a file that ends in {', '.join(SQLITE + JOURNAL)}, or a URL such as "
            f"postgresql://user@host/database, but got {storage!r}."
        )
    return path


def _journal(path: Path) -> optuna.storages.BaseStorage:
    from optuna.storages.journal import JournalFileBackend

    try:
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    except (OSError, ValueError) as error:  # ValueError: a line that is not JSON
        raise SearchError(f"the storage must be a journal file of Optuna, but {path}: {error}.") from error


def _database(url: str) -> optuna.storages.BaseStorage:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise SearchError(
            f"a storage must have an address such as postgresql://user@host:5432/database, but {shown(url)} "
            "is none."
        ) from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {"pool_pre_ping": True}
    if parsed.drivername.startswith("postgresql"):
        options["connect_args"] = {"connect_timeout": 10}
    elif parsed.drivername.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}
    address = parsed.render_as_string(hide_password=False)
    try:
        for _ in range(TRIES):
            try:
                return optuna.storages.get_storage(optuna.storages.RDBStorage(address, engine_kwargs=options))
            except SQLAlchemyError as error:  # another process makes the tables in this very moment
                if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                    raise
                problem = error
                time.sleep(PAUSE)
        raise problem
    except (ImportError, NoSuchModuleError) as error:
        raise MissingExtra(
            f"the driver of {shown(url)} is not installed ({_first_line(error)}); for PostgreSQL "
            "pip install 'midflight[postgres]'"
        ) from error
    except (SQLAlchemyError, OSError, RuntimeError, optuna.exceptions.StorageInternalError) as error:
        raise SearchError(
            f"the storage must be a database that can be reached, but {shown(url)}: {_first_line(error)}."
        ) from error


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(getattr(cause, "orig", cause)).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")


def _lives(beat: Mapping[str, Any]) -> bool:
    if time.time() - beat["seen"] > STALE:
        return False
    if beat["host"] != platform.node():
        return True
    try:
        os.kill(beat["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _declaration(study: Study) -> Declaration:
    stored = study.user_attrs[DECLARATION]
    return Declaration(**{**stored, "space": Space.from_json(stored["space"])})


def _shown(declaration: Declaration, what: str) -> str:
    value = getattr(declaration, what)
    return ", ".join(value) if isinstance(value, Space) else str(value)
