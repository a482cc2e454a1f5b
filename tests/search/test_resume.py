"""Whatever is killed, and wherever it is stored: nothing is lost, nothing counted twice."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import RDBStorage

import midflight as mf
from midflight import search
from midflight.search import checkpoint
from midflight.search.ledger import read_study
from midflight.search.problems import MLP_SPACE, Mlp, problem
from midflight.search.trial import Job, run_job


def table(records):
    """What a trial is and measured, whoever ran it and however often it was killed."""
    return {r.number: (r.state, r.config, r.starts, r.losses, r.trajectory) for r in records}


def by_command(objective_file, storage, *more, name="s"):
    command = [
        sys.executable, "-m", "midflight", "search", f"{objective_file}:objective", "--study", name,
        "--storage", str(storage), "--engine", "random", "--epochs", "4", "--json", *more,
    ]  # fmt: skip
    with objective_file.with_name("printed").open("a") as file:
        return subprocess.Popen(command, start_new_session=True, stdout=file, stderr=file)


@pytest.mark.parametrize(("kills", "workers"), [(3, 2), pytest.param(10, 4, marks=pytest.mark.slow)])
def test_killed_workers_lose_and_repeat_nothing(kills, workers, objective_file, tmp_path, trace, slowed):
    slowed(0.02)
    what = problem(f"{objective_file}:objective")
    moments, killed = random.Random(0), []

    def kill(record):
        """A worker that just reported dies where it waits, or a moment later in its next epoch."""
        if record.state != "unfinished" or not record.extra or len(killed) >= kills:
            return
        # a third death would be the trial's end; two naps more keep the worker at it until it dies
        if killed.count(record.number) < 2 and record.epoch <= 4 and moments.random() < 0.5:
            killed.append(record.number)
            pid = int(record.extra["pid"])
            threading.Timer(moments.choice([0, 0.01, 0.03]), _kill, [pid]).start()

    options = {"engine": "random", "trials": 12, "epochs": 6}
    found = search.run(
        what.objective,
        what.space,
        workers=workers,
        storage=str(tmp_path / "s.sqlite"),
        callbacks=[kill],
        **options,
    )
    assert len(killed) == kills
    trained = trace()
    undisturbed = search.run(what.objective, what.space, **options)
    assert table(found.records) == table(undisturbed.records)
    assert {r.state for r in found.records} == {"complete"}
    assert set(trained) == {(n, e) for n in range(12) for e in range(1, 7)}
    assert len(trained) <= 12 * 6 + kills  # the epoch in which a worker died is all that is trained again


def _kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_search_whose_own_process_is_killed_goes_on_where_it_was(
    objective_file, tmp_path, trace, slowed, group_ends
):
    slowed(0.3)
    process = by_command(objective_file, tmp_path / "s.journal", "--trials", "8", "--workers", "2")
    while len(trace()) < 3 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(1).uniform(0, 0.3))
    assert process.poll() is None, "the search was over before it was killed"
    process.kill()
    process.wait()
    assert group_ends(process.pid), "workers outlived their parent"
    slowed(0)
    what, storage = problem(f"{objective_file}:objective"), str(tmp_path / "s.journal")
    options = {"engine": "random", "epochs": 4, "workers": 2, "label": what.label}
    records = search.run(what.objective, what.space, trials=8, storage=storage, name="s", **options).records
    # a sampler draws anew after a restart, so configurations differ, but each was trained once and to its end
    assert [r.state for r in records] == ["complete"] * 8
    assert set(trace()) == {(n, e) for n in range(8) for e in range(1, 5)}
    assert len(trace()) <= 8 * 4 + 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgres"])
@pytest.mark.parametrize("victim", ["search", "worker", "both"])
def test_twenty_kills_lose_and_repeat_nothing(
    victim, kind, request, objective_file, tmp_path, trace, slowed, group_ends
):
    storage = request.getfixturevalue("postgres") if kind == "postgres" else str(tmp_path / f"s.{kind}")
    name, more = victim, ("--trials", "60", "--workers", "2", "--folder", str(tmp_path / "out"))
    moments, process = random.Random(f"{victim} {kind}"), None
    epochs = 7 if victim == "worker" else 2  # between kills; a trial whose workers die three times is failed
    slowed(0.2)
    for kill in range(20):
        before = len(trace())
        if process is None or victim != "worker":
            process = by_command(objective_file, storage, *more, name=name)
        while len(trace()) < before + epochs and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        assert process.poll() is None, f"the search was over before kill {kill}"
        if victim == "worker":
            _kill(moments.choice(_workers_of(process.pid)))
        else:
            (os.kill if victim == "search" else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
            assert group_ends(process.pid), "workers outlived their parent"
    slowed(0)
    process = process if victim == "worker" else by_command(objective_file, storage, *more, name=name)
    assert process.wait(600) == 0, (tmp_path / "printed").read_text()
    with read_study(storage, name) as (ledger, _):
        records = ledger.records()
    assert [r.state for r in records] == ["complete"] * 60
    assert all(list(r.losses) == [1, 2, 3, 4] for r in records)
    assert set(trace()) == {(n, e) for n in range(60) for e in range(1, 5)}
    assert len(trace()) <= 60 * 4 + 2 * 20  # a kill may repeat the current epoch of both workers


def _workers_of(search):
    """Return the processes that run the trials of a search, and the server that forks them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            command = (stat.parent / "cmdline").read_text()
            ours = int(stat.read_text().rpartition(")")[2].split()[2]) == search  # its process group
            if ours and "multiprocessing" in command and "tracker" not in command:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"op_code": 0}', '{"op_code": 99, "worker_id": "a"}'])
