"""Compute with models that `torch.distributed.fsdp.fully_shard` (FSDP2) has sharded.

Each process holds a part of every weight, as the local tensor of a `DTensor`. Arithmetic is done on these
parts. A norm or an inner product is then the sum over all parts, which `Parts` takes. A forward pass gathers
the whole weights, and a backward pass leaves the part of the mean gradient in `.grad`.

After some passes FSDP keeps the gathered weights, and `model.parameters()` then yields these in place of the
parts. So the tuner drops them before it reads weights, and before each of its own passes.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from midflight._tensors import Tensors, all_finite, norm
from midflight.errors import UnsupportedSetting


def is_sharded(t: Any) -> bool:
    """Return whether a tensor is a `DTensor`; other tensors are whole in each process."""
    module = sys.modules.get("torch.distributed.tensor")  # no tensor is one before this is imported
    return module is not None and isinstance(t, module.DTensor)


def part(t: Any) -> Any:
    """Return this process's part of a sharded tensor, detached, in the same memory; others as given."""
    if not is_sharded(t):
        return t
    with torch.no_grad():
        return t.to_local()


def part_of_gradient(p: Tensor) -> Tensor | None:
    """Return the gradient of this process's part of a weight; None if the weight has no gradient.

    A loss that reads a sharded weight itself may leave a gradient with another placement.
    """
    grad: Any = p.grad
    if is_sharded(grad) and grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    local: Tensor | None = part(grad)
    return local


