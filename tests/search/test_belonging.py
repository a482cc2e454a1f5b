"""A checkpoint belongs to one study of one store, and a sampler never proposes the same twice."""

import errno
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import midflight as mf
from midflight import search
from midflight.search import checkpoint

SPACE = search.Space(x=mf.Float(0.0, 1.0), y=mf.Float(1e-3, 1.0, log=True))
SLOW_SMAC = pytest.param("smac", marks=pytest.mark.slow)
ENGINES = ["random", "tpe", "bohb", SLOW_SMAC]


def trains(plus):
    """An objective whose losses are at least `plus`; it goes on from its state, which holds `plus`."""

    def objective(trial):
        state = trial.load() or {"epoch": 0, "plus": plus}
        for epoch in range(state["epoch"] + 1, trial.epochs + 1):
            trial.report(
                epoch, state["plus"] + trial.params["x"] + 1 / epoch, {"epoch": epoch, "plus": state["plus"]}
            )

    return objective


def two_stores(folder, suffix="sqlite"):
    return str(folder / f"a.{suffix}"), str(folder / f"b.{suffix}")


@pytest.mark.parametrize("engine", ["random", "bohb", "smac"])
def test_two_stores_in_one_folder_keep_their_own_states(engine, tmp_path):
    first, second = two_stores(tmp_path)
    options = {"engine": engine, "trials": 6, "epochs": 3}
    a = search.run(trains(0), SPACE, storage=first, **options)
    b = search.run(trains(100), SPACE, storage=second, **options)
    assert all(r.loss >= 100 for r in b.records)
    assert all(r.from_epoch == 0 or r.root != r.number for r in b.records)
    assert a.load()["plus"] == 0
    assert b.load()["plus"] == 100


@pytest.mark.parametrize("engine", ["random", SLOW_SMAC])
def test_two_searches_of_one_name_that_run_at_once_in_one_folder_keep_their_own_states(engine, tmp_path):
    first, second = two_stores(tmp_path, "journal")
    other = {}

    def a_whole_search_inside(trial):
        if not other:
            other["found"] = search.run(
                trains(100), SPACE, engine=engine, trials=4, epochs=3, storage=second, folder=tmp_path
            )
        trains(0)(trial)

    a = search.run(
        a_whole_search_inside, SPACE, engine=engine, trials=4, epochs=3, storage=first, folder=tmp_path
    )
    b = other["found"]
    assert all(r.loss >= 100 for r in b.records)
    assert all(r.loss < 100 for r in a.records)
    assert (a.load()["plus"], b.load()["plus"]) == (0, 100)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_store_that_was_deleted_leaves_nothing_that_a_new_one_continues(engine, tmp_path):
    storage = tmp_path / "s.sqlite"
    options = {"engine": engine, "trials": 4, "epochs": 3, "storage": str(storage)}
    search.run(trains(0), SPACE, **options)
    storage.unlink()
    assert any(tmp_path.rglob("*.pt"))
    again = search.run(trains(100), SPACE, **options)
    assert all(r.loss >= 100 for r in again.records)
    assert again.load()["plus"] == 100


def test_two_names_in_one_store_share_a_folder_without_harm(tmp_path):
    options = {"engine": "random", "trials": 3, "epochs": 2, "storage": str(tmp_path / "s.sqlite")}
    a = search.run(trains(0), SPACE, name="a", folder=tmp_path / "c", **options)
    b = search.run(trains(100), SPACE, name="b", folder=tmp_path / "c", **options)
    assert (a.load()["plus"], b.load()["plus"]) == (0, 100)


