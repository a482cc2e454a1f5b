"""The only surgery on a user's model: evaluation mode and other weights, for the length of one pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from midflight.errors import UnsupportedParameter
from midflight.trees import Tensors


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, then each back in the mode it had."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def weights_at(params: Mapping[str, Tensor], at: Tensors) -> Iterator[None]:
    """The parameters hold other values, then their own storage again, bit for bit.

    The swap goes through `.data`: graphs recorded before stay valid, tied weights stay tied, and
    a weight need not belong to the model.
    """
    before = {name: p.data for name, p in params.items()}
    try:
        for name, p in params.items():
            p.data = at[name]
        yield
    finally:
        for name, p in params.items():
            p.data = before[name]


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's weights that require a gradient, by their names in the model.

    Raises:
        UnsupportedParameter: a weight is complex.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            name = names.get(id(p), f"group{i}.{j}")
            if p.is_complex():
                raise UnsupportedParameter(
                    f"weights must be real, but {name} is {p.dtype}; keep it in an optimiser of its own."
                )
            if p.requires_grad:
                found[name] = p
    return found


def graph_leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that `loss.backward()` would give a gradient."""
    found: dict[int, Tensor] = {}
    seen = {loss.grad_fn}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        for following, _ in node.next_functions if node is not None else ():
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return list(found.values())
