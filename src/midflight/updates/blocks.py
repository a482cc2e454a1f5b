"""Apply update rules block by block: large weights are cut to fit the cache, small ones are concatenated.

An optimiser step has about twelve elementwise operations. On a large weight, each would read and write main
memory. On many small weights, the cost of the calls would dominate. So weights are cut or joined into flat
blocks of about BLOCK entries, where the rule and the memory layout allow.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from midflight._tensors import Tensors, unalias
from midflight.updates.base import Options, State, Update, UpdateRule, tuned_options
from midflight.updates.flat import lies_whole

BLOCK = 2**16
"""Number of entries of a block on the CPU; on other devices large weights are not cut."""

PENALTY_OPTIONS = frozenset({"weight_decay"})
"""Options that act like a penalty in the loss (coupled decay), or do not involve the gradient (decoupled)."""

Updates = Mapping[str, Update]


@dataclass(frozen=True)
class Block:
    """Hold whole weights with equal rule, options and scalar state, or a piece of a large weight."""

    names: tuple[str, ...]
    piece: range | None
    rule: UpdateRule
    options: Options

    def of(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Return the entries of the block from a tree name -> tensor."""
        if len(self.names) > 1:
            return torch.cat([tree[name].reshape(-1) for name in self.names])
        tensor = tree[self.names[0]]
        if self.piece is None:
            return tensor
        return tensor.as_strided((len(self.piece),), (1,), tensor.storage_offset() + self.piece.start)

    def state(self, states: Mapping[str, State]) -> State:
        """Return the state of the block's entries; one number per weight stays unchanged."""
        first = states[self.names[0]]
        if len(self.names) == 1 and self.piece is None:
            return first
        return {
            key: self.of({name: states[name][key] for name in self.names}) if _is_entrywise(value) else value
            for key, value in first.items()
        }

    def put(self, result: Tensor, into: Tensors, like: Mapping[str, Tensor]) -> None:
        """Write a result for the block into the tree `into`, under the names of its weights."""
        if self.piece is not None:
            name = self.names[0]
            if name not in into:
                into[name] = torch.empty_like(like[name], dtype=result.dtype)
            self.of(into)[:] = result
            return
        if len(self.names) == 1:  # keep the layout in memory, which may be transposed
            into[self.names[0]] = result
            return
        parts = torch.split(result.reshape(-1), [like[name].numel() for name in self.names])
        for name, part in zip(self.names, parts, strict=True):
            into[name] = part.view(like[name].shape)


def blocks(
    params: Mapping[str, Tensor], states: Mapping[str, State], updates: Updates, *more: Mapping[str, Tensor]
) -> Iterator[Block]:
    """Split all weights that have an update into blocks; each entry is in exactly one.

    Args:
        more: other trees that the blocks will index, such as gradients. A weight is cut only if its memory
            layout is the same in all of them.
    """
    together: dict[Any, list[str]] = {}
    for name, u in updates.items():
        p, size = params[name], params[name].numel()
        if not u.rule.elementwise or size == 0:
            yield Block((name,), None, u.rule, u.options)
        elif many := {name for name, x in u.options.items() if isinstance(x, Tensor) and x.ndim > 0}:
            rule = u.rule if many <= u.rule.per_row_options else _StepOnly(u.rule)
            yield Block((name,), None, rule, u.options)
        elif size < BLOCK:
            together.setdefault(_kin(p, states[name], u), []).append(name)
        elif (
            p.device.type != "cpu"
            or u.rule.one_pass
            or not _lie_alike([p, *(tree[name] for tree in more)], states[name])
        ):
            yield Block((name,), None, u.rule, u.options)
        else:
            for start in range(0, size, BLOCK):
                yield Block((name,), range(start, min(start + BLOCK, size)), u.rule, u.options)
    for names in together.values():
        u = updates[names[0]]
        while names:
            count, size = 0, 0
            while count < len(names) and size < BLOCK:
                size += params[names[count]].numel()
                count += 1
            yield Block(tuple(names[:count]), None, u.rule, u.options)
            names = names[count:]


