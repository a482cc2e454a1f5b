"""Where the tuner judges a step, and the two regimes that the averaged horizon tells apart."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Recorder, cross_entropy, network, space, train, tuner

import midflight as mf
from midflight.gradcheck.oracles import derivative
from midflight.tuner.horizon import (
    GAIN,
    LAST_WINDOW,
    MEMORISED,
    MOST,
    OPEN_END,
    SAMPLED,
    SAMPLES,
    STEADY,
    WINDOW,
    Averaged,
)
from midflight.updates import rule_for


@pytest.mark.parametrize(
    ("c1", "c2", "extrapolation"), [(0.0, 1.0, MOST), (1.0, 1.0, 0.0), (0.4, 1.0, GAIN * (OPEN_END - 0.4))]
)
def test_extrapolation_rises_as_the_training_loss_falls_below_the_validation_loss(c1, c2, extrapolation):
    horizon = Averaged()
    horizon.observe(c1, c2, None)
    assert horizon.extrapolation == pytest.approx(extrapolation)


def test_the_line_falls_from_1_to_memorised_over_the_run():
    horizon, extrapolations = Averaged(), []
    for n in range(101):
        horizon.observe(MEMORISED + 0.05, 1.0, n / 100)
        extrapolations.append(horizon.extrapolation)
    assert extrapolations[0] == MOST
    assert extrapolations[-1] == 0.0
    assert extrapolations == sorted(extrapolations, reverse=True)


def test_caution_follows_recent_losses_only():
    horizon = Averaged()
    for c1 in [0.0] * 85 + [1.0] * 16:
        horizon.observe(c1, 1.0, None)
    assert horizon.extrapolation == 0.0


def test_losses_that_have_no_ratio_leave_the_caution_as_it_is():
    horizon = Averaged()
    horizon.extrapolation = 0.7
    horizon.observe(1.0, -1.0, None)
    assert horizon.extrapolation == 0.7


def test_a_restored_horizon_judges_and_goes_on_as_the_saved_one():
    saved, restored, w = Averaged(), Averaged(), {"w": torch.ones(3)}
    for n in range(100):
        saved.follow({"w": torch.full((3,), float(n))}, 5 * n)
        saved.observe(0.5, 1.0 + abs(n - 50), 0.5)
        saved.smoothed({"h": torch.tensor(float(n))})
    restored.load_state_dict(saved.state_dict())
    for each in (saved, restored):
        each.extrapolation = 0.3
    assert torch.equal(saved.valid_at(w, dict)["w"], restored.valid_at(w, dict)["w"])
    found = [each.smoothed({"h": torch.tensor(1.0)})["h"] for each in (saved, restored)]
    assert torch.equal(*found)
    assert found[0] > 2.0
    assert torch.equal(saved.best["w"], restored.best["w"])
    for each in (saved, restored):
        each.follow(w, 600)
        each.observe(0.5, 2.0, 0.5)
    assert saved.extrapolation == restored.extrapolation > 0
    assert torch.equal(saved.valid_at(w, dict)["w"], restored.valid_at(w, dict)["w"])
    assert torch.equal(saved.best["w"], restored.best["w"])


def test_a_restored_horizon_gives_averages_in_the_types_of_the_weights_before_it_has_seen_any():
    saved, restored = Averaged(), Averaged()
    saved.follow({"w": torch.ones(3, dtype=torch.bfloat16)}, 5)
    restored.load_state_dict(saved.state_dict())
    assert restored.average()["w"].dtype == torch.bfloat16


def test_the_average_reaches_back_over_a_share_of_the_run_also_in_bfloat16():
    horizon, expected = Averaged(), 1.0
    for n in range(1, 101):
        if n > 1:
            expected += min(1.0, 1 / (WINDOW * n)) * (n - expected)
        horizon.follow({"w": torch.full((3,), float(n), dtype=torch.bfloat16)}, SAMPLED * n)
    average = horizon.average()["w"]
    assert average.dtype == torch.bfloat16
    assert average.float() == pytest.approx(torch.full((3,), expected), rel=1e-2)
    exact = Averaged()
    for n in range(1, 101):
        assert exact.follow({"w": torch.full((3,), float(n), dtype=torch.float64)}, SAMPLED * n)
        not_yet = {"w": torch.full((3,), 1e9, dtype=torch.float64)}
        assert not exact.follow(not_yet, SAMPLED * n + 1)
    assert exact.average()["w"].tolist() == pytest.approx([expected] * 3, rel=1e-12)


@pytest.mark.parametrize(
    ("progress", "window"),
    [(None, WINDOW), (0.0, WINDOW), (0.8, WINDOW), (0.9, (WINDOW + LAST_WINDOW) / 2), (1.0, LAST_WINDOW)],
)
def test_towards_the_end_of_a_run_the_average_is_shortened(progress, window):
    horizon = Averaged()
    horizon.follow({"w": torch.zeros(3)}, 990, progress)
    horizon.follow({"w": torch.ones(3)}, 1000, progress)
    assert horizon.average()["w"].tolist() == pytest.approx([10 / (window * 1000)] * 3)


def test_a_long_average_is_sampled_more_rarely():
    horizon = Averaged()
    sampled = [n for n in range(1, 10_001) if horizon.follow({"w": torch.zeros(1)}, n)]
    gaps = [(n, later - n) for n, later in pairwise(sampled)]
    assert {gap for n, gap in gaps if n < 450} == {SAMPLED}
    assert all(gap == pytest.approx(WINDOW * n / SAMPLES, abs=1 + 0.02 * gap) for n, gap in gaps if n > 1000)


def decay_space(**more):
    return mf.Space({"weight_decay": mf.Float(1e-4, 1e-1, log=True, init=1e-2), **more})


def test_the_tuner_tells_the_horizon_how_much_of_the_run_is_over(monkeypatch):
    told = []
    monkeypatch.setattr(Averaged, "follow", lambda self, params, steps, progress: told.append(progress))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner(model, optimizer, decay_space(), horizon="run", schedule=10, total_steps=4)
    train(model, optimizer, 4)
    with pytest.warns(UserWarning, match="total_steps"):
        train(model, optimizer, 1)
    assert told == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("extrapolation", "kept"), [(0.0, STEADY), (0.5, STEADY / 2), (1.0, 0.0), (3.0, 0.0)]
)
def test_the_higher_the_extrapolation_the_less_v_is_averaged(extrapolation, kept):
    horizon = Averaged()
    horizon.extrapolation = extrapolation
    for n in range(1, 5):
        found = horizon.smoothed({"h": torch.full((2,), float(n), dtype=torch.float64)})["h"]
    weights = [kept ** (4 - n) for n in range(1, 5)]
    expected = sum(n * w for n, w in zip(range(1, 5), weights, strict=True)) / sum(weights)
    assert found.tolist() == pytest.approx([expected] * 2)
    assert horizon.smoothed({"other": torch.ones(1)}).keys() == {"other"}


def test_the_average_with_the_least_validation_loss_is_kept():
    horizon = Averaged()
    for n, c2 in enumerate([3.0, 1.0, 2.0, 5.0]):
        horizon.forget()
        horizon.follow({"w": torch.full((2,), float(n))}, n)
        horizon.observe(1.0, c2, None, {"b": torch.tensor([-1.0 * n])})
    assert horizon.best["w"].tolist() == [1.0, 1.0]
    assert horizon.best["b"].tolist() == [-1.0]


@pytest.fixture
def in_float64():
    """(training batch, validation batch, smooth network) in float64."""
    torch.manual_seed(0)
    train_batch, valid_batch = (
        (torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))) for _ in range(2)
    )
    return train_batch, valid_batch, nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("estimator", ["one_step_cheap", "one_step"])
@pytest.mark.parametrize("extrapolation", [0.0, 0.3, 1.0, 3.0])
def test_the_hypergradient_is_the_step_s_pullback_of_v_at_the_judged_weights(
    extrapolation, estimator, monkeypatch, in_float64
):
    """<v(average + extrapolation (theta - average)), theta'(h)> differentiated centrally, v held fixed."""
    batch, (xv, yv), model = in_float64
    space = mf.Space({"weight_decay": mf.Float(1e-4, 1e-1, log=True, init=1e-2)}, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    t = tuner(
        model, optimizer, space, train_loader=[batch], valid_loader=[(xv, yv)], horizon="run",
        hyper_optimizer=Recorder, estimator=estimator,
    )  # fmt: skip
    train(model, optimizer, 60, batch)  # the average and the weights part
    monkeypatch.setattr(Averaged, "observe", lambda self, *_: None)
    monkeypatch.setattr(Averaged, "smoothed", lambda self, v: v)  # has a test of its own
    t.horizon.extrapolation = extrapolation

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    options = dict(optimizer.param_groups[0], beta1=0.9, beta2=0.999)
    rule = rule_for(optimizer)

    def after(raw):
        value = float(space["weight_decay"].transform.value(torch.tensor(raw, dtype=torch.float64)))
        now = {**options, "weight_decay": value}
        return {n: rule.step(before[n], grads[n], state[n], now)[0] for n in before}

    raw = float(space["weight_decay"].raw)
    average = t.horizon.average()
    judged = {n: (average[n] + extrapolation * (p - average[n])).requires_grad_() for n, p in before.items()}
    loss = F.cross_entropy(torch.func.functional_call(model, judged, (xv,)), yv)
    v = dict(zip(judged, torch.autograd.grad(loss, list(judged.values())), strict=True))
    truth, _ = derivative(lambda shift: float(sum((v[n] * p).sum() for n, p in after(raw + shift).items())))
    optimizer.step()
    assert float(t.hyper_optimizer.seen[-1][0]) == pytest.approx(truth, rel=1e-6)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), after(raw)[n])


