"""`benchmarks/finetune.py` at a tiny scale, on random bytes in place of the sources."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
finetune = pytest.importorskip("finetune")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The benchmark with 20 steps, two of pretraining, and sources of disjoint bytes."""

    def text(name):
        low = 30 * finetune.SOURCES.index(name)
        return {part: torch.randint(low, low + 30, (6000,)) for part in ("train", "valid", "test")}

    monkeypatch.setenv("MIDFLIGHT_CACHE", str(tmp_path))
    for name, value in {"STEPS": 20, "MOMENTS": 4, "PRETRAINING": 2, "TEST": 160, "TRAININGS": 2}.items():
        monkeypatch.setattr(finetune, name, value)
    monkeypatch.setattr(finetune, "text", text)
    monkeypatch.setattr(finetune, "one_thread", lambda: None)
    finetune.pretrained.cache_clear()
    finetune.data.cache_clear()
    yield finetune
    finetune.pretrained.cache_clear()
    finetune.data.cache_clear()


def test_each_arm_runs_and_the_tables_and_the_figure_show_it(tiny, tmp_path):
    found = [tiny.run((200, arm, 0, 0)) for arm in tiny.ARMS]
    untouched, tuned, fixed, searched = found
    assert untouched["start"] == tuned["start"] != fixed["start"]
    assert untouched["end"] == pytest.approx(untouched["start"])
    assert tuned["end"] != pytest.approx(tuned["start"])
    assert searched["trials"] >= 2  # two trainings' worth of steps
    tables = tiny.summary(found)
    assert all(f"| 200 examples | {arm} |" in tables for arm in tiny.ARMS)
    tiny.figure(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


def test_the_search_goes_on_after_a_pruned_trial(tiny, monkeypatch):
    monkeypatch.setattr(finetune.optuna.trial.Trial, "should_prune", lambda trial: True)
    assert tiny.run((200, "TPE", 0, 0))["trials"] == 8  # moments of two trainings, one for each trial


def test_no_example_is_in_two_parts(tiny):
    parts = [{tuple(x.tolist()) for x in part.x} for part in tiny.data(200, 0).values()]
    assert [len(part) for part in parts] == [160, 40, 160]
    assert len(set.union(*parts)) == 360


def test_only_lora_and_the_head_are_trained(tiny):
    training = tiny.Training(200, tiny.start("fixed", 0, 0), 0)
    before = {n: p.clone() for n, p in training.model.named_parameters()}
    for _ in training.steps():
        pass
    moved = {n for n, p in training.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(training.weights)
    assert all("up" in n or "down" in n or n.startswith("head") for n in moved)


def test_lora_adds_a_matrix_of_low_rank():
    layer = nn.Linear(20, 12)
    lora = finetune.LoRA(layer, nn.Identity())
    x = torch.randn(3, 20)
    assert torch.equal(lora(x), layer(x))  # up begins at 0
    nn.init.normal_(lora.up.weight)
    merged = layer.weight + 2 * lora.up.weight @ lora.down.weight  # alpha / rank = 2
    torch.testing.assert_close(lora(x), nn.functional.linear(x, merged, layer.bias), rtol=1e-4, atol=1e-5)
