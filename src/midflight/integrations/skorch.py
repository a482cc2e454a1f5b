"""Tune in skorch: `NeuralNetClassifier(..., callbacks=[Tune(space)])`.

    from midflight.integrations.skorch import Tune

    net = NeuralNetClassifier(Module, optimizer=torch.optim.AdamW, callbacks=[Tune(space)])
    net.fit(X, y)

The validation data are what `train_split` holds out. Both losses are those of `net.get_loss`, the validation
loss in eval mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from skorch.callbacks import Callback
from skorch.dataset import unpack_data
from torch import Tensor, nn

from midflight.integrations.host import PREFIX, Host, OnFailure, unchanged
from midflight.space import Space
from midflight.tuner import Tuner


class Tune(Callback):
    """Tunes hyperparameters while a skorch net trains.

    The net's history gets the hyperparameters of each epoch as "tune/...". Each `fit` begins with the initial
    values of the space. A further `partial_fit` goes on with the present values, but anneals anew. An
    exception ends the tuning. skorch takes Ctrl-C for the end of the training, and so does the tuner.

    Args:
        space: the hyperparameters to tune, or a function of the net that returns them. scikit-learn copies a
            net for cross-validation, and a space with it; so if the module reads the space, pass a function,
            such as `lambda net: net.module_.space`.
        finish: whether the module ends with its best weights, by `Tuner.finish`.
        options: further arguments of `Tuner`; `total_steps` follows from `max_epochs` by default.

    Attributes:
        tuner: the `Tuner` of the present or the last training; None before the first.

    Raises:
        TypeError: an option is no argument of `Tuner`.
        UnusableLoader: when the training begins: the net has no `train_split`.
    """

    def __init__(self, space: Space | Callable[[Any], Space], *, finish: bool = True, **options: Any) -> None:
        self.space, self.finish, self.options = space, finish, options
        self._host, self._begun = self._new_host(), False
        self._watching: list[OnFailure] = []
        self._numbers: dict[str, float] = {}

    @property
    def tuner(self) -> Tuner | None:
        return self._host.tuner

    def _new_host(self, net: Any = None) -> Host:
        space = self.space
        found = partial(space, net) if callable(space) else space
        return Host(found, self.finish, self.options)

    def initialize(self) -> "Tune":
        self._host.detach()
        if isinstance(self.space, Space):
            _reset(self.space)
        return self

    def on_epoch_begin(
        self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **_: Any
    ) -> None:
        if self._begun:
            return
        self._host.detach()
        self._begun, self._host = True, self._new_host(net)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            x, y = unpack_data(batch)
            with unchanged(net):
                loss: Tensor = net.get_loss(net.infer(x), y, X=x, training=model.training)
            return loss

        t1 = net.get_iterator(dataset_train, training=True)
        t2 = None if dataset_valid is None else net.get_iterator(dataset_valid, training=False)
        total = net.max_epochs * len(t1) if hasattr(t1, "__len__") else None
        optimizers = [getattr(net, name + "_") for name in net._optimizers]
        self._host.begin(net.module_, optimizers, loss_fn, (t1, t2), total, self._numbers.update)

    def on_train_begin(self, net: Any, **_: Any) -> None:
        self._begun = False
        self._release()
        # other callbacks may also fail outside `fit_loop`, at the beginning or end of the training
        self._watching = [OnFailure(net, method, self._fail) for method in ("fit_loop", "notify")]

    def _fail(self) -> None:
        self._host.detach()
        self._release()

    def _release(self) -> None:
        """Give the net its own methods back."""
        for watched in reversed(self._watching):
            watched.remove()
        self._watching = []

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        for name, number in self._numbers.items():
            if name.startswith(PREFIX + "value/"):
                net.history.record(name, number)

    def on_train_end(self, net: Any, **_: Any) -> None:
        self._release()
        self._host.end()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tuner out of copies and pickles of a net, because it hooks this net's optimiser."""
        return {name: value for name, value in vars(self).items() if name != "_host"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._host = self._new_host()

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"space": self.space, "finish": self.finish, **self.options}

    def set_params(self, **params: Any) -> "Tune":
        given = self.get_params() | params
        self.space, self.finish, self.options = given.pop("space"), given.pop("finish"), given
        self._new_host()  # refuses unknown options
        return self


def _reset(space: Space) -> None:
    """Restore the initial values, so that a fit does not depend on earlier ones."""
    fresh = Space({name: space[name].spec for name in space})
    with torch.no_grad():
        for name, raw in space.raws.items():
            raw.copy_(fresh[name].raw)
