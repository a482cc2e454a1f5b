"""The user's live model, evaluated with other weights and left without a trace.

Everything that the tuner computes on the model happens inside `LiveModel.borrowed`: whatever goes wrong
there, in the user's functions or by Ctrl-C, weights, buffers, modes, gradients and random numbers are as they
were.
"""

import copy
import inspect
import operator
import signal
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from midflight._tensors import Tensors
from midflight.errors import InvalidLoss
from midflight.hypergrad.graph import graph_nodes
from midflight.tuner.data import fresh
from midflight.tuner.randomness import Randomness

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar."""
MOST_ENTRIES = 100_000
"""A container of a module with more entries is not put back: it would take too long."""


class LiveModel:
    """Evaluates a user's loss functions on a user's model.

    Args:
        model: the model being trained, compiled or not.
        randomness: the tuner's own random numbers.
        others: weights that are trained and not the model's.
        beside: modules that the loss functions use beside the model, such as a head or a teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        randomness: Randomness,
        others: Iterable[Tensor] = (),
        beside: Iterable[nn.Module] = (),
    ) -> None:
        self.model = model
        self._all, known = nn.ModuleList(), set[nn.Module]()
        for module in [model, *beside]:
            if module not in known:
                self._all.append(module)
                known.update(module.modules())
        self._others = list(others)
        self._randomness = randomness
        self._versions: list[tuple[Tensor, int]] = []
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in self._all.modules())

    def watch(self) -> None:
        """Note which parameters the loop writes from here to the next hyper-step."""
        self._versions = [(p, p._version) for p in self._all.parameters()]

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """For the length of a hyper-step: the model and the modules beside it may be changed, and are put
        back."""
        written = [p for p, version in self._versions if p._version != version]
        with ExitStack() as stack:
            stack.enter_context(signals_wait())
            stack.enter_context(self._randomness.borrowed())
            stack.enter_context(preserved(self._all, self._others, written))
            stack.enter_context(_uncompiled())
            stack.enter_context(_no_autocast_cache())
            stack.enter_context(torch.enable_grad())
            if self._recurrent:  # cuDNN's recurrent layers know neither eval mode nor second derivatives
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode; also for the backward pass, in which checkpoints compute again."""
        with evaluating(self._all):
            yield

    def valid_loss(self, function: Loss, batch: Any) -> Tensor:
        """`function(model, batch)` in eval mode."""
        with self.evaluating():
            return self._call(function, batch)

    def train_loss(self, function: Loss, batch: Any) -> Tensor:
        """`function(model, batch)` in the mode in which the model trains."""
        return self._call(function, batch)

    def gradients(
        self,
        loss: Callable[[], Tensor],
        at: Tensors,
        inside: Callable[[], Tensors] = dict,
        hooks: bool = False,
    ) -> tuple[Tensor, Tensors]:
        """The loss and its gradient at leaves, name -> tensor; without those that the loss does not reach.

        With it comes the gradient at leaves that `inside` names once the loss is computed.

        Reentrant checkpointing knows `backward` only: there the leaves' `.grad` is used, which `borrowed`
        emptied.
        """
        value = loss()
        with nullcontext() if hooks else _without_hooks(at.values()):
            at = at | {name: t for name, t in inside().items() if t.requires_grad}
            if not reenters(value):
                found = torch.autograd.grad(value, list(at.values()), allow_unused=True)
                return value.detach(), {n: g for n, g in zip(at, found, strict=True) if g is not None}
            for leaf in at.values():
                leaf.grad = None
            value.backward()  # type: ignore[no-untyped-call]
        grads = {name: leaf.grad for name, leaf in at.items() if leaf.grad is not None}
        for leaf in at.values():
            leaf.grad = None
        return value.detach(), grads

    def _call(self, function: Loss, batch: Any) -> Tensor:
        torch.clear_autocast_cache()  # it may hold casts of other weights
        return scalar_loss(function, function(self.model, fresh(batch)))


def reenters(loss: Tensor) -> bool:
    """Whether a part of the graph is hidden behind reentrant checkpointing, which knows `backward` only."""
    return any("CheckpointFunction" in node.name() for node in graph_nodes([loss]))


@contextmanager
def _without_hooks(leaves: Iterable[Tensor]) -> Iterator[None]:
    """The user's hooks on gradients, such as clipping, are for the training loss."""
    kept = [(leaf, leaf._backward_hooks, leaf._post_accumulate_grad_hooks) for leaf in leaves]
    try:
        for leaf, *_ in kept:
            leaf._backward_hooks = leaf._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        yield
    finally:
        for leaf, before, after in kept:
            leaf._backward_hooks, leaf._post_accumulate_grad_hooks = before, after


