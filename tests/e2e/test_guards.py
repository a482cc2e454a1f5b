"""What the tuner does when something breaks, what it reports, and following its trajectory again."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight.guards import PATIENCE, RECOVERY
from midflight.trajectory import MOST_POINTS, Trajectory

X, Y = torch.randn(64, 8), torch.randint(0, 3, (64,))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def training(seed=0, **options):
    torch.manual_seed(seed)
    space = mf.Space(
        weight_decay=mf.Float(1e-5, 1e-1, log=True, init=1e-3), noise=mf.Float(0.0, 0.8, init=0.3)
    )
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    usual = {"bind": ["weight_decay"], "every": 1, "valid_loader": [(X, Y)], "validate": cross_entropy}
    return space, model, optimizer, mf.Tuner(model, optimizer, space, **{**usual, **options})


def steps(model, optimizer, tuner, n, factor=1.0):
    for _ in range(n):
        optimizer.zero_grad()
        loss = factor * F.cross_entropy(model(X), Y)
        tuner.backward(loss) if tuner else loss.backward()
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def momenta(model, optimizer):
    return [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]


@pytest.mark.parametrize("foresight", [False, True])
def test_repeated_failure_brings_back_the_last_good_snapshot(foresight):
    space, model, optimizer, tuner = training(snapshots=4, train_loader=[(X, Y)] if foresight else None)
    steps(model, optimizer, tuner, 4)
    at_snapshot, momentum = weights(model), momenta(model, optimizer)
    values = space.as_dict()
    steps(model, optimizer, tuner, 2)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    steps(model, optimizer, tuner, PATIENCE)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), at_snapshot, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(momenta(model, optimizer), momentum, strict=True))
    assert space.as_dict() == values
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(values["weight_decay"])
    steps(model, optimizer, tuner, 5)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (tuner.failures.skipped, tuner.failures.restored) == (PATIENCE, 1)
    assert "restored 1 times" in tuner.report()[0]


def test_a_snapshot_can_be_restored_twice():
    _, model, optimizer, tuner = training(snapshots=8)
    steps(model, optimizer, tuner, 8)
    at_snapshot = weights(model), momenta(model, optimizer)
    for _ in range(2):
        steps(model, optimizer, tuner, 3)
        with torch.no_grad():
            model[1].weight.fill_(float("inf"))
        steps(model, optimizer, tuner, PATIENCE)
        for now, then in zip((weights(model), momenta(model, optimizer)), at_snapshot, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


def test_without_snapshots_failures_are_left_out_and_nothing_else_happens():
    space, model, optimizer, tuner = training()
    steps(model, optimizer, tuner, 2)
    values = space.as_dict()
    steps(model, optimizer, tuner, 2 * PATIENCE, factor=float("nan"))
    assert space.as_dict() == values
    assert (tuner.failures.skipped, tuner.failures.restored) == (2 * PATIENCE, 0)


def test_a_validation_loss_that_is_not_finite_once_spoils_one_hyper_step_only():
    broken = []

    def validate(model, batch):
        spoilt = broken and torch.is_grad_enabled()  # a look that is not finite ends it sooner
        return cross_entropy(model, batch) * (float("nan") if spoilt else 1.0)

    space, model, optimizer, tuner = training(validate=validate, train_loader=[(X, Y)])
    steps(model, optimizer, tuner, 6)
    broken.append(True)
    steps(model, optimizer, tuner, 1)
    broken.clear()
    values = space.as_dict()
    steps(model, optimizer, tuner, 3)
    assert tuner.failures.skipped == 1
    assert space.as_dict() != values


def test_a_failure_halves_the_next_move_and_good_ones_bring_it_back():
    space, model, optimizer, tuner = training()

    def moved():
        before = space["noise"].raw.detach().clone()
        steps(model, optimizer, tuner, 1)
        return float((space["noise"].raw.detach() - before).abs())

    space.set(noise=0.4)
    full = moved()
    weights_before = weights(model)
    steps(model, optimizer, tuner, 1, factor=float("nan"))
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights_before, strict=True):
            p.copy_(w)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
    assert moved() == pytest.approx(full / 2, rel=0.05)
    assert moved() == pytest.approx(full / 2, rel=0.05)
    for _ in range(RECOVERY):
        space.set(noise=0.4)
        last = moved()
    assert last == pytest.approx(full, rel=0.2)


def test_hyperparameters_pinned_at_their_bounds_are_reported():
    _, model, optimizer, tuner = training(hyper_optimizer=lambda raws: torch.optim.SGD(raws, lr=1e9))
    steps(model, optimizer, tuner, 10)
    assert tuner.report() == []  # ten moves say little
    steps(model, optimizer, tuner, 10)
    decay, noise = tuner.report()
    assert decay.startswith("weight_decay stood at its ")
    assert "bound" in noise
    assert "for the last 20 of 20 hyper-steps" in noise


def test_a_hyperparameter_that_moves_inside_its_bounds_is_not_reported():
    _, model, optimizer, tuner = training(hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.02))
    steps(model, optimizer, tuner, 20)
    assert tuner.report() == []


def test_tuning_many_hyperparameters_on_few_rows_is_reported_as_overfitting():
    torch.manual_seed(0)
    x, y = torch.randn(400, 20), torch.randint(0, 2, (400,))  # nothing to learn
    t1, t2, third = ([(x[i : i + 5], y[i : i + 5]) for i in range(a, a + 100, 5)] for a in (0, 100, 200))
    space = mf.Space(bias=mf.Float(-3.0, 3.0, init=0.0, shape=(20,)))
    model = nn.Linear(20, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tuner = mf.Tuner(
        model, optimizer, space, validate=cross_entropy, valid_loader=t2, every=1,
        hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.05, agreement=0.0),
    )  # fmt: skip
    assert tuner.report(third) == []
    for _ in range(300):
        optimizer.zero_grad()
        pull = space["bias"].value @ (model.weight[1] - model.weight[0])
        tuner.backward(cross_entropy(model, tuple(map(torch.cat, zip(*t1, strict=True)))) + pull)
        optimizer.step()
    assert any("T2 is overfitted" in sentence for sentence in tuner.report(third))


def test_the_two_splits_need_two_batches_each():
    _, _, _, tuner = training()
    with pytest.raises(ValueError, match="at least 2 batches"):
        tuner.report(third=[(X, Y), (X, Y)])


def test_following_a_trajectory_repeats_the_tuned_run():
    space, model, optimizer, tuner = training()
    torch.manual_seed(1)
    steps(model, optimizer, tuner, 30)
    again, other, optimizer, unused = training()
    unused.detach()
    mf.Replay(tuner.trajectory, again, optimizer, bind=["weight_decay"], total_steps=30)
    torch.manual_seed(1)
    steps(other, optimizer, None, 30)
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert again.as_dict() == pytest.approx(space.as_dict())


def test_a_long_trajectory_is_thinned_and_keeps_its_shape():
    space, trajectory = mf.Space(a=mf.Float(0.0, 1.0, init=0.0)), Trajectory()
    for n in range(5 * MOST_POINTS):
        space.set(a=wave(n / (5 * MOST_POINTS)))
        trajectory.record(n, space)
    assert len(trajectory) <= MOST_POINTS
    for share in (0.0, 0.123, 0.2345, 0.5, 1.0):
        assert float(trajectory.at(share)["a"]) == pytest.approx(wave(share), abs=0.01)


def wave(share):
    return 0.5 + 0.5 * math.sin(20 * share)


def test_between_two_records_a_trajectory_is_linear():
    space, trajectory = mf.Space(a=mf.Float(0.0, 1.0, init=0.2)), Trajectory()
    trajectory.record(0, space)
    space.set(a=0.6)
    trajectory.record(10, space)
    assert float(trajectory.at(0.25)["a"]) == pytest.approx(0.3)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_the_run_is_refused(share):
    space, trajectory = mf.Space(a=mf.Float(0.0, 1.0)), Trajectory()
    trajectory.record(0, space)
    with pytest.raises(ValueError, match="share"):
        trajectory.at(share)


def test_an_empty_trajectory_cannot_be_followed():
    space, _, optimizer, _ = training()
    with pytest.raises(ValueError, match="at least one record"):
        mf.Replay(Trajectory(), space, optimizer, total_steps=10)