def _kin(p: Tensor, state: State, u: Update) -> tuple[Any, ...]:
    """Return a key that is equal for weights that can share a block."""
    numbers = (
        (key, float(value) if isinstance(value, Tensor) and value.device.type == "cpu" else id(value))
        for key, value in state.items()
        if not _is_entrywise(value)
    )
    alone = p.ndim == 0  # state per entry and state per weight have the same shape ()
    return (id(u.options), u.rule, p.dtype, p.device, tuple(state), *numbers, id(p) if alone else None)


def _fixed(options: Options, names: Iterable[str]) -> Options:
    """Return the options, with those in `names` detached from their graph."""
    return {**options} | {name: x.detach() for name in names if isinstance(x := options.get(name), Tensor)}


class _StepOnly(UpdateRule):
    """Use only `step` of a rule: closed forms need numbers, but populations have tensor options."""

    tunable: ClassVar = frozenset()

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        return self._rule.step(param, grad, state, options)


def _lie_alike(tensors: list[Tensor], state: State) -> bool:
    """Return whether all have the same layout without gaps; gradients of a population may be transposed."""
    first, *others = [*tensors, *filter(_is_entrywise, state.values())]
    return lies_whole(first) and all(t.stride() == first.stride() for t in others)


def _is_entrywise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


@torch.no_grad()
def step_ahead(params: Tensors, grads: Tensors, states: Mapping[str, State], updates: Updates) -> Tensors:
    """Return theta' = U(theta, s, g, phi) without a graph, in new memory."""
    ahead: Tensors = {}
    for block in blocks(params, states, updates, grads):
        new = block.rule.ahead(block.of(params), block.of(grads), block.state(states), block.options)
        block.put(new, ahead, params)
    return {name: ahead[name] for name in updates}


def step_pullback(
    v: Tensors,
    params: Tensors,
    grads: Tensors,
    states: Mapping[str, State],
    updates: Updates,
    others: Tensors | None = None,
    share: float = 0.0,
) -> tuple[Tensors, list[tuple[Tensor, Tensor]]]:
    """Return w = (dU/dg)^T v, and (option, its derivative) for every tuned option; see `UpdateRule.pullback`.

    Writes w into v's memory, because holding both would set the peak memory.

    Args:
        v: gradient with respect to theta'; overwritten.
        params, grads, states, updates: the optimiser step.
        others, share: dU/dg is taken at (1 - share) grads + share others; see `Dependence`. The derivatives
            of PENALTY_OPTIONS are taken there too, those of all other options at grads.
    """
    v = unalias(v)
    tuned: dict[int, tuple[Tensor, Tensor]] = {}
    others = None if others is None else {name: others.get(name, grads[name]) for name in updates}
    for block in blocks(params, states, updates, grads, v, *([] if others is None else [others])):
        of_v, param, grad, state = block.of(v), block.of(params), block.of(grads), block.state(states)
        options = block.options
        if others is None:
            part, derivatives = block.rule.pullback(of_v, param, grad, state, options)
        else:
            of_step = _fixed(options, PENALTY_OPTIONS)
            derivatives = (
                block.rule.pullback(of_v, param, grad, state, of_step)[1] if tuned_options(of_step) else {}
            )
            blended = grad.lerp(block.of(others).to(grad), share)
            penalties = _fixed(options, set(options) - PENALTY_OPTIONS)
            part, more = block.rule.pullback(of_v, param, blended, state, penalties)
            derivatives = derivatives | more
        block.put(part, v, params)
        for name, derivative in derivatives.items():
            option = options[name]
            before = tuned.get(id(option))
            tuned[id(option)] = option, derivative if before is None else before[1] + derivative
    return {name: v[name] for name in updates}, list(tuned.values())
