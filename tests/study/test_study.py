"""The study as a person runs it: killed, resumed, given bad input, out of disk."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight import cli
from midflight.datasets import Shuffled, evaluate
from midflight.gradcheck import KINDS, OPTIMIZERS
from midflight.hypergrad import ESTIMATORS
from midflight.hypergrad.one_step import OneStep
from midflight.study.arm import prepare, run_arm, seed_of
from midflight.study.spec import Arm, Spec, preset
from midflight.study.store import Result, Row, Store, StoreError, StoreUnavailable

TINY = [
    *("--networks", "16", "--epochs", "4", "--train", "250", "--valid", "50", "--landscape", "2"),
    *("--estimator", "one_step", "paper", "default"),
]
PER_START, LANDSCAPE = 7, 4
"""Arms of `TINY`: an initial one of each start, and two of each estimator; and the landscape."""
FIRST_EDITION = (
    '{"batch": 50, "dataset": "digits", "device": "cpu", "epochs": 20, "estimator": ["one_step", "paper"], '
    '"every": 5, "hyper_lr": 0.03, "hyper_optimizer": "sign", "l2": [-5.5, -2.5], "landscape": 3, "lr": '
    '0.001, "lr_end": 0.1, "networks": ["64-64"], "noise": [0.0, 0.8], "seed": 0, "starts": 4, "train": '
    '1000, "valid": 437, "wide": false}'
)
"""The smoke study as the first edition stored it."""


def tiny(store, starts, workers=1, run="r", seed=0):
    """The arguments of a study."""
    numbers = ("--starts", str(starts), "--workers", str(workers), "--seed", str(seed))
    return ["study", "smoke", "--run", run, "--store", str(store), *TINY, *numbers]


def in_a_process_group(arguments, **options):
    command = [sys.executable, "-m", "midflight", *arguments]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, **options)


def results(store, run="r"):
    with closing(sqlite3.connect(store)) as db:
        return db.execute(
            "SELECT network, kind, estimator, number, result FROM arms WHERE run = ?"
            " ORDER BY network, kind, estimator, number",
            (run,),
        ).fetchall()


def count(store):
    try:
        return len(results(store))
    except sqlite3.Error:
        return 0


def exit_code(arguments):
    """Of the command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["midflight", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code


@pytest.fixture
def call(capsys):
    """(exit code, standard output, standard error) of the command, in this process."""
    return lambda *arguments: (exit_code(arguments), *capsys.readouterr())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(starts) -> the store of a study that one worker ran without a break."""

    @cache
    def store_of(starts):
        store = tmp_path_factory.mktemp("whole") / "s.sqlite"
        assert exit_code(tiny(store, starts)) == 0
        return store

    return store_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "starts", "all_at_once"),
    [(10, 12, False), *(pytest.param(20, 30, both, marks=pytest.mark.slow) for both in (False, True))],
)
def test_kills_at_random_moments_lose_and_repeat_nothing(
    kills, starts, all_at_once, tmp_path, whole, group_ends
):
    store, moments = tmp_path / "s.sqlite", random.Random(0)
    for kill in range(kills):
        process = in_a_process_group(tiny(store, starts, workers=2), stderr=subprocess.DEVNULL)
        before = count(store)
        if kill % 2:  # at any moment, the start of the workers included
            time.sleep(moments.uniform(0.5, 4))
        else:  # while arms are being written
            while count(store) == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None, "the study was over before it was killed"
        (os.killpg if all_at_once else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        assert group_ends(process.pid), "workers outlived their parent"
    arms = PER_START * starts + LANDSCAPE
    assert 0 < count(store) < arms
    assert exit_code(tiny(store, starts)) == 0
    assert len(results(store)) == arms
    assert results(store) == results(whole(starts))


def test_ctrl_c_says_how_to_go_on_and_keeps_what_is_done(tmp_path):
    store = tmp_path / "s.sqlite"
    process = in_a_process_group(
        tiny(store, starts=40),
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in its background has them ignore Ctrl-C, which processes inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while count(store) < 2 and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "the study ended before it could be interrupted"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command resumes" in err
    assert count(store) >= 2


def test_a_study_twice_runs_nothing_twice_and_studies_do_not_mix(tmp_path, whole, monkeypatch):
    store = shutil.copy(whole(4), tmp_path)
    a = results(store)
    assert exit_code(tiny(store, starts=1, run="b", seed=1)) == 0
    b = results(store, "b")
    assert len(b) == PER_START + LANDSCAPE
    assert not set(a) & set(b)
    monkeypatch.setattr("midflight.study.run._run_in_processes", lambda *_: pytest.fail("ran twice"))
    assert exit_code(tiny(store, starts=4)) == 0
    assert results(store) == a


def test_paired_arms_share_their_start_and_reruns_begin_where_tuning_ended(whole):
    hypersteps = {"one_step": 20 // 5, "paper": 20 // 5, "default": 20 // 20}
    with Store(whole(4)) as store:
        spec, rows = store.spec("r"), {row.arm: row.result for row in store.rows("r")}
    assert set(rows) == set(spec.arms())
    for arm, result in rows.items():
        if arm.kind == "rerun":
            assert result.start == rows[replace(arm, kind="tuned")].end
            assert result.end == result.start
        else:
            start_of = spec.grid_point if arm.kind == "landscape" else spec.start
            assert result.start == pytest.approx(start_of(arm.index))
        assert len(result.trajectory) == (hypersteps[arm.estimator] if arm.kind == "tuned" else 0)
        assert len(result.valid_errors) == spec.epochs


def test_a_default_run_is_a_plain_loop_beside_a_tuner_that_is_given_no_policy():
    spec = preset("smoke", networks=("16",), epochs=10, train=400, valid=100)
    arm, data = Arm("16", "tuned", "default", 1), prepare(spec)
    start, seed = spec.start(1), seed_of(spec, arm)
    row = run_arm(spec, arm, start, data, lambda *_: None).result

    torch.manual_seed(seed)
    space = mf.Space(
        weight_decay=mf.Float(10**-5.5, 10**-2.5, log=True, init=10 ** start[0]),
        noise=mf.Float(0.0, 0.8, init=start[1]),
    )
    net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"], floor=0.008), net)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / 10))
    t1, t2 = Shuffled(data.t1, 50, seed), Shuffled(data.t2, 50, seed + 1)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    tuner = mf.Tuner(model, optimizer, space, loss_fn, t1, t2, total_steps=80)
    for _ in range(10):
        for batch in t1:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        scheduler.step()
    tuner.finish()

    valid_loss, valid_error = evaluate(model, data.t2)
    end = float(space["weight_decay"].value.log10()), float(space["noise"])
    assert row.end == end
    assert (row.valid_loss, row.valid_error) == (valid_loss, valid_error)
    assert row.test_error == evaluate(model, data.test)[1]


def test_an_estimator_takes_a_hyperstep_at_every_so_many_steps_and_moves_by_signs():
    spec = preset("smoke", networks=("16",), epochs=2, train=400, valid=100)
    start = (-4.0, 0.4)
    row = run_arm(spec, Arm("16", "tuned", "one_step", 0), start, prepare(spec), lambda *_: None).result
    assert [step for step, *_ in row.trajectory] == [5, 10, 15]
    l2, noise = start
    for (_, *point), left in zip(row.trajectory, (16 - 0, 16 - 5, 16 - 10), strict=True):
        length = 0.03 * left / 16  # of the interval, annealed over the 16 steps of the run
        assert abs(point[0] - l2) == pytest.approx(3.0 * length, rel=1e-3)
        assert abs(point[1] - noise) == pytest.approx(0.8 * length, rel=1e-3)
        l2, noise = point


def test_starts_do_not_depend_on_how_many_there_are_and_stay_inside():
    few, many, wide = preset("paper", starts=3), preset("paper", starts=100), preset("paper", wide=True)
    assert [few.start(i) for i in range(3)] == [many.start(i) for i in range(3)]
    for spec in (many, wide):
        (l2_low, l2_high), (noise_low, noise_high) = spec.intervals()
        for i in range(100):
            l2, noise = spec.start(i)
            assert l2_low <= l2 <= l2_high
            assert noise_low <= noise <= noise_high
    assert wide.intervals() == ((-5.0, -1.0), (0.0, 0.9))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "midflight study PRESET"),
        (("fly",), "study, report, check"),
        (("study",), "smoke, quick, paper"),
        (("study", "huge"), "smoke, quick, paper"),
        (("study", "smoke", "--dataset", "minst"), "mnist, fashion_mnist, digits"),
        (("study", "smoke", "--estimator", "two_step"), "one_step"),
        (("study", "smoke", "--speed", "3"), "--speed"),
        (("study", "smoke", "--epochs", "many"), "--epochs"),
        (("study", "smoke", "--epochs", "0"), "epochs >= 1 must hold, but got 0"),
        (("study", "smoke", "--l2", "-1", "-5"), "high - low >= 1e-6 must hold, but got (-1.0, -5.0)"),
        (("study", "smoke", "--noise", "-0.1", "0.5"), "low >= 0 and high <= 1e+38 must hold"),
        (("study", "smoke", "--networks", "12x4"), "widths"),
        (("study", "smoke", "--networks", "0-5"), "widths"),
        (("study", "smoke", "--workers", "-2"), "workers >= 1 must hold, but got -2"),
        (("study", "smoke", "--device", "tpu"), "cpu, cuda"),
        (("study", "smoke", "--device", "cuda"), "use --estimator one_step paper, or --device cpu"),
        (("study", "smoke", "--train", "5000"), "train + valid must be at most 1437"),
        (("report", "nothing"), "does not exist"),
    ],
)
def test_bad_input_gives_one_clear_sentence_and_exit_code_2(arguments, sentence, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    said = " ".join((out + err).split())
    assert code == 2
    assert sentence in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["no SQLite", "another SQLite", "read-only", "a folder"])
def test_a_store_that_cannot_be_one_is_refused_and_left_alone(kind, tmp_path, monkeypatch, call):
    store = tmp_path / "store"
    if kind == "no SQLite":
        store.write_text("a letter to my aunt, long enough to be no database at all\n" * 20)
    elif kind == "another SQLite":
        with closing(sqlite3.connect(store)) as db:
            db.execute("CREATE TABLE arms (aunt TEXT)")
    elif kind == "a folder":
        store.mkdir()
    else:
        with Store(store):
            pass
        monkeypatch.setattr(sqlite3, "connect", read_only(sqlite3.connect))
    before = store.read_bytes() if store.is_file() else b""
    code, _, err = call(*tiny(store, starts=4))
    assert code == 2
    reason = "of midflight" if kind == "another SQLite" else "must be a SQLite file"
    assert reason in " ".join(err.split())
    assert before == (store.read_bytes() if store.is_file() else b"")


def read_only(connect):
    """As for a user who may not write the file; the tests may run as root, whom no mode bits stop."""
    return lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options)


def test_a_study_of_the_first_edition_is_read_and_the_new_preset_gets_a_name_of_its_own(tmp_path):
    old = Spec.from_json(FIRST_EDITION)
    assert old == preset("smoke", estimator=("one_step", "paper"))
    with Store(tmp_path / "s.sqlite") as store:
        store.open_run("smoke", old, "there")
        store.open_run("smoke", old, "here")
        assert (store.spec("smoke"), store.machine("smoke")) == (old, "there")
        with pytest.raises(StoreError, match=r"estimator: .*-> \(.*'default'\).* with --run"):
            store.open_run("smoke", preset("smoke"), "here")


def test_a_full_disk_ends_with_a_sentence_and_loses_no_finished_arm(tmp_path, call):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or mount(disk, "size=56k"):
        pytest.skip("mounting a small tmpfs needs root")
    store = disk / "s.sqlite"
    try:
        code, _, err = call(*tiny(store, starts=3))
        assert code == 1
        assert "cannot be written now" in err
        assert "Traceback" not in err
        kept = results(store)
        assert kept
        assert mount(disk, "remount,size=8m") == 0
        assert exit_code(tiny(store, starts=3)) == 0
        assert set(kept) <= set(results(store))
        assert len(results(store)) == 3 * PER_START + LANDSCAPE
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def mount(folder, options):
    return subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    ).returncode


def test_a_row_that_does_not_fit_is_an_error_and_leaves_the_others(tmp_path):
    result = Result((-4.0, 0.1), (-4.0, 0.1), 0.1, 0.03, 0.03, [0.03], [])
    with Store(tmp_path / "s.sqlite") as store:
        store.open_run("r", preset("smoke"), "here")
        store.add("r", Row(Arm("16", "initial", "", 0), result, [1.0]))
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        large = replace(result, valid_errors=[0.123456789] * 100_000)
        with pytest.raises(StoreUnavailable, match="full"):
            store.add("r", Row(Arm("16", "initial", "", 1), large, [1.0]))
        assert [row.arm.index for row in store.rows("r")] == [0]
        store.add("r", Row(Arm("16", "initial", "", 0), replace(result, test_error=0.5), [2.0]))
        assert store.rows("r")[0].result == result  # the first stays


def test_check_passes_and_its_json_says_the_same(monkeypatch, call):
    monkeypatch.setattr("midflight.gradcheck.table.SEEDS", 2)
    code, out, _ = call("check", "--json")
    table = json.loads(out)
    assert code == 0
    assert {row["estimator"] for row in table["checks"]} == {"one_step", "one_step_cheap", "t1t2", "paper"}
    for row in table["checks"]:
        assert row["passed"] is (row["relative_error"] <= row["tolerance"] if row["exact"] else None)
    assert any(row["relative_error"] > 0.1 for row in table["checks"] if row["estimator"] == "t1t2")


def test_check_fails_when_an_estimator_is_wrong(monkeypatch, call):
    monkeypatch.setattr("midflight.gradcheck.table.SEEDS", 1)

    class OnePercentTooLong(OneStep):
        def __call__(self, step, v):
            return {name: 1.01 * g for name, g in super().__call__(step, v).items()}

    monkeypatch.setitem(ESTIMATORS, "one_step", OnePercentTooLong())
    code, out, _ = call("check")
    assert code == 1
    assert "FAILS" in out


def test_check_all_covers_every_estimator_and_names_what_it_leaves_out(monkeypatch, call):
    for table, rows in ((OPTIMIZERS, {"Adam"}), (KINDS, {"l1", "momentum"})):
        for row in set(table) - rows:
            monkeypatch.delitem(table, row)
    code, out, _ = call("check", "--all", "--json")
    found = json.loads(out)
    assert code == 0
    assert {row["estimator"] for row in found["checks"]} == set(ESTIMATORS) - {"paper"}
    left_out = {(row["hyperparameter"], row["estimator"]): row["reason"] for row in found["skipped"]}
    assert "no option momentum" in left_out["momentum", "all estimators"]
    assert ("l1", "paper") in left_out


def test_check_of_some_names_alone(call):
    code, out, _ = call("check", "--json", "--optimizers", "AdamW", "--estimators", "t1t2")
    assert code == 0
    assert {(row["rule"], row["estimator"]) for row in json.loads(out)["checks"]} == {("AdamW", "t1t2")}
    for option in ("--optimizers", "--estimators"):
        code, _, err = call("check", option, "none")
        assert code == 2
        assert "must be one of" in err


def test_help_shows_examples(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "midflight study smoke" in out
    code, out, _ = call("study", "quick", "--help")
    assert code == 0
    assert "--estimator" in out
