"""Handle losses and hypergradients that are not finite.

The tuner leaves such a hyper-step out. After PATIENCE of them in a row it halves the length of hyper-steps,
and restores the last copy if there is one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from midflight.space import Space
from midflight.tuner.schedule import whole

PATIENCE = 3
"""Failed hyper-steps in a row after which their length is halved and the last copy is restored."""
RECOVERY = 10
"""Good hyper-steps in a row after which a halved length doubles again."""


class Rollback:
    """A copy of model, optimisers and hyperparameters, renewed at every n-th good hyper-step.

    It takes as much memory as the weights and the optimiser's state.

    Args:
        model, optimizers, space: what is copied and restored.
        every: good hyper-steps from one copy to the next, n >= 1.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], space: Space, every: int
    ) -> None:
        self._model, self._optimizers, self._space = model, list(optimizers), space
        self._every = whole("rollback", every)
        self._good = 0
        self._state: dict[str, Any] | None = None

    def good(self) -> None:
        """Count a hyper-step with finite values; renew the copy if that is due."""
        if self._good % self._every == 0:
            self._state = {
                "model": _copy(self._model.state_dict()),
                "optimizers": [_copy(optimizer.state_dict()) for optimizer in self._optimizers],
                "space": _copy(self._space.state_dict()),
            }
        self._good += 1

    def restore(self) -> bool:
        """Restore the copy and drop all gradients, so that the coming optimiser step does nothing.

        Returns:
            whether there was a copy.
        """
        if self._state is None:
            return False
        self._model.load_state_dict(self._state["model"])
        self._space.load_state_dict(self._state["space"])
        for optimizer, state in zip(self._optimizers, self._state["optimizers"], strict=True):
            options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(_copy(state))  # training must not change our copy
            for group, now in zip(optimizer.param_groups, options, strict=True):
                group.update(now)  # options stay where the user's scheduler has set them
            optimizer.zero_grad(set_to_none=True)
        return True


class NonFiniteGuard:
    """Counts hyper-steps that were not finite, and shortens the next ones.

    Args:
        rollback: restores the last copy; None if no copies are kept.

    Attributes:
        skipped: failed hyper-steps, which were left out.
        restored: how often the last good copy was restored.
        shrink: the factor on the length of hyper-steps. It halves after PATIENCE failures in a row, and
            doubles after RECOVERY good hyper-steps in a row, up to 1.
    """

    def __init__(self, rollback: Rollback | None) -> None:
        self._rollback = rollback
        self.skipped = 0
        self.restored = 0
        self.shrink = 1.0
        self._row = 0  # > 0: failures in a row; < 0: good ones

    @property
    def has_copies(self) -> bool:
        """Whether copies are kept."""
        return self._rollback is not None

    def good(self) -> None:
        """Count a hyper-step with finite values."""
        self._row = min(self._row, 0) - 1
        if self._row % RECOVERY == 0:
            self.shrink = min(1.0, 2 * self.shrink)
        if self._rollback:
            self._rollback.good()

    def failed(self) -> bool:
        """Count a failure.

        Returns:
            whether model, optimisers and hyperparameters were restored from the copy.
        """
        self._row = max(self._row, 0) + 1
        self.skipped += 1
        if self._row % PATIENCE:
            return False  # a single bad batch must not cost more than its own hyper-step
        self.shrink /= 2
        if not self._rollback or not self._rollback.restore():
            return False
        self.restored += 1
        return True

    def counts(self) -> dict[str, int]:
        """Return the counts for a logger."""
        return {"skipped": self.skipped, "restored": self.restored}

    def report(self) -> list[str]:
        """Return a sentence if hyper-steps failed."""
        if not self.skipped:
            return []
        went_back = f"; the last good copy was restored {self.restored} times" * bool(self.restored)
        steps = "hyper-step was" if self.skipped == 1 else "hyper-steps were"
        return [f"{self.skipped} {steps} left out: a loss or hypergradient was not finite{went_back}."]

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped, "restored": self.restored, "shrink": self.shrink, "row": self._row
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.restored, self.shrink, self._row = (
            state[name] for name in ("skipped", "restored", "shrink", "row")
        )


def _copy(state: Any) -> Any:
    """Return a copy of a state_dict that shares no tensor with it."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    return state
