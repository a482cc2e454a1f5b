"""The only surgery on a user's model: evaluation mode and other weights, for the length of one pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from midflight.errors import NeedsClosure, UnknownName, UnsupportedParameter
from midflight.problem import TrainLoss
from midflight.space import Space
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


@contextmanager
def buffers_apart(model: nn.Module) -> Iterator[None]:
    """Forward passes change copies of the buffers, such as running averages, which are then dropped."""
    before = [(b, b.data) for b in model.buffers()]
    try:
        for b, data in before:
            b.data = data.clone()
        yield
    finally:
        for b, data in before:
            b.data = data


def param_groups(model: nn.Module, per: str) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, one per "layer" or per "tensor" of the model, in its order.

    With a hyperparameter of as many entries, `bind=` then tunes an option for each of them:

        groups = mf.param_groups(model, per="layer")
        space = mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True, shape=(len(groups),)))
        optimizer = torch.optim.Adam(groups)

    Args:
        model: its trainable parameters are grouped; a tied one stands in the first group that has it.
        per: "layer": the parameters that one module holds itself; "tensor": each alone.

    Raises:
        UnknownName: `per` is neither.
    """
    if per not in ("layer", "tensor"):
        raise UnknownName("per", per, ("layer", "tensor"))
    groups: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(name if per == "tensor" else name.rpartition(".")[0], []).append(p)
    return [{"params": params, "name": name} for name, params in groups.items()]


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


class RandomState:
    """The random generators of torch as they are now, on the CPU and on the devices of the weights."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.devices = sorted({p.device.index or 0 for p in params.values() if p.is_cuda})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(d) for d in self.devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers again; afterwards the generators are where they were."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self.devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class _LossModule(nn.Module):
    """A user's loss function as a module, so that `functional_call` can give its model other weights."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self) -> Tensor:
        return self._loss()


def with_tensors(model: nn.Module, loss: Callable[[], Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """What the loss is while the model has other weights and buffers, differentiable in them.

    Args:
        tensors: by their names in the model; one that stands in several places is replaced in each.
    """
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(prefix="model"):  # each once, wherever else it stands
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(prefix, recurse=False, remove_duplicate=False):
                places.setdefault(id(tensor), []).append(name)
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    everywhere = {place: t for name, t in tensors.items() for place in places[id(known[name])]}
    # torch's own way with tied weights takes those of a module under two names away from it for good
    result: Tensor = torch.func.functional_call(_LossModule(model, loss), everywhere, (), tie_weights=False)
    return result


def reevaluated(
    model: nn.Module, loss: Callable[[], Tensor], space: Space, random: RandomState, names: Iterable[str]
) -> TrainLoss:
    """(params, values) -> the loss there, differentiable in both; buffers are left as they are.

    Raises:
        NeedsClosure: a weight in `names` is not the model's and cannot be replaced.
    """
    buffers = dict(model.named_buffers())
    foreign = set(names) - {name for name, _ in model.named_parameters()}
    if foreign:
        raise NeedsClosure(
            f"this estimator gives the model other weights, but {', '.join(sorted(foreign))} of the "
            "optimiser are not the model's; put them into one nn.Module with it."
        )

    def train_loss(params: Tensors, values: Tensors) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}
        with random.replayed(), space.seeing(values):
            return with_tensors(model, loss, {**params, **copies})

    return train_loss
