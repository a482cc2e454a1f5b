"""Every example, shortened, ends with a better validation loss than its start."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from midflight.datasets import DatasetUnavailable

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORTER = {"fashion_cnn": 2, "hf_text": 2, "tabular": 2, "language_model": 2}
"""How many times shorter than the example's own quick form a training is here."""

NEEDS = {
    "fashion_cnn": ["kornia"],
    "lightning_digits": ["lightning"],
    "hf_text": ["transformers"],
    "skorch_digits": ["skorch"],
}


def shortened(train, times):
    """So many times shorter; the re-run, untuned like the first run, is the first run."""
    runs = {}

    def run(*arguments, tune):
        if tune not in runs:
            *others, length = arguments
            runs[tune] = train(*others, length // times, tune=tune)
        return runs[tune]

    return run


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def result_of(name):
    example = load(name)
    if name == "noisy_labels":
        example.EXAMPLES = 4_000
    if hasattr(example, "train"):
        example.train = shortened(example.train, SHORTER.get(name, 1))
    try:
        return example.main(quick=True)
    except DatasetUnavailable as error:
        pytest.skip(str(error))


LOOPS = sorted(
    path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("train_gpt", "hypergradient")
)  # see test_unchanged_loop, and below


@pytest.mark.parametrize("name", LOOPS)
def test_tuning_ends_with_a_lower_validation_loss_than_the_start(name):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    result = result_of(name)
    assert result["valid"]["tuned"] < result["valid"]["fixed"]
    if name == "noisy_labels":
        assert result["precision"] > 1.5 * result["chance"]  # a network that learnt nothing is at 1


def test_the_example_of_a_hypergradient_finds_the_slope():
    found = load("hypergradient").main()
    assert found["hypergradient"] == pytest.approx(found["difference"], rel=1e-6)


ALONE = ["1_first_run", "6_search"]
"""Tutorials without an untuned run beside the tuned one."""
TUTORIALS = sorted((EXAMPLES.parent / "docs" / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_tuning_helps(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    said = re.findall(r"(?:error|loss)\D*: (\d+\.\d+)", capsys.readouterr().out)
    assert len(said) == (0 if path.stem in ALONE else 2)
    assert said == sorted(said, key=float, reverse=True)  # tuned last


PAGE = (EXAMPLES.parent / "README.md").read_text()
CODE, SHOWN = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL).groups()


def test_the_readmes_example_runs_as_it_stands_and_ends_as_it_says(capsys):
    """The numbers are of one machine and version of torch; another may round otherwise."""
    exec(CODE, {})
    shown = capsys.readouterr().out, SHOWN
    found, expected = ([float(x) for x in re.findall(r"\d+\.\d+", text)] for text in shown)
    assert len(found) == len(expected) == 5
    assert found[:3] == pytest.approx(expected[:3], rel=0.1)
    assert found[3] < found[4] / 2


def test_the_readmes_example_ends_without_the_tuner_where_it_says():
    plain = [line for line in CODE.splitlines() if not line.startswith(("tuner = ", "noise = ", "print("))]
    losses, names = [], {}

    def after_epoch():
        model = names["model"].eval()
        losses.append(float(names["loss_fn"](model, (names["x"][500:], names["y"][500:])).detach()))
        model.train()

    names["after_epoch"] = after_epoch
    exec("\n".join([*plain, "    after_epoch()"]), names)
    said = re.search(r"the last weights\s+have ([\d.]+), those of the best epoch ([\d.]+)\.", PAGE)
    assert len(losses) == 100
    assert [losses[-1], min(losses)] == pytest.approx([float(x) for x in said.groups()], rel=0.1)