def test_a_file_of_other_lines_is_no_journal(line, tmp_path):
    path = tmp_path / "s.journal"
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(search.SearchError, match="must be a journal file of Optuna"):
        search.run(lambda trial: 0.0, search.Space(a=mf.Int(1, 2)), trials=1, storage=path)
    assert path.read_text() == f"{line}\n{line}\n"


def test_a_checkpoint_that_cannot_be_read_ends_the_search_and_stays(tmp_path):
    (tmp_path / "1.pt").mkdir()
    with pytest.raises(search.StorageLost, match="must be readable"):
        checkpoint.load_or_drop(tmp_path / "1.pt")
    assert (tmp_path / "1.pt").is_dir()


@pytest.mark.parametrize("torn", [1, 10])
def test_a_journal_whose_last_line_is_torn_is_resumed(torn, tmp_path):
    journal = tmp_path / "s.journal"
    options = {"engine": "random", "epochs": 1, "storage": journal}
    space = search.Space({"x": mf.Float(0.0, 1.0)})
    search.run(lambda trial: 1.0, space, trials=2, **options)
    journal.write_bytes(journal.read_bytes()[:-torn])
    for trials in (3, 4):
        found = search.run(lambda trial: 1.0, space, trials=trials, **options)
        assert [r.state for r in found.records] == ["complete"] * trials


def test_two_processes_share_one_study(objective_file, tmp_path, trace):
    storage = str(tmp_path / "s.sqlite")
    other = by_command(objective_file, storage, "--trials", "12", "--workers", "1")
    what = problem(f"{objective_file}:objective")

    def once_the_other_trains(trial):
        while not trace() and other.poll() is None:
            time.sleep(0.01)
        what.objective(trial)

    options = {"engine": "random", "epochs": 4, "label": what.label}
    search.run(once_the_other_trains, what.space, trials=12, storage=storage, name="s", **options)
    assert other.wait(600) == 0, (tmp_path / "printed").read_text()
    with read_study(storage, "s") as (ledger, _):
        records, owners = ledger.records(), {t.user_attrs["owner"] for t in ledger.study.trials}
    assert {r.state for r in records} == {"complete"}
    assert 12 <= len(records) <= 13  # each looks before it asks
    assert sorted(trace()) == [(n, e) for n in range(len(records)) for e in range(1, 5)]
    assert len(owners) == 2


def test_a_process_may_begin_the_study_between_two_looks_of_another(tmp_path, monkeypatch):
    """Whichever look at the storage comes first, by the next one the other process has a trial in it."""
    options = {"engine": "random", "epochs": 1, "storage": str(tmp_path / "s.sqlite")}

    def objective(trial):
        return trial.params["x"]

    space = search.Space(x=mf.Float(0.0, 1.0))
    for look in ("get_study_user_attrs", "get_all_trials"):
        real = getattr(RDBStorage, look)

        def and_then_the_other(self, *args, real=real, **more):
            seen = real(self, *args, **more)
            monkeypatch.undo()
            search.run(objective, space, trials=1, **options)
            return seen

        monkeypatch.setattr(RDBStorage, look, and_then_the_other)
    assert len(search.run(objective, space, trials=2, **options).records) == 2


