"""The house from outside: its public names, what an import loads, and the picture of its imports."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import midflight as mf
from midflight import cli

PAGE = Path(__file__).with_name("public_names.txt")
MOST = 35
OPTIONAL = (
    "sklearn", "scipy", "pandas", "matplotlib", "rich", "tyro", "jinja2", "platformdirs", "kornia", "optuna",
    "smac", "ConfigSpace", "ray", "lightning", "transformers", "accelerate", "skorch", "peft",
)  # fmt: skip


def signatures() -> list[str]:
    """Each public name with its arguments, without their annotations."""
    found = []
    for name in {*mf.__all__, *mf._LAZY}:
        thing = getattr(mf, name)
        arguments = ""
        if callable(thing):
            parameters = inspect.signature(thing).parameters.values()
            plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
            arguments = str(inspect.Signature(plain))
        found.append(name + arguments)
    return sorted(found)


def test_the_public_names_and_their_arguments_are_these():
    told = PAGE.read_text().splitlines()
    assert signatures() == told, (
        "users see this change: run `python tests/test_house.py`, which writes "
        "tests/public_names.txt, and add a line to CHANGELOG.md."
    )
    assert len(told) <= MOST, f"midflight may have at most {MOST} public names; keep new ones in a submodule."


def test_importing_midflight_or_its_search_loads_no_optional_package():
    loaded = f"[m for m in {OPTIONAL} if m in sys.modules]"
    code = f"import sys, midflight, midflight.search; sys.exit(str({loaded}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr.strip() == "[]"


def test_importing_midflight_loads_little_that_torch_has_not():
    code = (
        "import sys, torch; before = set(sys.modules); import midflight; "
        "own = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "sys.exit(str(sorted(own | ({'numpy.random'} & set(sys.modules) - before))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr.strip() == "['midflight']"


def test_the_command_helps_and_names_the_missing_extra_without_optional_packages():
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); from importlib import util; "
    block += (
        f"real = util.find_spec; util.find_spec = lambda n, *a: None if n in {OPTIONAL} else real(n, *a); "
    )
    for argument, code, said in (("--help", 0, "midflight study PRESET"), ("study", 2, "midflight[study]")):
        run = f"{block}sys.argv = ['midflight', {argument!r}]; from midflight.cli import main; main()"
        ran = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
        assert ran.returncode == code
        assert said in ran.stdout + ran.stderr


def test_a_command_whose_reader_ends_says_nothing(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "argv", ["midflight", "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 141
    assert capsys.readouterr().err == ""


def test_the_page_for_contributors_shows_the_imports_as_they_are():
    script = Path(__file__).parent.parent / "dev" / "import_graph.py"
    ran = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


if __name__ == "__main__":
    PAGE.write_text("\n".join(signatures()) + "\n")
