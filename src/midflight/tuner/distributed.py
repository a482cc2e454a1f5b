"""Take hyper-steps together in all processes that train one model with `torch.distributed`.

Each process has batches of its own. Losses, v = dC2/dtheta and hypergradients are averaged over the
processes, as DistributedDataParallel averages the training gradient. So every decision is the same
everywhere, and weights and hyperparameters stay equal, bit for bit.

With `fully_shard`, a process has a part of every weight. FSDP itself averages all gradients of weights. An
inner product over weights, such as v . dU/dphi, is a sum over the parts; see `sharded`.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from midflight._tensors import Tensors
from midflight.errors import AnotherProcessFailed, UnsupportedSetting
from midflight.tuner.sharded import WHOLE, Parts, is_sharded, reduced, require_supported, sharded_modules

PLAIN_HOOKS = {"allreduce_hook", "fp16_compress_hook", "bf16_compress_hook"}
"""Communication hooks of DistributedDataParallel that give the mean gradient, up to rounding."""


class Processes:
    """The processes that train together; with one process, every method returns its argument.

    Args:
        model: the model being trained.
        weights: the trained weights, name -> leaf; by default all parameters of the model.

    Raises:
        UnsupportedSetting: the model is sharded, but not by `fully_shard` over all processes, or its gradient
            is not their mean. Or there are several processes, and the model has a layer or a communication
            hook that is not supported.

    Attributes:
        count: number of processes.
        sharded: whether each process has a part of every weight.
        parts: sums over these parts; `WHOLE` if weights are not sharded.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        self.count = _count()
        weights = dict(model.named_parameters()) if weights is None else weights
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        first: Any = next(filter(is_sharded, weights.values()), None)
        self.sharded = first is not None
        if first is not None:
            require_supported(sharded_modules(model), weights, self.count)
            self._device = torch.device(first.device_mesh.device_type)  # the weights may be offloaded
        if self.count > 1:
            _require_plain_mean(model)
        self.parts = Parts(self.count, self._device) if self.sharded else WHOLE

    @property
    def place(self) -> list[int] | None:
        """[rank of this process, number of processes] if weights are sharded; None otherwise."""
        return [torch.distributed.get_rank(), self.count] if self.sharded else None

    @contextmanager
    def together(self, equal: Sequence[Tensor] = ()) -> Iterator[None]:
        """Compute what follows in all processes; if it fails in one, it fails in all.

        With sharded weights, an error is raised only where it occurs. The other processes go on, or wait
        until that process ends.

        Args:
            equal: tensors that must be the same in every process, bit for bit.

        Raises:
            AnotherProcessFailed: the computation failed in another process; never with sharded weights.
            UnsupportedSetting: the tensors differ, or the processes joined after the tuner was built.
        """
        if self.count != _count():
            raise UnsupportedSetting(
                f"a tuner must be built once all processes have joined, but there were {self.count} then and "
                f"there are {_count()} now; call init_process_group before."
            )
        if self.count == 1:
            yield
            return
        self._agree(equal)
        try:
            yield
        except AnotherProcessFailed:
            raise
        except Exception:
            if not self.sharded:  # FSDP may wait for parts of weights, and would take this message for one
                reduced([1, 1, 1], self._device, largest=True)
            raise

    def mean(self, tensors: Tensors) -> Tensors:
        """Return the mean over processes, name -> tensor, in new memory, because autograd may share the old.

        All processes must have the same names and shapes.
        """
        if self.count == 1:
            return tensors
        self._agree()
        found = {
            name: t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True).contiguous()
            for name, t in tensors.items()
        }
        waits = [torch.distributed.all_reduce(found[name], async_op=True) for name in sorted(found)]
        for wait in waits:
            wait.wait()
        return {name: t.div_(self.count).to(tensors[name].dtype) for name, t in found.items()}

    def mean_gradient(self, found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensors:
        """Return `mean_where_present` of the gradients; FSDP has averaged those of sharded weights."""
        return dict(found) if self.sharded else self.mean_where_present(found, like)

    def mean_of(self, number: float) -> float:
        """Return the mean of a number over the processes."""
        return self.sum_of([number / self.count])[0]

    def sum_of(self, numbers: Iterable[float]) -> list[float]:
        """Return the sum of each number over the processes."""
        given = list(numbers)
        if self.count == 1:
            return given
        self._agree()
        return reduced(given, self._device)

    def mean_where_present(self, found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensors:
        """Return the mean over processes of tensors that some may lack, where they count as 0.

        Args:
            found: name -> tensor.
            like: all names that can occur, with a tensor of the same shape.
        """
        if self.count == 1:
            return dict(found)
        present = self.sum_of(float(name in found) for name in like)
        names = [name for name, n in zip(like, present, strict=True) if n]
        return self.mean({n: found[n] if n in found else torch.zeros_like(like[n]) for n in names})

    def _agree(self, equal: Sequence[Tensor] = ()) -> None:
        """Wait until every process is here, and raise an error in all if one failed or differs."""
        parts = [t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in equal]
        own = zlib.crc32(b"".join(parts))
        failed, most, least = reduced([0, own, -own], self._device, largest=True)
        if failed:
            raise AnotherProcessFailed(
                "a hyper-step must succeed in all processes, but failed in another; see its error."
            )
        if most != -least:
            wrap = "" if self.sharded else "wrap the model in DistributedDataParallel, and "
            raise UnsupportedSetting(
                "processes that train together must have equal weights and hyperparameters, but theirs "
                f"differ; {wrap}build equal spaces, optimisers and tuners."
            )


def _count() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _require_plain_mean(model: nn.Module) -> None:
    """Raise `UnsupportedSetting` unless the gradient is the plain mean over the processes."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise UnsupportedSetting(
            "a sharded model must keep the shapes of its weights, but FullyShardedDataParallel flattens "
            "them; use fully_shard or DistributedDataParallel."
        )
    if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise UnsupportedSetting(
            "SyncBatchNorm has no second derivative over several processes; use BatchNorm or GroupNorm."
        )
    for wrapper in _wrappers(model):
        for hook, _ in getattr(wrapper, "_comm_hooks", []):
            name = getattr(hook, "__name__", type(hook).__name__)
            if name not in PLAIN_HOOKS:
                raise UnsupportedSetting(
                    f"a communication hook must give the mean gradient, as {', '.join(sorted(PLAIN_HOOKS))} "
                    f"do, but the model has {name}."
                )


def _wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    return [m for m in model.modules() if isinstance(m, DistributedDataParallel)]


@contextmanager
def local(model: nn.Module) -> Iterator[None]:
    """Let DistributedDataParallel send neither gradients nor buffers in the passes inside."""
    wrappers = _wrappers(model)
    before = [(w, w.require_backward_grad_sync, w.require_forward_param_sync) for w in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, gradients, buffers in before:
            wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = gradients, buffers