def test_a_study_that_is_not_of_midflight_is_left_alone(tmp_path):
    storage = tmp_path / "s.sqlite"
    others = optuna.create_study(storage=f"sqlite:///{storage}", study_name="s")
    others.tell(others.ask(), 1.0)
    with pytest.raises(search.SearchError, match=r"one of midflight, but .* is not; choose another name"):
        search.run(
            lambda trial: 0.0, search.Space(x=mf.Float(0.0, 1.0)), trials=2, storage=str(storage), name="s"
        )
    assert not others.user_attrs
    assert len(others.trials) == 1


def test_a_trial_that_kills_its_worker_three_times_is_failed_and_the_search_goes_on(objective_file):
    what = problem(f"{objective_file}:kills_itself")
    found = search.run(what.objective, what.space, engine="random", trials=2, epochs=4, workers=2)
    assert [(r.state, r.message) for r in found.records] == [
        ("failed", "its worker process died 3 times")
    ] * 2  # fmt: skip


def test_an_interrupted_trial_continues_bit_for_bit(tmp_path):
    """Weights, optimiser, tuner, hyperparameters, noise and dropout masks, and the order of the data."""
    objective, storage = Mlp("digits", train=400), str(tmp_path / "s.sqlite")

    def interrupted(trial):
        report = trial.report

        def cut(epoch, *rest, **more):
            report(epoch, *rest, **more)
            if epoch == 2:
                raise KeyboardInterrupt

        trial.report = cut
        objective(trial)

    options = {"engine": "random", "trials": 1, "epochs": 5, "seed": 3}
    with pytest.raises(search.Interrupted) as stopped:
        search.run(interrupted, MLP_SPACE, storage=storage, **options)
    assert [(r.state, r.epoch) for r in stopped.value.result.records] == [("unfinished", 2)]
    assert stopped.value.result.best.number == 0
    resumed = search.run(objective, MLP_SPACE, storage=storage, **options)
    whole = search.run(objective, MLP_SPACE, **options)
    assert table(resumed.records) == table(whole.records)
    assert list(whole.records[0].losses) == [1, 2, 3, 4, 5]
    assert_equal(resumed.load(), whole.load())


def test_a_promoted_trial_continues_bit_for_bit(tmp_path):
    objective = Mlp("digits", train=300)
    found = search.run(
        objective,
        MLP_SPACE,
        engine="smac",
        trials=14,
        epochs=9,
        folder=tmp_path,
        storage=str(tmp_path / "s.db"),
    )
    promoted = [r for r in found.records if r.from_epoch]
    assert promoted
    r = max(promoted, key=lambda r: r.epoch)
    assert r.root < r.number
    assert r.losses == {**found.records[r.root].losses, **r.losses}
    points = []
    job = Job(r.number, r.config, r.starts, 9, 0, MLP_SPACE, tmp_path / "whole.pt")
    run_job(job, objective, lambda new: points.extend(new) or len(points) < r.epoch)
    assert {p.epoch: p.loss for p in points} == r.losses
    assert [(p.epoch, p.online) for p in points] == r.trajectory
    continued, whole = checkpoint.load(found.ledger.checkpoint(r)), checkpoint.load(tmp_path / "whole.pt")
    assert_equal(continued.state, whole.state)
    assert_equal(continued.random_state, whole.random_state)


