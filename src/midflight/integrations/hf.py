"""Tune in Hugging Face's Trainer: `trainer.add_callback(Tune(trainer, space))`.

    from midflight.integrations.hf import Tune

    trainer = Trainer(model, args, train_dataset=train, eval_dataset=valid)
    trainer.add_callback(Tune(trainer, space))
    trainer.train()

Both losses are those of `trainer.compute_loss`, the validation loss in eval mode. Subclasses of `Trainer`
work as well.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from midflight.errors import InvalidLoss, warn
from midflight.integrations.host import PREFIX, Host, OnFailure, only, silenced, unchanged
from midflight.space import Space
from midflight.tuner import Tuner

FILE = "midflight.pt"
"""The file of a checkpoint that holds the tuner."""


class Tune(TrainerCallback):
    """Tunes hyperparameters while a Hugging Face `Trainer` trains.

    Each checkpoint of the trainer gets a file "midflight.pt", or one per process, from which the tuner
    resumes. The trainer logs the hyperparameters as "tune/value/..." and the validation loss, after each
    hyper-step. `on_hyperstep=` gets all numbers. An exception or Ctrl-C that leaves `trainer.train` ends the
    tuning.

    Args:
        trainer: the trainer, which gives the loss and the data.
        space: the hyperparameters to tune, or a function that returns them once the training begins.
        train_loader, valid_loader: batches of T1 and T2; by default those of the trainer's `train_dataset`
            and `eval_dataset`.
        finish: whether the model ends with its best weights, by `Tuner.finish`.
        resume_from: the checkpoint from which a resumed training takes the tuner; by default
            `output_dir/checkpoint-<step>`.
        options: further arguments of `Tuner`; `total_steps` is the trainer's by default.

    Attributes:
        tuner: the `Tuner` of the present or the last training; None before the first.

    Raises:
        TypeError: an option is no argument of `Tuner`.
        UnusableLoader: when the training begins: the trainer has no `eval_dataset`, or several.
        FileNotFoundError: when the training resumes: the checkpoint of a tuned training has no tuner.
        InvalidLoss: at a hyper-step: `compute_loss` returns no loss.
    """

    def __init__(
        self,
        trainer: Trainer,
        space: Space | Callable[[], Space],
        *,
        train_loader: Iterable[Any] | None = None,
        valid_loader: Iterable[Any] | None = None,
        finish: bool = True,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._trainer, self._loaders, self._resume_from = trainer, (train_loader, valid_loader), resume_from
        self._host = Host(space, finish, options)
        OnFailure(trainer, "train", self._host.detach)

    @property
    def tuner(self) -> Tuner | None:
        return self._host.tuner

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            inputs = trainer._prepare_inputs(dict(batch))
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
            with trainer.compute_loss_context_manager(), unchanged(trainer), silenced(trainer, "log"):
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
            if not isinstance(loss, Tensor):
                raise InvalidLoss(f"compute_loss must return a loss, but gave a {type(loss).__name__}.")
            return loss

        self._host.load_state_dict({})  # one loaded for a training that failed is not for this one
        if state.global_step:
            self._resume(args, state)
        train_loader, valid_loader = self._loaders
        train_loader = kwargs["train_dataloader"] if train_loader is None else train_loader
        valid_loader = self._valid_loader() if valid_loader is None else valid_loader
        total = self._host.steps_left(state.max_steps, state.global_step)
        model, loaders = trainer.model_wrapped, (train_loader, valid_loader)
        self._host.begin(model, kwargs["optimizer"], loss_fn, loaders, total, self._write)

    def _write(self, numbers: dict[str, float]) -> None:
        """Log values and validation loss; all numbers would hide the trainer's own."""
        shown = PREFIX + "value/", PREFIX + "valid_loss"
        logs = {name: x for name, x in numbers.items() if name.startswith(shown)}
        # `log` of a subclass, such as TRL's, would add its own numbers and set them to zero
        Trainer.log(self._trainer, logs)

    def _valid_loader(self) -> Iterable[Any] | None:
        data: Any = self._trainer.eval_dataset
        if data is None or not isinstance(data, dict):
            return None if data is None else self._trainer.get_eval_dataloader()
        return only([self._trainer.get_eval_dataloader(part) for part in data.values()])

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Take the tuner from a checkpoint; warn if that is of a training that was not tuned."""
        file = _file(args, self._resume_from or _checkpoint(args, state))
        if file.is_file():
            self._host.load_state_dict(torch.load(file, map_location="cpu"))
        elif any(name.startswith(PREFIX) for entry in state.log_history for name in entry):
            raise FileNotFoundError(
                f"a tuned training resumes at step {state.global_step}, but {file} does not exist; pass "
                "resume_from=, the folder of the checkpoint."
            )
        else:
            warn(
                f"the training resumes at step {state.global_step}, but {file} does not exist, so tuning "
                "begins anew; pass resume_from=, the folder of the checkpoint."
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.tuner is not None:
            folder = _checkpoint(args, state)
            folder.mkdir(parents=True, exist_ok=True)  # if several processes save
            torch.save(self._host.state_dict(), _file(args, folder))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._host.end()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _file(args: TrainingArguments, folder: str | Path) -> Path:
    """Return the file of this process in a checkpoint; each has its own place in the data."""
    return Path(folder, FILE if args.world_size == 1 else f"{args.process_index}-{FILE}")
