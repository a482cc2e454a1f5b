"""Adam and AdamW, as `torch.optim.Adam` and `torch.optim.AdamW`.

g~ = g + weight_decay theta                   (Adam: coupled L2)
m' = beta1 m + (1 - beta1) g~,  s' = beta2 s + (1 - beta2) g~^2
theta' = theta - lr m^ / (sqrt(s^) + eps),    m^ = m' / (1 - beta1^t),  s^ = s' / (1 - beta2^t)
theta' -= lr weight_decay theta               (AdamW: decoupled)
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from midflight.errors import NoCompiler
from midflight.updates.base import (
    Options,
    State,
    UpdateRule,
    decayed,
    numbers,
    safe_sqrt,
    step_number,
    tuned_options,
)


class Adam(UpdateRule):
    """Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019); see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
        start, total = decayed(param, grad, options, decoupled=options["decoupled_weight_decay"])
        t = step_number(state)
        m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * total
        s = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * total * total
        new_state = {"step": torch.tensor(float(t)), "exp_avg": m, "exp_avg_sq": s}
        if options["amsgrad"]:
            s = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(s)), s)
            new_state["max_exp_avg_sq"] = s
        denom = safe_sqrt(s) / (1 - beta2**t) ** 0.5 + options["eps"]
        return start - lr / (1 - beta1**t) * (m / denom), new_state

    @torch.no_grad()
    def ahead(self, param: Tensor, grad: Tensor, state: State, options: Options) -> Tensor:
        o = numbers(options)
        _, m, root = _moments(param, grad, state, o)
        start = param * (1 - o["lr"] * o["weight_decay"]) if o["decoupled_weight_decay"] else param
        scale, eps = _scale(state, o)
        return torch.addcdiv(start, m, root.add_(eps), value=-scale)

    @torch.no_grad()
    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tuned = tuned_options(options)
        if options["amsgrad"] or set(tuned) - {"weight_decay"}:
            return super().pullback(v, param, grad, state, options)
        o = numbers(options)
        total, m, root = _moments(param, grad, state, o)
        scale, eps = _scale(state, o)
        # d(m / (root + eps))/dg~ = (1 - beta1 - (1 - beta2) m g~ / (root (root + eps))) / (root + eps)
        denom = root + eps
        w = v / denom
        both = root.mul_(denom).clamp_min_(torch.finfo(root.dtype).tiny)  # where root is 0 so is m
        slope = root.new_tensor(-scale * (1 - o["beta1"]))
        w.mul_(torch.addcdiv(slope, m.mul_(total), both, value=scale * (1 - o["beta2"])))
        derivatives = {}
        if tuned:
            along, factor = (v, -o["lr"]) if o["decoupled_weight_decay"] else (w, 1.0)
            derivatives["weight_decay"] = factor * torch.dot(along.reshape(-1), param.reshape(-1))
        return (w.neg_() if o["maximize"] else w), derivatives

    def compiled(self, device: torch.device) -> UpdateRule:
        return CompiledAdam(device)


class CompiledAdam(Adam):
    """Adam whose dozen of elementwise operations are compiled into one pass over memory.

    Knows a weight decay with one entry per row, as a `Population` has it.

    Args:
        device: of the weights.

    Raises:
        NoCompiler: torch.compile does not work there; it needs a C++ compiler, on a GPU Triton.
    """

    one_pass: ClassVar = True
    of_many: ClassVar = frozenset({"weight_decay"})

    def __init__(self, device: torch.device) -> None:
        some, number = torch.ones(1, 8, device=device), torch.tensor(0.5, dtype=torch.float64, device=device)
        try:
            _compiled(_ahead)(*[some] * 4, *[number] * 6)
            _compiled(_pullback)(*[some] * 5, *[number] * 5)
        except Exception as error:  # torch has no common class for what can go wrong here
            raise NoCompiler(
                "compile=True needs a C++ compiler that torch.compile finds (on a GPU Triton), but it said: "
                f"{str(error).strip().splitlines()[0]}; install one (g++, say), or leave compile=True out."
            ) from error

    @torch.no_grad()
    def step_all(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        options: Sequence[Options],
    ) -> list[tuple[Tensor, State]]:
        """In one program for all weights whose numbers, such as lr, are equal."""
        each = list(zip(params, grads, states, options, strict=True))
        if any(_is_rare(state, o) for _, _, state, o in each):
            return super().step_all(params, grads, states, options)
        alike: dict[tuple[float, ...], list[int]] = {}
        for i, (_, _, state, o) in enumerate(each):
            alike.setdefault((float(step_number(state)), *_numbers(state, o)), []).append(i)
        found = {}
        for (t, *common), indices in alike.items():
            # laid out as the gradient is, which a batched matrix product gives transposed: one copy, at first
            flat = {i: _Flat(grads[i], _rows(options[i])) for i in indices}
            weights = [[*map(flat[i].of, _moving(*each[i][:3])), *_decay(*each[i][::3])] for i in indices]
            moved = _compiled(_steps)(weights, *_scalars(common, params[0]))
            for i, tensors in zip(indices, moved, strict=True):
                new, m, s = map(flat[i].back, tensors)
                found[i] = new, {"step": torch.tensor(t), "exp_avg": m, "exp_avg_sq": s}
        return [found[i] for i in range(len(each))]

    @torch.no_grad()
    def ahead(self, param: Tensor, grad: Tensor, state: State, options: Options) -> Tensor:
        if _is_rare(state, options):
            return _slow(options).ahead(self, param, grad, state, options)
        flat, scalars = _Flat(param, _rows(options)), _scalars(_numbers(state, options), param)
        arrays = map(flat.of, _moving(param, grad, state))
        return flat.back(_compiled(_ahead)(*arrays, *_decay(param, options), *scalars))

    @torch.no_grad()
    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tuned = tuned_options(options)
        if _is_rare(state, options) or set(tuned) - {"weight_decay"}:
            return _slow(options).pullback(self, v, param, grad, state, options)
        flat, scalars = _Flat(param, _rows(options)), _scalars(_numbers(state, options), param)
        arrays = map(flat.of, (v, *_moving(param, grad, state)))
        w, w_theta, v_theta = _compiled(_pullback)(*arrays, _decay(param, options)[0], *scalars)
        along = -options["lr"] * v_theta if options["decoupled_weight_decay"] else w_theta
        derivatives = {"weight_decay": along.view_as(options["weight_decay"])} if tuned else {}
        return flat.back(w), derivatives


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # without fullgraph: torch gives up after some shapes too many, and then runs it as it is
    return torch.compile(function, dynamic=True)


