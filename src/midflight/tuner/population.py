"""Train and tune many small models as one program, with stacked weights and batched functions.

Members do not affect each other, so the gradient of the sum of their losses contains the gradient of each. In
a small network, launching operations takes most of the time; here each is launched once for all members. A
hyper-step is that of `Tuner`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from midflight._tensors import Tensors, detach, leaves
from midflight.errors import BindingError, UnsupportedOptimizer, UnsupportedParameter
from midflight.hypergrad import Estimator, estimator_for
from midflight.hypergrad.problem import Step, gradient, recorded, require_reached
from midflight.space import Space
from midflight.tuner.binding import Bind, Binding
from midflight.tuner.data import EndlessBatches
from midflight.tuner.hyper_optimizer import Move, SignSteps
from midflight.tuner.live import evaluating, with_tensors
from midflight.tuner.optimizers import trained_parameters
from midflight.tuner.randomness import Randomness
from midflight.tuner.saved import Saved, copied
from midflight.tuner.schedule import Schedule, schedule_for, whole
from midflight.tuner.sharded import is_sharded
from midflight.updates import State, Update, UpdateRule, Updates, compiled, rule_for

Loss = Callable[[nn.Module, Any], Tensor]


class Population(Saved):
    """n trainings with their own weights, batches and hyperparameters, each tuned as by `Tuner`.

    The horizon is "step" (see `Tuner`). The method `step` takes the training step as well.

    Args:
        n: number of members, n >= 1.
        build: space -> model; called once for each member, under its seed. All randomness of the model in
            training must come from torch (`torch.randn_like`, dropout). Then each member draws its own.
        space: the hyperparameters; every member begins at its values, or at `starts`.
        optimizer: parameters -> the torch optimiser whose step is taken, such as
            `partial(torch.optim.Adam, lr=1e-3)`.
        loss_fn: (model, batch of one member) -> training loss, a scalar.
        valid_loss_fn: (model, batch of one member) -> validation loss, a scalar, in eval mode; `loss_fn` by
            default.
        valid_loader: validation batches whose tensors have n as their first dimension.
        starts: name -> n values to begin at.
        seeds: n seeds of the initial weights; 0 to n - 1 by default.
        exploit: hyper-steps between two exploits. At an exploit the worst fifth of the members copies the
            weights, optimiser state and hyperparameters of the best fifth. Members are ranked by the mean
            validation loss since the last exploit. Their own gradients then move the copies apart again.
            None: members never copy.
        bind, schedule, estimator, total_steps, hyper_optimizer: as for `Tuner`.
        compile: whether torch.compile fuses the dozen operations of an optimiser step into one pass over
            memory, and likewise the two passes over the optimiser's state in a hyper-step. This works for
            Adam and AdamW; other optimisers are not compiled. It takes half a minute at first, and needs a
            C++ compiler, or Triton on a GPU. torch compiles two programs per network and at most eight in a
            process; `torch.compiler.reset()` removes them.

    Raises:
        ValueError: n < 1, there are not n starts or seeds, or another number is out of its range.
        BindingError: as for `Tuner`, or a bound hyperparameter is not a single number.
        UnsupportedOptimizer: the optimiser has no update rule, or mixes the entries of a weight (Muon).
        UnsupportedParameter: the model has buffers, such as running averages, or complex or sharded weights.
        NoCompiler: torch.compile does not work here.

    Source: population-based training, Jaderberg et al. 2017, with hypergradients in place of perturbations.
    """

    SAVED = (
        "params", "state", "_move_raws", "schedule", "_batches", "_randomness", "_calls", "_moves", "_hyper",
        "_seen",
    )  # fmt: skip

    SHARE = 0.2
    """The share of members that copy at an exploit, and the share that is copied."""

    def __init__(
        self,
        n: int,
        build: Callable[[Space], nn.Module],
        space: Space,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        *,
        loss_fn: Loss,
        valid_loader: Iterable[Any],
        valid_loss_fn: Loss | None = None,
        starts: Mapping[str, Sequence[Any]] | None = None,
        seeds: Sequence[int] | None = None,
        exploit: int | None = None,
        bind: Bind = None,
        schedule: Schedule | int | None = None,
        estimator: str | Estimator = "one_step",
        total_steps: int | None = None,
        hyper_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = SignSteps,
        compile: bool = False,
    ) -> None:
        seeds = range(n) if seeds is None else seeds
        _require_numbers(n, {"seeds": seeds, **(starts or {})}, exploit, total_steps)
        self.n, self.space, self._build = n, space, build
        self._loss, self._validate, self._exploit = loss_fn, valid_loss_fn or loss_fn, exploit
        models = [_seeded(build, space, seed) for seed in seeds]
        self._model = models[0]
        self.optimizer = optimizer(self._model.parameters())
        """The optimiser whose options, such as lr, all members use; they may be changed between steps."""
        self._rule = rule_for(self.optimizer)
        _require_batchable(self._model, self.optimizer, self._rule)
        if compile:
            self._rule = compiled(self._rule, next(self._model.parameters()).device)
        self._binding = Binding([self.optimizer], space, bind)
        for name in self._binding.options:
            if space[name].spec.shape:
                raise BindingError(f"a bound hyperparameter must be one number here, but {name} is not.")
        self._weights = trained_parameters(self._model, self.optimizer)
        of_each = [dict(model.named_parameters()) for model in models]
        self.params: Tensors = {
            name: torch.stack([p[name].detach() for p in of_each]) for name in self._weights
        }
        """The weights of all members, name -> tensor of shape (n, ...)."""
        self.state: dict[str, State] = {name: {} for name in self._weights}
        """The optimiser's state of all members, name -> state whose tensors have shape (n, ...)."""
        self.raws: Tensors = self._start(starts or {})
        """Unit coordinates of the hyperparameters, name -> tensor of shape (n, ...)."""
        self._estimate = _on_recorded_graph(estimator)
        self._calls = 0
        self._move_raws = Move(
            self.raws, hyper_optimizer, lambda: min(1.0, self._calls / total_steps) if total_steps else None
        )
        self.schedule = schedule_for(schedule)
        self.schedule.begin(total_steps)
        self._randomness = Randomness([valid_loader])
        self._batches = EndlessBatches(valid_loader, "valid_loader", self._randomness)
        self._moves, self._hyper = 0, self.schedule.next_is_hyper(0, hyper=False)
        self._seen: list[Tensor] = []

    def step(self, batch: Any) -> Tensor:
        """Take one training step of every member, with a hyper-step if one is due.

        Args:
            batch: the batches of all members, as tensors of shape (n, ...); see `stacked`.

        Returns:
            training losses before the step, shape (n,).

        Raises:
            UnreachedHyperparameter: a hyperparameter reaches neither the training gradient nor the optimiser.
            NotTwiceDifferentiable: the loss contains an operation that is differentiable only once.
        """
        self._calls += 1
        hyper, params = self._hyper, leaves(self.params)
        raws = {name: raw.detach().requires_grad_(hyper) for name, raw in self.raws.items()}
        values = self.space.values(raws)
        losses = self._losses(self._loss, params, values, batch)
        grads = gradient(losses.sum(), params, create_graph=hyper)
        updates = self._updates(values)
        if hyper:
            step = Step(
                params=detach(params),
                grads=detach(grads),
                state=self.state,
                updates=updates,
                hparams=raws,
                values=values,
                dependence=recorded(grads, raws),
                members=self.n,
            )
            found = require_reached(self._estimate(step, self._valid_grad(self._estimate.at(step))), raws)
        self._train(detach(grads), updates)
        if hyper:
            self._move(found)
        self._hyper = self.schedule.next_is_hyper(self._calls, hyper)
        return losses.detach()

    def losses(self, batch: Any) -> Tensor:
        """Return the validation losses of all members, shape (n,), on a batch as for `step`."""
        return self.evaluate(self._validate, batch)

    @torch.no_grad()
    def evaluate(self, function: Loss, batch: Any) -> Tensor:
        """Return `function` of all members in eval mode, shape (n,).

        Args:
            function: (model, batch of one member) -> scalar.
            batch: as for `step`.
        """
        with evaluating(self._model):
            return self._losses(function, self.params, self.values, batch)

    @property
    def hyper_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser that moves the raw coordinates."""
        return self._move_raws.optimizer

    @property
    def values(self) -> Tensors:
        """The hyperparameters of all members, name -> tensor of shape (n, ...)."""
        return self.space.values(detach(self.raws))

    def member(self, i: int) -> tuple[nn.Module, Space]:
        """Return a new model with the weights of member i, and a new space with its hyperparameters."""
        space = copy.deepcopy(self.space)
        model = self._build(space).to(next(iter(self.params.values())))
        model.load_state_dict({name: p[i] for name, p in self.params.items()}, strict=False)
        space.load_state_dict({"raw": {name: raw.detach()[i] for name, raw in self.raws.items()}})
        return model, space

    @torch.no_grad()
    def exploit(self, losses: Tensor) -> list[tuple[int, int]]:
        """Let the worst fifth copy the best fifth: weights, optimiser state, hyperparameters.

        Args:
            losses: of the members, shape (n,); NaN ranks last.

        Returns:
            (index of the copying member, index of the copied one) for each copy.
        """
        order = losses.nan_to_num(nan=float("inf")).argsort()
        count = min(self.n // 2, max(1, round(self.SHARE * self.n)))
        best, worst = order[:count], order.flip(0)[:count]
        histories = [self.hyper_optimizer.state[raw] for raw in self.raws.values()]
        for tensors in (self.params, self.raws, *self.state.values(), *histories):
            for t in tensors.values():
                if isinstance(t, Tensor) and t.ndim > 0:
                    t[worst] = t[best]
        return list(zip(worst.tolist(), best.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        return {**super().state_dict(), "raws": copied(self.raws)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        super().load_state_dict(state)
        with torch.no_grad():
            for name, raw in self.raws.items():
                raw.copy_(state["raws"][name])

    def _losses(self, loss: Loss, params: Tensors, values: Tensors, batch: Any) -> Tensor:
        def of_one(params: Tensors, values: Tensors, batch: Any) -> Tensor:
            with self.space.seeing(values):
                return with_tensors(self._model, lambda: loss(self._model, batch), params)

        result: Tensor = torch.func.vmap(of_one, randomness="different")(params, values, batch)
        return result

    def _valid_grad(self, at: Tensors) -> Tensors:
        params = leaves(at)
        with evaluating(self._model):
            losses = self._losses(self._validate, params, detach(self.values), next(self._batches))
        self._seen.append(losses.detach())
        return gradient(losses.sum(), params)

    def _updates(self, values: Tensors) -> Updates:
        self._binding.update_references()  # a scheduler comes after the optimiser, which is made here
        return {
            name: Update(self._rule, {o: _column(x, self._weights[name].ndim) for o, x in u.options.items()})
            for name, u in self._binding.updates(self._weights, values).items()
        }

    @torch.no_grad()
    def _train(self, grads: Tensors, updates: Updates) -> None:
        moved = self._rule.step_all(
            [(self.params[name], grads[name], self.state[name], u.options) for name, u in updates.items()]
        )
        for name, (new, state) in zip(updates, moved, strict=True):
            self.params[name], self.state[name] = new, state

    @torch.no_grad()
    def _move(self, hypergradients: Tensors) -> None:
        # the hyperparameters of a diverged member stay unchanged
        self._move_raws({name: g.nan_to_num(0.0, 0.0, 0.0) for name, g in hypergradients.items()})
        self._moves += 1
        if self._exploit and self._moves % self._exploit == 0:
            self.exploit(torch.stack(self._seen).mean(0))
        if self._exploit is None or self._moves % self._exploit == 0:
            self._seen = []

    def _start(self, starts: Mapping[str, Sequence[Any]]) -> Tensors:
        like = next(iter(self.params.values()))
        found = {}
        for name in self.space:
            spec, raw = self.space[name].spec, self.space[name].raw.detach()
            each = [spec.transform.raw(spec.check(v)).clamp(0, 1) for v in starts.get(name, ())]
            found[name] = torch.stack(each or [raw] * self.n).to(like.device, raw.dtype).requires_grad_()
        return found


def stacked(loaders: Sequence[Iterable[Any]]) -> Iterable[Any]:
    """Return batches for a `Population`, in which the tensors of all members' loaders are stacked.

    Iteration ends with the shortest loader. It can be repeated if that of the loaders can.

    Args:
        loaders: one iterable of batches for each member.
    """
    return _Stacked(loaders)


@dataclass(frozen=True)
class _Stacked:
    loaders: Sequence[Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        for batches in zip(*self.loaders, strict=False):
            yield tree_map(lambda *tensors: torch.stack(tensors), *batches)


def _require_numbers(
    n: int, of_each: Mapping[str, Sequence[Any]], exploit: int | None, total_steps: int | None
) -> None:
    for what, given in of_each.items():
        if n < 1 or len(given) != n:
            raise ValueError(
                f"n >= 1 and n {what}, one per member, must hold, but n={n} and {len(given)} were given."
            )
    for name, number in {"exploit": exploit, "total_steps": total_steps}.items():
        if number is not None:
            whole(name, number)


def _require_batchable(model: nn.Module, optimizer: torch.optim.Optimizer, rule: UpdateRule) -> None:
    if any(True for _ in model.buffers()):
        raise UnsupportedParameter("the model must have no buffers, but has some; use LayerNorm, say.")
    if any(map(is_sharded, model.parameters())):
        raise UnsupportedParameter(
            "the members must be whole models, to be stacked, but `build` shards them; leave out "
            "fully_shard, or use a Tuner."
        )
    if not rule.elementwise:
        kind = type(optimizer).__name__
        raise UnsupportedOptimizer(f"the optimiser must step elementwise, but {kind} does not.")


def _on_recorded_graph(estimator: str | Estimator) -> Estimator:
    found = estimator_for(estimator)
    if found.needs_train_loss or found.mixed not in (None, "double backward"):
        raise ValueError(
            f"a population's estimator must use a recorded graph, but got {estimator!r}; use 'one_step'."
        )
    return found


def _column(option: Any, ndim: int) -> Any:
    """Return a tuned option, shape (n,), such that it broadcasts against a weight of the members."""
    return option.reshape(-1, *[1] * ndim) if isinstance(option, Tensor) and option.ndim else option


def _seeded(build: Callable[[Space], nn.Module], space: Space, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(space)
