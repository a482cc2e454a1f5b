"""The command with bad input and with names of any text: a sentence, exit code 2, nothing lost."""

import io
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from midflight import cli
from midflight._reporting.files import file_name
from midflight._reporting.text import printable
from midflight.study import spec
from midflight.study.spec import SpecError, preset
from midflight.study.store import Store

OUTPUT_OF = 'import sys; from midflight.cli import main; main(["report", *sys.argv[1:]])'
NAMES = ["[/INST]", "[bold]x", "a\nb", "\x1b[31mred\x1b[2J", "ü€", ":smile:"]
NAMES += ["../../up", "..", "/etc/x", "a" * 300, "<script>x"]


COUNTS = [f"--{field}" for field in spec.COUNTS] + ["--workers"]
PAIRS = "-inf 0,0 inf,nan 0,0 nan,1 0,0 0,0,a b,0 1 2,-1e400 0,0 1e-18,0 1e39"
WIDTHS = ["²", "１６", "٣", "", "-", "16-", "0", "-5", "16--16", "a"]  # noqa: RUF001


def bad_options():
    """Options of `study smoke` that must be refused before anything is stored."""
    numbers = ["-1", "nan", "inf", "1.5", "", "x", "²", "1e3"]
    for option in COUNTS:
        for text in numbers:
            yield option, text
        if option not in ("--seed", "--landscape"):
            yield option, "0"
    for option in ("--starts", "--landscape", "--train", "--valid", "--batch"):
        yield option, "9" * 30
    for option in ("--lr", "--lr-end", "--hyper-lr"):
        for text in ("0", "-1", "nan", "inf", "2", "x", ""):
            yield option, text
    for option in ("--l2", "--noise"):
        for pair in PAIRS.split(","):
            yield option, *pair.split()
    for text in (*WIDTHS, "9" * 20, "9" * 5000, "99999999-99999999"):
        yield "--networks", text
    yield from (("--networks",), ("--networks", "16", "16"))
    yield from (("--estimator",), ("--estimator", "paper", "paper"))
    for option in ("--estimator", "--dataset", "--device", "--hyper-optimizer"):
        for text in ("", "[/INST]", "\x1b[31m"):
            yield option, text
    for text in ("cuda:x", "cpu:7", "cuda:99", "cuda:-1", "CPU"):
        yield "--device", text
    yield from (
        ("--run", ""),
        ("--run", "\udcff"),
        ("--run", "a\0b"),
        ("--store", "a\0b"),
        ("--store", ""),
        ("--speed", "3"),
    )


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """(exit code, output) of the command in an empty folder; a study that begins to train is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("midflight.cli.study.run_study", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("midflight.cli.report.run_checks", list)

    def called(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return called


@pytest.mark.parametrize("options", list(bad_options()), ids=lambda o: ascii(" ".join(o))[:40])
def test_a_bad_option_is_refused_and_leaves_no_study(options, call, tmp_path):
    code, said = call("study", "smoke", "--estimator", "one_step", *options)
    assert code == 2, said
    assert "Traceback" not in said
    assert "\x1b" not in said
    assert (
        not (tmp_path / "runs/midflight.sqlite").exists()
        or not Store(tmp_path / "runs/midflight.sqlite")._runs()
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("studdy",), "did you mean study?"),
        (("study", "smoke", "--dataset", "minst"), "did you mean mnist?"),
        (("study", "smoke", "--estimator", "One-Step"), "did you mean one_step?"),
        (("check", "--optimizers", "adam"), "did you mean Adam?"),
        (("report", "Good", "--store", "good"), "did you mean good?"),
        (("report", "good", "--store", "empty"), "is empty"),
        (("report", "good", "--store", "folder"), "is a folder"),
        (("report", "good", "--store", "good", "--out", "empty"), "empty: File exists"),
        (("report", "good", "--store", "good", "--out", "empty/x"), "Not a directory"),
        (("study", "smoke", "--store", "empty/s.sqlite"), "must be a SQLite file that can be written"),
        (("study", "smoke", "--estimator", "one_step", "--seed", "-1"), "seed >= 0 must hold, but got -1"),
        (("study", "smoke", "--l2", "-inf", "0"), "low >= -37 and high <= 38 must hold, but got (-inf, 0.0)"),
        (("study", "smoke", "--networks", "²"), "such as 500-500, must hold, but got ('²',)"),
    ],
)
def test_a_refusal_says_what_must_hold_and_the_nearest_name(arguments, sentence, call, tmp_path):
    with Store(tmp_path / "good") as store:
        store.open_run("good", preset("smoke"), "here")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    code, said = call(*arguments)
    assert code == 2
    assert sentence in " ".join(said.split())


def test_a_store_named_like_sqlites_memory_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store(Path(":memory:")) as store:
        store.open_run("r", preset("smoke"), "here")
    with Store(Path(":memory:"), create=False) as store:
        assert store.spec("r") == preset("smoke")


@pytest.mark.parametrize("field", ["starts", "epochs", "every", "seed"])
@pytest.mark.parametrize("value", [True, 1.5, float("nan"), float("inf"), "3", None])
def test_a_spec_made_in_python_wants_whole_numbers(field, value):
    with pytest.raises(SpecError, match=field):
        preset("smoke", **{field: value})


@pytest.fixture
def named(tmp_path):
    """A store with an empty study of each of NAMES."""
    with Store(tmp_path / "s/s.sqlite") as store:
        for name in NAMES:
            store.open_run(name, preset("smoke"), "here & <b>there</b>")
    return tmp_path / "s/s.sqlite"


@pytest.mark.parametrize("name", NAMES, ids=lambda n: ascii(n)[:20])
def test_a_name_of_any_text_is_shown_and_kept_in_a_folder_beside_the_store(name, named, call, monkeypatch):
    monkeypatch.setattr("midflight.study.report.all_figures", lambda *_: {})
    code, said = call("report", name, "--store", str(named))
    assert code == 0
    pages = list(named.parent.glob("*/report.html"))
    assert len(pages) == 1
    assert printable(str(pages[0])) in said
    assert "\x1b" not in said
    page = pages[0].read_text()
    parser = HTMLParser()
    tags = []
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(page)
    assert not {"script", "b"} & set(tags)


def test_names_that_differ_get_folders_that_differ():
    names = [*NAMES, "a/b", "a_b", "a" * 301, ".", "a\tb", "name", "my run"]
    assert len({file_name(name) for name in names}) == len(names)
    assert [file_name(name) for name in ("quick", "my run", "v1.2-ü")] == ["quick", "my run", "v1.2-ü"]
    assert all(len(file_name(n).encode()) < 255 and "/" not in file_name(n) for n in [*names, "€" * 99])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_that_lacks_a_character_shows_an_escape_and_a_dash(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    print("Δ − x")  # noqa: RUF001
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding).endswith("\\u0394 - x\n")


def test_the_whole_report_in_ascii_on_a_narrow_terminal(named):
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "NO_COLOR": "1",
        "COLUMNS": "20",
        "TERM": "dumb",
    }
    done = subprocess.run(
        [sys.executable, "-c", OUTPUT_OF, "ü€", "--store", str(named), "--json"],
        capture_output=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u20ac" in done.stdout


@pytest.mark.parametrize("missing", ["tyro", "rich", "jinja2", "matplotlib", "sklearn", "platformdirs"])
def test_without_an_extra_the_help_is_shown_and_a_verb_names_the_extra(missing, call, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert call("--help")[0] == 0
    for verb in ("study", "report"):
        code, said = call(verb, "x")
        assert code == 2
        assert f"{missing} must be installed for this, but is not; run pip install 'midflight[study]'" in said


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_device_for_the_output_is_a_failure_and_not_bad_input(unbuffered):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "midflight", "--help"], stdout=full, stderr=subprocess.PIPE, timeout=300,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
