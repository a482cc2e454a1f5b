"""Notice a run that diverges, and go back to the best weights before it is lost.

Options that set how a step is taken, such as lr but not weight_decay, can ruin a run within a few steps.
While such an option is tuned, each hyper-step compares the validation loss at the weights with that at their
average on the same batch, and the average with the best one so far. The first steps of a run are checked,
too. At each hyper-step and each update of the average, the gradient must be finite.

A run that diverges goes on from the best average so far, which may be the initial weights. The options that
can ruin a run step back, and rise again only slowly. Other hyperparameters return to the values that they had
with that average.

A run whose first steps ruin its initial weights begins again. At the last of `total_steps`, the best average
replaces weights that validate worse. If no such option is tuned, only gradients that are not finite at a
hyper-step send a run back.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from midflight._tensors import Tensors, write
from midflight.space import Space
from midflight.tuner.horizon import Averaged
from midflight.tuner.movement import Beginning, Speed
from midflight.tuner.saved import Saved
from midflight.tuner.sharded import WHOLE, Parts
from midflight.tuner.step_options import LENGTHS, RISKY, stepped_back

LOOKS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64})
"""Optimiser steps after which the first part of a run is checked."""
JUMP, START = 1.0, 0.1
"""A run diverges if C2(theta) > (1 + JUMP) C2(average). Early in a run: if C2(theta) > (1 + START) C2(initial
weights). Both losses are of the same batch."""
RISEN, TWICE = 0.25, 2
"""A run has got worse if C2(average) > (1 + RISEN) C2(best average), on the same batch, at TWICE hyper-steps
in a row."""
MARGIN = 0.05
"""MARGIN times the fall of C2 since the start is added to these limits at hyper-steps."""
SLOWER = 0.5
"""The factor on lr after a run has got worse."""
DEAD, FALLEN = 0.5, 0.2
"""A run is lost if the number of weight tensors with a gradient of exactly 0 has grown by more than DEAD of
all since the first step, not all are 0, and C2 has fallen by less than FALLEN of its initial value."""
MOST_IN_VAIN = 8
"""The most returns after divergences without a better average in between. Beyond it the guard acts only if
weights are not finite."""
LEARNS = 0.5
"""A run that began again with a lower lr gets its lr back if, in as many steps, C2 falls by less than this
share of its fall before."""
WORSE_AT_END, BATCHES_AT_END = 0.05, 4
"""The last weights are replaced if their mean loss on BATCHES_AT_END batches of T2 is above (1 +
WORSE_AT_END) times that of the best average."""
BELOW, RISE = 0.7, 0.01
"""lr stays below BELOW times the value with which the run diverged. This bound rises by the factor 1 + RISE
per hyper-step."""


class Guard(Saved):
    """Restores the best average of a run that diverges, and makes risky options step back.

    `Averaged` keeps the best average, and `Beginning` the initial weights.

    Args:
        space: the hyperparameters.
        horizon: keeps the best average.
        params, buffers: return the weights and the model's buffers, name -> live tensor.
        optimizers: of the weights.
        options: hyperparameter -> option; only options that set how a step is taken.
        parts: sums over the processes, if the weights are sharded.

    Attributes:
        restored: how often the run went back.
        replaced: whether the best average replaced the last weights.
    """

    SAVED = (
        "beginning", "restored", "replaced", "_initial", "_worse", "_in_vain", "_at_best", "_trial",
        "_highest", "_zero",
    )  # fmt: skip

    def __init__(
        self,
        space: Space,
        horizon: Averaged,
        params: Callable[[], Tensors],
        buffers: Callable[[], Tensors],
        optimizers: Sequence[torch.optim.Optimizer],
        options: Mapping[str, str],
        parts: Parts = WHOLE,
    ) -> None:
        self._space, self._horizon, self._optimizers = space, horizon, list(optimizers)
        self._parts = parts
        self._params, self._buffers, self._options = params, buffers, dict(options)
        self.restored, self.replaced = 0, False
        self._initial: float | None = None
        """C2 at the initial weights."""
        self._worse = 0
        """For how many hyper-steps in a row the average has been worse than the best."""
        self._in_vain = 0
        """How often the run has gone back since the last better average."""
        self._at_best: Tensors = {}
        """The raw coordinates at the time of the best average."""
        self._highest: Tensors = {}
        """Name of a risky option -> its largest allowed value."""
        self._zero = 0
        """How many weight tensors had a gradient of 0 at the first step."""
        self._trial: tuple[int, float, Tensors] | None = None
        """Steps, C2 and raw coordinates when the run began again, until the two can be compared."""
        self.beginning, self._speed = Beginning(params, buffers, parts), Speed(parts)
        self._lengths = [name for name, option in self._options.items() if option in LENGTHS]

    @property
    def watching(self) -> bool:
        """Whether the guard checks this run: an option that sets how a step is taken is tuned."""
        return bool(self._options)

    def begin(self, loss: float, grads: Tensors) -> None:
        """Note the initial weights, C2 there, and the gradients of the first step.

        Does nothing if the loss is not finite; the next step tries again.
        """
        if not math.isfinite(loss):
            return
        self._initial = loss
        self._horizon.keep(loss, self._params(), self._buffers())
        self._at_best = self._raws()
        self._zero = self._largest(grads).count(0)
        if "lr" in self._options.values():
            self.beginning.keep(self._raws())

    @property
    def begun(self) -> bool:
        return self._initial is not None

    def lost(self, grads: Tensors, look: Callable[[], float | None]) -> bool:
        """Return whether gradients of a step show that the weights are lost.

        Gradients of 0 show it only if C2 has hardly fallen: a loss of 0, a part of the model that is not used
        and a frozen layer have such gradients too.

        Args:
            grads: of the weights.
            look: returns C2 at the weights, on the batch of `begin` if that is known.
        """
        sizes = self._largest(grads)
        if not all(map(math.isfinite, sizes)):
            return True
        zero = sizes.count(0)
        if not self._zero + DEAD * len(sizes) < zero < len(sizes):
            return False
        assert self._initial is not None
        loss = look()
        return loss is not None and not loss < self._initial - FALLEN * abs(self._initial)

    def diverged_early(self, loss: float | None) -> bool:
        """Return whether C2 at the weights is too far above the initial one; False for NaN, as of a bad
        batch."""
        assert self._initial is not None
        return loss is not None and loss > self._initial + START * abs(self._initial)

    def diverged(self, loss: float, at_average: float) -> bool:
        """Return whether the run diverges, given C2 at the weights and at their average, on one batch."""
        if not math.isfinite(at_average):  # the batch may be to blame
            return False
        return not loss - at_average <= JUMP * abs(at_average) + self._margin()

    def got_worse(self, at_average: float, at_best: float) -> bool:
        """Return whether the run has got worse, given C2 at the average and at the best one, on one batch."""
        risen = at_average - at_best > RISEN * abs(at_best) + self._margin()
        self._worse = self._worse + 1 if risen else 0
        return self._worse >= TWICE

    def end(self, compare: Callable[[Tensors, int], tuple[float, float]]) -> None:
        """Replace the last weights by the best average if that validates better.

        Args:
            compare: (other weights, n) -> C2 at the weights and at the others, means over n batches of T2.
        """
        if not self._best_fits():
            return
        at_end, at_best = compare(self._horizon.earlier(), BATCHES_AT_END)
        if math.isfinite(at_best) and not at_end <= at_best + WORSE_AT_END * abs(at_best):
            self._take_best()
            self.replaced = True

    def note_best(self) -> None:
        """Take in that the average now is the best so far."""
        self._at_best = self._raws()
        self._in_vain = 0

    def _margin(self) -> float:
        assert self._initial is not None
        return MARGIN * max(0.0, self._initial - self._horizon.best_loss)

    @torch.no_grad()
    def _take_best(self) -> None:
        """Give the model the weights and buffers of the best average."""
        for name, value in {**self._params(), **self._buffers()}.items():
            if name in self._horizon.best:
                write(self._horizon.best[name], value)

    def _best_fits(self) -> bool:
        """Return whether there is a finite best average of all present weights."""
        best, params = self._horizon.best, self._params()
        fits = all(name in best and best[name].shape == p.shape for name, p in params.items())
        finite = self._parts.all_finite(best[name] for name in params if name in best)
        return fits and finite  # a buffer may hold -inf, as a mask does

    @torch.no_grad()
    def restore(self, diverged: bool = True) -> bool:
        """Go back to the best average, with a new state of the optimisers and gradients of 0.

        Args:
            diverged: whether the run diverged, so that risky options must step back from their present
                values and stay below them. Otherwise it got worse, and lr goes on at SLOWER times the smaller
                of its values now and at the best average.

        Returns:
            whether the run went back. False: there is no finite best average, or MOST_IN_VAIN is exceeded.
        """
        if not self._best_fits():
            return False
        self._in_vain += diverged
        if self._in_vain > MOST_IN_VAIN and self._parts.all_finite(self._params().values()):
            return False
        self._take_best()
        self._forget_steps()
        for name, raw in self._space.raws.items():
            option, transform = self._options.get(name), self._space[name].transform
            if option == "lr" and not diverged:
                value = SLOWER * torch.minimum(transform.value(raw), transform.value(self._at_best[name]))
                raw.copy_(transform.raw(value).clamp(0, 1))
                self._at_best[name] = raw.clone()
            elif option in RISKY and diverged:
                value = transform.value(raw)
                self._highest[name] = BELOW * value if option == "lr" else value
                raw.copy_(transform.raw(stepped_back(option, value)).clamp(0, 1))
            elif name in self._at_best:
                raw.copy_(self._at_best[name])
        return True

    @torch.no_grad()
    def begin_again(self, look: Callable[[], float | None]) -> bool:
        """Go back to the initial weights, with a lower lr, if the first steps have moved them too far.

        Args:
            look: returns C2 at the weights, on the batch of `begin`; None if that is not known.

        Returns:
            whether the run went back; False also if C2 is not known.
        """
        factor = self.beginning.slower()
        loss = None if factor is None else look()
        if factor is None or loss is None:
            return False
        assert self._initial is not None
        self._trial = self.beginning.steps, loss, self._raws()
        self.beginning.restore()
        self._forget_steps()
        for name, raw in self._space.raws.items():
            transform = self._space[name].transform
            if self._options.get(name) == "lr":
                value = transform.value(raw)
                self._highest[name] = BELOW * value
                raw.copy_(transform.raw(factor * value).clamp(0, 1))
            else:
                raw.copy_(self.beginning.raws[name])
        self._horizon.keep(self._initial, self._params(), self._buffers())
        self._at_best = self._raws()
        return True

    @property
    def trial_due(self) -> bool:
        """Whether a run that began again has taken as many steps as before."""
        return self._trial is not None and self.beginning.steps >= self._trial[0]

    @torch.no_grad()
    def end_trial(self, loss: float | None) -> None:
        """Give lr its value back if the run has learnt much less since it began again; `loss` is C2 now."""
        assert self._trial is not None
        assert self._initial is not None
        (_, before, raws), self._trial = self._trial, None
        if loss is None or self._initial - loss >= LEARNS * (self._initial - before):
            return
        for name, option in self._options.items():
            if option == "lr":
                self._space.raws[name].copy_(raws[name])
                self._highest.pop(name, None)
        self.beginning.end()

    def _forget_steps(self) -> None:
        """Clear the optimisers' state and the gradients, because earlier weights are restored."""
        self.restored += 1
        self._worse = 0
        self.beginning.count_anew()
        for optimizer in self._optimizers:
            optimizer.state.clear()  # old second moments would make the first steps too long
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if p.grad is not None:
                    p.grad.zero_()

    def begin_step(self) -> None:
        """Note the weights before a step that has a hyper-step."""
        if self._lengths:
            self._speed.begin(self._params())

    def paced(
        self, hypergradients: Tensors, steps: int, factor: float = 1.0
    ) -> tuple[Tensors, dict[str, float]]:
        """Judge by the length of the present step how far lr and momentum may rise.

        Args:
            hypergradients: name -> tensor.
            steps: the number of the present step.
            factor: of the loop's schedule on lr in this step.

        Returns:
            the hypergradients to use: after a fast step, without those that would raise lr or momentum. And
            the factors by which lr and momentum rise further than usual, by name; above 1 after a slow step.
        """
        if not self._lengths:
            return hypergradients, {}
        longer = [n for n in self._lengths if n in hypergradients and bool((hypergradients[n] <= 0).all())]
        pace = self._speed.pace(self._params(), steps, factor)
        if pace == 0:
            return {name: g for name, g in hypergradients.items() if name not in longer}, {}
        return hypergradients, dict.fromkeys(longer, pace)

    @torch.no_grad()
    def limit(self) -> None:
        """Keep risky options below their bounds after each move. The bound of lr then rises by RISE."""
        for name, highest in self._highest.items():
            raw, transform = self._space.raws[name], self._space[name].transform
            raw.copy_(torch.minimum(raw, transform.raw(highest).clamp(0, 1)))
            if self._options[name] == "lr":
                highest.mul_(1 + RISE)

    def _raws(self) -> Tensors:
        return {name: raw.detach().clone() for name, raw in self._space.raws.items()}

    def _largest(self, tensors: Tensors) -> list[float]:
        """Return the size of the largest entry of each tensor; one synchronisation with a GPU."""
        present = [name for name, t in tensors.items() if t.numel()]
        sizes = torch._foreach_norm([tensors[name] for name in present], math.inf)
        own = torch.stack([size.to(sizes[0]) for size in sizes]).tolist() if sizes else []
        if self._parts.count == 1:
            return own
        of_parts = dict.fromkeys(tensors, 0.0) | dict(zip(present, own, strict=True))
        return self._parts.reduced(of_parts.values(), largest=True)
