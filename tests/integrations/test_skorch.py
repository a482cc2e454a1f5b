"""Tuning in skorch: history, cross-validation, copies, and a second fit."""

import copy
import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from comparing import STOPS, assert_detached, at_call, fail, same, state
from torch import nn

import midflight as mf

skorch = pytest.importorskip("skorch")

from sklearn.base import clone  # noqa: E402
from sklearn.model_selection import cross_val_score  # noqa: E402

from midflight.integrations.skorch import Tune  # noqa: E402

DRAWS = np.random.default_rng(0)
X = DRAWS.normal(size=(120, 6)).astype(np.float32)
Y = (X[:, 0] + 0.3 * DRAWS.normal(size=120) > 0).astype(np.int64)


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.space = mf.Space(
            lr=mf.Float(1e-4, 1e-1, log=True, init=3e-3), noise=mf.Float(0.0, 0.8, init=0.3)
        )
        self.net = nn.Sequential(
            mf.nn.GaussianNoise(self.space["noise"]), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)
        )

    def forward(self, x):
        return self.net(x)


def of_module(net):
    return net.module_.space


def net(*callbacks, cls=skorch.NeuralNetClassifier, **options):
    torch.manual_seed(0)
    settings = {"max_epochs": 6, "batch_size": 16, "optimizer": torch.optim.AdamW, "lr": 3e-3, "verbose": 0}
    settings |= {"criterion": nn.CrossEntropyLoss, "callbacks": list(callbacks), **options}
    return cls(Module, **settings)


def test_it_tunes_and_the_history_has_the_values():
    tune = Tune(of_module, schedule=3)
    fitted = net(tune).fit(X, Y)
    assert tune.tuner.steps == 36
    assert fitted.module_.space["lr"].value != pytest.approx(3e-3)
    seen = fitted.history[:, "tune/value/noise"]
    assert len(set(seen)) > 3
    assert not fitted.optimizer_._optimizer_step_pre_hooks


def test_a_space_of_options_alone_needs_no_function():
    space = mf.Space(weight_decay=mf.Float(1e-4, 1.0, log=True, init=1e-2))
    net(Tune(space, schedule=3)).fit(X, Y)
    assert float(space["weight_decay"]) != pytest.approx(1e-2)


def test_it_is_cloned_pickled_and_fitted_again():
    tune = Tune(of_module, schedule=3)
    first = net(tune).fit(X, Y)
    again = clone(first)
    assert again.callbacks[0].options == {"schedule": 3}
    for other in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        np.testing.assert_array_equal(other.predict(X), first.predict(X))
    first.fit(X, Y)
    assert tune.tuner.steps == 36
    assert cross_val_score(net(Tune(of_module, schedule=3)), X, Y, cv=2).mean() > 0.7


def test_parameters_are_set_as_scikit_learn_does():
    wrapped = net(("tune", Tune(of_module)))
    wrapped.set_params(callbacks__tune__schedule=3, callbacks__tune__finish=False)
    wrapped.fit(X, Y)
    tune = dict(wrapped.callbacks_)["tune"]
    assert tune.tuner.log()["hypersteps"] > 5


def test_without_a_split_or_with_a_wrong_option_it_says_so():
    with pytest.raises(TypeError, match="shedule"):
        Tune(of_module, shedule=3)
    with pytest.raises(mf.errors.UnusableLoader, match="validation data"):
        net(Tune(of_module), train_split=None).fit(X, Y)


class Stops(skorch.NeuralNetClassifier):
    """Calls a function at each loss, those of hyper-steps and of the validation included."""

    def get_loss(self, *args, **kwargs):
        self.at_each_loss()
        return super().get_loss(*args, **kwargs)


