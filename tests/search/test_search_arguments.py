"""Bad calls of the search and of its command: one sentence each, no traceback, no hang, exit code 2."""

import re
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

import midflight as mf
from midflight import cli, search

SPACE = search.Space(
    n=mf.Int(1, 4),
    net=mf.Categorical(["mlp", "cnn", 3, True]),
    x=mf.Float(1, 10),
    rate=mf.Float(0.1, 0.9, logit=True, when={"net": "cnn"}),
    decay=mf.Float(1e-6, 1e-2, log=True, online=True),
)
WHOLE = {"n": 2, "net": "mlp", "x": 5.0}
NAN, INF = float("nan"), float("inf")

BAD_CALLS = [
    *[("trials", value) for value in (NAN, INF, -INF, -1, 0, True, 2.5, "5", [5], 1j, Decimal("2.5"))],
    *[("trials", value) for value in (np.float64(NAN), np.int64(-3), np.bool_(True), np.array([1, 2]))],
    *[("seconds", value) for value in (NAN, INF, -INF, -1, 0, True, "5", [5], 1j, np.float32(NAN))],
    *[("epochs", value) for value in (NAN, INF, 0, -1, True, 1.5, "3", None)],
    *[("workers", value) for value in (NAN, INF, 0, -1, True, 1.5, "2", None)],
    *[("seed", value) for value in (NAN, -1, True, 0.5, "0", None, 2**32, np.int64(-1))],
    *[("storage", value) for value in ("", " ", 3, b"s.sqlite", "s.txt", "s", True, ["s.sqlite"])],
    *[("storage", value) for value in ("nonsense://x", "sqlite:", "/proc/no/s.sqlite", "a\0.sqlite")],
    *[("folder", value) for value in ("", 3, True, b"c", "/proc/no/such")],
    *[("name", value) for value in ("", 3, None, "a/b", "../out", "..", ".", "a" * 300, b"a")],
    *[("label", value) for value in (3, None)],
    *[("engine", value) for value in ("annealing", "", None, 3, ["tpe"], "TPE")],
    *[("objective", value) for value in (None, 3, "mine.py:f")],
    *[("space", value) for value in (None, {"x": mf.Float(0, 1)}, mf.Space(x=mf.Float(0, 1)), [])],
    *[("callbacks", value) for value in (print, 3, None, [3], "print")],
    *[("first", value) for value in (WHOLE, 3, None, "x", [3], [None], [[("x", 5.0)]])],
    *[("first", [{**WHOLE, **wrong}]) for wrong in (
        {"X": 5.0}, {"x": 50.0}, {"x": 0.5}, {"x": NAN}, {"x": "5"}, {"x": True}, {"x": None}, {"x": [5.0]},
        {"n": 2.5}, {"n": 2.0}, {"n": 5}, {"n": True}, {"n": "2"}, {"net": "rnn"}, {"net": False}, {"net": 1},
        {"net": ["mlp"]}, {"net": None}, {"rate": 0.5}, {"decay": 1e-3}, {"x": np.array([5.0])}, {3: 5.0},
    )],
    *[("first", [WHOLE, {"x": 11}]), ("unknown", 1), ("address", "auto")],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_CALLS, ids=lambda value: repr(value)[:40])
def test_a_bad_argument_is_refused_in_a_sentence_before_anything_runs(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    options = {"objective": ran.append, "space": SPACE, "engine": "random", "trials": 2, name: value}
    kinds = search.SearchError, mf.errors.SpaceError, mf.errors.UnknownName, mf.errors.MissingExtra
    with pytest.raises(kinds) as refused:
        search.run(options.pop("objective"), options.pop("space"), **options)
    assert not ran
    text = str(refused.value)
    assert refused.value.exit_code == 2
    assert re.search(
        r"must|needs|may name|may give|cannot be|is not installed|options of the engine", text
    ), text
    assert len(text) < 700
    assert name in text or name in ("storage", "folder", "first", "unknown", "address")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("trials", value) for value in (np.int64(2), np.int8(2), np.float64(2.0), 2.0, np.uint64(2))],
        *[("seconds", value) for value in (np.float32(30), np.int64(30), 30, 30.5)],
        *[("epochs", value) for value in (np.int32(1), 1.0)],
        *[("seed", value) for value in (np.int64(3), 2**32 - 1, 0)],
        *[("storage", value) for value in ("s.sqlite", Path("s.db"), "s.journal", "sqlite:///u.sqlite")],
        *[("folder", value) for value in ("checks", Path("checks/deep"))],
        *[
            ("first", value)
            for value in ((), [], (WHOLE,), [{}], [{"x": np.float32(5)}], [{"n": np.int64(2)}])
        ],
        *[
            ("first", value)
            for value in ([{"net": True}], [{"net": 3}], [{"net": np.str_("mlp")}], [{"x": 1}])
        ],
        *[("first", [{"net": "cnn", "rate": 0.5}])],
        *[("callbacks", value) for value in ((), [repr])],
        *[("name", value) for value in ("é", "a b", "it's")],
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_argument_of_every_usual_type_is_taken(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"engine": "random", "trials": 2, "epochs": 1, name: value}
    found = search.run(lambda trial: trial.params["x"], SPACE, **options)
    assert [r.state for r in found.records] == ["complete"] * 2
    for config in value if name == "first" else ():
        assert {n: found.records[0].config[n] for n in config} == config
    for r in found.records:
        assert all(type(v) in (int, float, str, bool) for v in r.config.values())