def parts(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each tensor by its `part`, in nested containers too; other entries stay."""
    return {n: part(t) if isinstance(t, Tensor) else tree_map(part, t) for n, t in tensors.items()}


def reduced(numbers: Iterable[float], device: torch.device | None, largest: bool = False) -> list[float]:
    """Return the sum of each number over all processes, or the largest; whole numbers up to 2^53 are exact.

    Args:
        numbers: as many in every process.
        device: where the backend reduces.
        largest: whether to return the largest.
    """
    how = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
    vector = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(vector, op=how)
    found: list[float] = vector.tolist()
    return found


class Parts:
    """Takes sums, maxima and norms over the parts of sharded tensors.

    All processes must make the same calls, in the same order, with equally many numbers or tensors.

    Args:
        count: number of processes that hold a part each. With 1, nothing is sent.
        device: on which the backend reduces.
    """

    def __init__(self, count: int = 1, device: torch.device | None = None) -> None:
        self.count, self._device = count, device

    def reduced(self, numbers: Iterable[float], largest: bool = False) -> list[float]:
        """Return the sum of each number over the processes; with `largest`, its maximum."""
        given = list(map(float, numbers))
        return reduced(given, self._device, largest) if self.count > 1 and given else given

    def sum(self, number: float) -> float:
        """Return the sum of one number over the processes."""
        return self.reduced([number])[0] if self.count > 1 else number

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """Return for each flag whether it is set in some process."""
        return [n > 0 for n in self.reduced(flags)]

    def all_finite(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether no entry of any part is NaN or infinite."""
        return not self.any([not all_finite(tensors)])[0]

    def norms(self, norms: Sequence[float]) -> list[float]:
        """Return Euclidean norms of whole tensors, given those of the parts."""
        if self.count == 1:
            return list(norms)
        return [squared**0.5 for squared in self.reduced(n * n for n in norms)]

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm over all entries of all parts, shape ()."""
        own = norm(tensors)
        return own if self.count == 1 else own.new_tensor(self.norms([float(own)])[0])

    def gathered(self, vectors: Tensors, length: int) -> Tensors:
        """Return the vectors of all processes, name -> float64 CPU tensor of shape (processes, length).

        Args:
            vectors: name -> float64 vector on the CPU of at most `length` entries; zeros fill it up.
        """
        whole = torch.zeros(len(vectors), self.count, length, dtype=torch.float64)
        rank = torch.distributed.get_rank() if self.count > 1 else 0
        for rows, vector in zip(whole, vectors.values(), strict=True):
            rows[rank, : len(vector)] = vector
        if self.count > 1:
            there = whole.to(self._device)
            torch.distributed.all_reduce(there)
            whole = there.cpu()
        return dict(zip(vectors, whole, strict=True))


WHOLE = Parts()
"""Serves tensors that are not sharded: nothing is sent."""


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called on, the outer ones first."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)  # torch < 2.6 has none
    return [m for m in model.modules() if kind is not None and isinstance(m, kind)]


def reshard(modules: Iterable[Any]) -> None:
    """Drop gathered weights, so that the modules show their parts and the next pass gathers anew."""
    for module in modules:
        module.reshard()


def gather(modules: Iterable[Any]) -> None:
    """Gather all weights, for a backward pass that begins inside the model, where FSDP does not notice it."""
    for module in modules:
        module.unshard()


def restart(modules: Iterable[Any]) -> None:
    """Drop gathered weights, and let FSDP forget a pass that failed half way."""
    for module in modules:
        if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):  # torch >= 2.13
            module.reset_iter_state()
        module.reshard()


@contextmanager
def passes_between(modules: list[Any]) -> Iterator[None]:
    """Average the gradients of each backward pass inside, and leave the model sharded.

    The loop may have switched the averaging off, to accumulate gradients without it. If an error leaves the
    block, gradients of whole weights that wait for the averaging are dropped.
    """
    groups = [group for module in modules for group in _groups(module)]
    flags = "reduce_grads", "all_reduce_grads", "reshard_after_backward"
    before = [(group, [getattr(group, flag) for flag in flags]) for group in groups]
    contexts = [module._get_fsdp_state()._state_ctx for module in modules]
    last = [context.is_last_backward for context in contexts]
    try:
        for group, _ in before:
            for flag in flags:
                setattr(group, flag, True)
        for context in contexts:
            context.is_last_backward = True
        yield
    except BaseException:
        for weight in (weight for group in groups for weight in group.fsdp_params):
            weight.unsharded_accumulated_grad = None
            if hasattr(weight, "_unsharded_param"):
                weight._unsharded_param.grad = None
        raise
    finally:
        restart(modules)
        for context, was_last in zip(contexts, last, strict=True):
            context.is_last_backward = was_last
        for group, values in before:
            for flag, value in zip(flags, values, strict=True):
                setattr(group, flag, value)


def _groups(module: Any) -> list[Any]:
    """Return the groups of weights that a module gathers together."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # torch >= 2.12
    return [g for g in ([state._fsdp_param_group] if several is None else several) if g is not None]


def require_supported(modules: list[Any], weights: Mapping[str, Tensor], count: int) -> None:
    """Raise `UnsupportedSetting` unless `fully_shard` splits every trained weight over all processes.

    Args:
        modules: see `sharded_modules`.
        weights: the trained weights, name -> leaf.
        count: number of processes.
    """
    groups = [group for module in modules for group in _groups(module)]
    known = {id(w.sharded_param) for group in groups for w in group.fsdp_params}
    for name, p in weights.items():
        mesh: Any = getattr(p, "device_mesh", None)
        if id(p) not in known or mesh is None:
            raise UnsupportedSetting(
                "if trained weights are sharded, fully_shard must have split all of them, but "
                f"{name} was not split by it; call fully_shard on the whole model, without ignored_params, "
                "before the optimiser is built."
            )
        if mesh.ndim != 1 or mesh.size() != count:
            raise UnsupportedSetting(
                f"fully_shard must split weights over all {count} processes, but the mesh of {name} has "
                f"shape {tuple(mesh.shape)}; use a mesh of one dimension, without replicas or tensor "
                "parallelism."
            )
    if any(g.gradient_divide_factor not in (None, float(count)) or g._all_reduce_hook for g in groups):
        raise UnsupportedSetting(
            "the gradient must be the mean over the processes, but set_gradient_divide_factor or "
            "set_all_reduce_hook changes it; scale the loss instead."
        )