def key(config):
    return tuple(sorted(config.items()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [(5, 10), (1, 2, 3, 4), (12, 15)])
def test_a_resumed_search_proposes_only_what_is_new(engine, steps, tmp_path):
    for trials in steps:
        found = search.run(
            lambda trial: trial.params["x"], SPACE, engine=engine, trials=trials, epochs=1,
            storage=str(tmp_path / "s.sqlite"),
        )  # fmt: skip
    assert len({key(r.config) for r in found.records}) == steps[-1] == len(found.records)


def test_a_resumed_random_search_proposes_what_an_undisturbed_one_does(tmp_path):
    options = {"engine": "random", "epochs": 1, "seed": 4}
    whole = search.run(lambda trial: trial.params["x"], SPACE, trials=9, **options)
    for trials in (2, 3, 9):
        cut = search.run(
            lambda trial: trial.params["x"],
            SPACE,
            trials=trials,
            storage=str(tmp_path / "s.journal"),
            **options,
        )
    assert [r.config for r in cut.records] == [r.config for r in whole.records]
    other_seed = search.run(
        lambda trial: trial.params["x"], SPACE, engine="random", epochs=1, trials=9, seed=5
    )
    assert not {key(r.config) for r in other_seed.records} & {key(r.config) for r in whole.records}


@pytest.mark.parametrize("engine", ["random", "tpe", SLOW_SMAC])
def test_two_searches_at_once_on_one_study_propose_different_configurations(engine, tmp_path):
    """The second one runs six trials while the first one is in its first trial."""
    options = {"engine": engine, "epochs": 1, "storage": str(tmp_path / "s.journal")}
    inner = []

    def objective(trial):
        if not inner:
            inner.append(search.run(lambda trial: trial.params["x"], SPACE, trials=7, **options))
        return trial.params["x"]

    found = search.run(objective, SPACE, trials=14, **options)
    assert len(inner[0].records) == 7
    assert len({key(r.config) for r in found.records}) == len(found.records) == 14


def test_first_is_tried_once_also_after_a_restart(tmp_path):
    first = [{"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 0.5}]
    for trials in (1, 3, 6):
        found = search.run(
            lambda trial: trial.params["x"], SPACE, engine="tpe", trials=trials, epochs=1, first=first,
            storage=str(tmp_path / "s.sqlite"),
        )  # fmt: skip
    tried = [r.config for r in found.records]
    assert tried[:2] == first
    assert [tried.count(config) for config in first] == [1, 1]


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_first_is_tried_by_every_engine_and_a_waiting_one_is_not_lost(engine, epochs, tmp_path):
    first = [{"x": 0.25, "y": 0.5}]
    options = {"engine": engine, "epochs": epochs, "storage": str(tmp_path / "s.sqlite"), "first": first}

    def objective(trial):
        for epoch in range((trial.load() or 0) + 1, trial.epochs + 1):
            trial.report(epoch, trial.params["x"] / epoch, state=epoch)

    def killed(self, *_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:  # killed between enqueueing and asking
        patch.setattr("optuna.Study.ask", killed)
        with pytest.raises(search.Interrupted):
            search.run(objective, SPACE, trials=8, **options)
    found = search.run(objective, SPACE, trials=8, **options)
    assert found.records[0].config == first[0]
    assert len(found.records) == 8
    assert {r.state for r in found.records} <= {"complete", "pruned"}


def test_first_may_leave_a_choice_to_the_engine():
    found = search.run(
        lambda trial: trial.params["x"], SPACE, engine="tpe", trials=2, epochs=1, first=[{"x": 0.25}]
    )
    assert found.records[0].config["x"] == 0.25


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a bit flipped in the middle": lambda content: flipped(content, len(content) // 2),
    "not a checkpoint": lambda content: b"PK\x03\x04" + os.urandom(400),
    "of pickle": None,
    "of another kind": None,
}


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


class Evil:
    def __reduce__(self):
        return (os.mkdir, (str(Path(os.environ["EVIL"])),))


@pytest.mark.parametrize("engine", ["random", SLOW_SMAC])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_once_and_its_trial_begins_anew(engine, damage, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "code-ran"))
    options = {"engine": engine, "epochs": 4, "storage": str(tmp_path / "s.sqlite")}
    began = []

    def objective(trial):
        state = trial.load()
        began.append((trial.number, state and state["epoch"]))
        for epoch in range((state["epoch"] if state else 0) + 1, trial.epochs + 1):
            trial.report(epoch, trial.params["x"] + 1 / epoch, {"epoch": epoch, "w": torch.ones(5000)})

    def cut(record):
        if record.number == 5 and record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(search.Interrupted):
        search.run(objective, SPACE, trials=8, callbacks=[cut], **options)
    (path,) = tmp_path.rglob("5-*.pt")
    if DAMAGES[damage]:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    else:
        torch.save(Evil() if damage == "of pickle" else [1, 2], path)
    began.clear()
    with pytest.warns(UserWarning, match="a trial begins anew") as said:
        found = search.run(objective, SPACE, trials=8, **options)
    assert len(said) == 1
    assert began[0] == (5, None)
    assert found.records[5].state in ("complete", "pruned")
    assert len(found.records) == 8
    assert not (tmp_path / "code-ran").exists()


def test_a_flipped_bit_anywhere_in_a_checkpoint_never_changes_a_tensor(tmp_path):
    path, state = tmp_path / "c.pt", {"w": torch.arange(64.0)}
    checkpoint.Checkpoint([checkpoint.Point(1, 0.5)], state, checkpoint.random_state()).save(path)
    content, refused = path.read_bytes(), 0
    for at in range(0, len(content), 37):
        path.write_bytes(flipped(content, at))
        try:
            loaded = checkpoint.load(path)
        except search.SearchError:
            refused += 1
        else:
            assert torch.equal(loaded.state["w"], state["w"])
            assert loaded.points == [checkpoint.Point(1, 0.5)]
    assert refused > 20


@pytest.mark.parametrize("how", [errno.ENOSPC, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("engine", ["random", SLOW_SMAC])
def test_a_full_disk_ends_the_search_and_the_trials_go_on_later(engine, how, tmp_path, monkeypatch):
    options = {"engine": engine, "epochs": 3, "trials": 5, "storage": str(tmp_path / "s.sqlite")}
    write = Path.write_bytes

    def full(self, content):
        if self.suffix == ".part" and self.name.startswith(".1-"):
            raise OSError(how, os.strerror(how), str(self))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(search.StorageLost, match="checkpoints must be written to") as lost:
            search.run(trains(0), SPACE, **options)
    assert lost.value.exit_code == 1
    found = search.run(trains(0), SPACE, **options)
    assert len(found.records) == 5
    assert {r.state for r in found.records} <= {"complete", "pruned"}


def test_a_full_disk_counts_also_if_the_objective_catches_the_error(tmp_path, monkeypatch):
    def objective(trial):
        try:
            trial.report(1, 1.0, state=1)
        except OSError:
            return 0.0

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(search.StorageLost, match="No space left"):
        search.run(objective, SPACE, engine="random", trials=2, epochs=1, folder=tmp_path)


def test_a_full_disk_in_a_worker_ends_the_search_with_exit_code_1(tmp_path):
    """No file may become larger than 300 kB, which the states of later trials are."""
    (tmp_path / "mine.py").write_text(
        "import torch, midflight as mf\nfrom midflight import search\n"
        "space = search.Space(x=mf.Float(0.0, 1.0))\n"
        "def f(trial):\n    trial.report(1, 1.0, {'w': torch.zeros(20000 * (1 + trial.number))})\n"
    )
    command = [sys.executable, "-m", "midflight", "search", f"{tmp_path}/mine.py:f", "--trials", "6"]
    found = subprocess.run(
        [*command, "--epochs", "2", "--workers", "2", "--engine", "random", "--storage", "s.journal"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )  # fmt: skip
    assert found.returncode == 1, found.stderr
    assert "checkpoints must be written" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_missing_state_of_the_best_trial_is_none_and_a_damaged_one_is_refused(tmp_path):
    found = search.run(trains(0), SPACE, engine="random", trials=2, epochs=2, folder=tmp_path)
    path = found.ledger.checkpoint(found.best)
    path.write_bytes(b"")
    with pytest.raises(search.SearchError, match="damaged"):
        found.load()
    shutil.rmtree(tmp_path)
    assert found.load() is None


def test_a_process_number_that_the_system_used_again_does_not_hold_a_trial(tmp_path, monkeypatch):
    """A search in a container is often process 1 on the same host after a restart."""
    storage = str(tmp_path / "s.sqlite")

    def dies(trial):
        os._exit(9)

    def body():
        search.run(dies, SPACE, engine="random", trials=1, epochs=1, storage=storage)

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join(60)
    monkeypatch.setattr(
        "midflight.search.ledger.os.kill", lambda pid, signal: None
    )  # "it is alive", under the same number
    found = search.run(lambda trial: 1.0, SPACE, engine="random", trials=1, epochs=1, storage=storage)
    assert [r.state for r in found.records] == ["complete"]


def test_a_path_that_holds_quotes_and_sql_is_only_a_name(tmp_path):
    name = "'; DROP TABLE studies; --"
    storage = str(tmp_path / 'it\'s; a "store".sqlite')
    found = search.run(trains(0), SPACE, engine="random", trials=2, epochs=1, storage=storage, name=name)
    again = search.run(trains(0), SPACE, engine="random", trials=3, epochs=1, storage=storage, name=name)
    assert again.records[:2] == found.records
