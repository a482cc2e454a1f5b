"""Store the finished arms of all studies in one SQLite file.

One transaction writes an arm as soon as it is done, so a study can be killed at any time. Results and
timings are in separate tables, because results repeat exactly and timings do not.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TypeAlias

from midflight.errors import MidflightError, UnknownName
from midflight.study.spec import Arm, Spec, changed_fields

Point: TypeAlias = tuple[float, float]
"""(log10 L2, noise)"""


class StoreError(MidflightError, ValueError):
    """The file is not a store, or it holds another study of the same name."""


class StoreUnavailable(MidflightError, OSError):
    """The store cannot be written, for example because the disk is full."""

    exit_code = 1


@dataclass(frozen=True)
class Result:
    """The measurements of one arm; equal specs give equal results.

    Errors are shares of misclassified images, in [0, 1].

    Attributes:
        start: initial (log10 L2, noise).
        end: final (log10 L2, noise); equals `start` for a fixed arm.
        valid_loss: cross-entropy of the final weights on T2; a tuner may have replaced them at the end.
        valid_error: error of the final weights on T2.
        test_error: error of the final weights on the test set; None for the landscape.
        valid_errors: error on T2 after each epoch, before a tuner replaces the weights.
        trajectory: [step, log10 L2, noise] after each hyperparameter step; [] for a fixed arm.
    """

    start: Point
    end: Point
    valid_loss: float
    valid_error: float
    test_error: float | None
    valid_errors: list[float]
    trajectory: list[list[float]]


@dataclass(frozen=True)
class Row:
    """A stored arm with its result and the seconds of each epoch.

    The seconds include training and tuning, with `Tuner.finish` in the last epoch, but no evaluation.
    """

    arm: Arm
    result: Result
    epoch_seconds: list[float] = field(default_factory=list)


_KEY = "run TEXT, network TEXT, kind TEXT, estimator TEXT, number INTEGER"
_APPLICATION_ID = 0x6D666C74  # "mflt", in the header of the file
_SCHEMA = f"""
BEGIN;
PRAGMA application_id = {_APPLICATION_ID};
CREATE TABLE IF NOT EXISTS runs (name TEXT PRIMARY KEY, spec TEXT, machine TEXT);
CREATE TABLE IF NOT EXISTS arms ({_KEY}, result TEXT, PRIMARY KEY (run, network, kind, estimator, number));
CREATE TABLE IF NOT EXISTS timings ({_KEY}, seconds TEXT,
                                    PRIMARY KEY (run, network, kind, estimator, number));
COMMIT;
"""


class Store:
    """Read and write a SQLite file of studies; as a context manager, close it at the end.

    Args:
        path: the file.
        create: whether to create a missing file and its folder.

    Raises:
        StoreError: the file is missing and `create` is false, or it is not a store of midflight.
        StoreUnavailable: the file cannot be opened or written.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        if not create and not path.is_file():
            raise StoreError(
                f"the store must be a file, but {path} does not exist; run `midflight study` first."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the folder {path.parent} of the store cannot be created: {error}.") from error
        with self._errors():
            self._db = sqlite3.connect(path, timeout=60)
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if create and not tables:
                self._db.executescript(_SCHEMA)
            owner = self._db.execute("PRAGMA application_id").fetchone()[0]
        if owner != _APPLICATION_ID:
            raise StoreError(
                f"the store must be a SQLite file of midflight, but {path} belongs to another program; "
                "name another with --store."
            )

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def open_run(self, name: str, spec: Spec, machine: str) -> None:
        """Start or resume a study; raises `StoreError` if `name` has another spec."""
        if name not in self._runs():
            with self._errors(), self._db:
                self._db.execute("INSERT INTO runs VALUES (?, ?, ?)", (name, spec.to_json(), machine))
            return
        old = self.spec(name)
        changed = [f"{f}: {getattr(old, f)} -> {getattr(spec, f)}" for f in changed_fields(old, spec)]
        if changed:
            raise StoreError(
                f"the run {name!r} in {self.path} must have the same spec to be resumed, but it differs "
                f"({'; '.join(changed)}); name this study differently with --run."
            )

    def spec(self, name: str) -> Spec:
        """Return the spec of a run; raises `UnknownName`."""
        return Spec.from_json(self._run(name)[0])

    def machine(self, name: str) -> str:
        """Return the machine on which a run started; raises `UnknownName`."""
        return self._run(name)[1]

    def add(self, run: str, row: Row) -> None:
        """Store a finished arm; an arm already stored stays unchanged."""
        key, values = (run, *astuple(row.arm)), "VALUES (?, ?, ?, ?, ?, ?)"
        result, seconds = json.dumps(asdict(row.result)), json.dumps(row.epoch_seconds)
        with self._errors(), self._db:
            added = self._db.execute(f"INSERT OR IGNORE INTO arms {values}", (*key, result))
            if added.rowcount:
                self._db.execute(f"INSERT OR REPLACE INTO timings {values}", (*key, seconds))

    def rows(self, run: str) -> list[Row]:
        """Return the finished arms of a run, sorted by arm."""
        with self._errors():
            found = self._db.execute(
                "SELECT network, kind, estimator, number, result, seconds FROM arms"
                " LEFT JOIN timings USING (run, network, kind, estimator, number)"
                " WHERE run = ? ORDER BY network, kind, estimator, number",
                (run,),
            ).fetchall()
        return [Row(Arm(*key), _result(result), json.loads(seconds)) for *key, result, seconds in found]

    def _runs(self) -> dict[str, tuple[str, str]]:
        """Return name -> (spec as JSON, machine) of all runs."""
        with self._errors():
            found = self._db.execute("SELECT name, spec, machine FROM runs ORDER BY name")
            return {name: (spec, machine) for name, spec, machine in found}

    def _run(self, name: str) -> tuple[str, str]:
        runs = self._runs()
        if name not in runs:
            raise UnknownName(f"a run in {self.path}", name, runs or ["(none yet)"])
        return runs[name]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "readonly" in str(error) or "unable to open" in str(error) or "no such" in str(error):
                raise StoreError(
                    f"the store must be a SQLite file that can be written, but {self.path} is not: {error}; "
                    "name another with --store."
                ) from error
            raise StoreUnavailable(
                f"{self.path} cannot be written now: {error}. Stored arms are safe; free some disk space and "
                "run the same command again."
            ) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"the store must be a SQLite file, but {self.path} is not: {error}; pass --store."
            ) from error


def _result(text: str) -> Result:
    data = json.loads(text)
    return Result(**data | {key: tuple(data[key]) for key in ("start", "end")})
