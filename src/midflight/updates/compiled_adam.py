"""Compile the elementwise operations of Adam into one pass over memory.

The derivative of a step stands here and in `adam`. The form there writes in place and takes numbers, without
which it is slower. The form here takes tensors, without which torch would recompile for each number.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from midflight.errors import NoCompiler
from midflight.updates.adam import Adam, corrected, moments, moved
from midflight.updates.base import (
    Options,
    State,
    UpdateRule,
    Weight,
    numbers,
    step_number,
    tuned_options,
)  # fmt: skip
from midflight.updates.flat import Flat


class CompiledAdam(Adam):
    """Run Adam by torch.compile; accept a weight decay with one entry per row, as in a `Population`.

    Args:
        device: device of the weights.

    Raises:
        NoCompiler: torch.compile does not work on the device. It needs a C++ compiler, or Triton on a GPU.
    """

    one_pass: ClassVar = True
    per_row_options: ClassVar = frozenset({"weight_decay"})

    def __init__(self, device: torch.device) -> None:
        some, number = torch.ones(1, 8, device=device), torch.tensor(0.5, dtype=torch.float64, device=device)
        try:
            _compiled(_ahead)(*[some] * 4, *[number] * 6)
            _compiled(_pullback)(*[some] * 5, *[number] * 5)
        except Exception as error:  # torch.compile has no common class of errors
            raise NoCompiler(
                "compile=True needs a C++ compiler that torch.compile finds (on a GPU Triton), but it said: "
                f"{str(error).strip().splitlines()[0]}; install one, such as g++, or omit compile=True."
            ) from error

    @torch.no_grad()
    def step_all(self, weights: Sequence[Weight]) -> list[tuple[Tensor, State]]:
        """Apply `step` to many weights; one program covers those with equal scalars, such as lr."""
        if any(_is_rare(state, options) for *_, state, options in weights):
            return super().step_all(weights)
        alike: dict[tuple[float, ...], list[int]] = {}
        for i, (*_, state, options) in enumerate(weights):
            alike.setdefault((float(step_number(state)), *_numbers(state, options)), []).append(i)
        found = {}
        for (t, *common), indices in alike.items():
            # in the gradient's layout, which a batched matrix product transposes: only the first step copies
            flat = {i: Flat(weights[i][1], _rows(weights[i][3])) for i in indices}
            arrays = [
                [*map(flat[i].of, _moving(*weights[i][:3])), *_decay(*weights[i][::3])] for i in indices
            ]
            moved = _compiled(_steps)(arrays, *_scalars(common, weights[0][0]))
            for i, tensors in zip(indices, moved, strict=True):
                new, m, s = map(flat[i].back, tensors)
                found[i] = new, {"step": torch.tensor(t), "exp_avg": m, "exp_avg_sq": s}
        return [found[i] for i in range(len(weights))]

    @torch.no_grad()
    def ahead(self, param: Tensor, grad: Tensor, state: State, options: Options) -> Tensor:
        if _is_rare(state, options):
            return _slow(options).ahead(self, param, grad, state, options)
        flat, scalars = Flat(param, _rows(options)), _scalars(_numbers(state, options), param)
        arrays = map(flat.of, _moving(param, grad, state))
        return flat.back(_compiled(_ahead)(*arrays, *_decay(param, options), *scalars))

    @torch.no_grad()
    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tuned = tuned_options(options)
        if _is_rare(state, options) or set(tuned) - {"weight_decay"}:
            return _slow(options).pullback(self, v, param, grad, state, options)
        flat, scalars = Flat(param, _rows(options)), _scalars(_numbers(state, options), param)
        arrays = map(flat.of, (v, *_moving(param, grad, state)))
        w, w_theta, v_theta = _compiled(_pullback)(*arrays, _decay(param, options)[0], *scalars)
        along = -options["lr"] * v_theta if options["decoupled_weight_decay"] else w_theta
        derivatives = {"weight_decay": along.view_as(options["weight_decay"])} if tuned else {}
        return flat.back(w), derivatives


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # no fullgraph: after too many recompilations torch then runs the function uncompiled
    return torch.compile(function, dynamic=True)


def _rows(options: Options) -> int:
    """Return the number of entries of the weight decay."""
    decay = options["weight_decay"]
    return decay.numel() if isinstance(decay, Tensor) else 1


def _moving(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, ...]:
    return param, grad, state["exp_avg"], state["exp_avg_sq"]


def _decay(param: Tensor, options: Options) -> list[Tensor]:
    """Return the factor of theta in g~ (coupled decay) and in theta' (decoupled); shape () or (rows, 1)."""
    decay = options["weight_decay"]
    if _rows(options) > 1:
        decay = decay.detach().reshape(-1, 1).to(param)
    elif isinstance(decay, Tensor):
        decay = decay.item()
    coupled, shrink = (0.0, 1 - options["lr"] * decay) if options["decoupled_weight_decay"] else (decay, 1.0)
    return _scalars([coupled, shrink], param)


def _numbers(state: State, options: Options) -> tuple[float, ...]:
    """Return a and e of `corrected`, beta1 and beta2."""
    o = numbers(options, but=("weight_decay",))
    return (*corrected(state, o), o["beta1"], o["beta2"])


def _scalars(values: Iterable[float | Tensor], like: Tensor) -> list[Tensor]:
    """Convert numbers to tensors, or torch recompiles for each; float64, because 1 - beta2 is small."""
    return [
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=like.device)
        for x in values
    ]


Three = tuple[Tensor, Tensor, Tensor]


def _steps(weights: list[list[Tensor]], *common: Tensor) -> list[Three]:
    return [_step(*tensors, *common) for tensors in weights]


def _step(p: Tensor, g: Tensor, m: Tensor, s: Tensor, coupled: Tensor, shrink: Tensor, a: Tensor, e: Tensor,
          beta1: Tensor, beta2: Tensor) -> Three:  # fmt: skip
    m, s = moments(g + coupled * p, m, s, beta1, beta2)
    return moved(shrink * p, m, s, a, e), m, s


def _ahead(*tensors: Tensor) -> Tensor:
    return _step(*tensors)[0]


def _pullback(v: Tensor, p: Tensor, g: Tensor, m: Tensor, s: Tensor, coupled: Tensor, a: Tensor, e: Tensor,
              beta1: Tensor, beta2: Tensor) -> Three:  # fmt: skip
    total = g + coupled * p
    m, s = moments(total, m, s, beta1, beta2)
    root = s.sqrt()
    both = (root * (root + e)).clamp_min(torch.finfo(p.dtype).tiny)  # m is 0 where root is 0
    w = a * v / (root + e) * ((1 - beta2) * m * total / both - (1 - beta1))
    return w, (w * p).sum(1), (v * p).sum(1)


def _slow(options: Options) -> type[UpdateRule]:
    """Return the class to use without compilation; Adam's closed forms accept numbers only."""
    return Adam if _rows(options) == 1 else UpdateRule


def _is_rare(state: State, options: Options) -> bool:
    """Return whether a case is too rare to compile."""
    many = {name for name, x in options.items() if isinstance(x, Tensor) and x.numel() > 1}
    return not state or options["amsgrad"] or options["maximize"] or bool(many - {"weight_decay"})