class _Flat:
    """Tensors of one shape as (rows, rest), in the order in which one of them lies in memory."""

    def __init__(self, like: Tensor, rows: int) -> None:
        kept = range(rows > 1)
        self._rows = rows
        self._order = [*kept, *sorted(range(len(kept), like.ndim), key=like.stride, reverse=True)]
        self._shape = [like.shape[d] for d in self._order]
        self._back = sorted(range(like.ndim), key=self._order.__getitem__)

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self._order).reshape(self._rows, -1)

    def back(self, flat: Tensor) -> Tensor:
        return flat.view(self._shape).permute(self._back)


def _rows(options: Options) -> int:
    """As many as the weight decay has entries."""
    decay = options["weight_decay"]
    return decay.numel() if isinstance(decay, Tensor) else 1


def _moving(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, ...]:
    return param, grad, state["exp_avg"], state["exp_avg_sq"]


def _decay(param: Tensor, options: Options) -> list[Tensor]:
    """What is added to g per theta, and what is left of theta; numbers, or of shape (rows, 1)."""
    decay = options["weight_decay"]
    if _rows(options) > 1:
        decay = decay.detach().reshape(-1, 1).to(param)
    elif isinstance(decay, Tensor):
        decay = decay.item()
    coupled, shrink = (0.0, 1 - options["lr"] * decay) if options["decoupled_weight_decay"] else (decay, 1.0)
    return _scalars([coupled, shrink], param)


def _numbers(state: State, options: Options) -> tuple[float, ...]:
    """a, e, beta1, beta2."""
    o = numbers(options, but=("weight_decay",))
    return (*_scale(state, o), o["beta1"], o["beta2"])


def _scalars(values: Iterable[float | Tensor], like: Tensor) -> list[Tensor]:
    """As tensors: a number would be compiled into the program. In float64, for 1 - beta2 is small."""
    return [
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=like.device)
        for x in values
    ]


Three = tuple[Tensor, Tensor, Tensor]


def _steps(weights: list[list[Tensor]], *common: Tensor) -> list[Three]:
    return [_step(*tensors, *common) for tensors in weights]


def _step(p: Tensor, g: Tensor, m: Tensor, s: Tensor, coupled: Tensor, shrink: Tensor, a: Tensor, e: Tensor,
          beta1: Tensor, beta2: Tensor) -> Three:  # fmt: skip
    total = g + coupled * p
    m = beta1 * m + (1 - beta1) * total
    s = beta2 * s + (1 - beta2) * total * total
    return shrink * p - a * m / (s.sqrt() + e), m, s


def _ahead(*tensors: Tensor) -> Tensor:
    return _step(*tensors)[0]


def _pullback(v: Tensor, p: Tensor, g: Tensor, m: Tensor, s: Tensor, coupled: Tensor, a: Tensor, e: Tensor,
              beta1: Tensor, beta2: Tensor) -> Three:  # fmt: skip
    total = g + coupled * p
    m = beta1 * m + (1 - beta1) * total
    root = (beta2 * s + (1 - beta2) * total * total).sqrt()
    both = (root * (root + e)).clamp_min(torch.finfo(p.dtype).tiny)  # where root is 0 so is m
    w = a * v / (root + e) * ((1 - beta2) * m * total / both - (1 - beta1))
    return w, (w * p).sum(1), (v * p).sum(1)


def _slow(options: Options) -> type[UpdateRule]:
    """Whose methods to take where there is no program; Adam's closed forms know numbers only."""
    return Adam if _rows(options) == 1 else UpdateRule


def _is_rare(state: State, options: Options) -> bool:
    """Not worth a program of its own."""
    many = {name for name, x in options.items() if isinstance(x, Tensor) and x.numel() > 1}
    return not state or options["amsgrad"] or options["maximize"] or bool(many - {"weight_decay"})


def _moments(param: Tensor, grad: Tensor, state: State, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """g~, m' and sqrt(s'), in as few passes over memory as it takes; the last two are the caller's."""
    total = -grad if o["maximize"] else grad
    if o["weight_decay"] and not o["decoupled_weight_decay"]:
        total = total.add(param, alpha=o["weight_decay"])
    if state:
        m = state["exp_avg"].lerp(total, 1 - o["beta1"])
        s = (state["exp_avg_sq"] * o["beta2"]).addcmul_(total, total, value=1 - o["beta2"])
        if o["amsgrad"]:
            s = torch.maximum(state["max_exp_avg_sq"], s)
    else:
        m = total * (1 - o["beta1"])
        s = total * total * (1 - o["beta2"])
    return total, m, s.sqrt_()


def _scale(state: State, o: Options) -> tuple[float, float]:
    """a and e of theta' = theta - a m' / (sqrt(s') + e), which holds both bias corrections."""
    t = step_number(state)
    correction = (1 - o["beta2"] ** t) ** 0.5
    return o["lr"] * correction / (1 - o["beta1"] ** t), o["eps"] * correction
