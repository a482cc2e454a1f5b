"""An optimiser without a rule of its own: its `step`, run on copies, gives theta' and its derivatives.

    theta' = U(theta, s, g, phi)                        one step on copies
    (dU/dg)^T v = v (U(g + h) - U(g - h)) / (2 h)       two steps; right if U is elementwise
    v . dU/dphi = <v, U(phi + h) - U(phi - h)> / (2 h)  two steps per tuned option

The optimiser must be deterministic, elementwise, and treat each weight tensor by itself. That is checked
with random gradients when the rule is built, and with the first gradients of the run.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from midflight.errors import UnsupportedOptimizer
from midflight.updates.base import Options, State, UpdateRule, Weight, numbers, read_options, tuned_options

STEP, OPTION_STEP = 1e-4, 1e-6
"""h over the size of a gradient, and of an option. Copies are in float64, so rounding does not matter. The
second is small because an option may have a kink at its value, such as the largest lr so far."""
SAME = 1e-6
"""Relative difference up to which two steps are the same."""
TRIAL = (6, 4), (5,)
"""Shapes of the weights of the trial when the rule is built."""
TRIAL_STEPS = 3
"""The trial takes this many steps, because state matters from the second on."""


class BlackBox(UpdateRule):
    """The step of an optimiser that is known by its `step` alone; see the module for the formulas.

    Args:
        optimizer: it is not changed. Every option that is a number can be tuned.

    Raises:
        UnsupportedOptimizer: on random gradients it is not elementwise or not deterministic, or treats
            weights together.
    """

    elementwise: ClassVar = False  # its state may have any shape, so weights are neither cut nor joined

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        group = read_options(optimizer.param_groups[0])
        is_number = {
            n: isinstance(x, float) or (isinstance(x, Tensor) and not x.ndim) for n, x in group.items()
        }
        self.tunable = frozenset(name for name, is_one in is_number.items() if is_one)  # type: ignore[misc]
        self._try(numbers(group))

    @property
    def _name(self) -> str:
        return type(self._optimizer).__name__

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        raise UnsupportedOptimizer(
            f"this estimator must differentiate several steps, but {self._name} has no UpdateRule; use an "
            'estimator of one step, such as "one_step".'
        )

    def ahead(self, param: Tensor, grad: Tensor, state: State, options: Options) -> Tensor:
        return self._moved([(param, grad, state, numbers(options))])[0].to(param)

    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        grad, now = grad.double(), numbers(options)

        def moved(grad: Tensor, **changed: float) -> Tensor:
            return self._moved([(param, grad, state, {**now, **changed})])[0]

        h = STEP * (grad.abs() + grad.abs().mean() + torch.finfo(grad.dtype).tiny)
        w = v * ((moved(grad + h) - moved(grad - h)) / (2 * h)).to(v)
        found = {}
        for name in tuned_options(options):
            h_option = OPTION_STEP * (abs(now[name]) or 1.0)
            low = max(0.0, now[name] - h_option) if now[name] >= 0 else now[name] - h_option
            high = now[name] + h_option
            change = (moved(grad, **{name: high}) - moved(grad, **{name: low})) / (high - low)
            found[name] = (v.double() * change).sum().to(options[name])
        return w, found

    def require_usable(self, weights: Sequence[Weight]) -> None:
        try:
            self._judge(weights)
        except UnsupportedOptimizer:
            raise
        except Exception as error:
            raise UnsupportedOptimizer(
                "an optimiser without an UpdateRule must take a step without a closure, on copies; "
                f"{self._name} does not: {error!r}. Use another optimiser, or add a rule to "
                "midflight.updates.RULES."
            ) from error

    def _judge(self, weights: Sequence[Weight]) -> None:
        """Raise `UnsupportedOptimizer` if these steps are not of the kind that the formulas need."""
        weights = [(p, g.double(), s, numbers(o)) for p, g, s, o in weights]
        together = self._moved(weights)
        alone = [self._moved([weight])[0] for weight in weights]
        generator = torch.Generator().manual_seed(0)
        for (param, grad, state, options), joint, own in zip(weights, together, alone, strict=True):
            again = self._moved([(param, grad, state, options)])[0]
            self._require(own, again, param, "give the same step twice, but its step is random")
            self._require(
                own, joint, param, "treat each weight by itself, but one changes the step of others"
            )
            half = (torch.rand(grad.shape, generator=generator) < 0.5).to(grad.device)
            other = self._moved([(param, torch.where(half, 1.5 * grad, grad), state, options)])[0]
            kept = torch.where(half, own, other)
            self._require(own, kept, param, "be elementwise, but one entry of a gradient moves others")
        if not any(map(self._feels_the_gradient, weights)):
            self.why_not_differentiable = "does not take the size of a gradient into account"  # type: ignore[misc]

    def _feels_the_gradient(self, weight: Weight) -> bool:
        return bool(self.pullback(torch.ones_like(weight[0]), *weight)[0].any())

    def _require(self, one: Tensor, other: Tensor, before: Tensor, must: str) -> None:
        """Raise `UnsupportedOptimizer` if two steps differ."""
        if one.numel() and (one - other).abs().max() > SAME * (one - before).abs().max():
            raise UnsupportedOptimizer(
                f"an optimiser without an UpdateRule must {must}: {self._name}. Use another optimiser, or "
                "add a rule to midflight.updates.RULES."
            )

    def _try(self, options: Options) -> None:
        """Check the optimiser on random gradients; leave an error of its own to the first real step."""
        draws = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=draws) for shape in TRIAL]
        states: list[Any] = [{} for _ in TRIAL]
        for _ in range(TRIAL_STEPS):
            weights = [
                (p, torch.randn(p.shape, generator=draws), s, options)
                for p, s in zip(params, states, strict=True)
            ]
            try:
                self._judge(weights)
                params, states = self._run(weights)
            except UnsupportedOptimizer:
                raise
            except Exception:
                return

    def _moved(self, weights: Sequence[Weight]) -> list[Tensor]:
        """Return the weights after one step of all on copies, in float64."""
        return self._run(weights)[0]

    def _run(self, weights: Sequence[Weight]) -> tuple[list[Tensor], list[Any]]:
        """Return the weights and their states after one step of all on copies, in float64."""
        copies = [nn.Parameter(param.detach().to(torch.float64, copy=True)) for param, *_ in weights]
        groups: dict[int, dict[str, Any]] = {}
        twin = _twin(self._optimizer)
        for p, (_, grad, state, options) in zip(copies, weights, strict=True):
            p.grad = grad.detach().double().clone()
            if state:
                twin.state[p] = {name: _copied(value) for name, value in state.items()}
            groups.setdefault(id(options), {**_written(options), "params": []})["params"].append(p)
        twin.param_groups = list(groups.values())
        with torch.no_grad():
            type(twin).step(twin)
        return [p.detach() for p in copies], [dict(twin.state[p]) for p in copies]


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimiser of the same class and settings, without weights, state and hooks."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            setattr(twin, name, OrderedDict())
        elif name not in ("param_groups", "state", "step", "grad_scale", "found_inf"):
            setattr(twin, name, _copied(value))
    twin.state = defaultdict(dict)
    return twin


def _written(options: Options) -> dict[str, Any]:
    """Return the options as in a `param_group`; the inverse of `read_options`."""
    group = {name: _copied(value) for name, value in options.items() if name not in ("beta1", "beta2")}
    if "beta1" in options:
        group["betas"] = options["beta1"], options["beta2"]
    return group


def _copied(value: Any) -> Any:
    """Return a copy of tensors, in float64, and of containers; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone().double() if value.is_floating_point() else value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {key: _copied(entry) for key, entry in value.items()}
    return value
