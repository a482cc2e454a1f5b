"""Record the hyperparameters over a run, and replay them in another run."""

import copy
import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from midflight._tensors import Tensors
from midflight.errors import require_extra
from midflight.space import Space
from midflight.space.hyperparameter import Hyperparameter
from midflight.space.transforms import Simplex
from midflight.tuner.binding import Bind, Binding
from midflight.tuner.hooks import StepHooks
from midflight.tuner.optimizers import Optimizers, unwrapped
from midflight.tuner.saved import Saved
from midflight.tuner.schedule import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 1000
"""The most points of a trajectory; if there are more, every other one is dropped."""
MOST_NAMED = 20
"""A figure names the sources of a mixture if there are at most so many."""
MOST_EFFECTS = 20
"""How many of the last hyper-steps `effects` averages."""
MOST_ENTRIES = 1_000_000
"""The most entries, which are points times entries of all hyperparameters."""


class Trajectory(Saved):
    """The raw coordinates of a space over the training steps of a run."""

    SAVED = ("_steps", "_raws", "_stride", "_seen", "_effects")

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._raws: list[Tensors] = []
        self._stride = 1
        """Every how many calls of `record` one is kept."""
        self._seen = 0
        """How often `record` was called."""
        self._effects: dict[str, list[Tensor]] = {}
        """Name of a mixture -> dC2/dw minus its weighted mean, at each of the last hyper-steps."""

    def __len__(self) -> int:
        return len(self._steps)

    @torch.no_grad()
    def record(self, steps: int, space: Space) -> None:
        """Record the values that hold from optimiser step `steps` on, unless this point is thinned out."""
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        self._steps.append(steps)
        self._raws.append({name: raw.detach().to("cpu", copy=True) for name, raw in space.raws.items()})
        entries = sum(raw.numel() for raw in self._raws[0].values())
        if len(self) > max(2, min(MOST_POINTS, MOST_ENTRIES // entries)):
            self._steps, self._raws = self._steps[::2], self._raws[::2]
            self._stride *= 2

    @torch.no_grad()
    def record_effects(self, space: Space, hypergradients: Tensors) -> None:
        """Record what the sources of mixtures do for T2, from the hypergradients at the present weights."""
        for name, slope in hypergradients.items():
            transform = space[name].transform
            if isinstance(transform, Simplex):
                kept = self._effects.setdefault(name, [])
                kept.append(transform.by_share(space[name].raw, slope).to("cpu", copy=True))
                del kept[:-MOST_EFFECTS]

    def effects(self, mixture: Hyperparameter, last: int = MOST_EFFECTS) -> dict[str, tuple[float, float]]:
        """Return what each source does for T2: dC2/dw_i minus the mean over the sources by their weights.

        A negative number means that more of this source lowers the validation loss after a step. C2 and w are
        those of the last hyper-steps. Horizon "run" averages v over hyper-steps, so their errors are not
        independent, and the standard error is too small.

        Args:
            mixture: a `Mixture` that was tuned.
            last: how many hyper-steps count, at most MOST_EFFECTS.

        Returns:
            source -> (mean over the hyper-steps, its standard error), from the lowest mean.

        Raises:
            ValueError: `mixture` has had fewer than two hyper-steps, or `last` is below 2.
        """
        found = self._effects.get(mixture.name, [])[-last:] if last > 1 else []
        if len(found) < 2:
            raise ValueError(
                f"{mixture.name} must be a mixture with at least 2 hyper-steps, and last at least 2, but "
                f"there are {len(found)}, and last={last}."
            )
        slopes = torch.stack(found)
        means, errors = slopes.mean(0).tolist(), (slopes.std(0) / math.sqrt(len(found))).tolist()
        pairs = zip(_sources(mixture), zip(means, errors, strict=True), strict=True)
        return dict(sorted(pairs, key=lambda pair: pair[1][0]))

    def plot_effects(self, mixture: Hyperparameter, last: int = MOST_EFFECTS) -> "Figure":
        """Draw `effects` as bars with standard errors; the sources that help T2 most are on top.

        Raises:
            MissingExtra: matplotlib is not installed.
            ValueError: as for `effects`.
        """
        require_extra("matplotlib", "study")
        from matplotlib.figure import Figure

        found = list(self.effects(mixture, last).items())
        if len(found) > MOST_NAMED:
            found = found[: MOST_NAMED // 2] + found[-(MOST_NAMED // 2) :]
        names = [name for name, _ in found]
        means, errors = zip(*(pair for _, pair in found), strict=True)
        fig = Figure(figsize=(5, 0.8 + 0.25 * len(names)), layout="constrained")
        ax = fig.subplots()
        ax.barh(names, means, xerr=errors)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.invert_yaxis()
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel("change of the validation loss per unit of weight, from the mean")
        return fig

    def at(self, share: float) -> Tensors:
        """Return the raw coordinates after a share of the recorded steps, interpolated linearly.

        Args:
            share: in [0, 1].

        Returns:
            name -> tensor with entries in [0, 1].

        Raises:
            ValueError: nothing was recorded, or the share is outside [0, 1].
        """
        if not self._steps:
            raise ValueError("a trajectory must hold at least one record to be followed, but it is empty.")
        if not 0 <= share <= 1:
            raise ValueError(f"0 <= share <= 1 must hold, but share={share}.")
        steps = share * self._steps[-1]
        after = bisect_left(self._steps, steps)
        before = max(0, after - 1)
        gap = self._steps[after] - self._steps[before]
        part = (steps - self._steps[before]) / gap if gap else 0.0
        return {name: raw.lerp(self._raws[after][name], part) for name, raw in self._raws[before].items()}

    def values(self, space: Space) -> dict[str, list[float]]:
        """Return the recorded values as columns, which `pandas.DataFrame` takes.

        Args:
            space: that of the tuner.

        Returns:
            "step" and the name of each hyperparameter -> one number per record; means of tensors. Of a
            mixture, "name/source" -> weight.
        """
        found: dict[str, list[float]] = {"step": [float(step) for step in self._steps]}
        for name in space:
            entry = space[name]
            values = [entry.transform.value(raws[name]) for raws in self._raws]
            if entry.spec.is_shares:
                weights = torch.stack(values).T.tolist() if values else [[] for _ in entry.parts()]
                found |= dict(zip(entry.parts(), weights, strict=True))
            else:
                found[name] = [float(v.mean()) for v in values]
        return found

    def plot(self, space: Space) -> "Figure":
        """Draw each hyperparameter over the optimiser steps.

        Args:
            space: that of the tuner; its scales and ranges are those of the axes.

        Returns:
            a figure of matplotlib; a notebook shows it, `savefig` writes it.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        require_extra("matplotlib", "study")
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter

        columns = self.values(space)
        fig = Figure(figsize=(6, 0.8 + 1.4 * len(space)), layout="constrained")
        axes = fig.subplots(len(space), sharex=True, squeeze=False)[:, 0]
        for ax, name in zip(axes, space, strict=True):
            spec = space[name].spec
            if spec.is_shares:
                labels = _sources(space[name])
                weights = [columns[part] for part in space[name].parts()]
                ax.stackplot(columns["step"], weights, step="post", labels=labels)
                if len(labels) <= MOST_NAMED:
                    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
            else:
                ax.step(columns["step"], columns[name], where="post")
            ax.set_yscale("log" if spec.log else "logit" if spec.logit else "linear")
            if spec.logit:
                ax.yaxis.set_minor_formatter(NullFormatter())  # its labels would lie on each other
            ax.set_ylim(spec.low, spec.high)
            ax.set_ylabel(name)
        axes[-1].set_xlabel("optimiser step")
        return fig


def _sources(mixture: Hyperparameter) -> list[str]:
    """Return the names of the sources, without that of the mixture."""
    return [part.removeprefix(f"{mixture.name}/") for part in mixture.parts()]


class Replay(Saved):
    """Makes another training follow the trajectory of a tuned one, for example one on T1 and T2.

    Source: Luketina et al. 2016, section 4, who retrain with T2 once the hyperparameters are found.

    Build it in place of the tuner. It moves the space after each `optimizer.step()`, and the loop needs no
    change.

    Args:
        trajectory: `tuner.trajectory`.
        space: hyperparameters of the same names and shapes, which the model reads.
        optimizer: the torch optimiser that trains the model.
        bind: as for the tuner.
        total_steps: optimiser steps of this run; may differ from those of the tuned run.

    Raises:
        SpaceError: the space has other hyperparameters than the trajectory.
        BindingError: as for the tuner.
        ValueError: the trajectory is empty, or total_steps < 1.
    """

    SAVED = ("_steps", "_trajectory", "_binding")

    def __init__(
        self,
        trajectory: Trajectory,
        space: Space,
        optimizer: Optimizers,
        *,
        bind: Bind = None,
        total_steps: int,
    ) -> None:
        self._trajectory, self._space = copy.deepcopy(trajectory), space
        self._total = whole("total_steps", total_steps)
        optimizers = unwrapped(optimizer)
        self._binding = Binding(optimizers, space, bind)
        self._steps = 0
        self._space.requires_grad_(False)
        self._move()
        self._binding.attach(self.detach, moves=False)
        self._hooks = StepHooks(
            optimizers, lambda o, _: self._binding.write(o), self._after_step, self._binding.restore
        )

    def detach(self) -> None:
        """Stop following; the space and the optimiser keep their values."""
        self._hooks.remove()
        self._binding.detach()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        super().load_state_dict(state)
        self._move()

    def _after_step(self, _: torch.optim.Optimizer, last: bool) -> None:
        self._binding.restore()
        if last:
            self._steps += 1
            self._move()

    @torch.no_grad()
    def _move(self) -> None:
        for name, raw in self._trajectory.at(min(1.0, self._steps / self._total)).items():
            self._space[name].raw.copy_(raw)
