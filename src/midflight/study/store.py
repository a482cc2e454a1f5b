"""Every finished arm of every study, in one SQLite file.

An arm is written in one transaction the moment it is done, so a study can be killed at any time.
What an arm measured is kept apart from how long it took: the first is the same on every run, the
second never is.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path

from midflight.errors import MidflightError, UnknownName
from midflight.study.spec import Arm, Spec, differences


class StoreError(MidflightError, ValueError):
    """The file is no store, or holds another study under this name."""


class StoreUnavailable(MidflightError, OSError):
    """The disk or the file system does not let us write."""

    exit_code = 1


@dataclass(frozen=True)
class Result:
    """What one arm measured; the same on every run with the same spec.

    Attributes:
        start: (log10 L2, noise) at the beginning.
        end: (log10 L2, noise) at the end; `start` for a fixed arm.
        valid_loss: cross-entropy on T2 at the end, by the weights that the run is left with.
        valid_error: share of T2 misclassified at the end, in [0, 1].
        test_error: share of the test set misclassified; None for the landscape, which never reads it.
        valid_errors: share of T2 misclassified after each epoch, by the weights of then.
        trajectory: [step, log10 L2, noise] after each hyper-step; [] for a fixed arm.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    valid_loss: float
    valid_error: float
    test_error: float | None
    valid_errors: list[float]
    trajectory: list[list[float]]


@dataclass(frozen=True)
class Row:
    """A stored arm: which one, what it measured, and how long each epoch took.

    Seconds are of training with all that tuning adds, `Tuner.finish` in the last epoch; none of measuring.
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
    """A SQLite file of studies; a context manager.

    Args:
        path: of the file; made, with its folder, if it is not there.
        create: whether it may be made.

    Raises:
        StoreError: it is no SQLite file of ours, or not there and may not be made.
        StoreUnavailable: it cannot be opened or written.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        if not create and not path.is_file():
            raise StoreError(
                f"the store must be a file, but {path} is not there; run `midflight study` first."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the store's folder {path.parent} cannot be made: {error}.") from error
        with self._errors():
            self._db = sqlite3.connect(path, timeout=60)
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if create and not tables:
                self._db.executescript(_SCHEMA)
            owner = self._db.execute("PRAGMA application_id").fetchone()[0]
        if owner != _APPLICATION_ID:
            raise StoreError(
                f"the store must be a SQLite file of midflight, but {path} is another program's."
            )

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def open_run(self, name: str, spec: Spec, machine: str) -> None:
        """Begin a study, or go on with it; raises `StoreError` if `name` is another study's."""
        before = self._run(name)
        if before is not None:
            changed = differences(Spec.from_json(before[0]), spec)
            if changed:
                raise StoreError(
                    f"the run {name!r} in {self.path} has another spec ({'; '.join(changed)}); "
                    "give this study a name of its own with --run."
                )
            return
        with self._errors(), self._db:
            self._db.execute("INSERT INTO runs VALUES (?, ?, ?)", (name, spec.to_json(), machine))

    def spec(self, name: str) -> Spec:
        """What the run `name` is; raises `UnknownName`."""
        return Spec.from_json(self._known(name)[0])

    def machine(self, name: str) -> str:
        """The machine on which the run `name` began."""
        return self._known(name)[1]

    def runs(self) -> list[str]:
        """The names of the runs."""
        with self._errors():
            return [name for (name,) in self._db.execute("SELECT name FROM runs ORDER BY name")]

    def add(self, run: str, row: Row) -> None:
        """Keep a finished arm; an arm that is there already is left as it is."""
        key = (run, *astuple(row.arm))
        with self._errors(), self._db:
            result = json.dumps(asdict(row.result))
            added = self._db.execute("INSERT OR IGNORE INTO arms VALUES (?, ?, ?, ?, ?, ?)", (*key, result))
            if added.rowcount:
                self._db.execute(
                    "INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?, ?, ?)",
                    (*key, json.dumps(row.epoch_seconds)),
                )

    def rows(self, run: str) -> list[Row]:
        """The finished arms of a run, in a fixed order."""
        with self._errors():
            found = self._db.execute(
                "SELECT network, kind, estimator, number, result, seconds FROM arms"
                " LEFT JOIN timings USING (run, network, kind, estimator, number)"
                " WHERE run = ? ORDER BY network, kind, estimator, number",
                (run,),
            ).fetchall()
        return [Row(Arm(*key), _result(result), json.loads(seconds)) for *key, result, seconds in found]

    def _run(self, name: str) -> tuple[str, str] | None:
        with self._errors():
            found: tuple[str, str] | None = self._db.execute(
                "SELECT spec, machine FROM runs WHERE name = ?", (name,)
            ).fetchone()
        return found

    def _known(self, name: str) -> tuple[str, str]:
        found = self._run(name)
        if found is None:
            raise UnknownName(f"a run in {self.path}", name, self.runs() or ["(none yet)"])
        return found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "readonly" in str(error) or "unable to open" in str(error) or "no such" in str(error):
                raise StoreError(
                    f"the store must be a SQLite file that can be written, but {self.path}: {error}; "
                    "name another with --store."
                ) from error
            raise StoreUnavailable(
                f"{self.path} cannot be written now: {error}; what was stored is safe, run the same command "
                "again when there is room."
            ) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"the store must be a SQLite file, but {self.path}: {error}; name another with --store."
            ) from error


def _result(text: str) -> Result:
    data = json.loads(text)
    return Result(
        **{f.name: data[f.name] for f in fields(Result)} | {k: tuple(data[k]) for k in ("start", "end")}
    )
