"""The way of the hyperparameters through a run, and following it in another one."""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch

from midflight.binding import Bind, Binding
from midflight.space import Space
from midflight.trees import Tensors

MOST_POINTS = 1000
"""A longer trajectory is thinned: every other point is dropped."""
MOST_ENTRIES = 1_000_000
"""The same by the number of points times hyperparameters."""


class Trajectory:
    """The raw coordinates of a space over the training steps of a run."""

    def __init__(self) -> None:
        self._calls: list[int] = []
        self._raws: list[Tensors] = []
        self._stride = 1
        self._seen = 0

    def __len__(self) -> int:
        return len(self._calls)

    @torch.no_grad()
    def record(self, calls: int, space: Space) -> None:
        """The values from here on, `calls` training steps into the run."""
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        self._calls.append(calls)
        self._raws.append({name: raw.detach().to("cpu", copy=True) for name, raw in space.raws.items()})
        entries = sum(raw.numel() for raw in self._raws[0].values())
        if len(self) > max(2, min(MOST_POINTS, MOST_ENTRIES // entries)):
            self._calls, self._raws = self._calls[::2], self._raws[::2]
            self._stride *= 2

    def at(self, share: float) -> Tensors:
        """Raw coordinates when this share of the recorded steps, in [0, 1], was over; linear in between.

        Raises:
            ValueError: nothing was recorded, or the share is outside [0, 1].
        """
        if not self._calls:
            raise ValueError("a trajectory must hold at least one record to be followed, but it is empty.")
        if not 0 <= share <= 1:
            raise ValueError(f"0 <= share <= 1 must hold, but share={share}.")
        calls = share * self._calls[-1]
        after = bisect_left(self._calls, calls)
        before = max(0, after - 1)
        gap = self._calls[after] - self._calls[before]
        part = (calls - self._calls[before]) / gap if gap else 0.0
        return {name: raw.lerp(self._raws[after][name], part) for name, raw in self._raws[before].items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to follow it later, or to go on recording."""
        return {
            "calls": list(self._calls),
            "raws": list(self._raws),
            "stride": self._stride,
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._calls, self._raws = list(state["calls"]), list(state["raws"])
        self._stride, self._seen = state["stride"], state["seen"]


class Replay:
    """Lets another training follow the trajectory of a tuned one, such as one on T1 and T2 together.

    Source: Luketina et al. 2016, section 4, retrain with T2 once the hyperparameters are found.

    Build it where the tuner stood; it moves the space after each `optimizer.step()`.

    Args:
        trajectory: `tuner.trajectory`.
        space: hyperparameters of the same names and shapes; the model reads them.
        optimizer: trains the model.
        bind: as for the tuner.
        total_steps: of this run; it may differ from that of the tuned one.

    Raises:
        SpaceError: the space has other hyperparameters than the trajectory.
        BindingError: as for the tuner.
        ValueError: the trajectory is empty, or total_steps < 1.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        space: Space,
        optimizer: torch.optim.Optimizer,
        *,
        bind: Bind = (),
        total_steps: int,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps >= 1 must hold, but total_steps={total_steps}.")
        self._trajectory, self._space, self._total = trajectory, space, total_steps
        self._binding = Binding(optimizer, space, bind)
        self._steps = 0
        self._space.requires_grad_(False)
        self._move()
        self._hook = optimizer.register_step_post_hook(lambda *_: self._step())

    def detach(self) -> None:
        """Stop following; the space keeps its values."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume."""
        return {"steps": self._steps, "trajectory": self._trajectory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self._steps = state["steps"]
        self._trajectory.load_state_dict(state["trajectory"])
        self._move()

    def _step(self) -> None:
        self._steps += 1
        self._move()

    def _move(self) -> None:
        self._space.load_state_dict({"raw": self._trajectory.at(min(1.0, self._steps / self._total))})
        self._binding.write()
