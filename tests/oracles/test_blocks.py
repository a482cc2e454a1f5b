"""Weights in blocks, cut and joined, against each weight by itself."""

import pytest
import torch

from midflight import updates
from midflight._tensors import unalias
from midflight.gradcheck import OPTIMIZERS
from midflight.updates import Update, blocks, read_options, rule_for, step_ahead, step_pullback

SHAPES = {
    "a": (3, 2),
    "large": (9, 5),
    "b": (4,),
    "c": (2, 2),
    "d": (5,),
    "exact": (7, 2),
    "number": (),
    "none": (0, 2),
}
NAMES = [name for name in OPTIMIZERS if name != "Muon"]  # takes matrices only, and is not elementwise


class Weights:
    """Some weights of an optimiser in the middle of training; the last ones belong to a second group."""

    def __init__(self, name, monkeypatch, dtype=torch.float64):
        monkeypatch.setattr(blocks, "BLOCK", 14)
        torch.manual_seed(0)
        # torch's Adafactor divides by the number of entries
        shapes = {n: s for n, s in SHAPES.items() if name != "Adafactor" or 0 not in s}
        self.params = {n: torch.randn(s, dtype=dtype) for n, s in shapes.items()}
        self.params["turned"] = torch.randn(6, 8, dtype=dtype).t()
        names = list(self.params)
        groups = names[:3], names[3:]
        optimizer = OPTIMIZERS[name]([{"params": [self.params[n] for n in group]} for group in groups])
        for _ in range(3):
            self.draw()
            for n, p in self.params.items():
                p.grad = self.grads[n] if n != "a" else None  # a has no state yet
            optimizer.step()
        self.draw()
        self.states = {n: optimizer.state.get(p, {}) for n, p in self.params.items()}
        self.options = [read_options(group) for group in optimizer.param_groups]
        self.rule = rule_for(optimizer)
        self.groups = groups

    def draw(self):
        self.grads = {n: torch.randn_like(p) for n, p in self.params.items()}

    @property
    def updates(self):
        made = [Update(self.rule, options) for options in self.options]
        return {n: update for update, group in zip(made, self.groups, strict=True) for n in group}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_blocks_is_the_step_of_each_weight(name, monkeypatch):
    w = Weights(name, monkeypatch)
    found = step_ahead(w.params, w.grads, w.states, w.updates)
    assert list(found) == list(w.params)
    for n, u in w.updates.items():
        alone = u.rule.step(w.params[n], w.grads[n], w.states[n], u.options)[0]
        torch.testing.assert_close(found[n], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_pullback_in_blocks_is_the_pullback_of_each_weight(name, monkeypatch):
    w = Weights(name, monkeypatch)
    for options in w.options:
        options["weight_decay"] = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    v = {n: torch.randn_like(p) for n, p in w.params.items()}
    used_up = {n: t.clone() for n, t in v.items()}
    found, pairs = step_pullback(used_up, w.params, w.grads, w.states, w.updates)
    assert (found["large"] is used_up["large"]) == w.rule.elementwise
    derivatives = {id(option): derivative for option, derivative in pairs}
    sums = dict.fromkeys(derivatives, 0.0)
    for n, u in w.updates.items():
        alone, tuned = updates.UpdateRule.pullback(
            u.rule, v[n], w.params[n], w.grads[n], w.states[n], u.options
        )
        torch.testing.assert_close(found[n], alone, rtol=1e-9, atol=1e-12)
        sums[id(u.options["weight_decay"])] += float(tuned["weight_decay"])
    assert len(sums) == 2
    for key, total in sums.items():
        assert float(derivatives[key]) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "SGD momentum"])
