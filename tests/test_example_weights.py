"""Weights of training examples: hypergradients, steps, batches, and what cannot be one."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import midflight as mf
from midflight.errors import SpaceError
from weighted import Dicts, Keeper, WeightedLoop, mean_loss, per_example

SEEN = 12


class Loop(WeightedLoop):
    """A loop on one batch of 12 of 20 examples."""

    def __init__(self, optimizer, clip):
        torch.manual_seed(0)
        weights = mf.ExampleWeights(20)
        space = mf.Space(weights=weights, dtype=torch.float64)
        weights.set(torch.linspace(0.1, 0.9, 20))
        x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,))
        self.index = torch.randperm(20)[:SEEN]
        t2 = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 3, (30,))
        batch = x[self.index], y[self.index], self.index
        super().__init__(weights, space, batch, t2, optimizer, clip)

    def alignments(self):
        """The wrong twin, which forgets the optimiser: -lr <v, gradient of loss_i> / B, v after the step."""
        before = copy.deepcopy((self.model, self.optimizer))
        self.step()
        v = torch.autograd.grad(mean_loss(self.model, self.t2), list(self.model.parameters()))
        self.model, self.optimizer = before
        found = torch.zeros(20, dtype=torch.float64)
        for loss, i in zip(per_example(self.model, *self.batch[:2]), self.index, strict=True):
            grads = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True)
            found[i] = -1e-2 * sum((a * b).sum() for a, b in zip(v, grads, strict=True)) / SEEN
        return found


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_hypergradients_of_the_weights_equal_central_differences(optimizer, clip):
    loop = Loop(optimizer, clip)
    tuner = mf.Tuner(
        loop.model, loop.optimizer, loop.space, loop.loss, [loop.batch], [loop.t2], examples=3,
        valid_loss_fn=mean_loss, schedule=1, horizon="step", hyper_optimizer=Keeper, max_grad_norm=clip,
    )  # fmt: skip
    for _ in range(3):
        loop.step()
    before = copy.deepcopy((loop.model, loop.optimizer))
    loop.step()
    tuner.detach()
    truth = loop.true_hypergradients(before)
    found = tuner.hyper_optimizer.last
    scale = float(truth.abs().max())
    assert torch.allclose(found, truth, rtol=1e-5, atol=1e-7 * scale)  # difference of losses near 1, float64
    loop.model, loop.optimizer = copy.deepcopy(before)
    assert not torch.allclose(loop.alignments(), truth, rtol=0.1, atol=0.1 * scale)


def test_the_whole_batch_is_used_so_that_the_weight_of_each_of_its_examples_moves():
    loop = Loop(torch.optim.Adam, None)
    tuner = mf.Tuner(
        loop.model, loop.optimizer, loop.space, loop.loss, [loop.batch], [loop.t2], examples=3,
        valid_loss_fn=mean_loss, schedule=1, horizon="step", total_steps=10,
    )  # fmt: skip
    before = loop.weights.value.clone()
    loop.step()
    tuner.detach()
    moved = (loop.weights.value != before).nonzero().flatten()
    assert moved.tolist() == loop.index.sort().values.tolist()


def test_a_step_is_longer_the_fewer_of_the_examples_a_batch_has():
    loop = Loop(torch.optim.Adam, None)
    loop.weights.set(torch.full((20,), 0.5))
    tuner = mf.Tuner(
        loop.model, loop.optimizer, loop.space, loop.loss, [loop.batch], [loop.t2],
        valid_loss_fn=mean_loss, schedule=1,
    )  # fmt: skip
    loop.step()
    tuner.detach()
    moved = loop.weights.value[loop.index] - 0.5
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.8 * 0.08 * 20 / SEEN, rel=1e-4)


@pytest.mark.parametrize(
    ("batches", "total", "warns"), [(1, 100, False), (1, 99, True), (4, 399, True), (1, None, False)]
)
def test_a_run_in_which_a_weight_moves_fewer_than_five_times_is_warned_of(batches, total, warns):
    loop = Loop(torch.optim.Adam, None)
    with pytest.warns(UserWarning, match="moves about 4") if warns else nullcontext():
        mf.Tuner(
            loop.model, loop.optimizer, loop.space, loop.loss, [loop.batch] * batches, [loop.t2],
            valid_loss_fn=mean_loss, total_steps=total,
        ).detach()  # fmt: skip


def test_entries_move_by_their_size_over_the_root_mean_square_and_the_others_stay():
    raw = torch.full((4,), 0.5)
    plain, by_size = mf.SignSteps([raw.clone()], lr=0.08), mf.SignSteps([raw], lr=0.08)
    by_size.move_by_size([raw])
    (other,) = plain.param_groups[0]["params"]
    first, second = torch.tensor([0.0, 1e-9, -7e-9, 0.0]), torch.tensor([1.0, 0.0, 0.0, 100.0])
    raw.grad, other.grad = first, first
    by_size.step()
    plain.step()
    assert raw.tolist() == pytest.approx([0.5, 0.4872, 0.5896, 0.5])  # root mean square 5e-9
    before, before_twin = raw.clone(), other.clone()
    raw.grad, other.grad = second, second
    by_size.step()
    plain.step()
    assert torch.equal(raw[1:3], before[1:3])
    assert not torch.equal(other[1:3], before_twin[1:3])  # the wrong twin: momentum moves them


def test_no_entry_moves_if_none_has_a_hypergradient():
    raw = torch.full((3,), 0.5)
    steps = mf.SignSteps([raw])
    steps.move_by_size([raw])
    raw.grad = torch.zeros(3)
    steps.step()
    assert torch.equal(raw, torch.full((3,), 0.5))


def test_the_loss_is_the_mean_of_weighted_losses_over_the_batch():
    weights = mf.ExampleWeights(4)
    weights.set([0.0, 0.5, 1.0, 0.25])
    index = torch.tensor([3, 1])
    assert float(weights.loss(torch.tensor([4.0, 2.0]), index)) == pytest.approx(1.0)
    assert float(weights.loss(torch.tensor([[3.0, 5.0], [2.0, 2.0]]), index)) == pytest.approx(1.0)
    assert weights.lowest(2).tolist() == [0, 3]


def test_a_loader_says_which_examples_a_batch_has():
    x = torch.arange(10.0)
    for batch in mf.ExampleWeights(10).loader(TensorDataset(x, x), 4):
        assert torch.equal(batch[0], x[batch[2]])
    (batch,) = mf.ExampleWeights(5).loader(Dicts(), 5, shuffle=False)
    assert batch["index"].tolist() == [0, 1, 2, 3, 4]


def test_a_run_finds_wrong_labels_and_trains_no_worse_than_without():
    """Three classes, half of the labels wrong; the tuner has its defaults."""

    def train(tune):
        torch.manual_seed(0)
        x = torch.randn(600, 10)
        clean = x[:, :3].argmax(1)
        wrong = torch.rand(300) < 0.5
        y = torch.where(wrong, (clean[:300] + torch.randint(1, 3, (300,))) % 3, clean[:300])
        weights = mf.ExampleWeights(300)
        data = TensorDataset(x[:300], y)
        t2 = [(x[300:400], clean[300:400])]
        model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        loader = weights.loader(data, 20)

        def loss_fn(model, batch):
            return weights.loss(per_example(model, *batch[:2]), batch[2])

        if tune:
            tuner = mf.Tuner(
                model, optimizer, mf.Space(weights=weights), loss_fn, weights.loader(data, 300), t2,
                valid_loss_fn=mean_loss, total_steps=450,
            )  # fmt: skip
        for _ in range(30):
            for batch in loader:
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
        if tune:
            tuner.finish()
        k = int(wrong.sum())
        found = float(wrong[weights.lowest(k)].float().mean())
        return found, float(mean_loss(model.eval(), (x[400:], clean[400:])).detach())

    (_, untuned), (precision, tuned) = train(False), train(True)
    assert precision > 0.7  # 0.5 by chance
    assert tuned < untuned


def test_a_million_weights_are_saved_and_resumed():
    weights = mf.ExampleWeights(10**6)
    space = mf.Space(weights=weights)
    weights.set(torch.linspace(0, 1, 10**6))
    other = mf.Space(weights=mf.ExampleWeights(10**6))
    other.load_state_dict(space.state_dict())
    assert torch.equal(other["weights"].value, weights.value)


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3"])
def test_the_number_of_examples_must_be_a_whole_number(n):
    with pytest.raises(SpaceError, match="whole number"):
        mf.ExampleWeights(n)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda w: w.loss(torch.tensor(1.0), torch.tensor([0])), "one entry for each"),
        (lambda w: w.loss(torch.ones(2), torch.tensor([0])), "one entry for each"),
        (lambda w: w.loader(TensorDataset(torch.ones(3)), 2), "one example for each of 2"),
    ],
)
def test_weights_refuse_other_data_than_their_examples(call, said):
    with pytest.raises(ValueError, match=said):
        call(mf.ExampleWeights(2))
