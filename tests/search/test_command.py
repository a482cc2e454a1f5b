"""`midflight search` as a person runs it: to a report, again from the storage, and given bad input."""

import json
import re
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO

import pytest

from midflight import cli
from midflight.search.ledger import read_study

TINY = ["--trials", "4", "--epochs", "3", "--workers", "1"]


def ended(capture, *arguments):
    """(exit code, standard output, standard error) of the command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["midflight", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code, *capture()


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(ended, capsys.readouterr)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A search for `TINY` named s: its storage, its folder with the report, and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    printed = StringIO()
    with redirect_stdout(printed):
        storage = folder / "x.journal"
        code, *_ = ended(tuple, "search", "mlp", "--train", 200, "--study", "s", "--storage", storage, *TINY)
    assert code == 0
    return storage, folder / "s", printed.getvalue()


def test_a_search_runs_to_a_report(study):
    storage, folder, printed = study
    page = (folder / "report.html").read_text()
    assert str(folder / "report.html") in printed
    for name in ("history", "importance", "configurations", "online"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'<figure id="{name}">' in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "<script" not in page
    for name in ("layers", "optimizer", "weight_decay", "dropout"):
        assert f'<th scope="row">{name}</th>' in page
    with read_study(str(storage), "s") as (ledger, declaration):
        records = ledger.records()
    assert len(records) == 4
    assert declaration.objective == "mlp on digits, 200 images"
    losses = [r.loss for r in records if r.state == "complete"] or [r.loss for r in records]
    assert f"Validation loss {min(losses):.4g}" in page


@pytest.mark.parametrize("engine", ["bohb", "smac"])
def test_each_engine_searches_and_its_trials_are_stored_by_default(call, engine):
    code, out, _ = call("search", "mlp", "--train", 200, "--engine", engine, "--json", *TINY)
    assert code == 0
    found = json.loads(out)
    assert found["study"] == f"mlp-digits-200-{engine}"
    assert found["summary"]["engines"] == [engine]
    with read_study("runs/search.sqlite", found["study"]) as (ledger, _):
        records = ledger.records()
    assert [t["config"] for t in found["trials"]] == [r.config for r in records]
    assert len(records) == 4
    losses = [r.loss for r in records if r.state == "complete"] or [r.loss for r in records]
    assert records[found["best"]].loss == min(losses)


def test_a_report_is_made_again_from_the_stored_rows_alone(call, study, tmp_path):
    storage, folder, _ = study
    code, _, _ = call("report", "s", "--storage", storage, "--out", "again")
    assert code == 0
    for name in ("report.html", "history.png"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    code, out, _ = call("report", "s", "--storage", storage, "--json")
    found = json.loads(out)
    assert len(found["trials"]) == found["summary"]["trials"] == 4
    assert set(found["space"]) >= {"layers", "noise"}
    assert found["trials"][found["best"]]["state"] == "complete"


def test_the_same_command_goes_on_and_offline_is_a_study_of_its_own(call):
    options = ["--train", 200, "--epochs", 2, "--workers", 1, "--engine", "tpe", "--json"]
    for more in (["--trials", 2], ["--trials", 4], ["--trials", 2, "--offline"]):
        code, *_ = call("search", "mlp", *options, *more)
        assert code == 0
    with read_study("runs/search.sqlite", "mlp-digits-200-tpe") as (ledger, _):
        assert [r.state for r in ledger.records()] == ["complete"] * 4
        assert all(r.trajectory for r in ledger.records())
    with read_study("runs/search.sqlite", "mlp-digits-200-tpe-offline") as (ledger, declaration):
        assert not declaration.space.online
        assert all({"noise", "dropout"} <= set(r.config) and not r.starts for r in ledger.records())


def test_time_ends_a_search(call):
    options = ["--train", 200, "--time", "2s", "--epochs", 3, "--workers", 1, "--json"]
    code, *_ = call("search", "mlp", *options)
    assert code == 0
    with read_study("runs/search.sqlite", "mlp-digits-200-bohb") as (ledger, _):
        first, *others = ledger.records()
        assert others or first.state == "unfinished"  # a slow machine may not end one trial in that time


SPACES = {
    "empty": ("search.Space()", "needs at least one hyperparameter"),
    "twice": ("search.Space({'n': mf.Int(1, 2)}, n=mf.Int(1, 2))", "n is declared twice"),
    "repeated": ("search.Space(n=mf.Int(1, 2), n=mf.Int(1, 2))", "keyword argument repeated: n"),
    "impossible": (
        "search.Space(n=mf.Int(1, 2), m=mf.Int(1, 2, when={'n': 3}))",
        "n=3, but n must be a whole",
    ),
    "cyclic": (
        "search.Space(n=mf.Int(1, 2, when={'m': 1}), m=mf.Int(1, 2, when={'n': 1}))",
        "must not form a cycle",
    ),
    "online Int": ("search.Space(n=mf.Int(1, 2, online=True))", "'online'"),
    "not a space": ("3", "space is 3"),
    "tuned only": ("search.Space(d=mf.Float(0, 1, online=True))", "use midflight.Tuner"),
}


@pytest.mark.parametrize("case", SPACES)
def test_a_bad_space_is_one_sentence_and_exit_code_2(call, tmp_path, case):
    space, message = SPACES[case]
    file = tmp_path / f"bad_{case.replace(' ', '_')}.py"
    file.write_text(
        f"import midflight as mf\nfrom midflight import search\nspace = {space}\ndef f(trial): ...\n"
    )
    assert_refused(call("search", f"{file}:f", *TINY), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mlp", "--engine", "annealing"],
            "engine must be one of random, tpe, bohb, smac, ray; got 'annealing'",
        ),
        (["mlp", "--data", "cifar"], "dataset must be one of mnist, fashion_mnist, digits"),
        (["mpl"], r"must be mlp or FILE\.py:FUNCTION, but got 'mpl'"),
        (["nowhere.py:f"], "must be in a Python file, but .*nowhere.py does not exist"),
        (["nowhere.py:f", "--data", "digits"], "--data and --train are for mlp"),
        (["mlp", "--train", "99999"], "1 <= train <= 1197 must hold for digits, but train=99999"),
        (["mlp", "--time", "soon"], "--time must be a duration such as 90s, 5m or 2h, but got 'soon'"),
        (["mlp", "--time", "-5m"], "--time must be a duration"),
        (["mlp", "--trials", "0"], "trials > 0 must hold"),
        (["mlp", "--workers", "0"], "workers > 0 must hold"),
        (["mlp", "--storage", "study.txt"], "must be a file that ends in .sqlite"),
        (
            ["mlp", "--storage", "/proc/no/s.sqlite"],
            "folder of the storage /proc/no/s.sqlite cannot be created",
        ),
        (["mlp", "--storage", "oracle://x"], "driver of oracle://x is not installed"),
        (["mlp", "--storage", "postgresql://u:secret@127.0.0.1:1/d"], r"reached, but .*127\.0\.0\.1:1/d"),
        (["mlp", "--storage", "postgresql://u@:port/d"], "must have an address such as"),
        (["mlp", "--engine", "ray", "--address", "127.0.0.1:1"], "127.0.0.1:1 does not answer"),
        (["mlp", "--engine", "ray", "--address", "somewhere"], "must be auto or host:port"),
        (["mlp", "--engine", "ray", "--scheduler", "fair"], "scheduler of Ray must be one of asha"),
        (["mlp", "--engine", "ray", "--scheduler", "pbt", "--time", "5s"], "needs trials="),
        (
            ["mlp", "--engine", "bohb", "--scheduler", "pbt"],
            "options of the engine bohb are none, but got scheduler=",
        ),
        (
            ["mlp", "--engine", "smac", "--address", "auto"],
            "options of the engine smac are none, but got address=",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(call, arguments, message):
    more = [] if {"--trials", "--workers", "--time"} & set(arguments) else TINY
    found = call("search", *arguments, *more)
    assert_refused(found, message)
    assert "secret" not in found[2]


def test_a_report_on_what_is_not_there_is_one_sentence_and_exit_code_2(call, study, tmp_path):
    assert_refused(
        call("report", "s", "--storage", "no.sqlite"), "no.sqlite does not exist; run the search first"
    )
    assert_refused(call("report", "t", "--storage", study[0]), "must be one of s; got 't'")
    (tmp_path / "junk.sqlite").write_text("not a database, but longer than a header of one" * 9)
    assert_refused(call("report", "s", "--storage", "junk.sqlite"), "file is not a database")
    (tmp_path / "junk.journal").write_text("not json\n" * 3)
    assert_refused(call("report", "s", "--storage", "junk.journal"), "must be a journal file of Optuna")


def test_a_study_is_not_resumed_as_another_search(call, study):
    for change, message in (
        (["--epochs", 4], "same epochs to be resumed, but it has 3 and this search has 4"),
        (["--seed", 1], "the same seed"),
        (["--offline"], "the same space"),
        (["--train", 201], "the same objective"),
    ):
        arguments = ["--train", 200, "--study", "s", "--storage", study[0], *TINY, *change]
        assert_refused(call("search", "mlp", *arguments), message)


def assert_refused(found, message):
    code, out, err = found
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    text = " ".join(err.split())
    assert text.startswith("midflight: ")
    assert re.search(message, text), text


def test_an_objective_that_always_fails_ends_the_search_with_its_message(call, objective_file):
    code, _, err = call("search", f"{objective_file}:breaks", *TINY)
    assert code == 1
    assert "the first 3 trials all failed, the last with KeyError: 'no such layer' (mine.py:" in " ".join(
        err.split()
    )