@pytest.mark.parametrize("at", [91, 93, 109])  # in a batch, in a hyper-step, in the validation
@pytest.mark.parametrize("do", STOPS)
def test_what_stops_a_fit_leaves_no_hook_and_the_tuned_options_and_the_next_fit_is_as_a_first(do, at):
    tune = Tune(of_module, schedule=3)
    stopped = net(tune, cls=Stops)
    stopped.at_each_loss = at_call(at, do)
    with pytest.raises(ArithmeticError) if do is fail else nullcontext():  # skorch takes Ctrl-C for the end
        stopped.fit(X, Y)
    assert 0 < tune.tuner.steps < 36
    assert_detached(stopped.optimizer_, stopped.module_.space)
    assert "fit_loop" not in vars(stopped)
    torch.manual_seed(0)
    stopped.fit(X, Y)
    first = net(Tune(of_module, schedule=3), cls=Stops)
    first.at_each_loss = lambda: None
    first.fit(X, Y)
    assert same(state(stopped.module_, stopped.module_.space), state(first.module_, first.module_.space))


def test_what_a_net_counts_by_itself_is_as_without_a_tuner():
    class Counts(skorch.NeuralNetClassifier):
        losses = 0

        def get_loss(self, *args, **kwargs):
            self.losses += 1
            return super().get_loss(*args, **kwargs)

    counts = [
        net(*callbacks, cls=Counts).fit(X, Y).losses for callbacks in ((), [Tune(of_module, schedule=3)])
    ]
    assert counts[0] == counts[1] > 36


def test_each_fit_begins_at_the_initial_values_and_a_clone_too():
    space = mf.Space(weight_decay=mf.Float(1e-4, 1.0, log=True, init=1e-2))
    seen = []
    tune = Tune(space, schedule=3, on_hyperstep=lambda step, numbers: seen.append(numbers))
    tuned = net(tune).fit(X, Y)
    ended = float(space["weight_decay"])
    torch.manual_seed(0)
    tuned.fit(X, Y)
    assert float(space["weight_decay"]) == ended
    torch.manual_seed(0)
    again = clone(tuned).fit(X, Y)
    assert float(dict(again.callbacks_)["Tune"].space["weight_decay"]) == ended
    del seen[:]
    tuned.partial_fit(X, Y)
    assert abs(math.log(seen[0]["value/weight_decay"] / ended)) < 1 < abs(math.log(1e-2 / ended))


class Fails(skorch.callbacks.Callback):
    """Raises in one of its methods, or copies the net there."""

    def __init__(self, at, copies=False):
        self.at, self.copies, self.copy = at, copies, None

    def notify(self, method, net, **_):
        if method != self.at:
            return
        if self.copies:
            self.copy = copy.deepcopy(net)
        else:
            raise ArithmeticError("a callback failed")

    def on_train_begin(self, net, **_):
        self.notify("on_train_begin", net)

    def on_train_end(self, net, **_):
        self.notify("on_train_end", net)


def test_a_callback_that_fails_at_the_end_leaves_no_hook():
    fitted = net(("fails", Fails("on_train_end")), ("tune", Tune(of_module, schedule=3)))
    with pytest.raises(ArithmeticError):
        fitted.fit(X, Y)
    assert not fitted.optimizer_._optimizer_step_pre_hooks
    assert not {"fit_loop", "notify"} & set(vars(fitted))


def test_a_net_whose_training_failed_to_begin_can_be_pickled_and_its_copy_trains_itself():
    fitted = net(("tune", Tune(of_module, schedule=3)), ("fails", Fails("on_train_begin")))
    with pytest.raises(ArithmeticError):
        fitted.fit(X, Y)
    pickle.dumps(fitted)
    other = copy.deepcopy(fitted)
    other.set_params(callbacks__fails=None)
    other.fit(X, Y)
    assert len(other.history) == 6
    assert not fitted.history
    assert torch.equal(
        fitted.module_.state_dict()["net.1.weight"], net().initialize().module_.state_dict()["net.1.weight"]
    )


def test_a_copy_made_while_a_training_begins_trains_itself():
    copies = Fails("on_train_begin", copies=True)
    fitted = net(("tune", Tune(of_module, schedule=3)), ("copies", copies)).fit(X, Y)
    before, other = copy.deepcopy(fitted.module_.state_dict()), copies.copy
    other.partial_fit(X, Y)
    assert len(other.history) == len(fitted.history) == 6
    assert all(torch.equal(t, before[name]) for name, t in fitted.module_.state_dict().items())
