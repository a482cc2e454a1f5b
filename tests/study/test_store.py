"""A store that is damaged, of another version, or used by two at once: no number changes without a word."""

import json
import random
import sqlite3
import warnings
from contextlib import closing
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import pytest

from midflight.errors import MidflightError
from midflight.study.spec import preset
from midflight.study.store import Result, Row, Store, StoreError, StoreUnavailable

SPEC = preset("smoke", starts=8)
RESULT = Result((-4.0, 0.1), (-4.5, 0.2), 0.1, 0.03, 0.03, [0.03], [[5.0, -4.5, 0.2]])


def rows_of(spec):
    return [Row(arm, replace(RESULT, valid_loss=0.1 + 0.01 * i), [1.0]) for i, arm in enumerate(spec.arms())]


@pytest.fixture
def whole(tmp_path):
    """(path, rows) of a whole study."""
    with Store(tmp_path / "s.sqlite") as store:
        store.open_run("r", SPEC, "here")
        for row in rows_of(SPEC):
            store.add("r", row)
        return store.path, store.rows("r")


def written(path, table, column, value, where="1"):
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (value,))


def test_a_flipped_bit_is_found_or_changes_no_number(whole, tmp_path):
    path, rows = whole
    content, draw, found = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                with Store(path, create=False) as store:
                    spec, read = store.spec("r"), store.rows("r")
            except MidflightError:
                found += 1
                continue
        assert spec == SPEC
        known = {row.arm: row for row in rows}
        assert all(known.get(row.arm, row) == row for row in read if row.arm in known)
        found += bool(said)
    assert found > 100  # most bits lie in the texts


def test_a_damaged_arm_is_said_counts_as_not_run_and_is_replaced(whole):
    path, rows = whole
    text = (
        sqlite3.connect(path)
        .execute("SELECT result FROM arms WHERE number = 0 AND kind = 'initial'")
        .fetchone()[0]
    )
    written(path, "arms", "result", text.replace("-4.0", "-5.0"), "number = 0 AND kind = 'initial'")
    with Store(path) as store:
        with pytest.warns(UserWarning, match=rf"1 of {len(rows)} stored arms of 'r' in .* are damaged"):
            left = store.rows("r")
        assert len(left) == len(rows) - 1
        lost = next(row for row in rows if row not in left)
        store.add("r", lost)
        assert store.rows("r") == rows


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "1",
        "{}",
        '{"start": 1}',
        "[" * 100_000,
        "\ud83d".encode("utf-16-le", "surrogatepass"),
        None,
        b"\xff\xfe",
        7,
    ],
)
def test_an_arm_of_any_text_is_damaged_and_no_error(text, whole):
    path, rows = whole
    for table, column in (("arms", "result"), ("timings", "seconds")):
        if table == "timings" and text in ("", "[]", None, "null"):
            continue
        written(path, table, column, text, "number = 1 AND kind = 'initial'")
        with Store(path) as store, pytest.warns(UserWarning, match="damaged"):
            assert len(store.rows("r")) == len(rows) - 1


@pytest.mark.parametrize("value", [["a"], [[1, 2]], [[1, 2, "x"]], "abc", None, 1.0, {"a": 1}])
def test_an_arm_of_the_first_edition_whose_numbers_are_none_is_damaged(value, whole):
    path, rows = whole
    result = {**vars(RESULT), "trajectory": value}
    written(path, "arms", "result", json.dumps(result), "number = 1 AND kind = 'initial'")
    with Store(path) as store, pytest.warns(UserWarning, match="damaged"):
        assert len(store.rows("r")) == len(rows) - 1


@pytest.mark.parametrize(
    "spec",
    ["", "{}x", "[]", '{"speed": 3}', '{"starts": "4"}', '{"l2": [1]}', '{"networks": "16"}', None, b"\xff"],
)
def test_settings_that_are_damaged_or_of_another_version_are_refused(spec, whole):
    path, _ = whole
    written(path, "runs", "spec", spec)
    with Store(path) as store:
        with pytest.raises(StoreError, match="damaged or of another version"):
            store.spec("r")
        with pytest.raises(StoreError, match="with --run"):
            store.open_run("r", SPEC, "here")


@pytest.mark.parametrize("left", [16, 100, 4096, 5000, 0.5])
def test_a_truncated_store_is_refused_and_left_alone(left, whole):
    path, _ = whole
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if left < 1 else left])
    before = path.read_bytes()

    def study():
        with Store(path) as store:
            store.open_run("r", SPEC, "here")
            store.rows("r")

    with pytest.raises(StoreError, match="SQLite file"):
        study()
    assert path.read_bytes() == before


def test_a_store_without_its_tables_is_refused(whole):
    path, _ = whole
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE timings")
    with Store(path) as store, pytest.raises(StoreError, match="no such table"):
        store.rows("r")


def test_a_locked_store_is_a_failure_that_says_so(whole, monkeypatch):
    path, _ = whole
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.01))
    with closing(connect(path)) as other, Store(path) as store:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreUnavailable, match=r"locked.*end what locks the file"):
            store.rows("r")


def test_many_that_begin_at_once_in_one_folder_keep_their_own_rows(tmp_path):
    def study(i):
        with Store(tmp_path / "new/s.sqlite") as store:
            for name in ("same", f"own{i}"):
                store.open_run(name, SPEC if name == "same" else replace(SPEC, seed=i), "here")
                for row in rows_of(SPEC)[:3]:
                    store.add(name, replace(row, epoch_seconds=[float(i)]))

    with ThreadPool(8) as pool:
        pool.map(study, range(8))
    with Store(tmp_path / "new/s.sqlite") as store:
        assert len(store._runs()) == 9
        assert all(len(store.rows(name)) == 3 for name in store._runs())
        assert all(row.epoch_seconds == [float(i)] for i in range(8) for row in store.rows(f"own{i}"))


def test_of_two_studies_that_take_one_name_at_once_the_second_is_refused(tmp_path, monkeypatch):
    with Store(tmp_path / "s.sqlite") as first, Store(tmp_path / "s.sqlite") as second:
        runs = second._runs
        monkeypatch.setattr(second, "_runs", lambda: {})  # second looked before first wrote
        first.open_run("r", SPEC, "here")
        monkeypatch.setattr(second, "_run", lambda name: runs()[name])
        with pytest.raises(StoreError, match="seed: 0 -> 1"):
            second.open_run("r", replace(SPEC, seed=1), "there")


def test_no_code_runs_from_a_store(whole, tmp_path):
    path, _ = whole
    payload = "cos\nsystem\n(S'touch " + str(tmp_path / "ran") + "'\ntR."
    written(path, "arms", "result", payload, "number = 1 AND kind = 'initial'")
    written(path, "runs", "machine", payload)
    with Store(path) as store, pytest.warns(UserWarning, match="damaged"):
        store.rows("r")
    assert not (tmp_path / "ran").exists()