def assert_equal(a, b):
    """Nested states, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_smac_is_told_what_an_earlier_process_found(tmp_path):
    what = {"engine": "smac", "epochs": 3, "storage": str(tmp_path / "s.sqlite")}
    told = []

    def objective(trial):
        for epoch in range((trial.load() or 0) + 1, trial.epochs + 1):
            trial.report(epoch, 1.0 / trial.params["layers"], state=epoch)

    from midflight.search.engines import smac

    first = search.run(objective, MLP_SPACE, trials=6, **what)
    original = smac.SmacSampler._tell

    def spy(self, trials):
        original(self, trials)
        told.append(len(self._facade.runhistory))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smac.SmacSampler, "_tell", spy)
        second = search.run(objective, MLP_SPACE, trials=9, **what)
    assert told[0] == len(first.records) == 6
    assert len(second.records) == 9


@pytest.fixture(scope="module")
def postgres():
    """The URL of a server that is started here."""
    folder = _programs()
    if folder is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    user = "nobody" if os.getuid() == 0 else None
    if user and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    home = Path(tempfile.mkdtemp(prefix="midflight-pg-"))
    if user:
        shutil.chown(home, user)

    def call(*command):
        prefix = ["runuser", "-u", user, "--"] if user else []
        done = subprocess.run([*prefix, *command], capture_output=True, text=True, cwd=home, timeout=600)
        if done.returncode:
            pytest.skip(f"PostgreSQL does not start here: {done.stderr.strip()[-200:]}")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = home / "data"
    call(str(folder / "initdb"), "-D", str(data), "-U", "midflight", "--auth=trust", "--no-sync")
    options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off"
    call(str(folder / "pg_ctl"), "-D", str(data), "-w", "-l", str(home / "log"), "-o", options, "start")
    yield f"postgresql://midflight@127.0.0.1:{port}/postgres"
    call(str(folder / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
    shutil.rmtree(home, ignore_errors=True)


def _programs():
    on_path = shutil.which("initdb")
    of_debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = Path(on_path) if on_path else of_debian[-1] if of_debian else None
    return found.parent if found else None


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgres"])
def test_every_storage_holds_the_same_and_resumes(kind, request, objective_file, tmp_path):
    storage = request.getfixturevalue("postgres") if kind == "postgres" else str(tmp_path / f"s.{kind}")
    what = problem(f"{objective_file}:objective")
    options = {"engine": "random", "epochs": 4, "folder": tmp_path, "name": "one"}
    cut = []

    def stop(record):
        if record.number == 3 and record.epoch == 2 and not cut:
            cut.append(record.number)
            raise KeyboardInterrupt

    with pytest.raises(search.Interrupted):
        search.run(what.objective, what.space, trials=6, storage=storage, callbacks=[stop], **options)
    with read_study(storage, "one") as (ledger, declaration):
        assert [r.state for r in ledger.records()] == ["complete"] * 3 + ["unfinished"]
    assert declaration.space == what.space
    found = search.run(what.objective, what.space, trials=6, storage=storage, **options)
    memory = search.run(what.objective, what.space, trials=6, engine="random", epochs=4)
    assert [r.state for r in found.records] == ["complete"] * 6
    assert table(found.records[:4]) == table(memory.records[:4])
    assert all(list(r.losses) == [1, 2, 3, 4] for r in found.records)


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_the_stored_study_is_an_ordinary_one_of_optuna(storage, objective_file, tmp_path):
    import optuna

    path = tmp_path / f"s.{storage}"
    what = problem(f"{objective_file}:objective")
    found = search.run(
        what.objective, what.space, engine="tpe", trials=4, epochs=3, storage=str(path), name="x"
    )
    backend = (
        f"sqlite:///{path}"
        if storage == "sqlite"
        else optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    )
    study = optuna.load_study(study_name="x", storage=backend)
    assert study.best_value == found.best.loss
    assert study.best_params == found.best.config
    assert [t.params for t in study.trials] == [r.config for r in found.records]


def test_a_report_that_was_saved_but_not_heard_is_told_when_the_trial_goes_on(objective_file, tmp_path):
    what = problem(f"{objective_file}:objective")
    config = {"layers": 1, "optimizer": "adam", "lr": 1e-2}
    job = Job(0, config, what.space.starts(config), 3, 0, what.space, tmp_path / "0.pt")
    heard = []

    def dies(points):
        if points[-1].epoch == 2:
            raise KeyboardInterrupt  # saved, and killed before anybody heard of it
        heard.extend(points)
        return True

    with pytest.raises(KeyboardInterrupt):
        run_job(job, what.objective, dies)
    assert [p.epoch for p in heard] == [1]
    told = []
    run_job(job, what.objective, lambda points: told.append([p.epoch for p in points]) or True)
    assert told == [[1, 2], [3]]
