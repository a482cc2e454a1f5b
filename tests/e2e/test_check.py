"""mf.check on a user's own step: right where it is right, and a hint for each usual cause where not."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf

X, Y = torch.randn(40, 8), torch.randint(0, 3, (40,))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def checked(model, space, loss=cross_entropy, optimizer=None, **options):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2)
    data = {"batch": (X, Y), "validate": cross_entropy, "valid_batch": (X, Y)}
    return mf.check(model, loss, optimizer, space, **data, **options)


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
    report = checked(model, s, optimizer=optimizer, bind=["weight_decay"])
    assert report.passed, str(report)
    assert {line.hyperparameter for line in report.lines} == {"weight_decay", "noise"}
    assert "one_step" in str(report)
    assert report.mixed_partial == "double backward"
    after = (model.state_dict(), optimizer.state_dict(), s.as_dict(), torch.get_rng_state())
    assert repr(before) == repr(after)
    assert next(model.parameters()).dtype == torch.float32


def test_estimators_other_than_exact_are_shown_with_their_distance():
    s = space()
    report = checked(network(s), s, bind=["weight_decay"])
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
    assert report.mixed_partial.startswith("forward over reverse")
    assert sum(line.hyperparameter.startswith("w[") for line in report.lines) == 5 * 3


def test_batchnorm_in_training_mode_is_right_and_explained():
    s = space()
    report = checked(network(s, nn.BatchNorm1d(16)), s, bind=["weight_decay"])
    assert report.passed, str(report)
    assert any("BatchNorm" in hint for hint in report.hints)


def test_relu_is_right_and_its_kinks_do_not_fail_the_check():
    s = space()
    report = checked(network(s, nn.ReLU()), s, bind=["weight_decay"])
    assert report.passed, str(report)


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


def test_random_numbers_that_torch_does_not_control_are_found():
    s = space()
    draw = np.random.default_rng(0).uniform
    report = checked(
        network(s), s, lambda model, batch: cross_entropy(model, batch) * draw(), bind=["weight_decay"]
    )
    assert any("numpy" in hint for hint in report.hints)


def test_an_in_place_operation_is_explained():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x.exp()
            y += 1
            return y

    s = space()
    report = checked(network(s, InPlace()), s, bind=["weight_decay"])
    assert not report.passed
    assert any("in-place" in hint for hint in report.hints)


def test_an_operation_that_is_differentiable_once_only_is_explained():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g / ctx.saved_tensors[0].cosh() ** 2

    class Fused(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    s = space()
    report = checked(network(s, Fused()), s, bind=["weight_decay"])
    assert any("differentiable once only" in hint for hint in report.hints)
    report = checked(network(s, Fused()), s, bind=["weight_decay"], estimators=["central_difference"])
    assert all(line.relative_error < 1e-4 for line in report.lines)


def test_eval_mode_is_pointed_out():
    s = space()
    report = checked(network(s).eval(), s, bind=["weight_decay"])
    assert any("model.train()" in hint for hint in report.hints)


def test_bad_bindings_are_refused_as_the_tuner_does():
    s = space()
    with pytest.raises(mf.BindingError):
        checked(network(s), s, bind=["decay"])