def test_what_acts_like_the_loss_is_differentiated_at_the_blended_gradient_and_the_rest_at_the_steps_own(
    name, monkeypatch
):
    w = Weights(next(n for n in NAMES if n.startswith(name)), monkeypatch)
    for options in w.options:
        for option, value in (("weight_decay", 0.1), ("lr", 0.01)):
            options[option] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    v, others = ({n: torch.randn_like(p) for n, p in w.params.items()} for _ in range(2))
    copies = {n: t.clone() for n, t in v.items()}
    found, pairs = step_pullback(copies, w.params, w.grads, w.states, w.updates, others, 0.3)
    expected = {id(option): 0.0 for option, _ in pairs}
    for n, u in w.updates.items():
        blended = 0.7 * w.grads[n] + 0.3 * others[n]
        for grad, options in ((blended, {"weight_decay"}), (w.grads[n], {"lr"})):
            alone, tuned = updates.UpdateRule.pullback(
                u.rule, v[n], w.params[n], grad, w.states[n], u.options
            )
            if grad is blended:
                torch.testing.assert_close(found[n], alone, rtol=1e-9, atol=1e-12)
            for option in options:
                expected[id(u.options[option])] += float(tuned[option])
    assert len(expected) == 4
    for option, derivative in pairs:
        assert float(derivative) == pytest.approx(expected[id(option)], rel=1e-9)


def test_gradients_that_share_memory_are_pulled_back_as_others_are(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 14)
    whole = torch.randn(10, 5, dtype=torch.float64)
    v = {"a": whole, "b": whole, "c": whole[1:], "d": torch.ones(()).double().expand(9, 5)}
    expected = {n: -0.1 * t for n, t in v.items()}
    params = {n: torch.randn(t.shape, dtype=t.dtype) for n, t in v.items()}
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    of_all = dict.fromkeys(v, Update(rule_for(optimizer), read_options(optimizer.param_groups[0])))
    found, _ = step_pullback(v, params, params, {n: {} for n in v}, of_all)
    for n, w in expected.items():
        torch.testing.assert_close(found[n], w)


def test_unaliased_entries_can_be_written_in_place_one_by_one():
    whole = torch.zeros(4, 3)
    tree = {"a": whole, "b": whole[1:], "repeated": torch.zeros(()).expand(5), "own": torch.zeros(2)}
    found = unalias(tree)
    for n, t in enumerate(found.values(), 1):
        t.add_(n)
    assert [t.unique().tolist() for t in found.values()] == [[1.0], [2.0], [3.0], [4.0]]
    assert found["own"] is tree["own"]
    assert not whole.any()


def test_no_block_is_longer_than_it_may_be(monkeypatch):
    w = Weights("Adam", monkeypatch)
    found = list(blocks.blocks(w.params, w.states, w.updates))
    assert sum(block.of(w.params).numel() for block in found) == sum(p.numel() for p in w.params.values())
    assert max(block.of(w.params).numel() for block in found) < 2 * blocks.BLOCK
    assert any(len(block.names) > 1 for block in found)


def test_what_does_not_lie_alike_is_not_cut_for_each_piece_would_copy_all_of_it(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    p, g = torch.randn(6, 4), torch.randn(4, 6).T
    optimizer = torch.optim.SGD([p], lr=0.1)
    w = {"w": updates.Update(updates.rule_for(optimizer), updates.read_options(optimizer.param_groups[0]))}
    assert len(list(blocks.blocks({"w": p}, {"w": {}}, w, {"w": p}))) == 3
    assert len(list(blocks.blocks({"w": p}, {"w": {}}, w, {"w": g}))) == 1
    assert len(list(blocks.blocks({"w": p}, {"w": {"momentum_buffer": g}}, w))) == 1
    assert len(list(blocks.blocks({"w": g}, {"w": {"momentum_buffer": g}}, w, {"w": g}))) == 3
    gaps = torch.randn(6, 8)[:, :4]
    assert len(list(blocks.blocks({"w": gaps}, {"w": {}}, w, {"w": gaps}))) == 1
    for param in (p, g, gaps):
        torch.testing.assert_close(step_ahead({"w": param}, {"w": g}, {"w": {}}, w)["w"], param - 0.1 * g)
