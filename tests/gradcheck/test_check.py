"""mf.check on a user's own step: right where it is right, and a hint for each usual cause where not."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf
from once_only import Fused

X, Y = torch.randn(40, 8), torch.randint(0, 3, (40,))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def checked(model, space, loss=cross_entropy, optimizer=None, **options):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2)
    usual = {"batch": (X, Y), "valid_batch": (X, Y), "valid_loss_fn": cross_entropy}
    return mf.check(model, optimizer, space, loss, **{**usual, **options})


def space():
    return mf.Space(
        weight_decay=mf.Float(1e-5, 1e-1, log=True, init=1e-2),
        noise=mf.Float(0.0, 0.8, init=0.3),
    )


def network(s, *middle):
    return nn.Sequential(
        mf.nn.GaussianNoise(s["noise"]), nn.Linear(8, 16), *middle, nn.Tanh(), nn.Linear(16, 3)
    )


def test_a_sound_model_passes_and_nothing_is_changed():
    s = space()
    model = network(s, nn.Dropout(0.2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), s.as_dict(), torch.get_rng_state()))
    report = checked(model, s, optimizer=optimizer)
    assert report.passed, str(report)
    assert {line.hyperparameter for line in report.lines} == {"weight_decay", "noise"}
    assert "one_step" in str(report)
    assert report.mixed_partial == "double backward"
    after = (model.state_dict(), optimizer.state_dict(), s.as_dict(), torch.get_rng_state())
    assert repr(before) == repr(after)
    assert next(model.parameters()).dtype == torch.float32


def test_estimators_other_than_exact_are_shown_with_their_distance():
    s = space()
    report = checked(network(s), s)
    off = [line for line in report.lines if line.estimator == "t1t2"]
    assert all(line.passed is None and line.relative_error > 0.1 for line in off)


def test_it_says_which_mixed_partial_is_used():
    s = mf.Space(l1=mf.Float(0.0, 0.1), w=mf.Float(0.0, 1.0, shape=(40,)))
    model = nn.Linear(8, 3)

    def loss(model, batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (s["w"] * losses).mean() + s["l1"] * model.weight.abs().sum()

    report = checked(model, s, loss)
    assert report.passed, str(report)
    assert report.mixed_partial.startswith("forward mode")
    assert sum(line.hyperparameter.startswith("w[") for line in report.lines) == 5 * 3


def test_batchnorm_in_training_mode_is_right_and_explained():
    s = space()
    report = checked(network(s, nn.BatchNorm1d(16)), s)
    assert report.passed, str(report)
    assert any("holds its running statistics still" in hint for hint in report.hints)


def test_a_step_that_moves_nothing_is_pointed_out():
    s = space()
    model = network(s)
    report = checked(model, s, optimizer=torch.optim.Adam(model.parameters(), lr=0.0))
    assert any("nothing moves at lr 0" in hint for hint in report.hints)


def test_relu_is_right_and_its_kinks_do_not_fail_the_check():
    s = space()
    report = checked(network(s, nn.ReLU()), s)
    assert report.passed, str(report)


@pytest.mark.parametrize("spec", [mf.default_range("dropout", init=0.3), mf.Float(0.0, 0.8, init=0.0)])
def test_dropout_is_compared_with_its_own_relaxation(spec):
    """The same masks whatever the rate: the function whose derivative the layer gives, written out here."""
    s = mf.Space(drop=spec)
    layers = nn.Linear(8, 16), nn.Tanh(), mf.nn.Dropout(s["drop"]), nn.Linear(16, 3)
    model, rng = nn.Sequential(*layers), torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = checked(model, s, optimizer=optimizer, estimators=["one_step"])
    assert report.passed, str(report)
    assert report.lines[0].truth != 0
    assert torch.equal(rng, torch.get_rng_state())
    assert layers[2](X).count_nonzero() < X.numel()  # it draws again


def test_a_layer_that_draws_anew_in_the_loss_is_compared_too():
    s = mf.Space(drop=mf.default_range("dropout", init=0.3))
    drop, model = mf.nn.Dropout(lambda: s["drop"].value), nn.Linear(8, 3)

    def loss(model, batch):
        return F.cross_entropy(model(drop(batch[0])), batch[1])

    report = checked(model, s, loss)
    assert report.passed, str(report)


def test_attention_is_compared_although_its_fused_kernels_are_differentiable_once_only():
    s = space()
    attend = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=F.gelu, batch_first=True)
    model = nn.Sequential(mf.nn.GaussianNoise(s["noise"]), nn.Unflatten(1, (1, 8)), attend, nn.Flatten())
    report = checked(model, s, estimators=["one_step"])
    assert report.passed, str(report)


def test_numbers_from_numpy_and_random_are_the_same_at_each_evaluation():
    s = space()

    def loss(model, batch):
        return cross_entropy(model, batch) * (np.random.rand() + random.random())

    before = np.random.get_state()[1].tolist(), random.getstate()
    report = checked(network(s), s, loss)
    assert report.passed, str(report)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


def test_estimators_with_settings_of_their_own_are_told_apart():
    s = space()
    estimators = [
        mf.hypergrad.Unrolled(steps=1),
        mf.hypergrad.Unrolled(steps=2),
        mf.hypergrad.ESTIMATORS["one_step"],
    ]
    report = checked(network(s), s, estimators=estimators)
    lines = {line.estimator: line for line in report.lines if line.hyperparameter == "noise"}
    assert list(lines) == ["Unrolled(steps=1)", "Unrolled(steps=2)", "one_step"]
    assert lines["Unrolled(steps=1)"].estimate == pytest.approx(lines["one_step"].estimate, rel=1e-9)
    assert lines["Unrolled(steps=2)"].estimate != pytest.approx(lines["one_step"].estimate, rel=1e-2)
    assert lines["one_step"].passed


def test_the_optimisers_keep_no_hook():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    hooks = {name: dict(x) for name, x in vars(optimizer).items() if "hook" in name}
    checked(model, s, optimizer=optimizer)
    assert {name: dict(x) for name, x in vars(optimizer).items() if "hook" in name} == hooks


def test_an_unused_hyperparameter_is_named():
    s = mf.Space(noise=mf.Float(0.0, 0.8, init=0.3), forgotten=mf.Float(0, 1))
    report = checked(network(s), s)
    assert not report.passed
    assert any("forgotten" in hint and "did not" in hint for hint in report.hints)


def test_a_gradient_that_is_cut_is_found():
    s = mf.Space(noise=mf.Float(0.0, 0.8, init=0.3), scale=mf.Float(0.5, 2.0))
    model = network(s)

    def loss(model, batch):
        half_cut = 0.5 * s["scale"] + 0.5 * s["scale"].value.detach()
        return half_cut * cross_entropy(model, batch)

    # plain SGD: under Adam a factor on the loss has next to no effect
    report = checked(model, s, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert {line.hyperparameter for line in report.lines if line.passed is False} == {"scale"}
    assert any("cut" in hint for hint in report.hints)


def test_a_step_without_derivative_is_found():
    s = mf.Space(scale=mf.Float(0.5, 2.0))
    model = nn.Linear(8, 3)
    report = checked(model, s, lambda model, batch: float(s["scale"]) * cross_entropy(model, batch))
    assert not report.passed
    assert any("float()" in hint for hint in report.hints)


def test_random_numbers_that_nobody_controls_are_found():
    s = space()
    draw = np.random.default_rng(0).uniform
    report = checked(network(s), s, lambda model, batch: cross_entropy(model, batch) * draw())
    assert any("numpy" in hint for hint in report.hints)


def test_an_in_place_operation_is_explained():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x.exp()
            y += 1
            return y

    s = space()
    report = checked(network(s, InPlace()), s)
    assert not report.passed
    assert any("in-place" in hint for hint in report.hints)


def test_an_operation_that_is_differentiable_once_only_is_explained():
    s = space()
    report = checked(network(s, Fused()), s)
    assert any("differentiable once only" in hint for hint in report.hints)
    assert report.mixed_partial.startswith("difference")
    report = checked(network(s, Fused()), s, estimators=["central_difference"])
    assert report.passed, str(report)
    assert all(0 < line.relative_error < 1e-4 for line in report.lines)


def test_eval_mode_is_pointed_out():
    s = space()
    report = checked(network(s).eval(), s)
    assert any("model.train()" in hint for hint in report.hints)


def test_bad_bindings_are_refused_as_the_tuner_does():
    s = space()
    with pytest.raises(mf.errors.BindingError):
        checked(network(s), s, bind=["decay"])


def test_exchanged_arguments_and_a_loader_for_a_batch_are_refused_in_a_sentence():
    model, s = nn.Linear(8, 3), mf.Space(weight_decay=mf.Float(1e-5, 1e-1, log=True))
    with pytest.raises(TypeError, match=r"loss_fn must be a function of \(model, batch\)"):
        checked(model, s, loss=(X, Y))
    with pytest.raises(TypeError, match=r"batch must be one batch.*next\(iter\(loader\)\)"):
        checked(model, s, batch=DataLoader(TensorDataset(X, Y)))


class Descent(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


class DescentRule(mf.updates.UpdateRule):
    tunable = frozenset({"lr"})
    factor = 1.0

    def step(self, param, grad, state, options):
        return param - self.factor * options["lr"] * grad, {}


def checked_with(make, stepped=False):
    model = nn.Linear(8, 3)
    space = mf.Space(lr=mf.Float(1e-3, 1.0, log=True, init=0.1))
    optimizer = make(model.parameters())
    if stepped:
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return checked(model, space, optimizer=optimizer, estimators=["one_step"])


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (2.0, False), (-1.0, False)])
def test_a_rule_of_the_user_is_compared_with_the_optimiser_itself(monkeypatch, factor, passes):
    monkeypatch.setattr(DescentRule, "factor", factor)
    monkeypatch.setitem(mf.updates.RULES, Descent, DescentRule())
    report = checked_with(Descent)
    assert report.passed == passes
    assert any("must give the step of Descent" in hint for hint in report.hints) != passes


class Heavy(Descent):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", p.grad.clone())
                p.sub_(group["lr"] * m)
                m.mul_(0.9).add_(p.grad)


class HeavyRule(mf.updates.UpdateRule):
    tunable = frozenset({"lr"})
    kept, first = 0.9, 1.0

    def step(self, param, grad, state, options):
        m = state.get("m", self.first * grad)
        return param - options["lr"] * m, {"m": self.kept * m + grad}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [({}, None), ({"kept": 0.8}, "from the state that it returned"), ({"first": 0.5}, "at its first step")],
)
def test_the_state_that_a_rule_of_the_user_returns_is_compared_too(monkeypatch, wrong, said, stepped):
    for name, value in wrong.items():
        monkeypatch.setattr(HeavyRule, name, value)
    monkeypatch.setitem(mf.updates.RULES, Heavy, HeavyRule())
    if stepped and "first" in wrong:
        said = None  # the first step is over
    report = checked_with(Heavy, stepped)
    assert report.passed == (said is None)
    assert any((said or "must give") in hint for hint in report.hints) == (said is not None)


class WithClosure(Descent):
    def step(self, closure=None):
        closure()


def test_a_rule_is_not_passed_if_the_optimiser_cannot_step_on_copies(monkeypatch):
    monkeypatch.setitem(mf.updates.RULES, WithClosure, DescentRule())
    report = checked_with(WithClosure)
    assert not report.passed
    assert any("without a closure, but that failed: TypeError" in hint for hint in report.hints)