@pytest.mark.parametrize(("extrapolation", "agreement"), [(0.0, 0.2), (0.4, 0.12), (2.0, 0.0)])
def test_under_extrapolation_steps_wait_less_for_agreement(extrapolation, agreement, monkeypatch):
    monkeypatch.setattr(Averaged, "observe", lambda self, *_: setattr(self, "extrapolation", extrapolation))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    t = tuner(
        model, optimizer, decay_space(), horizon="run",
        hyper_optimizer=lambda raws: mf.SignSteps(raws, agreement=0.2),
    )  # fmt: skip
    train(model, optimizer, 2)
    assert t.hyper_optimizer.param_groups[0]["agreement"] == pytest.approx(agreement)


@pytest.mark.parametrize(
    ("option", "log_length"), [("lr", math.log), ("momentum", lambda x: -math.log(1 - x))]
)
def test_the_length_of_steps_is_judged_along_the_way_from_the_average(in_float64, option, log_length):
    batch, (xv, yv), layers = in_float64
    space = mf.Space(
        {
            "lr": mf.Float(1e-4, 1e-1, log=True, init=1e-2),
            "momentum": mf.Float(0.5, 0.99, logit=True, init=0.8),
            "noise": mf.Float(0.0, 1.0, init=0.2),
        },
        dtype=torch.float64,
    )
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), *layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.8)
    t = tuner(
        model, optimizer, space, train_loader=[batch], valid_loader=[(xv, yv)], horizon="run",
        hyper_optimizer=Recorder, total_steps=40,
    )  # fmt: skip
    train(model, optimizer, 19, batch)
    raw, transform = float(space[option].raw), space[option].transform
    count = len(t.hyper_optimizer.seen)
    while len(t.hyper_optimizer.seen) == count:
        average = {n: a.clone() for n, a in t.horizon.average().items()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        done = t.horizon._progress
        train(model, optimizer, 1, batch)

    def loss_after(shift):
        longer = log_length(float(transform.value(torch.tensor(raw + shift, dtype=torch.float64))))
        longer -= log_length(float(transform.value(torch.tensor(raw, dtype=torch.float64))))
        at = {n: average[n] + (done + longer) * (before[n] - average[n]) for n in before}
        model.eval()
        return float(F.cross_entropy(torch.func.functional_call(model, at, (xv,)), yv))

    truth, _ = derivative(loss_after)
    assert float(t.hyper_optimizer.seen[-1][list(space).index(option)]) == pytest.approx(truth, rel=1e-6)


def run(train_rows, steps):
    """An MLP on a noisy rule, tuned from almost no regularisation; gives the space and the extrapolation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 20, generator=generator)
    y = (x[:, 0] + 0.5 * x[:, 1] * x[:, 2] + 0.7 * torch.randn(20000, generator=generator) > 0).long()
    torch.manual_seed(0)
    space = mf.Space(noise=mf.Float(0.0, 1.2, init=0.1))
    model = nn.Sequential(
        mf.nn.GaussianNoise(space["noise"]), nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = [
        (x[rows], y[rows]) for rows in torch.randint(train_rows, (steps, 64), generator=generator)
    ]  # fmt: skip
    t = tuner(
        model, optimizer, space, train_loader=batches, valid_loader=[(x[-2000:], y[-2000:])], horizon="run",
        schedule=5, total_steps=steps, examples=64,
    )  # fmt: skip
    extrapolations = []
    for batch in batches:
        train(model, optimizer, 1, batch)
        extrapolations.append(t.log()["extrapolation"])
    return space, extrapolations


def test_it_extrapolates_where_few_data_are_memorised_and_not_where_data_are_many():
    memorising, many = run(500, 1200), run(16000, 300)
    assert sum(memorising[1]) / 1200 > 0.5
    assert max(many[1][50:]) == 0.0
    assert memorising[0].as_dict()["noise"] > 0.3 > many[0].as_dict()["noise"]


def test_the_losses_that_set_the_caution_are_those_of_the_average_in_eval_mode(monkeypatch):
    torch.manual_seed(0)
    train_batch, valid_batch = ((torch.randn(16, 4), torch.randint(0, 2, (16,))) for _ in range(2))
    space = mf.Space(noise=mf.Float(0.5, 1.0))
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    t = tuner(model, optimizer, space, train_loader=[train_batch], valid_loader=[valid_batch], horizon="run")
    seen = []
    monkeypatch.setattr(Averaged, "observe", lambda self, c1, c2, *_: seen.append((c1, c2)))
    train(model, optimizer, 4, train_batch)
    average = t.horizon.average()
    train(model, optimizer, 1, train_batch)
    model.eval()
    for batch, found in ((train_batch, seen[-1][0]), (valid_batch, seen[-1][1])):
        expected = F.cross_entropy(torch.func.functional_call(model, average, (batch[0],)), batch[1])
        assert found == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_state_saved_with_one_horizon_is_not_loaded_into_a_tuner_with_another():
    def made(**more):
        model = nn.Linear(8, 3)
        return tuner(model, torch.optim.SGD(model.parameters(), lr=0.1), decay_space(), **more)

    with pytest.raises(ValueError, match="make it with the same classes"):
        made(horizon="run").load_state_dict(made().state_dict())


def test_a_horizon_of_another_name_is_refused():
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mf.errors.UnknownName, match="run, step"):
        tuner(model, optimizer, decay_space(), horizon="far")


def test_a_horizon_of_ones_own_is_a_subclass():
    class Own:
        def valid_at(self, params, at):
            return params

    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"subclass of midflight\.tuner\.horizon\.Horizon, but got"):
        tuner(model, optimizer, decay_space(), horizon=Own())


def test_v_that_shares_memory_is_averaged_as_if_it_did_not():
    """The gradients of a and b in f(a + b) are one tensor, and that of sum(a) is one number, expanded."""
    apart, together = Averaged(), Averaged()
    for n in (1.0, 2.0, 5.0):
        one = torch.full((3,), n, dtype=torch.float64)
        found = together.smoothed({"a": one, "b": one, "c": torch.tensor(n, dtype=torch.float64).expand(3)})
        expected = apart.smoothed({name: one.clone() for name in "abc"})
        assert all(torch.equal(found[name], expected[name]) for name in "abc")


def test_a_gradient_that_is_not_finite_costs_its_own_hyper_step_and_stays_out_of_the_mean():
    calls = []

    def valid_loss(model, batch):
        loss = cross_entropy(model, batch)
        if loss.requires_grad:
            calls.append(loss)
            if len(calls) == 3:  # the root of 0 is finite, and its derivative is not
                loss = loss + (0 * loss).sqrt()
        return loss

    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, horizon="run", valid_loss_fn=valid_loss)
    train(model, optimizer, 8)
    assert t.log()["skipped"] == 1
    assert t.log()["hypersteps"] == 7
    assert all(bool(torch.isfinite(raw).all()) for raw in s.raws.values())
