"""A script as people have it, examples/train_gpt.py: its loop does not know that it is being tuned."""

import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/train_gpt.py"


def test_the_loop_has_no_word_of_the_tuner():
    text = SCRIPT.read_text()
    loop = text[text.index("--- the loop, unchanged ---") : text.index("--- the loop ends ---")]
    assert "optimizer.step()" in loop
    assert "clip_grad_norm_" in loop
    assert 'param_group["lr"] = lr' in loop
    assert not {"tuner", "midflight", "mf.", "space", "loss_fn"} & set(loop.replace("(", " ").split())
    assert not any(word in loop for word in ("tuner", "mf.", "space[", "args.tune"))


def test_flash_attention_compiled_groups_schedule_accumulation_clipping_and_autocast_are_tuned(
    monkeypatch, capsys
):
    options = ["--tune", "--steps", "8", "--backend", "aot_eager", "--dtype", "bfloat16"]
    text, two_blocks = SCRIPT.read_text(), "n_embd, n_head, n_layer = 64, 8, 64, 4, 2\n"
    assert two_blocks in text
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    exec(compile(text.replace(two_blocks, two_blocks.replace("2\n", "1\n")), SCRIPT, "exec"), {})
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["hypersteps"] >= 1
    assert found["undecided"] == found["skipped"] == 0
    assert found["mixed_partial/double_backward"] == 1  # on plain attention, while the loop has the fused one
    for name in ("weight_decay", "dropout"):  # in so few steps nothing was learnt, so neither rises
        assert found[f"hypergradient/{name}"] != 0
        assert found[name] <= 0.1 * (1 + 1e-6)
    assert found["lr"] != pytest.approx(1e-3)
