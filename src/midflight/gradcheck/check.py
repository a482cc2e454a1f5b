"""Compare hypergradients of a user's own training step with central differences, in float64.

Evaluations use copies of the tensors. The model, the optimiser and the space stay unchanged.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from midflight._reporting.text import aligned
from midflight._tensors import Tensors, leaves
from midflight.errors import (
    InvalidLoss,
    MidflightError,
    NotTwiceDifferentiable,
    UnreachedHyperparameter,
    UnsupportedOptimizer,
)
from midflight.gradcheck.oracles import along, derivative, stepped
from midflight.hypergrad import CLAIMS, ESTIMATORS, Estimator, estimator_for, hypergradient
from midflight.hypergrad.graph import require_twice_differentiable
from midflight.hypergrad.mixed import is_linear, knows_forward_mode
from midflight.hypergrad.problem import Problem
from midflight.nn.magnitude import held_constants
from midflight.space import Space
from midflight.tuner.binding import Bind, Binding
from midflight.tuner.live import LiveModel, Loss, require_loss, with_tensors
from midflight.tuner.mixed_partial import plain_attention
from midflight.tuner.optimizers import Optimizers, trained_parameters, unwrapped
from midflight.tuner.randomness import Randomness
from midflight.updates import State, Update, UpdateRule
from midflight.updates.base import Weight, numbers
from midflight.updates.black_box import step_on_copies

ENTRIES = 5  # how many entries of a large hyperparameter are checked
SAME_STEP = 1e-6  # the relative difference of two steps, in float64, that counts as none
FURTHER, SAME_LATER = 3, 1e-2  # further steps, and their difference: a state may be kept in half precision


@dataclass(frozen=True)
class Line:
    """The result for one entry of one hyperparameter under one estimator.

    Attributes:
        hyperparameter: its name, with the index of the entry if it has a shape.
        estimator: its name in `ESTIMATORS`, or its class with its changed settings.
        estimate: of dC2/d raw, where C2 is the validation loss after the step.
        truth: the central difference that agrees best with that of the next smaller step size.
        uncertainty: the difference between these two, plus rounding.
        passed: whether |estimate - truth| is within the estimator's claim or three times the uncertainty;
            None for an estimator without a claim for one step.
    """

    hyperparameter: str
    estimator: str
    estimate: float
    truth: float
    uncertainty: float
    passed: bool | None

    @property
    def relative_error(self) -> float:
        """|estimate - truth| / |truth|."""
        return abs(self.estimate - self.truth) / max(abs(self.truth), 1e-300)


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`; print it.

    Attributes:
        lines: the table of errors.
        hints: likely causes of errors, and conditions that limit the check.
        mixed_partial: how `Tuner` computes the mixed partial.
    """

    lines: list[Line]
    hints: list[str]
    mixed_partial: str

    @property
    def passed(self) -> bool:
        """Whether there are lines and no estimator failed its claim in any of them."""
        return bool(self.lines) and all(line.passed is not False for line in self.lines)

    def __str__(self) -> str:
        rows = [("hyperparameter", "estimator", "estimate", "central difference", "relative error", "")]
        for x in self.lines:
            verdict = "approximate" if x.passed is None else "ok" if x.passed else "WRONG"
            truth = f"{x.truth:.6g} +- {x.uncertainty:.1g}"
            rows.append(
                (
                    x.hyperparameter,
                    x.estimator,
                    f"{x.estimate:.6g}",
                    truth,
                    f"{x.relative_error:.2g}",
                    verdict,
                )
            )
        notes = [f"mixed partial: {self.mixed_partial}", *(f"hint: {hint}" for hint in self.hints)]
        return "\n".join([aligned(rows), *notes])


