"""The way of the hyperparameters through a run, and following it in another one."""

import math

import pytest
import torch
from toys import as_it_steps, network, space, train, tuner, weights

import midflight as mf
from midflight.tuner.trajectory import MOST_POINTS, Trajectory


def training():
    torch.manual_seed(0)
    s = space()
    model = network(s)
    return s, model, torch.optim.Adam(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("parts", [[30], [12, 18]])
def test_following_a_trajectory_repeats_the_tuned_run(parts):
    """Also in a run that was interrupted."""
    s, model, optimizer = training()
    t = tuner(model, optimizer, s)
    torch.manual_seed(1)
    train(model, optimizer, 30)
    again, other, optimizer = training()
    torch.manual_seed(1)
    replay = mf.Replay(t.trajectory, again, optimizer, total_steps=30)
    for n in parts:
        saved = replay.state_dict()
        replay.detach()
        optimizer.param_groups[0]["weight_decay"] = 0.0
        replay = mf.Replay(t.trajectory, again, optimizer, total_steps=30)
        replay.load_state_dict(saved)
        train(other, optimizer, n)
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert again.as_dict() == pytest.approx(s.as_dict())
    replay.detach()
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(float(s["weight_decay"]))


def test_a_longer_run_follows_at_the_same_shares_of_its_way():
    s = mf.Space(lr=mf.Float(0.0, 1.0, init=0.0))
    trajectory = Trajectory()
    for n in range(11):
        s.set(lr=n / 10)
        trajectory.record(n, s)
    model = torch.nn.Linear(8, 3)
    optimizer, read = torch.optim.SGD(model.parameters(), lr=1.0), []
    as_it_steps(optimizer, lambda groups: read.append(groups[0]["lr"]))
    mf.Replay(trajectory, s, optimizer, total_steps=20)
    train(model, optimizer, 22)
    assert read == pytest.approx([n / 20 for n in range(20)] + [1.0, 1.0], abs=1e-6)


def test_a_long_trajectory_is_thinned_and_keeps_its_shape():
    s, trajectory = mf.Space(a=mf.Float(0.0, 1.0, init=0.0)), Trajectory()
    for n in range(5 * MOST_POINTS):
        s.set(a=wave(n / (5 * MOST_POINTS)))
        trajectory.record(n, s)
    assert len(trajectory) <= MOST_POINTS
    for share in (0.0, 0.123, 0.2345, 0.5, 1.0):
        assert float(trajectory.at(share)["a"]) == pytest.approx(wave(share), abs=0.01)


def wave(share):
    return 0.5 + 0.5 * math.sin(20 * share)


def test_between_two_records_a_trajectory_is_linear():
    s, trajectory = mf.Space(a=mf.Float(0.0, 1.0, init=0.2)), Trajectory()
    trajectory.record(0, s)
    s.set(a=0.6)
    trajectory.record(10, s)
    assert float(trajectory.at(0.25)["a"]) == pytest.approx(0.3)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_the_run_is_refused(share):
    s, trajectory = mf.Space(a=mf.Float(0.0, 1.0)), Trajectory()
    trajectory.record(0, s)
    with pytest.raises(ValueError, match="share"):
        trajectory.at(share)


def test_an_empty_trajectory_cannot_be_followed():
    s, _, optimizer = training()
    with pytest.raises(ValueError, match="at least one record"):
        mf.Replay(Trajectory(), s, optimizer, total_steps=10)


def test_a_replay_does_not_warn_of_its_start():
    """A tuner does: its values move from where they are. Warnings are errors here."""
    s = mf.Space(lr=mf.Float(1e-5, 1e-1, log=True))  # starts at 1e-3
    model = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trajectory = Trajectory()
    trajectory.record(0, s)
    mf.Replay(trajectory, s, optimizer, total_steps=5).detach()
    with pytest.warns(UserWarning, match="lr starts at 0.001"):
        tuner(model, optimizer, s)


def test_a_replay_that_is_resumed_leaves_the_trajectory_it_was_made_from():
    s, model, optimizer = training()
    t = tuner(model, optimizer, s)
    train(model, optimizer, 4)
    saved = mf.Replay(t.trajectory, space(), training()[2], total_steps=4).state_dict()
    train(model, optimizer, 4)
    mf.Replay(t.trajectory, space(), training()[2], total_steps=4).load_state_dict(saved)
    assert len(t.trajectory) == 9


def test_its_values_and_its_picture_are_those_of_the_run(tmp_path):
    space = mf.Space(
        lr=mf.Float(1e-4, 1.0, log=True, init=1e-2), noise=mf.Float(0.0, 0.8, shape=(2,), init=0.2)
    )
    trajectory = Trajectory()
    trajectory.record(0, space)
    space.set(lr=0.1, noise=[0.2, 0.6])
    trajectory.record(7, space)
    columns = trajectory.values(space)
    assert columns["step"] == [0, 7]
    assert columns["lr"] == pytest.approx([0.01, 0.1], rel=1e-5)
    assert columns["noise"] == pytest.approx([0.2, 0.4], rel=1e-5)
    figure = trajectory.plot(space)
    assert [ax.get_ylabel() for ax in figure.axes] == ["lr", "noise"]
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear"]
    assert list(figure.axes[0].lines[0].get_ydata()) == columns["lr"]
    figure.savefig(tmp_path / "trajectory.png")
