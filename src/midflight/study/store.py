"""Store the finished arms of all studies in one SQLite file.

One transaction writes an arm as soon as it is done, so a study can be killed at any time. Results and
timings are in separate tables, because results repeat exactly and timings do not. A checksum follows each
text, because SQLite does not notice a changed bit. The store holds text and numbers: reading it runs no code.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias
from zlib import crc32

import numpy as np

from midflight.errors import MidflightError, UnknownName, warn
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
_PRIMARY = "PRIMARY KEY (run, network, kind, estimator, number)"
_APPLICATION_ID = 0x6D666C74  # "mflt", in the header of the file
_SCHEMA = f"""
BEGIN IMMEDIATE;
PRAGMA application_id = {_APPLICATION_ID};
CREATE TABLE IF NOT EXISTS runs (name TEXT PRIMARY KEY, spec TEXT, machine TEXT);
CREATE TABLE IF NOT EXISTS arms ({_KEY}, result TEXT, {_PRIMARY});
CREATE TABLE IF NOT EXISTS timings ({_KEY}, seconds TEXT, {_PRIMARY});
COMMIT;
"""
_ROWS = """
SELECT network, kind, estimator, number, result, seconds FROM arms
LEFT JOIN timings USING (run, network, kind, estimator, number) WHERE run = ?
"""
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What a damaged text raises."""


class Store:
    """Read and write a SQLite file of studies; as a context manager, close it at the end.

    Args:
        path: the file.
        create: whether to create a missing file and its folder.

    Raises:
        StoreError: the file is missing and `create` is false, or it is damaged or no store of midflight.
        StoreUnavailable: the disk is full, or another program locks the file.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        if not create and not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise StoreError(f"the store must be a file, but {path} {what}; run `midflight study` first.")
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path.absolute(), timeout=60)  # SQLite keeps ":memory:" in memory
            self._db.text_factory = lambda text: text.decode(errors="replace")  # the checksum notices it
            if create and not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._db.executescript(_SCHEMA)
            owner = self._db.execute("PRAGMA application_id").fetchone()[0]
        if owner != _APPLICATION_ID:
            what = "belongs to another program" if path.stat().st_size else "is empty"
            raise StoreError(
                f"the store must be a SQLite file of midflight, but {path} {what}; name another with --store."
            )

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def open_run(self, name: str, spec: Spec, machine: str) -> None:
        """Start or resume a study; raises `StoreError` if `name` has another spec."""
        if not name or name != name.encode(errors="ignore").decode():
            raise StoreError(f"the name of a study must be text in UTF-8, but got {name!r}; pass --run.")
        if name not in self._runs():
            values = name, _sealed((), spec.to_json()), machine
            with self._errors(), self._db:  # another process may have been faster
                self._db.execute("INSERT OR IGNORE INTO runs VALUES (?, ?, ?)", values)
        old = self.spec(name)
        changed = [f"{f}: {getattr(old, f)} -> {getattr(spec, f)}" for f in changed_fields(old, spec)]
        if changed:
            raise StoreError(
                f"the run {name!r} in {self.path} must have the same spec to be resumed, but it differs "
                f"({'; '.join(changed)}); name this study differently with --run."
            )

    def spec(self, name: str) -> Spec:
        """Return the spec of a run; raises `UnknownName`, or `StoreError` if the spec is damaged."""
        text = self._run(name)[0]
        try:
            return Spec.from_json(_opened((), text))
        except _UNREADABLE as error:
            raise StoreError(
                f"the settings of {name!r} in {self.path} must be those of a study of this version, but they "
                f"are damaged or of another version ({error}); start again under another name with --run."
            ) from error

    def machine(self, name: str) -> str:
        """Return the machine on which a run started; raises `UnknownName`."""
        return self._run(name)[1]

    def add(self, run: str, row: Row) -> None:
        """Store a finished arm; an arm already stored stays unchanged, unless it is damaged."""
        key, values = astuple(row.arm), "VALUES (?, ?, ?, ?, ?, ?)"
        of_arm = "AND network = ? AND kind = ? AND estimator = ? AND number = ?"
        with self._errors(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            found = self._db.execute(_ROWS + of_arm, (run, *key)).fetchone()
            if found and _row(*found):
                return
            for table, value in (("arms", asdict(row.result)), ("timings", row.epoch_seconds)):
                sealed = _sealed(key, json.dumps(value))
                self._db.execute(f"INSERT OR REPLACE INTO {table} {values}", (run, *key, sealed))

    def rows(self, run: str) -> list[Row]:
        """Return the finished arms of a run, sorted by arm; warn of damaged ones, which count as not run."""
        with self._errors():
            found = self._db.execute(f"{_ROWS} ORDER BY network, kind, estimator, number", (run,)).fetchall()
        rows = [row for columns in found if (row := _row(*columns))]
        if len(rows) < len(found):
            warn(
                f"{len(found) - len(rows)} of {len(found)} stored arms of {run!r} in {self.path} are damaged "
                "and count as not run; `midflight study` runs them again."
            )
        return rows

    def _runs(self) -> dict[str, tuple[str, str]]:
        """Return name -> (spec as stored, machine) of all runs."""
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
        except (sqlite3.DatabaseError, OSError, UnicodeDecodeError) as error:
            usable = self.path.is_file() and os.access(self.path, os.R_OK | os.W_OK)
            lasting = "readonly" in str(error) or "no such" in str(error)
            if usable and not lasting and isinstance(error, sqlite3.OperationalError):
                raise StoreUnavailable(
                    f"{self.path} cannot be written now: {error}. Stored arms are safe; free some disk "
                    "space, or end what locks the file, and run the same command again."
                ) from error
            raise StoreError(
                f"the store must be a SQLite file that can be written, but {self.path} is not: {error}; name "
                f"another with --store. `sqlite3 FILE .recover` saves what is left of a damaged one."
            ) from error


def _sealed(key: Sequence[object], text: str) -> str:
    """Return the text with a checksum of it and its key."""
    return f"{text}\n{crc32(repr((*key, text)).encode()):08x}"


def _opened(key: Sequence[object], sealed: str) -> str:
    """Invert `_sealed`; the first edition stored no checksum. Raises `ValueError` if a bit has changed."""
    text, newline, _ = sealed.partition("\n")
    if newline and sealed != _sealed(key, text):
        raise ValueError("the checksum differs")
    return text


def _row(*columns: Any) -> Row | None:
    """Return the row of (network, kind, estimator, number, result, seconds), or None if it is damaged."""
    *key, result, seconds = columns
    try:
        data = json.loads(_opened(key, result))
        read = Result(**data | {name: tuple(data[name]) for name in ("start", "end")})
        (_, _), (_, _) = read.start, read.end
        numbers = *read.start, *read.end, read.valid_loss, read.valid_error, read.test_error or 0.0
        timed = seconds or "\n" in result  # an arm of the first edition may lack its seconds
        epoch_seconds = json.loads(_opened(key, seconds)) if timed else []
        # raises TypeError if an entry is no number; an array is fast, and a report reads millions
        np.array([*numbers, *read.valid_errors, *epoch_seconds, *chain(*read.trajectory)]) + 0.0
        if any(len(point) != 3 for point in read.trajectory):
            return None
    except _UNREADABLE:
        return None
    return Row(Arm(*key), read, epoch_seconds)