def check(
    model: nn.Module,
    optimizer: Optimizers,
    space: Space,
    loss_fn: Loss,
    batch: Any,
    valid_batch: Any,
    *,
    valid_loss_fn: Loss | None = None,
    bind: Bind = None,
    estimators: Sequence[str | Estimator] = ("one_step", "one_step_cheap", "t1t2"),
) -> CheckReport:
    """Compare hypergradients of your own training step with central differences, in float64.

    `mf.nn.Dropout` draws its masks at a constant rate here, so only its own relaxation is checked.

    Args:
        model: the model, in the mode in which it trains.
        optimizer: one or several that hold the model's weights, as for `Tuner`. If it has no state, three
            steps on a copy create one.
        space: the hyperparameters; five entries of a large one are checked.
        loss_fn: (model, batch) -> training loss, a scalar.
        batch: training batch; floating-point tensors in it (in tuples, lists, dicts) are cast to float64.
        valid_batch: validation batch.
        valid_loss_fn: (model, batch) -> validation loss, in eval mode; `loss_fn` by default.
        bind: as for `Tuner`.
        estimators: the estimators to compare, or their names in `ESTIMATORS`.

    Returns:
        the table of errors, hints and the method of the mixed partial; print it.

    Raises:
        BindingError, UnsupportedOptimizer, UnsupportedParameter, UnknownName: as for `Tuner`.
        TypeError: `loss_fn` cannot be called as (model, batch), or a batch is a DataLoader.
    """
    require_loss("loss_fn", loss_fn)
    for name, value in (("batch", batch), ("valid_batch", valid_batch)):
        if isinstance(value, DataLoader):
            raise TypeError(f"{name} must be one batch, but got a DataLoader; pass next(iter(loader)).")
    hints: list[str] = []
    trial = _Trial(model, optimizer, space, (loss_fn, valid_loss_fn or loss_fn), (batch, valid_batch), bind)
    chosen = [(_name(e), estimator_for(e)) for e in estimators]
    lines: list[Line] = []
    mixed_partial = "not found"
    with trial.borrowed():
        try:
            hints += trial.conditions()
            state = trial.settled_state()
            trial.require_own_rules_hold(state)
            truths = {name: trial.truth(name, state) for name in space}
            hints += _about_truths(truths)
            mixed_partial = trial.mixed_partial()
            for name, estimator in chosen:
                estimate = hypergradient(trial.problem, trial.params, trial.raws, state, estimator)
                lines += _lines(name, estimate, truths)
        except (MidflightError, RuntimeError) as error:
            hints.append(_explained(error))
    if any(line.passed is False for line in lines):
        hints.append(
            "a wrong line with a small uncertainty points to a gradient that is cut before the loss "
            "(detach, .data, .item(), no_grad, rounding)."
        )
    return CheckReport(lines, hints, mixed_partial)


@dataclass(frozen=True)
class _Truth:
    """Hold the central differences of one hyperparameter: entry -> (central difference, uncertainty)."""

    shape: tuple[int, ...]
    entries: dict[int, tuple[float, float]]


