"""Tune in Lightning: `Trainer(callbacks=[Tune(space)])`.

    from midflight.integrations.lightning import Tune

    trainer = Trainer(max_epochs=5, callbacks=[Tune(model.space)])
    trainer.fit(model, train_loader, valid_loader)

The loss is what `training_step` returns, on T2 in eval mode. Automatic and manual optimisation, accumulation,
clipping, precision plugins and schedulers work as they are, because the tuner hooks `optimizer.step`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from midflight.errors import InvalidLoss
from midflight.integrations.host import Host, only
from midflight.space import Space
from midflight.tuner import Tuner
from midflight.tuner.live import Loss


class Tune(pl.Callback):
    """Tunes hyperparameters while a Lightning trainer trains.

    The tuner is saved in the trainer's checkpoints and resumes with them. Loggers of the trainer get the
    numbers of `Tuner.log` as "tune/...", after each hyper-step.

    Args:
        space: the hyperparameters to tune, or a function that returns them once the training begins.
        loss_fn: (module, batch) -> training loss, on a batch on the module's device; by default the loss of
            `training_step(batch, 0)`, whose calls of `log` then do nothing.
        train_loader, valid_loader: batches of T1 and T2; by default those of the trainer.
        finish: whether the module ends with its best weights, by `Tuner.finish`.
        options: further arguments of `Tuner`; `total_steps` is the trainer's by default.

    Attributes:
        tuner: the `Tuner` of the present or the last training; None before the first.

    Raises:
        TypeError: an option is no argument of `Tuner`.
        UnusableLoader: when the training begins: the trainer has no validation loader, or several.
    """

    def __init__(
        self,
        space: Space | Callable[[], Space],
        *,
        loss_fn: Loss | None = None,
        train_loader: Iterable[Any] | None = None,
        valid_loader: Iterable[Any] | None = None,
        finish: bool = True,
        **options: Any,
    ) -> None:
        self._host = Host(space, finish, options)
        self._loss_fn, self._loaders = loss_fn, (train_loader, valid_loader)

    @property
    def tuner(self) -> Tuner | None:
        return self._host.tuner

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = self._loss_fn or _training_step
        strategy = trainer.strategy

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            batch = strategy.batch_to_device(strategy.precision_plugin.convert_input(batch))
            with strategy.precision_plugin.train_step_context(), _without_log(pl_module):
                return step(pl_module, batch)

        def write(numbers: dict[str, float]) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

        given, total = self._loaders, trainer.estimated_stepping_batches
        train_loader = only(trainer.train_dataloader) if given[0] is None else given[0]
        valid_loader = only(trainer.val_dataloaders) if given[1] is None else given[1]
        total_steps = int(total) if 0 < total < float("inf") else None
        model: nn.Module = strategy.model or pl_module
        loaders = train_loader, valid_loader
        self._host.begin(model, trainer.optimizers, loss_fn, loaders, total_steps, write)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._host.end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._host.detach()

    def state_dict(self) -> dict[str, Any]:
        return self._host.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._host.load_state_dict(state_dict)


def _training_step(module: pl.LightningModule, batch: Any) -> Tensor:
    """Return the loss of `training_step`.

    Raises:
        InvalidLoss: it returns none, as in manual optimisation.
    """
    if not module.automatic_optimization:
        raise InvalidLoss(
            "with manual optimisation, training_step trains instead of returning a loss; pass loss_fn=, a "
            "function of (module, batch)."
        )
    found = module.training_step(batch, 0)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise InvalidLoss(
            f"training_step must return a loss, or a dict with one, but gave a {type(found).__name__}; or "
            "pass loss_fn=, a function of (module, batch)."
        )
    return loss


@contextmanager
def _without_log(module: pl.LightningModule) -> Iterator[None]:
    """Let `log` and `log_dict` of a module do nothing, because a hyper-step is no step of the trainer."""
    attributes: dict[str, Any] = vars(module)
    own: dict[str, Any] = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
    attributes.update(log=_nothing, log_dict=_nothing)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del attributes[name]
        attributes.update(own)


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""
