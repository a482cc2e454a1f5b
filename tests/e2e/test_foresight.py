"""Foresight: where the tuner judges a step, and the two regimes it tells apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight.foresight import (
    GAIN,
    LAST_WINDOW,
    MEMORISED,
    MOST,
    OPEN_END,
    SAMPLED,
    STEADY,
    WINDOW,
    Foresight,
)
from midflight.testing.oracles import derivative
from midflight.updates import rule_for


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("c1", "c2", "caution"), [(0.0, 1.0, MOST), (1.0, 1.0, 0.0), (0.4, 1.0, GAIN * (OPEN_END - 0.4))]
)
def test_caution_rises_as_the_training_loss_falls_below_the_validation_loss(c1, c2, caution):
    foresight = Foresight()
    foresight.observe(c1, c2, None)
    assert foresight.caution == pytest.approx(caution)


def test_the_line_falls_from_1_to_memorised_over_the_run():
    foresight, cautions = Foresight(), []
    for n in range(101):
        foresight.observe(MEMORISED + 0.05, 1.0, n / 100)
        cautions.append(foresight.caution)
    assert cautions[0] == MOST
    assert cautions[-1] == 0.0
    assert cautions == sorted(cautions, reverse=True)


def test_caution_follows_recent_losses_only():
    foresight = Foresight()
    for c1 in [0.0] * 85 + [1.0] * 16:
        foresight.observe(c1, 1.0, None)
    assert foresight.caution == 0.0


def test_losses_that_have_no_ratio_leave_the_caution_as_it_is():
    foresight = Foresight()
    foresight.caution = 0.7
    foresight.observe(1.0, -1.0, None)
    assert foresight.caution == 0.7


def test_a_restored_foresight_judges_and_goes_on_as_the_saved_one():
    saved, restored, w = Foresight(), Foresight(), {"w": torch.ones(3)}
    for n in range(100):
        saved.follow({"w": torch.full((3,), float(n))}, 5 * n)
        saved.observe(0.5, 1.0 + abs(n - 50), 0.5)
        saved.steadied({"w": torch.full((3,), float(n))})
    restored.load_state_dict(saved.state_dict())
    for each in (saved, restored):
        each.caution = 0.3
    assert torch.equal(saved.judged(lambda: w)["w"], restored.judged(lambda: w)["w"])
    found = [each.steadied({"w": torch.ones(3)})["w"] for each in (saved, restored)]
    assert torch.equal(*found)
    assert found[0][0] > 2.0
    assert torch.equal(saved.best["w"], restored.best["w"])
    for each in (saved, restored):
        each.follow(w, 600)
        each.observe(0.5, 2.0, 0.5)
    assert saved.caution == restored.caution > 0
    assert torch.equal(saved.judged(lambda: w)["w"], restored.judged(lambda: w)["w"])
    assert torch.equal(saved.best["w"], restored.best["w"])


def test_the_average_reaches_back_over_a_share_of_the_run_also_in_bfloat16():
    foresight, expected = Foresight(), 1.0
    for n in range(1, 201):
        if n > 1:
            expected += min(1.0, 1 / (WINDOW * n)) * (n - expected)
        foresight.follow({"w": torch.full((3,), float(n), dtype=torch.bfloat16)}, SAMPLED * n)
    average = foresight.average()["w"]
    assert average.dtype == torch.bfloat16
    assert average.float() == pytest.approx(torch.full((3,), expected), rel=1e-2)
    exact = Foresight()
    for n in range(1, 201):
        exact.follow({"w": torch.full((3,), float(n), dtype=torch.float64)}, SAMPLED * n)
        exact.follow({"w": torch.full((3,), 1e9, dtype=torch.float64)}, SAMPLED * n + 1)  # not yet
    assert exact.average()["w"].tolist() == pytest.approx([expected] * 3, rel=1e-12)


@pytest.mark.parametrize(
    ("progress", "window"),
    [(None, WINDOW), (0.0, WINDOW), (0.8, WINDOW), (0.9, (WINDOW + LAST_WINDOW) / 2), (1.0, LAST_WINDOW)],
)
def test_towards_the_end_of_a_run_the_average_is_shortened(progress, window):
    foresight = Foresight()
    foresight.follow({"w": torch.zeros(3)}, 995, progress)
    foresight.follow({"w": torch.ones(3)}, 995 + SAMPLED, progress)
    assert foresight.average()["w"].tolist() == pytest.approx([SAMPLED / (window * 1000)] * 3)


def test_the_tuner_tells_foresight_how_much_of_the_run_is_over(monkeypatch):
    told = []
    monkeypatch.setattr(Foresight, "follow", lambda self, params, steps, progress: told.append(progress))
    model, batch = nn.Linear(2, 2), (torch.randn(4, 2), torch.randint(0, 2, (4,)))
    space = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=[batch], train_loader=[batch],
        bind=["weight_decay"], every=10, total_steps=4,
    )  # fmt: skip
    for _ in range(5):
        tuner.backward(cross_entropy(model, batch))
        optimizer.step()
    assert told == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_v_that_repeats_one_number_in_memory_is_averaged_too():
    foresight = Foresight()
    for n in (1.0, 1.0):
        found = foresight.steadied({"w": torch.full((1,), n).expand(3)})
    assert found["w"].tolist() == [1.0] * 3


@pytest.mark.parametrize(("caution", "kept"), [(0.0, STEADY), (0.5, STEADY / 2), (1.0, 0.0), (3.0, 0.0)])
def test_v_is_averaged_with_earlier_ones_the_less_the_more_caution_there_is(caution, kept):
    foresight = Foresight()
    foresight.caution = caution
    for n in range(1, 5):
        given = foresight.steadied({"w": torch.full((2,), float(n))})["w"]
        found = given.tolist()
        given.fill_(9.0)  # used up
    weights = [kept ** (4 - n) for n in range(1, 5)]
    expected = sum(n * w for n, w in zip(range(1, 5), weights, strict=True)) / sum(weights)
    assert found == pytest.approx([expected] * 2)
    assert foresight.steadied({"other": torch.ones(1)}).keys() == {"other"}


def test_the_average_with_the_least_validation_loss_is_kept():
    foresight = Foresight()
    for n, c2 in enumerate([3.0, 1.0, 2.0, 5.0]):
        foresight.forget()
        foresight.follow({"w": torch.full((2,), float(n))}, n)
        foresight.observe(1.0, c2, None, {"b": torch.tensor([-1.0 * n])})
    assert foresight.best["w"].tolist() == [1.0, 1.0]
    assert foresight.best["b"].tolist() == [-1.0]


@pytest.mark.parametrize(
    ("caution", "estimator"),
    [(0.0, None), (0.3, None), (1.0, None), (3.0, None), (0.3, "one_step"), (3.0, "one_step")],
)
def test_the_hypergradient_is_the_step_s_pullback_of_v_at_the_judged_weights(caution, estimator, monkeypatch):
    """<v(average + caution (theta - average)), theta'(h)> differentiated centrally, v held fixed.

    With `one_step`, theta' in place of theta.
    """
    torch.manual_seed(0)
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    xv, yv = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    space = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True, init=1e-2), dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])

    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=[(xv, yv)], train_loader=[(x, y)],
        bind=["weight_decay"], every=1, hyper_optimizer=lambda raws: Recorder(raws, lr=1.0),
        estimator=estimator,
    )  # fmt: skip
    for _ in range(60):  # the average and the weights part
        optimizer.zero_grad()
        tuner.backward(cross_entropy(model, (x, y)))
        optimizer.step()
    monkeypatch.setattr(Foresight, "observe", lambda self, *_: setattr(self, "caution", caution))
    monkeypatch.setattr(Foresight, "steadied", lambda self, v: v)  # has a test of its own

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    optimizer.zero_grad()
    tuner.backward(cross_entropy(model, (x, y)))
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    options = dict(optimizer.param_groups[0], beta1=0.9, beta2=0.999)
    rule = rule_for(optimizer)

    def after(raw):
        value = float(space["weight_decay"].transform.value(torch.tensor(raw, dtype=torch.float64)))
        now = {**options, "weight_decay": value}
        return {n: rule.step(before[n], grads[n], state[n], now)[0] for n in before}

    raw = float(space["weight_decay"].raw.detach())
    average = tuner.foresight.state_dict()["average"]
    leant = after(raw) if estimator else before
    judged = {n: (average[n] + caution * (p - average[n])).requires_grad_() for n, p in leant.items()}
    loss = F.cross_entropy(torch.func.functional_call(model, judged, (xv,)), yv)
    v = dict(zip(judged, torch.autograd.grad(loss, list(judged.values())), strict=True))
    truth, _ = derivative(lambda shift: float(sum((v[n] * p).sum() for n, p in after(raw + shift).items())))
    optimizer.step()
    assert float(seen[-1][0]) == pytest.approx(truth, rel=1e-6)
    assert all(
        torch.equal(p, after(raw)[n]) or torch.allclose(p, after(raw)[n]) for n, p in model.named_parameters()
    )


@pytest.mark.parametrize(("caution", "agreement"), [(0.0, 0.2), (0.4, 0.12), (2.0, 0.0)])
def test_under_caution_steps_wait_less_for_agreement(caution, agreement, monkeypatch):
    monkeypatch.setattr(Foresight, "observe", lambda self, *_: setattr(self, "caution", caution))
    model, batch = nn.Linear(2, 2), (torch.randn(4, 2), torch.randint(0, 2, (4,)))
    space = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=[batch], train_loader=[batch],
        bind=["weight_decay"], every=1, hyper_optimizer=lambda raws: mf.SignSteps(raws, agreement=0.2),
    )  # fmt: skip
    for _ in range(2):
        optimizer.zero_grad()
        tuner.backward(cross_entropy(model, batch))
        optimizer.step()
    assert tuner.hyper_optimizer.param_groups[0]["agreement"] == pytest.approx(agreement)


def test_a_learning_rate_is_judged_at_the_weights_after_the_step():
    torch.manual_seed(0)
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    xv, yv = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    space = mf.Space(
        weight_decay=mf.Float(1e-4, 1e-1, log=True, init=1e-2), lr=mf.Float(1e-4, 1e-1, log=True, init=1e-2),
        noise=mf.Float(0.0, 1.0, init=0.2), dtype=torch.float64,
    )  # fmt: skip
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), *layers).double()
    optimizer = torch.optim.Adam(model.parameters())
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])

    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=[(xv, yv)], train_loader=[(x, y)],
        bind=["weight_decay", "lr"], every=1, hyper_optimizer=lambda raws: Recorder(raws, lr=1.0),
    )  # fmt: skip
    for _ in range(20):
        optimizer.zero_grad()
        tuner.backward(cross_entropy(model, (x, y)))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        state = {
            n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()
        }
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    options = dict(optimizer.param_groups[0], beta1=0.9, beta2=0.999)
    raw, rule = float(space["lr"].raw.detach()), rule_for(optimizer)

    def loss_after(shift):
        lr = float(space["lr"].transform.value(torch.tensor(raw + shift, dtype=torch.float64)))
        at = {n: rule.step(before[n], grads[n], state[n], {**options, "lr": lr})[0] for n in before}
        model.eval()
        return float(F.cross_entropy(torch.func.functional_call(model, at, (xv,)), yv))

    truth, _ = derivative(loss_after)
    assert float(seen[-1][1]) == pytest.approx(truth, rel=1e-6)


def run(train_rows, steps, foresight=True):
    """An MLP on a noisy rule, tuned from almost no regularisation; gives the space and the caution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 20, generator=generator)
    y = (x[:, 0] + 0.5 * x[:, 1] * x[:, 2] + 0.7 * torch.randn(20000, generator=generator) > 0).long()
    torch.manual_seed(0)
    space = mf.Space(noise=mf.Float(0.0, 1.2, init=0.1))
    model = nn.Sequential(
        mf.nn.GaussianNoise(space["noise"]), nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    train, valid = (x[:train_rows], y[:train_rows]), (x[-2000:], y[-2000:])
    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=[valid],
        train_loader=[train] if foresight else None, every=5, total_steps=steps,
    )  # fmt: skip
    cautions = []
    for _ in range(steps):
        rows = torch.randint(train_rows, (64,), generator=generator)
        optimizer.zero_grad()
        tuner.backward(F.cross_entropy(model(train[0][rows]), train[1][rows]))
        optimizer.step()
        cautions.append(tuner.foresight.caution if foresight else 0.0)
    return space, cautions


