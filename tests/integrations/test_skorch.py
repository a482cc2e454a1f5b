"""Tuning in skorch: history, cross-validation, copies, and a second fit."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
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


def net(*callbacks, **options):
    torch.manual_seed(0)
    settings = {"max_epochs": 6, "batch_size": 16, "optimizer": torch.optim.AdamW, "lr": 3e-3, "verbose": 0}
    settings |= {"criterion": nn.CrossEntropyLoss, "callbacks": list(callbacks), **options}
    return skorch.NeuralNetClassifier(Module, **settings)


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


def test_an_exception_leaves_no_hook_once_the_net_is_initialised_again():
    class Fails(skorch.callbacks.Callback):
        def on_batch_end(self, net, **_):
            if net.history and len(net.history) > 2:
                raise ArithmeticError

    tune = Tune(of_module, schedule=3)
    failing = net(tune, Fails())
    with pytest.raises(ArithmeticError):
        failing.fit(X, Y)
    optimizer = failing.optimizer_
    failing.initialize()
    assert not optimizer._optimizer_step_pre_hooks


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
