"""The perceptrons that tune their own regularisation."""

import contextlib

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, make_friedman1, make_moons
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mean_squared_error

import midflight as mf
from midflight.automl import network, online_mlp
from midflight.automl.network import Recipe, followed, tuned
from midflight.automl.validation import held_out
from midflight.datasets import Split

STARTS = {"weight_decay": 1e-4, "noise": 0.2, "dropout": 0.1}


def recipe(**changes):
    settings = {"hidden": (8,), "lr": 3e-3, "batch": 16, "steps": 300, "patience": 1.0, "starts": STARTS}
    return Recipe(**{**settings, "seed": 0, **changes})


def moons(n=400, seed=0):
    x, y = make_moons(n, noise=0.3, random_state=seed)
    return Split(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


def test_the_three_move_from_their_starts_and_stay_in_their_ranges():
    x, y = load_breast_cancer(return_X_y=True)
    model = mf.OnlineMLPClassifier(max_steps=200, random_state=0).fit(x, y)
    for name, start in STARTS.items():
        low, high = mf.space.RANGES[name].low, mf.space.RANGES[name].high
        moved = abs(float(model.trajectory_.at(1.0)[name]) - float(model.trajectory_.at(0.0)[name]))
        assert moved > 0.01  # of the range; one full sign step is 0.08
        assert low * (1 - 1e-6) <= model.values_[name] <= high * (1 + 1e-6)  # float32
        assert model.values_[name] != pytest.approx(start)


def test_a_network_is_better_than_a_line_where_the_classes_are_moons():
    (x, y), (test_x, test_y) = (make_moons(400, noise=0.3, random_state=s) for s in (0, 1))
    model = mf.OnlineMLPClassifier(max_steps=500, random_state=0).fit(x, y)
    line = LogisticRegression().fit(x, y)
    losses = [log_loss(test_y, m.predict_proba(test_x)) for m in (model, line)]
    assert losses[0] < 0.8 * losses[1]
    np.testing.assert_array_equal(model.predict(test_x), model.predict_proba(test_x).argmax(1))


def test_a_regression_comes_near_the_noise_of_friedman_1():
    (x, y), (test_x, test_y) = (make_friedman1(400, noise=1.0, random_state=s) for s in (0, 1))
    elsewhere = 100 * y + 1000  # a target of another scale
    model = mf.OnlineMLPRegressor(max_steps=500, random_state=0).fit(x, elsewhere)
    error = mean_squared_error(test_y, (model.predict(test_x) - 1000) / 100)
    assert error < 4.0  # the noise has variance 1, the target 24


@pytest.mark.parametrize("refit", [True, False])
def test_equal_seeds_give_equal_networks_and_leave_the_global_generator_alone(refit):
    x, y = make_moons(100, noise=0.3, random_state=0)
    model = mf.OnlineMLPClassifier(max_steps=60, refit=refit, random_state=3)
    before = torch.get_rng_state()
    first = clone(model).fit(x, y).predict_proba(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    np.testing.assert_array_equal(clone(model).fit(x, y).predict_proba(x), first)
    assert np.any(clone(model).set_params(random_state=4).fit(x, y).predict_proba(x) != first)


@contextlib.contextmanager
def other_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "changed",
    [
        torch.no_grad, torch.inference_mode, other_dtype, lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
)  # fmt: skip
def test_what_the_caller_has_set_in_torch_changes_no_bit(changed):
    x, y = make_moons(100, noise=0.3, random_state=0)
    model = mf.OnlineMLPClassifier(max_steps=60, random_state=3)
    expected = clone(model).fit(x, y).predict_proba(x)
    with changed():
        network_ = clone(model).fit(x, y)
    np.testing.assert_array_equal(network_.predict_proba(x), expected)


def test_the_second_training_follows_the_first_on_all_rows(monkeypatch):
    seen = []

    def spy(rows, outputs, loss, recipe, trajectory, passes, stop):
        seen.append((len(rows), trajectory, passes, stop))
        return followed(rows, outputs, loss, recipe, trajectory, passes, stop)

    monkeypatch.setattr(online_mlp, "followed", spy)
    x, y = make_moons(100, noise=0.3, random_state=0)
    model = mf.OnlineMLPClassifier(max_steps=60, random_state=0).fit(x, y)
    ((n, trajectory, passes, stop),) = seen
    assert (n, trajectory) == (100, model.trajectory_)
    assert 0 < stop <= passes


def test_following_equals_a_loop_written_by_hand():
    rows, loss = moons(64), torch.nn.functional.cross_entropy
    first = tuned(rows, rows, 2, loss, recipe())
    network_ = followed(rows, 2, loss, recipe(), first.trajectory, passes=10, stop=5)

    run = network.Training(rows, 2, loss, recipe())
    weights = []
    for step in range(20):  # five passes of four batches, of the ten that the trajectory is stretched over
        raws = first.trajectory.at(step / 40)
        run.space.load_state_dict({"raw": raws})
        run.optimizer.param_groups[0]["weight_decay"] = float(run.space["weight_decay"])
        run.step()
        weights.append([p.detach().clone() for p in run.model.parameters()])
    # the average counts the weights after steps 1, 6, 11 and 16, and reaches back over less than two steps
    for p, expected in zip(network_.parameters(), weights[15], strict=True):
        torch.testing.assert_close(p, expected)


def test_following_shortens_its_average_towards_the_end():
    rows, loss = moons(64), torch.nn.functional.cross_entropy
    first = tuned(rows, rows, 2, loss, recipe())
    network_ = followed(rows, 2, loss, recipe(), first.trajectory, passes=50, stop=50)

    run = network.Training(rows, 2, loss, recipe())
    replay = mf.Replay(first.trajectory, run.space, run.optimizer, total_steps=200)
    average = mf.Averaged()
    for step in range(1, 201):
        run.step()
        average.follow(dict(run.model.named_parameters()), step, step / 200)
    replay.detach()
    for p, expected in zip(network_.parameters(), average.average().values(), strict=True):
        torch.testing.assert_close(p, expected)


def test_training_ends_once_t2_has_had_no_new_best_for_long_enough():
    t1, t2 = moons(60), moons(60, seed=1)
    noise = Split(t1.x, torch.randint(2, (60,)))  # nothing to be learnt: T2 gets worse from the start
    run = tuned(noise, t2, 2, torch.nn.functional.cross_entropy, recipe(steps=1000, patience=0.1, lr=1e-2))
    whole = 1000 / (60 // 16)
    assert run.passes < 0.8 * whole
    assert run.passes - run.best_passes == pytest.approx(0.1 * whole, rel=0.05)


def test_t2_is_stratified_and_leaves_one_row_of_each_class():
    y = np.array([0] * 50 + [1] * 27 + [2])  # each fifth would be the only row of 2, too
    t2 = held_out(y, 0.2, seed=0, classes=True)
    assert [int(t2[y == k].sum()) for k in (0, 1, 2)] == [10, 5, 0]
    assert held_out(np.arange(100_000), 0.2, seed=0, classes=False).sum() == 10_000
    assert not held_out(np.arange(9.0), 0.2, seed=0, classes=False).any()


@pytest.mark.parametrize("n", [2, 3, 9, 10, 12])
def test_a_handful_of_rows_is_enough(n):
    x = np.linspace(0, 1, n)[:, None]
    y = (x[:, 0] > 0.4).astype(int)
    classifier = mf.OnlineMLPClassifier(lr=1e-2, max_steps=60, random_state=0).fit(x, y)
    assert (classifier.predict(x) == y).mean() >= 0.8
    regressor = mf.OnlineMLPRegressor(lr=1e-2, max_steps=120, random_state=0).fit(x, x[:, 0])
    assert regressor.score(x, x[:, 0]) > DummyRegressor().fit(x, x[:, 0]).score(x, x[:, 0]) + 0.5


def test_with_few_rows_the_three_stay_at_their_starts():
    x, y = make_moons(8, random_state=0)
    model = mf.OnlineMLPClassifier(max_steps=50, random_state=0).fit(x, y)
    assert model.values_ == pytest.approx(STARTS)
    assert model.valid_losses_ == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"validation_fraction": 0.6}, "0 < validation_fraction <= 0.5 must hold"),
        ({"hidden": ()}, "hidden must give the units of each layer"),
        ({"noise": 2.0}, r"init in \[0, 0.8\] is needed"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, sentence):
    x, y = make_moons(20, random_state=0)
    with pytest.raises(ValueError, match=sentence):
        mf.OnlineMLPClassifier(**changes).fit(x, y)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="at least two classes, but got one class, a"):
        mf.OnlineMLPClassifier().fit(np.zeros((12, 1)), ["a"] * 12)
