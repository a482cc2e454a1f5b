"""`tuner.backward(loss, probe)`: the mixed partial from a part of the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight.capture import with_tensors

X, Y = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))


class Recorder(torch.optim.SGD):
    """Moves nothing and keeps the hypergradients."""

    def step(self, closure=None):
        self.seen = [float(p.grad) for p in self.param_groups[0]["params"]]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def smooth(model, space, rows):
    """Nonlinear in one hyperparameter, linear in the other."""
    outputs = model(X[rows] * space["scale"].value)
    return F.cross_entropy(outputs, Y[rows]) + space["penalty"].value * outputs.square().mean()


def linear(model, space, rows):
    losses = F.cross_entropy(model(X[rows]), Y[rows], reduction="none")
    return (
        space["scale"].value * losses.mean()
        + space["penalty"].value * (X[rows] @ model[0].weight.T).square().mean()
    )


def hyper_step(loss, probed, estimator="one_step"):
    """Hypergradients, gradients and model after one hyper-step in the middle of a training."""
    torch.manual_seed(0)
    space = mf.Space(
        scale=mf.Float(0.5, 2.0, init=1.2), penalty=mf.Float(0.0, 1.0, init=0.1), dtype=torch.float64
    )
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=[(X.flip(0), Y)], every=4,
        estimator=estimator, hyper_optimizer=lambda raws: Recorder(raws, lr=1.0),
    )  # fmt: skip
    for _ in range(4):
        optimizer.zero_grad()
        probe = None if probed is None else lambda: loss(model, space, probed)
        tuner.backward(loss(model, space, slice(None)), probe)
        optimizer.step()
    grads = [p.grad for p in model.parameters()]
    return torch.tensor(tuner.hyper_optimizer.seen, dtype=torch.float64), grads, tuner.mixed_partial


@pytest.mark.parametrize("loss", [smooth, linear])
def test_the_whole_batch_as_its_own_probe_changes_nothing(loss):
    plain, grads, _ = hyper_step(loss, None)
    probed, others, _ = hyper_step(loss, slice(None))
    torch.testing.assert_close(probed, plain, rtol=1e-9, atol=0)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("loss", [smooth, linear])
def test_probes_on_the_parts_of_a_batch_average_to_the_hypergradient_of_the_whole(loss):
    plain, grads, _ = hyper_step(loss, None)
    parts = [hyper_step(loss, rows) for rows in (slice(0, 16), slice(16, 32))]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, plain, rtol=1e-9, atol=0)
    assert not torch.allclose(parts[0][0], plain, rtol=1e-3)
    for _, others, _ in parts:  # the training itself sees the whole batch
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(grads, others, strict=True))


def test_with_a_probe_the_mixed_partial_is_chosen_by_its_structure():
    assert hyper_step(smooth, slice(16))[2] == "double backward"
    assert hyper_step(linear, slice(16))[2].startswith("forward over reverse")


def test_estimators_that_evaluate_the_loss_again_take_the_probe():
    difference, _, _ = hyper_step(smooth, slice(16), estimator="central_difference")
    exact, _, _ = hyper_step(smooth, slice(16))
    torch.testing.assert_close(difference, exact, rtol=1e-4, atol=0)


def test_a_module_under_two_names_keeps_its_weights():
    shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 3)).double()
    before = {id(t) for t in [*model.parameters(), *model.buffers()]}
    space = mf.Space(scale=mf.Float(0.5, 2.0), dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = mf.Tuner(model, optimizer, space, validate=cross_entropy, valid_loader=[(X, Y)], every=1)

    def loss():
        return cross_entropy(model, (X * space["scale"].value, Y))

    tuner.backward(loss(), loss)
    assert {id(t) for t in [*model.parameters(), *model.buffers()]} == before
    assert all(p.grad is not None for p in model.parameters())


def test_a_weight_of_two_modules_is_replaced_in_both():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
    model[1].weight = model[0].weight
    ones = with_tensors(model, lambda: model(X).sum(), {"0.weight": torch.ones(6, 6, dtype=torch.float64)})
    torch.testing.assert_close(ones, 36 * X.sum())
    assert model[0].weight is model[1].weight


def test_a_probe_leaves_buffers_and_random_numbers_as_the_loss_alone_would():
    def run(probed):
        torch.manual_seed(0)
        space = mf.Space(noise=mf.Float(0.0, 1.0, init=0.5))
        model = nn.Sequential(
            mf.nn.GaussianNoise(space["noise"]), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = X.float(), Y
        tuner = mf.Tuner(
            model, optimizer, space, validate=cross_entropy, valid_loader=[batch], every=2,
            hyper_optimizer=lambda raws: Recorder(raws, lr=1.0),
        )  # fmt: skip
        for _ in range(4):
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            tuner.backward(loss, (lambda: cross_entropy(model, (batch[0][:8], Y[:8]))) if probed else None)
            optimizer.step()
        return model.state_dict(), torch.get_rng_state(), tuner.hyper_optimizer.seen

    (plain, state, _), (probed, state_too, seen) = run(False), run(True)
    assert torch.equal(state, state_too)
    assert all(torch.allclose(plain[name], probed[name], atol=1e-6) for name in plain)
    assert seen[0] != 0