def scalar_loss(function: Loss, loss: Any) -> Tensor:
    """`loss` if it is one number; raises `InvalidLoss` otherwise."""
    name = _name(function)
    if not isinstance(loss, Tensor):
        kind = type(loss).__name__
        remedy = {
            "NoneType": "end it with return loss",
            "tuple": "return the loss alone",
            "list": "return the loss alone",
            "dict": "return the loss alone",
            "float": "remove .item() or float() from it",
        }.get(kind, "return the loss as torch computes it")
        raise InvalidLoss(f"{name} must return a scalar tensor, but returned {kind}; {remedy}.")
    if loss.numel() != 1:
        raise InvalidLoss(
            f"{name} must return one loss, but returned a tensor of shape {tuple(loss.shape)}; average it "
            "over the examples."
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise InvalidLoss(
            f"{name} must return a loss with a gradient with respect to the weights, but it has none; remove "
            "torch.no_grad(), .detach() or .item() from it."
        )
    return loss.reshape(())


ORDER = "Tuner(model, optimizer, space, loss_fn, train_loader, valid_loader)"
_OF_TORCH = {"torch.nn.modules.loss", "torch.nn.functional"}
_MODELS = {"model", "net", "network"}


def require_loss(name: str, function: Any) -> None:
    """Raise `TypeError` for what cannot be called as a `Loss`, where its signature says so for certain."""
    if not callable(function):
        raise TypeError(
            f"{name} must be a function of (model, batch), but got {function!r}; the order is {ORDER}."
        )
    called, its_name = f"{name} is called as {name}(model, batch)", _name(function)
    if {type(function).__module__, getattr(function, "__module__", "")} & _OF_TORCH:
        raise TypeError(
            f"{called}, but {its_name} takes outputs and targets; write a function that unpacks the batch, "
            "calls the model and returns this loss."
        )
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # of a builtin
        return
    order = [*signature.parameters][:2]
    if order == ["b", "m"] or (order[1:] and order[1] in _MODELS and order[0] not in _MODELS):
        raise TypeError(f"{called}, but takes ({', '.join(order)}); exchange the two.")
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(
            f"{called}, but takes {signature}; unpack the batch inside, or bind further arguments with "
            "functools.partial."
        ) from None


def require_moved(function: Loss, weights: Tensors, found: Tensors) -> None:
    """Raise `InvalidLoss` if none of the weights has a gradient: the loss is another model's."""
    if weights and not weights.keys() & found.keys():
        raise InvalidLoss(
            f"{_name(function)} must read the weights that the optimiser moves, but reads none of them; "
            "evaluate the model that it is called with, not a copy."
        )


def _name(function: Loss) -> str:
    return getattr(function, "__name__", type(function).__name__)


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
    a weight need not belong to the model. Values of weights that are gone, or have another shape, are left
    out.
    """
    at = {name: value for name, value in at.items() if name in params and params[name].shape == value.shape}
    before = {name: params[name].data for name in at}
    try:
        for name, value in at.items():
            params[name].data = value
        yield
    finally:
        for name, data in before.items():
            params[name].data = data


@contextmanager
def preserved(
    model: nn.Module, others: Iterable[Tensor] = (), written: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Attributes, buffers, gradients and `requires_grad` are put back, whatever happens.

    Forward passes change copies of the buffers, and of other tensors that modules keep. Containers that a
    module keeps, such as a queue, get their entries back. Gradients begin at None, so that nothing is added
    to the user's.

    Args:
        model: with all its modules.
        others: weights that are not the model's.
        written: parameters that forward passes write, such as those of a momentum encoder.
    """
    tables = [m.__dict__ for m in model.modules()]
    containers = [*tables, *(c for table in tables for c in table.values() if _is_container(c))]
    entries = [(c, copy.copy(c)) for c in containers]
    plain = (t for c, _ in entries for t in (c.values() if isinstance(c, dict) else c) if _is_plain(t))
    tensors = [(t, t.data) for t in {id(t): t for t in [*model.buffers(), *plain, *written]}.values()]
    weights = {id(p): p for p in [*model.parameters(), *others]}.values()
    params = [(p, p.grad, p.requires_grad) for p in weights]
    try:
        for t, data in tensors:
            t.data = data.clone()
        for p, *_ in params:
            p.grad = None
        yield
    finally:
        for container, before in entries:
            _put_back(container, before)
        for t, data in tensors:
            t.data = data
        for p, grad, requires_grad in params:
            if p.requires_grad is not requires_grad:
                p.requires_grad_(requires_grad)
            p.grad = grad


def _is_container(thing: Any) -> bool:
    kinds = (dict, OrderedDict, defaultdict, list, set, deque)
    return type(thing) in kinds and len(thing) <= MOST_ENTRIES


def _is_plain(thing: Any) -> bool:
    """Whether it is a tensor that a forward pass may write to and that is no parameter, frozen or not."""
    weight = isinstance(thing, nn.Parameter)
    return isinstance(thing, Tensor) and not (weight or thing.requires_grad or thing.is_inference())


def _put_back(container: Any, before: Any) -> None:
    """Give a container the entries that it had."""
    if isinstance(container, dict):
        same = len(container) == len(before) and all(container.get(k) is v for k, v in before.items())
    else:
        same = len(container) == len(before) and all(map(operator.is_, container, before))
    if not same:
        container.clear()
        (container.extend if isinstance(container, list | deque) else container.update)(before)


def _uncompiled() -> Any:
    """Compiled modules and functions run eagerly, where there are any: other shapes would compile them
    anew."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast keeps casts of the weights by their identity, which stays as their values are exchanged."""
    before = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


IMPATIENT = 3
"""So many signals of a kind, and the user does not want to wait for a function that hangs."""


class _Waiting:
    """The handler of signals within `signals_wait`; those that wait in a block around it are left alone."""

    def __init__(self) -> None:
        known = {s: signal.getsignal(s) for s in _SIGNALS}
        self.handlers = {s: h for s, h in known.items() if callable(h) and not isinstance(h, _Waiting)}
        self.came: list[tuple[int, FrameType | None]] = []
        self.over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came.append((number, frame))
        if self.over or sum(number == n for n, _ in self.came) >= IMPATIENT:
            self.handlers[signal.Signals(number)](number, frame)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals with a Python handler, such as Ctrl-C, wait until the block is over; a third one does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = _Waiting()
    try:
        for number in waiting.handlers:
            signal.signal(number, waiting)
        yield
    finally:
        try:
            _put_back_handlers(dict(waiting.handlers))
        finally:
            waiting.over = True
            with ExitStack() as stack:  # calls the handler of each signal, also after one that raises
                for number, frame in reversed(waiting.came):
                    stack.callback(waiting.handlers[signal.Signals(number)], number, frame)


def _put_back_handlers(left: dict[signal.Signals, Any]) -> None:
    """Each of them, though one that is back may raise before the others are."""
    try:
        for number in list(left):
            signal.signal(number, left[number])
            del left[number]
    finally:
        if left:
            _put_back_handlers(left)


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