def test_smac_refuses_a_part_of_a_configuration(tmp_path):
    with pytest.raises(search.SearchError, match=r"first\[0\] must be whole for smac, but lacks n, net"):
        search.run(lambda trial: 1.0, SPACE, engine="smac", trials=2, first=[{"x": 5.0}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": mf.Float(1, 20)}, r"x: Float\(low=1, high=10.*now Float\(low=1, high=20"),
        ({"y": mf.Float(1, 20)}, r"y: nothing, now Float\(low=1, high=20"),
        ({"net": mf.Categorical(["mlp", "rnn"])}, r"net: Categorical.*'cnn'.*now Categorical.*'rnn'"),
    ],
)
def test_a_resumed_study_with_another_space_names_what_differs(change, message, tmp_path):
    small = {"x": mf.Float(1, 10), "net": mf.Categorical(["mlp", "cnn"])}
    options = {"engine": "random", "trials": 1, "epochs": 1, "storage": str(tmp_path / "s.journal")}
    search.run(lambda trial: 1.0, search.Space(small), **options)
    with pytest.raises(search.SearchError, match=message):
        search.run(lambda trial: 1.0, search.Space({**small, **change}), **options)


BAD_COMMANDS = [
    ["mlp", "--seed", "-1"], ["mlp", "--seed", "x"], ["mlp", "--seed", "4294967296"],
    ["mlp", "--trials", "nan"], ["mlp", "--trials", "-1"], ["mlp", "--trials", "2.5"],
    ["mlp", "--trials", ""],
    ["mlp", "--time", "nan"], ["mlp", "--time", "inf"], ["mlp", "--time", "0s"], ["mlp", "--time", "-1s"],
    ["mlp", "--time", ""], ["mlp", "--time", "5x"], ["mlp", "--time", "²"], ["mlp", "--time", "1e999h"],
    ["mlp", "--epochs", "0"], ["mlp", "--epochs", "-3"], ["mlp", "--workers", "0"], ["mlp", "--workers", "²"],
    ["mlp", "--data", ""], ["mlp", "--data", "../digits"], ["mlp", "--train", "0"], ["mlp", "--train", "-5"],
    ["mlp", "--engine", ""], ["mlp", "--engine", "[/INST]"], ["mlp", "--study", "../x"],
    ["mlp", "--study", ""],
    ["mlp", "--storage", ""], ["mlp", "--storage", "x"], ["mlp", "--storage", "sqlite:"],
    ["mlp", "--storage", "mysql://"], ["mlp", "--folder", "/proc/no"], ["mlp", "--scheduler", "asha"],
    ["mlp", "--out"], ["mlp", "--nothing"], ["mlp", "more"], [], [""], ["mlp:"], [":f"], ["x.py"], ["x.py:"],
    ["x.py:f g"], ["x.py:1"], ["mlp.txt:f"], ["/:f"], ["[/INST]"], ["nowhere/x.py:f"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD_COMMANDS, ids=" ".join)
def test_a_bad_command_ends_with_exit_code_2_and_no_traceback(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = [] if {"--trials", "--time"} & set(arguments) else ["--trials", "1"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["midflight", "search", *arguments, *more, *([] if "--epochs" in arguments else ["--epochs", "1"])],
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.strip()
    assert "Traceback" not in printed.err
    assert not list(tmp_path.rglob("*.pt"))
