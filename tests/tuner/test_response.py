"""The response of the trained weights to weight decay: solved over many hyper-steps, and in a live loop."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight.gradcheck.oracles import derivative
from midflight.hypergrad.problem import Dependence, Step
from midflight.tuner.response import Solution, product_of
from midflight.updates import Update, read_options, rule_for

N = 12


def matrix(least=0.02, seed=0):
    """A symmetric matrix with eigenvalues from `least` to 1, and a vector of its size."""
    torch.manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64))[0]
    a = rotation @ torch.diag(torch.linspace(least, 1.0, N, dtype=torch.float64)) @ rotation.T
    return a, torch.randn(N, dtype=torch.float64)


def solved(a, v, calls=400):
    solution = Solution()
    for _ in range(calls):
        u = solution({"w": v}, lambda u: {"w": a @ u["w"]})["w"]
    return u


@pytest.mark.parametrize("preconditioned", [False, True])
def test_u_solves_the_system_over_many_calls(preconditioned):
    a, v = matrix()
    if preconditioned:  # as under Adam: no longer symmetric
        a = a @ torch.diag(torch.linspace(0.3, 1.0, N, dtype=torch.float64))
    expected = torch.linalg.solve(a, v)
    assert torch.allclose(solved(a, v), expected, rtol=1e-6)
    assert not torch.allclose(v, expected, rtol=0.5)  # the wrong twin: one step alone
    assert not torch.allclose(solved(a, v, calls=5), expected, rtol=1e-2)


@pytest.mark.parametrize("least", [-0.3, float("nan")])
def test_it_stays_finite_along_negative_curvature_and_after_a_product_that_is_not_finite(least):
    a, v = matrix(least if least < 0 else 0.02)
    solution = Solution()
    for n in range(300):
        bad = least != least and n == 50
        u = solution({"w": v}, lambda u, bad=bad: {"w": a @ u["w"] * (torch.nan if bad else 1.0)})["w"]
        assert bool(u.isfinite().all())
        assert float(u.norm()) < 1e3 * float(v.norm())


def test_a_restored_solution_goes_on_as_the_saved_one():
    a, v = matrix()
    saved, restored = Solution(), Solution()
    for _ in range(7):
        saved({"w": v}, lambda u: {"w": a @ u["w"]})
    restored.load_state_dict(copy.deepcopy(saved.state_dict()))
    found = [each({"w": v}, lambda u: {"w": a @ u["w"]})["w"] for each in (saved, restored)]
    assert torch.equal(*found)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.03),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.03),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, weight_decay=0.03),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_product_is_that_of_the_jacobian_of_the_step(name):
    torch.manual_seed(0)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    weight = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)

    def gradient(w):
        return torch.autograd.grad(F.mse_loss(torch.tanh(x @ w.T), y), w, create_graph=True)[0]

    optimizer = OPTIMIZERS[name]([weight])
    for _ in range(3):
        weight.grad = gradient(weight).detach()
        optimizer.step()
    options, state = read_options(optimizer.param_groups[0]), dict(optimizer.state[weight])
    update = Update(rule_for(optimizer), options)
    at = weight.detach()
    step = Step(
        params={"w": at}, grads={"w": gradient(weight).detach()}, state={"w": state}, updates={"w": update},
        hparams={}, values={}, dependence=lambda: Dependence(lambda _: {}),
    )  # fmt: skip

    def curvature(w):
        leaf = at.clone().requires_grad_()
        return {"w": torch.autograd.grad(gradient(leaf), leaf, w["w"])[0]}

    u = torch.randn_like(at)
    leaf = at.clone().requires_grad_()
    new = update.rule.step(leaf, gradient(leaf), state, options)[0]
    expected = u - torch.autograd.grad(new, leaf, u)[0]
    found = product_of(step, curvature, 1.0, {"w": u})["w"]
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)
    undecayed = product_of(
        Step(**{**step.__dict__, "updates": {"w": Update(update.rule, {**options, "weight_decay": 0.0})}}),
        curvature, 1.0, {"w": u},
    )["w"]  # fmt: skip
    assert not torch.allclose(undecayed, expected, rtol=1e-3)  # the wrong twin


class Ridge:
    """A linear model whose trained weights are known for each weight decay."""

    def __init__(self, decay):
        torch.manual_seed(1)
        scales = torch.tensor([3.0, 1.0, 0.5, 0.3], dtype=torch.float64)
        truth = torch.tensor([[0.2, 1.0, 2.0, 3.0]], dtype=torch.float64)
        self.train, self.valid = ((x := torch.randn(n, 4, dtype=torch.float64) * scales,
                                   x @ truth.T + 0.5 * torch.randn(n, 1, dtype=torch.float64))
                                  for n in (20, 40))  # fmt: skip
        self.model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.space = mf.Space(
            {"weight_decay": mf.Float(1e-5, 10.0, log=True, init=decay)}, dtype=torch.float64
        )

    def loss(self, model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    def trained_loss(self, raw):
        """Return C2 of the trained weights, with the weight decay at a raw coordinate."""
        decay = float(self.space["weight_decay"].transform.value(torch.tensor(raw, dtype=torch.float64)))
        x, y = self.train
        a = 2 * x.T @ x / len(x) + decay * torch.eye(4, dtype=torch.float64)
        weights = torch.linalg.solve(a, 2 * x.T @ y / len(x))
        return float(F.mse_loss(self.valid[0] @ weights, self.valid[1]))

    def hypergradient(self, horizon):
        tuner = mf.Tuner(
            self.model, self.optimizer, self.space, self.loss, [self.train], [self.valid], horizon=horizon,
            schedule=3, hyper_optimizer=lambda raws: torch.optim.SGD(raws, lr=1e-30), total_steps=6000,
        )  # fmt: skip
        for _ in range(3000):
            self.optimizer.zero_grad()
            self.loss(self.model, self.train).backward()
            self.optimizer.step()
        return tuner.log()["hypergradient/weight_decay"]


@pytest.mark.parametrize("decay", [0.003, 0.1, 1.0])
def test_the_hypergradient_of_weight_decay_is_that_of_the_trained_weights(decay):
    ridge = Ridge(decay)
    at = float(ridge.space["weight_decay"].raw)
    expected, _ = derivative(lambda h: ridge.trained_loss(at + h))
    assert ridge.hypergradient("run") == pytest.approx(expected, rel=2e-3)
    assert Ridge(decay).hypergradient("step") != pytest.approx(expected, rel=0.5)  # the wrong twin


def network_run(steps, state=None):
    """Tune lr and weight decay of a small network; return the tuner and its parts."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randn(64, 1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    space = mf.Space(lr=mf.Float(1e-4, 1e-1, log=True), weight_decay=mf.Float(1e-4, 1.0, log=True))
    tuner = mf.Tuner(
        model, optimizer, space, lambda m, b: F.mse_loss(m(b[0]), b[1]), [(x[:48], y[:48])],
        [(x[48:], y[48:])], total_steps=200, schedule=5,
    )  # fmt: skip
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        tuner.load_state_dict(state["tuner"])
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x[:48]), y[:48]).backward()
        assert_no_hooks_after(model, tuner)
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "tuner": tuner}


def assert_no_hooks_after(model, tuner):
    """Between hyper-steps no weight may have hooks: they slow down each backward pass."""
    if 1 < tuner.steps % 5 < 4 and tuner.steps > 10:
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_resumed_run_with_weight_decay_is_the_straight_one():
    straight = network_run(120)
    first = {name: copy.deepcopy(part.state_dict()) for name, part in network_run(67).items()}
    resumed = network_run(53, first)
    for a, b in zip(straight["model"].parameters(), resumed["model"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight["tuner"].space.as_dict() == resumed["tuner"].space.as_dict()