def test_it_is_cautious_where_few_data_are_memorised_and_not_where_data_are_many():
    memorising, many = run(500, 2000), run(16000, 500)
    assert sum(memorising[1]) / 2000 > 0.5
    assert max(many[1][50:]) == 0.0
    assert memorising[0].as_dict()["noise"] > 0.3 > many[0].as_dict()["noise"]


def test_looking_ahead_leaves_weights_modes_and_the_training_gradient_alone():
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    space = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=[(x, y)], train_loader=[(x, y)],
        bind=["weight_decay"], every=1,
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    loss = cross_entropy(model, (x, y))
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    tuner.backward(loss)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(m.training for m in model.modules())


def test_the_losses_that_set_the_caution_are_those_of_the_average_in_eval_mode(monkeypatch):
    torch.manual_seed(0)
    train, valid = ((torch.randn(16, 4), torch.randint(0, 2, (16,))) for _ in range(2))
    space = mf.Space(noise=mf.Float(0.5, 1.0))
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=[valid], train_loader=[train], every=1
    )
    seen = []
    monkeypatch.setattr(Foresight, "observe", lambda self, c1, c2, *_: seen.append((c1, c2)))
    for _ in range(5):
        optimizer.zero_grad()
        tuner.backward(cross_entropy(model, train))
        average = tuner.foresight.state_dict()["average"]
        optimizer.step()
    model.eval()
    for batch, found in ((train, seen[-1][0]), (valid, seen[-1][1])):
        expected = F.cross_entropy(torch.func.functional_call(model, average, (batch[0],)), batch[1])
        assert found == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_state_saved_without_foresight_is_not_loaded_into_a_tuner_with_it():
    def tuner(**more):
        model = nn.Linear(2, 2)
        space = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = (torch.randn(4, 2), torch.randint(0, 2, (4,)))
        return mf.Tuner(
            model,
            optimizer,
            space,
            validate=cross_entropy,
            valid_loader=[batch],
            bind=["weight_decay"],
            **more,
        )

    batch = (torch.randn(4, 2), torch.randint(0, 2, (4,)))
    with pytest.raises(ValueError, match="only the loading tuner has one"):
        tuner(train_loader=[batch]).load_state_dict(tuner().state_dict())