class _Trial:
    """Hold the user's step as a `Problem` in float64; use it only inside `borrowed`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        space: Space,
        losses: tuple[Loss, Loss],
        batches: tuple[Any, Any],
        bind: Bind,
    ) -> None:
        self._model, self._space = model, space
        loss_fn, valid_loss_fn = losses
        trained, optimizers = trained_parameters(model, optimizer), unwrapped(optimizer)
        binding = Binding(optimizers, space, bind)
        self._randomness = Randomness()
        live = self._live = LiveModel(model, self._randomness)
        buffers = {name: _cast(b) for name, b in model.named_buffers()}
        frozen = {name: _cast(p.detach()) for name, p in model.named_parameters() if name not in trained}
        batch, valid_batch = map(_cast, batches)
        self.params: Tensors = {name: _cast(p.detach()) for name, p in trained.items()}
        self.raws: Tensors = {name: _cast(raw.detach()) for name, raw in space.raws.items()}
        owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
        self._owners = {name: owners[id(p)] for name, p in trained.items()}
        states = {p: state for o in optimizers for p, state in o.state.items()}
        self._state: dict[str, State] = {
            name: {
                key: x.clone() if key == "step" and isinstance(x, Tensor) else _cast(x)
                for key, x in states.get(p, {}).items()
            }
            for name, p in trained.items()
        }

        def call(function: Loss, data: Any, params: Tensors, valid: bool = False) -> Tensor:
            self._randomness.rewind(self._draws)
            evaluate = live.valid_loss if valid else live.train_loss
            tensors = {**frozen, **{name: b.clone() for name, b in buffers.items()}, **params}
            return with_tensors(model, lambda: evaluate(function, data), tensors)

        def train_loss(params: Tensors, raws: Tensors) -> Tensor:
            with space.seeing(space.values(raws)):
                return call(loss_fn, batch, params)

        def valid_loss(params: Tensors) -> Tensor:
            return call(valid_loss_fn, valid_batch, params, valid=True)

        def updates(raws: Tensors) -> dict[str, Update]:
            return binding.updates(trained, space.values(raws))

        self.problem = Problem(train_loss, valid_loss, updates)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Prepare the model as for a hyper-step, in float64; restore everything at the end."""
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            with self._live.borrowed(), held_constants(), plain_attention():
                self._draws = self._randomness.snapshot()
                yield
        finally:
            torch.set_default_dtype(before)

    def conditions(self) -> Iterator[str]:
        """Yield the conditions that invalidate or limit the check."""
        with torch.no_grad():
            first, second = (self.problem.train_loss(self.params, self.raws) for _ in range(2))
        if not torch.equal(first, second):
            yield (
                "two evaluations of the loss differ, with equal random states of torch, numpy and random. It "
                "uses another generator or keeps state, so this table cannot be right."
            )
        if not bool(torch.isfinite(first)):
            yield "the training loss is not finite here."
        norms = [m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if any(m.training for m in norms):
            yield (
                "BatchNorm is in training mode. This table holds its running statistics still; `Tuner` adds "
                "what reaches the validation loss through them."
            )
        if not any(float(u.options["lr"]) for u in self.problem.updates(self.raws).values()):
            yield (
                "nothing moves at lr 0, so zeros that agree show nothing; check before the scheduler ends, "
                "or set another lr."
            )
        if not self._model.training:
            yield "the model is in eval mode; call model.train() first if you tune noise or dropout."

    def settled_state(self) -> dict[str, State]:
        """Return the optimiser's state; if it has none yet, take three steps on the copies first."""
        if any(self._state.values()):
            return self._state
        self.params, state = stepped(self.problem, self.params, self.raws, self._state, steps=3)
        return state

    def require_own_rules_hold(self, state: Mapping[str, State]) -> None:
        """Compare the user's own update rules with steps of the optimiser itself.

        The rules of midflight are compared in its tests.

        Raises:
            UnsupportedOptimizer: they differ, or the optimiser cannot step on copies.
        """
        updates = self.problem.updates(self.raws).items()
        own = {name: u for name, u in updates if not type(u.rule).__module__.startswith("midflight.")}
        grads = self.problem.train_grads(leaves(self.params), self.raws) if own else {}
        for name, update in own.items():
            before = [state.get(name, {})]
            if before[0] and not self._state[name]:  # the optimiser makes its state at the first step
                before.insert(0, {})
            for one in before:
                weight = self.params[name], grads[name].detach(), one, numbers(update.options)
                self._require_same_steps(name, update.rule, weight)

    def _require_same_steps(self, name: str, rule: UpdateRule, weight: Weight) -> None:
        """Compare a step, and three more with random gradients, which show what the states hold."""
        what, optimizer = type(rule).__name__, self._owners[name]
        param, grad, state, options = weight
        real, real_state, generator = param, state, torch.Generator().manual_seed(0)
        for n in range(1 + FURTHER):
            before = real
            try:
                (real,), (real_state,) = step_on_copies(optimizer, [(real, grad, real_state, options)])
            except Exception as error:
                raise UnsupportedOptimizer(
                    f"{what} must be compared with a step of {type(optimizer).__name__} on copies of the "
                    f"weights, without a closure, but that failed: {error!r}."
                ) from error
            ahead = rule.ahead(param, grad, state, options)
            param, state = rule.step(param, grad, state, options)
            size = (SAME_LATER if n else SAME_STEP) * float((real - before).abs().max())
            if not all(float((ours - real).abs().max()) <= size for ours in (ahead, param)):
                when = " at its first step" if not weight[2] and not n else ""
                why = " after a step from the state that it returned" if n else when
                raise UnsupportedOptimizer(
                    f"{what} must give the step of {type(optimizer).__name__}, but {name} moves "
                    f"otherwise{why}; correct the rule."
                )
            noise = torch.randn(grad.shape, generator=generator, dtype=grad.dtype).to(grad.device)
            grad = noise * grad.square().mean().sqrt()

    def truth(self, name: str, state: Mapping[str, State]) -> _Truth:
        """Return central differences of the validation loss after one step, in at most ENTRIES entries."""
        raw = self.raws[name]
        count = raw.numel()
        chosen = range(count) if count <= ENTRIES else torch.linspace(0, count - 1, ENTRIES).long().tolist()
        entries = {i: derivative(along(self.problem, self.params, self.raws, state, name, i)) for i in chosen}
        return _Truth(tuple(raw.shape), entries)

    def mixed_partial(self) -> str:
        """Return how `Tuner` computes the mixed partial."""
        values = leaves(self._space.values())

        def train_loss(params: Tensors, values: Tensors) -> Tensor:
            with self._space.seeing(values):
                return self.problem.train_loss(params, {})

        try:
            linear = is_linear(train_loss, self.params, values)
        except InvalidLoss:  # nothing reads a hyperparameter
            linear = False
        if linear and knows_forward_mode(train_loss, self.params, values):
            return "forward mode: the loss is linear in what it reads of the space"
        grads = self.problem.train_grads(leaves(self.params), leaves(self.raws), create_graph=True)
        try:
            require_twice_differentiable(grads.values())
        except NotTwiceDifferentiable:
            return "difference: the loss is differentiable once only"
        return "double backward"


def _name(estimator: str | Estimator) -> str:
    """Return the name of an estimator in the table, with the settings that differ from `ESTIMATORS`."""
    if isinstance(estimator, str):
        return estimator
    for name, known in ESTIMATORS.items():
        if estimator == known:
            return name
    kind = getattr(estimator, "__name__", type(estimator).__name__)
    if not is_dataclass(estimator):
        return str(kind)
    chosen = (f"{f.name}={x!r}" for f in fields(estimator) if (x := getattr(estimator, f.name)) != f.default)
    return f"{kind}({', '.join(chosen)})"


def _lines(estimator: str, estimate: Tensors, truths: Mapping[str, _Truth]) -> Iterator[Line]:
    claim = CLAIMS.get(estimator)
    exact = claim is not None and claim.steps == 1
    for name, truth in truths.items():
        for i, (value, uncertainty) in truth.entries.items():
            found = float(estimate[name].reshape(-1)[i])
            allowed = max(claim.tolerance * abs(value) if claim else 0.0, 3 * uncertainty)
            passed = abs(found - value) <= allowed if exact else None
            yield Line(f"{name}[{i}]" if truth.shape else name, estimator, found, value, uncertainty, passed)


def _about_truths(truths: Mapping[str, _Truth]) -> Iterator[str]:
    for name, truth in truths.items():
        entries = truth.entries.values()
        if all(value == 0 for value, _ in entries):
            yield f"{name}: the validation loss after the step does not depend on it here."
        elif any(uncertainty > 0.01 * abs(value) for value, uncertainty in entries):
            yield (
                f"{name}: the central difference is uncertain, because of kinks (ReLU, max-pooling) or a "
                "tiny derivative; use a smooth activation or a larger batch."
            )


def _explained(error: Exception) -> str:
    text = str(error)
    if isinstance(error, UnreachedHyperparameter):
        return f"{text} If it is used, its gradient is cut: float(), .item(), .data, detach or rounding."
    if isinstance(error, NotTwiceDifferentiable):
        return f"{text} `Tuner` uses differences automatically here."
    if "inplace operation" in text:
        return (
            "an in-place operation changes a tensor that a second derivative needs; write x = f(x) instead "
            f"of f_(x) or x += y, or use estimator='central_difference'. ({text.splitlines()[0]})"
        )
    if "derivative for" in text or "not implemented" in text:
        return f"an operation has no second derivative; use 'central_difference'. ({text.splitlines()[0]})"
    if "dtype" in text or "Double" in text or "Float" in text:
        return f"the model uses float32 tensors that are no parameters or buffers. ({text.splitlines()[0]})"
    return text


def _cast(data: Any) -> Any:
    if isinstance(data, Tensor):
        return data.detach().clone().double() if data.is_floating_point() else data
    if isinstance(data, Mapping):
        return {k: _cast(v) for k, v in data.items()}
    return type(data)(_cast(x) for x in data) if type(data) in (list, tuple) else data
