"""Differentiate an optimiser that has no rule, by finite differences of its `step` on copies.

    theta' = U(theta, s, g, phi)                        one step on copies
    (dU/dg)^T v = v (U(g + h) - U(g - h)) / (2 h)       two steps; right if U is elementwise
    v . dU/dphi = <v, U(phi + h) - U(phi - h)> / (2 h)  two steps per tuned option

The optimiser must be deterministic, elementwise, and treat each weight tensor by itself. Random gradients
test this when the rule is built. The gradients of a run test it again, and its real steps are compared with
those on copies (`HyperStep`).
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from midflight.errors import UnsupportedOptimizer
from midflight.updates.base import Options, State, UpdateRule, Weight, numbers, read_options, tuned_options

STEPS, OPTION_STEPS = (1e-4, 1e-1, 1e2, 1e5, 1e8), (1e-6, 1e-3, 0.3)
"""h over the size of a gradient, and of an option. The first that changes the weights by more than VISIBLE is
used, or would change them so if the step were proportional to the gradient. Those of options begin low,
because an option may have a kink, such as the largest lr so far."""
VISIBLE = 1e-8
"""A change of weights over their size that rounding in float64 does not spoil."""
SMALLEST = 1e-10
"""The least size of a gradient for h."""
SAME = 1e-6
"""Relative difference up to which two steps are the same."""
LARGE = 100.0
"""Gradients so many times as large are tried too, because an optimiser may clip."""
TRIAL, TRIAL_STEPS = ((6, 4), (5,)), 3
"""Shapes of the weights in the first test, and its steps; state matters from the second on."""


class BlackBox(UpdateRule):
    """Treats an optimiser as a black box; see the module for the formulas.

    Args:
        optimizer: it is not changed. Every option that is a number can be tuned.

    Raises:
        UnsupportedOptimizer: on random gradients it is not elementwise or not deterministic, or treats
            weights together. Or it steps another optimiser, which copies would step too.
    """

    certain: ClassVar = False
    elementwise: ClassVar = False  # its state may have any shape, so weights are neither cut nor joined

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        _require_alone(optimizer)
        group = numbers(read_options(optimizer.param_groups[0]))
        self.tunable = frozenset(name for name, x in group.items() if type(x) in (int, float))  # type: ignore[misc]
        self._try(group)

    @property
    def _name(self) -> str:
        return type(self._optimizer).__name__

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        if not torch.is_grad_enabled():
            (new,), (later,) = self._run([(param, grad, state, numbers(options))])
            return new.to(param), later
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
        size = grad.abs() + grad.abs().mean() + SMALLEST

        def moved(grad: Tensor, **changed: float) -> Tensor:
            return self._moved([(param, grad, state, {**now, **changed})])[0]

        whole = moved(grad) - moved(torch.zeros_like(grad))
        for step in STEPS:
            h = step * size
            change = moved(grad + h) - moved(grad - h)
            if _is_visible(change, param) or _is_visible(step * whole, param):
                break
        w = v * (change / (2 * h)).to(v)
        found = {}
        for name in tuned_options(options):
            for step in OPTION_STEPS:
                away = step * (abs(now[name]) or 1.0)
                low = max(0.0, now[name] - away) if now[name] >= 0 else now[name] - away
                high = now[name] + away
                change = moved(grad, **{name: high}) - moved(grad, **{name: low})
                if _is_visible(change, param):
                    break
            found[name] = (v.double() * change / (high - low)).sum().to(options[name])
        return w, found

    def require_usable(self, weights: Sequence[Weight]) -> None:
        try:
            self._judge(weights)
        except UnsupportedOptimizer:
            raise
        except Exception as error:
            raise UnsupportedOptimizer(
                f"the step of {self._name} failed on copies of the weights in float64, without a closure: "
                f"{error!r}. Use another optimiser, or add a rule to midflight.updates.RULES."
            ) from error

    def _judge(self, weights: Sequence[Weight]) -> None:
        """Raise `UnsupportedOptimizer` unless steps are deterministic, elementwise, weight by weight."""
        of_group = {id(o): numbers(o) for *_, o in weights}
        given: list[Weight] = [(p, g.double(), s, of_group[id(o)]) for p, g, s, o in weights]
        draws = torch.Generator().manual_seed(0)
        for factor in (1.0, LARGE):
            scaled: list[Weight] = [(p, factor * g, s, o) for p, g, s, o in given]
            together = self._moved(scaled)
            for (param, grad, state, options), joint in zip(scaled, together, strict=True):
                own, again = (self._moved([(param, grad, state, options)])[0] for _ in range(2))
                self._require(own, again, param, "give the same step twice, but its steps differ")
                self._require(
                    own, joint, param, "treat each weight by itself, but one changes the step of others"
                )
                half = (torch.rand(grad.shape, generator=draws) < 0.5).to(grad.device)
                other = self._moved([(param, torch.where(half, 1.5 * grad, grad), state, options)])[0]
                kept = torch.where(half, own, other)
                self._require(own, kept, param, "be elementwise, but one entry of a gradient moves others")

    def _depends_on_gradient(self, weights: Sequence[Weight]) -> bool | None:
        """Return whether the size of a gradient matters in a step; None if nothing moves."""
        if not any(bool((self._moved([w])[0] != w[0]).any()) for w in weights):
            return None
        return any(bool(self.pullback(torch.ones_like(w[0]), *w)[0].any()) for w in weights)

    def _require(self, one: Tensor, other: Tensor, before: Tensor, must: str) -> None:
        """Raise `UnsupportedOptimizer` if two steps differ."""
        if one.numel() and (one - other).abs().max() > SAME * (one - before).abs().max():
            raise UnsupportedOptimizer(
                f"an optimiser without an UpdateRule must {must}: {self._name}. Use another optimiser, or "
                "add a rule to midflight.updates.RULES."
            )

    def _try(self, options: Options) -> None:
        """Check the optimiser on random gradients; an error of its own is left to `require_usable`."""
        draws = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=draws) for shape in TRIAL]
        states: list[Any] = [{} for _ in TRIAL]
        depends = []
        for _ in range(TRIAL_STEPS):
            given = zip(params, states, strict=True)
            weights = [(p, torch.randn(p.shape, generator=draws), s, options) for p, s in given]
            try:
                self._judge(weights)
                depends.append(self._depends_on_gradient(weights))
                params, states = self._run(weights)
            except UnsupportedOptimizer:
                raise
            except Exception:
                return
        if False in depends and True not in depends:
            self.why_not_differentiable = "has a step that does not depend on the size of a gradient"  # type: ignore[misc]

    def _moved(self, weights: Sequence[Weight]) -> list[Tensor]:
        """Return the weights after one step of all on copies, in float64."""
        return self._run(weights)[0]

    def _run(self, weights: Sequence[Weight]) -> tuple[list[Tensor], list[Any]]:
        return step_on_copies(self._optimizer, weights)


def step_on_copies(
    optimizer: torch.optim.Optimizer, weights: Sequence[Weight]
) -> tuple[list[Tensor], list[Any]]:
    """Return the weights and their states after one step of all by the optimiser itself, in float64."""
    copies = [nn.Parameter(param.detach().to(torch.float64, copy=True)) for param, *_ in weights]
    groups: dict[int, dict[str, Any]] = {}
    twin = _twin(optimizer)
    for p, (_, grad, state, options) in zip(copies, weights, strict=True):
        p.grad = grad.detach().double().clone()
        if state:
            twin.state[p] = {name: _copied(value) for name, value in state.items()}
        groups.setdefault(id(options), {**_written(options), "params": []})["params"].append(p)
    twin.param_groups = list(groups.values())
    step = type(twin).step
    with torch.no_grad():  # without torch's hooks on every optimiser
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(twin)  # type: ignore[attr-defined]
    return [p.detach() for p in copies], [dict(twin.state[p]) for p in copies]


def _require_alone(optimizer: torch.optim.Optimizer) -> None:
    """Raise `UnsupportedOptimizer` if an optimiser holds another one."""
    for name, value in vars(optimizer).items():
        parts = value.values() if isinstance(value, dict) else value
        parts = parts if isinstance(value, dict | list | tuple) else [value]
        if any(isinstance(part, torch.optim.Optimizer) for part in parts):
            raise UnsupportedOptimizer(
                "an optimiser without an UpdateRule must move weights by itself, but "
                f"{type(optimizer).__name__} holds another as .{name}; pass that one, if it takes all steps, "
                "or add a rule to midflight.updates.RULES."
            )


def _is_visible(change: Tensor, param: Tensor) -> bool:
    """Return whether rounding is small beside a difference of weights."""
    return bool(change.abs().max() > VISIBLE * param.abs().max()) if change.numel() else True


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimiser of the same class and settings, without weights, state and hooks."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            setattr(twin, name, OrderedDict())
        elif name not in ("param_groups", "state", "step", "grad_scale", "found_inf"):
            setattr(twin, name, copy.deepcopy(value))
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
