"""Tune in Lightning: `Trainer(callbacks=[Tune(space)])`.

    from midflight.integrations.lightning import Tune

    trainer = Trainer(max_epochs=5, callbacks=[Tune(model.space)])
    trainer.fit(model, train_loader, valid_loader)

Both losses are what `training_step` returns, the validation loss in eval mode. Accumulation, clipping,
precision plugins and schedulers work unchanged, because the tuner hooks `optimizer.step`. Manual optimisation
needs `loss_fn=`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from midflight.errors import InvalidLoss
from midflight.integrations.host import Host, only, silenced
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
        optimizer: index of the one that trains the model and whose options are tuned; by default all, which
            must then step together. With a generator and a discriminator that step in turn, choose one.
        finish: whether the module ends with its best weights, by `Tuner.finish`.
        options: further arguments of `Tuner`. `total_steps` is the trainer's by default; pass it with manual
            optimisation.

    Attributes:
        tuner: the `Tuner` of the present or the last training; None before the first.

    Raises:
        TypeError: an option is no argument of `Tuner`.
        UnusableLoader: when the training begins: the trainer has no validation loader, or several.
        ValueError: when the training begins: there is no optimiser of this index.
        InvalidLoss: at the first hyper-step: `training_step` returns no loss.
    """

    def __init__(
        self,
        space: Space | Callable[[], Space],
        *,
        loss_fn: Loss | None = None,
        train_loader: Iterable[Any] | None = None,
        valid_loader: Iterable[Any] | None = None,
        optimizer: int | None = None,
        finish: bool = True,
        **options: Any,
    ) -> None:
        self._host = Host(space, finish, options)
        self._loss_fn, self._loaders, self._optimizer = loss_fn, (train_loader, valid_loader), optimizer
        self._stage = "fit"

    @property
    def tuner(self) -> Tuner | None:
        return self._host.tuner

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage = stage
        if stage == "fit":
            self._host.load_state_dict({})  # one loaded for a training that failed is not for this one

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = self._loss_fn or _training_step
        strategy = trainer.strategy

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            batch = strategy.precision_plugin.convert_input(batch)
            batch = strategy.batch_to_device(pl_module._on_before_batch_transfer(batch, dataloader_idx=0))
            with strategy.precision_plugin.train_step_context(), silenced(pl_module, "log", "log_dict"):
                return step(pl_module, batch)

        def write(numbers: dict[str, float]) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

        given, optimizers = self._loaders, trainer.optimizers
        train_loader = only(trainer.train_dataloader) if given[0] is None else given[0]
        valid_loader = only(trainer.val_dataloaders) if given[1] is None else given[1]
        if self._optimizer is not None and not 0 <= self._optimizer < len(optimizers):
            raise ValueError(f"optimizer must be below {len(optimizers)}, but got {self._optimizer}.")
        chosen = optimizers if self._optimizer is None else [optimizers[self._optimizer]]
        model: nn.Module = strategy.model or pl_module
        loaders, total = (train_loader, valid_loader), self._total_steps(trainer, pl_module)
        self._host.begin(model, chosen, loss_fn, loaders, total, write)

    def _total_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
        """Return the optimiser steps that the tuner will see; None if the trainer does not know them."""
        total = trainer.estimated_stepping_batches
        if not pl_module.automatic_optimization or not 0 < total < float("inf"):
            return None
        return self._host.steps_left(int(total), trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._host.end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._host.detach()

    def state_dict(self) -> dict[str, Any]:
        return self._host.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage == "fit":  # `validate` loads callbacks too
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
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    found = module.training_step(batch, 0) if takes_index else module.training_step(batch)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise InvalidLoss(
            f"training_step must return a loss, or a dict with one, but gave a {type(found).__name__}; or "
            "pass loss_fn=, a function of (module, batch)."
        )
    return loss
