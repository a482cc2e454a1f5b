"""Evaluate the user's live model with other weights, and leave no trace.

The tuner computes on the model only inside `LiveModel.borrowed`. Afterwards weights, buffers, modes,
gradients and random numbers are as before, even if the user's function fails or Ctrl-C stops it.
"""

import inspect
import math
import operator
import signal
import sys
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset

from midflight._tensors import Tensors
from midflight.errors import InvalidLoss, MidflightError
from midflight.hypergrad.graph import graph_nodes
from midflight.hypergrad.problem import reached
from midflight.tuner.data import fresh, tensors_of
from midflight.tuner.distributed import local
from midflight.tuner.gradient import same_entries, sampled
from midflight.tuner.randomness import Randomness
from midflight.tuner.sharded import (
    gather,
    is_sharded,
    part,
    part_of_gradient,
    passes_between,
    reshard,
    restart,
    sharded_modules,
)

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar."""
DEPTH = 6
"""Levels of containers and objects within a module that are restored."""
SAME_LOSS = 1e-3
"""Relative difference up to which two validation losses are the same but for rounding."""
MOST_ENTRIES = 100_000
"""Containers of a module with more entries are not restored, because that takes too long."""


class LiveModel:
    """Evaluates a user's loss functions on a user's model.

    Args:
        model: the model being trained, compiled or not.
        others: weights that the optimisers train but the model does not have.
        beside: modules other than the model that the loss functions use, such as a head or a teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        randomness: Randomness,
        others: Iterable[Tensor] = (),
        beside: Iterable[nn.Module] = (),
    ) -> None:
        self.model = model
        known, more = set(model.modules()), []
        for module in beside:
            if module not in known:
                more.append(module)
                known.update(module.modules())
        self.all: nn.Module = nn.ModuleList([model, *more]) if more else model
        """The model and the modules beside it."""
        self._others = list(others)
        self._randomness = randomness
        self._before: list[tuple[Tensor, int, Tensor | None]] = []
        self._written: list[Tensor] = []
        self._careful: dict[tuple[int, bool], bool] = {}
        """Whether a loss writes to its batch in place, by loss and mode; a new one gets copies."""
        self._by_flags = False
        """Whether eval mode sets flags only, without the `train` of modules that have their own."""
        self._derives = False
        """Whether a loss computes derivatives itself, so that it needs a graph."""
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in self.all.modules())
        self._sharded = sharded_modules(self.all)
        self.reshard()

    def reshard(self) -> None:
        """Drop the weights that FSDP gathered for its last pass, so that the model shows its parts."""
        reshard(self._sharded)

    def gather(self) -> None:
        """Gather the weights of a sharded model, so that a backward pass can begin inside it.

        The next call of a loss drops them.
        """
        gather(self._sharded)

    def watch(self) -> None:
        """Begin to note which parameters the loop writes until the next hyper-step.

        Entries of frozen ones are noted too, because a write by `.data` does not change the version.
        """
        self.reshard()
        self._before = [
            (p, p._version, None if p.requires_grad else sampled(p).clone()) for p in self.all.parameters()
        ]

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Let a hyper-step change the model and the modules beside it; restore them at the end."""
        self.reshard()
        self._find_written()
        with ExitStack() as stack:
            stack.enter_context(signals_wait())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._randomness.borrowed())
            stack.enter_context(preserved(self.all, self._others, self._written))
            if self._sharded:  # inside, so that the model is sharded when `preserved` restores its tables
                stack.enter_context(passes_between(self._sharded))
            stack.enter_context(_uncompiled())
            stack.enter_context(local(self.all))
            stack.enter_context(_no_autocast_cache())
            stack.enter_context(_no_parametrize_cache())
            if self._recurrent:  # cuDNN's recurrent layers know neither eval mode nor second derivatives
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def _find_written(self) -> None:
        """Find the parameters that were written since `watch`, once; frozen ones stay known."""
        if not self._before:
            return
        written = [
            p
            for p, version, entries in self._before
            if p._version != version or (entries is not None and not same_entries(entries, sampled(p)))
        ]
        frozen = [p for p in self._written if not p.requires_grad]
        self._written = list({id(p): p for p in [*frozen, *written]}.values())
        self._before = []

    def evaluating(self) -> AbstractContextManager[None]:
        """Put the model in eval mode, for a backward pass too, because checkpoints recompute in it."""
        self.reshard()
        return evaluating(self.all, self._by_flags)

    def choose_mode(self, function: Loss, batch: Any) -> None:
        """Choose how to put modules with a `train` of their own in eval mode.

        Such a `train` may merge weights, as that of LoRA layers does. A merged weight has no gradient with
        respect to its parts. So only the flags `training` are set if the validation loss is then the same.

        Args:
            function: the validation loss.
            batch: of T2.
        """
        if any(type(m).train is not nn.Module.train for m in self.all.modules()):
            states, losses = self._randomness.snapshot(), []
            for self._by_flags in (False, True):
                losses.append(self.number(lambda: self.valid_loss(function, batch)))
                self._randomness.rewind(states)
            self._by_flags = math.isclose(*losses, rel_tol=SAME_LOSS)

    def valid_loss(self, function: Loss, batch: Any) -> Tensor:
        """Return `function(model, batch)` in eval mode, shape ()."""
        with self.evaluating():
            try:
                return self._call(function, batch)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
                if not isinstance(error, MidflightError):
                    error.add_note(
                        "This was the validation loss, valid_loss_fn or else loss_fn; pass a valid_loss_fn "
                        "that takes batches of valid_loader."
                    )
                raise

    def train_loss(self, function: Loss, batch: Any) -> Tensor:
        """Return `function(model, batch)` in the mode in which the model trains, shape ()."""
        return self._call(function, batch)

    def number(self, loss: Callable[[], Tensor]) -> float:
        """Return a loss as a number, without a graph unless the loss computes derivatives itself."""
        if not self._derives:
            states = self._randomness.snapshot()
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # checkpoints
                    return float(loss())
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            self._derives = True
            self._randomness.rewind(states)
        return float(loss().detach())

    def gradients(
        self,
        loss: Callable[[], Tensor],
        at: Tensors,
        inside: Callable[[], Tensors] = dict,
        hooks: bool = False,
    ) -> tuple[Tensor, Tensors]:
        """Return the loss and its gradients, name -> tensor, without leaves that the loss does not reach.

        Reentrant checkpointing and FSDP work with `backward` only. Then the gradients are taken from the
        leaves' `.grad`, which `borrowed` has emptied. For a sharded weight, this is the process's part of the
        mean gradient over the processes.

        Args:
            loss: computes the loss.
            at: leaves, name -> tensor.
            inside: gives further leaves; called once the loss is computed.
            hooks: whether the user's hooks on gradients run.
        """
        value = loss()
        with nullcontext() if hooks else _without_hooks(at.values()):
            at = at | {name: t for name, t in inside().items() if t.requires_grad}
            if not at:
                return value.detach(), {}
            if not (any(map(is_sharded, at.values())) or reenters(value)):
                return value.detach(), _grad(value, at)
            for leaf in at.values():
                leaf.grad = None
            value.backward()  # type: ignore[no-untyped-call]
        grads = {name: g for name, leaf in at.items() if (g := part_of_gradient(leaf)) is not None}
        for leaf in at.values():
            leaf.grad = None
        return value.detach(), grads

    def _call(self, function: Loss, batch: Any) -> Tensor:
        torch.clear_autocast_cache()  # it may hold casts of other weights
        restart(self._sharded)  # weights may have changed since FSDP gathered them
        key = id(function), self.model.training  # a callable object may have no hash
        own = fresh(batch, copies=self._careful.get(key, True))
        tensors = [(t, t._version) for t in tensors_of(own)]
        loss = scalar_loss(function, function(self.model, own))
        self._careful[key] = self._careful.get(key, False) or any(t._version != v for t, v in tensors)
        return loss


def _grad(loss: Tensor, at: Tensors) -> Tensors:
    try:
        return reached([loss], at)
    except RuntimeError as error:
        if "a second time" not in str(error):
            raise
        raise InvalidLoss(
            "a loss that computes derivatives must keep their graph, but a part of it is freed; call "
            "autograd.grad with create_graph=True, in eval mode too."
        ) from error


def reenters(loss: Tensor) -> bool:
    """Return whether the loss uses reentrant checkpointing, which works with `backward` only."""
    return any("CheckpointFunction" in node.name() for node in graph_nodes([loss]))


@contextmanager
def _without_hooks(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Switch off the user's hooks on gradients, such as clipping, which are for the training loss."""
    kept = [(leaf, leaf._backward_hooks, leaf._post_accumulate_grad_hooks) for leaf in leaves]
    try:
        for leaf, *_ in kept:
            leaf._backward_hooks = leaf._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        yield
    finally:
        for leaf, before, after in kept:
            leaf._backward_hooks, leaf._post_accumulate_grad_hooks = before, after


def scalar_loss(function: Loss, loss: Any) -> Tensor:
    """Return `loss` with shape () if it is one number with a gradient; raise `InvalidLoss` otherwise."""
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
            "torch.no_grad(), .detach() or .item() from it. If it computes derivatives itself, it must do so "
            "with create_graph=True, in eval mode too."
        )
    return loss.reshape(())


ORDER = "Tuner(model, optimizer, space, loss_fn, train_loader, valid_loader)"
_OF_TORCH = {"torch.nn.modules.loss", "torch.nn.functional"}
_MODELS = {"model", "net", "network"}


def require_loss(name: str, function: Any) -> None:
    """Raise `TypeError` if the signature shows that `function` cannot be called as a `Loss`."""
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
    except (TypeError, ValueError):  # a builtin has no signature
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
    """Raise `InvalidLoss` if no weight has a gradient, because the loss then reads another model.

    Args:
        function: the loss function, for the message.
        weights: those that the optimisers move, name -> tensor.
        found: gradients of the loss, name -> tensor.
    """
    if weights and not weights.keys() & found.keys():
        raise InvalidLoss(
            f"{_name(function)} must read the weights that the optimiser moves, but reads none of them; "
            "evaluate the model that it is called with, not a copy."
        )


def _name(function: Loss) -> str:
    return getattr(function, "__name__", type(function).__name__)


@contextmanager
def evaluating(model: nn.Module, by_flags: bool = False) -> Iterator[None]:
    """Put every module in eval mode; restore each module's own mode at the end.

    The parameters and attributes of a module with a `train` of its own are restored as well.

    Args:
        by_flags: whether only the flags `training` are set.
    """
    modes = [(m, m.training) for m in model.modules()]
    own = [m for m, _ in modes if type(m).train is not nn.Module.train]
    tensors = [(p, _restorer(p)) for m in own for p in m.parameters(recurse=False)]
    attributes = [(m.__dict__, dict(m.__dict__)) for m in own]
    try:
        for p, _ in tensors:
            _let_write(p)
        if by_flags:
            for module, _ in modes:
                module.training = False
        else:
            model.eval()
        yield
    finally:
        for table, before in attributes:
            _restore_entries(table, before)
        for _, restore in tensors:
            restore()
        for module, mode in modes:
            module.training = mode


@contextmanager
def weights_at(params: Mapping[str, Tensor], at: Tensors) -> Iterator[None]:
    """Give parameters other values; restore their own storage, bit for bit, at the end.

    Values are exchanged by `.data`, so earlier graphs stay valid and tied weights stay tied. A weight need
    not belong to the model. Values whose weight is gone or has another shape are ignored.

    FSDP does not notice such an exchange. So values of sharded weights are copied into the parts, and back.

    Args:
        params: name -> leaf.
        at: name -> tensor, shaped like the weight; like its part if it is sharded.
    """
    at = {n: value for n, value in at.items() if n in params and part(params[n]).shape == value.shape}
    before = [_restorer(params[name]) for name in at]
    try:
        for name, value in at.items():
            if is_sharded(params[name]):
                part(params[name]).copy_(value)
            else:
                params[name].data = value
        yield
    finally:
        for restore in before:
            restore()


def _restorer(t: Tensor) -> Callable[[], Any]:
    """Return a function that gives the tensor its present values back.

    A plain tensor gets its old `.data` back. A sharded one can only be written in place, so its part is
    copied now.
    """
    return partial(part(t).copy_, part(t).clone()) if is_sharded(t) else partial(setattr, t, "data", t.data)


def _let_write(t: Tensor) -> None:
    """Let writes go to a copy of a tensor's values; writes to a sharded tensor go to the tensor itself."""
    if not is_sharded(t):
        t.data = t.data.clone()


@contextmanager
def preserved(
    model: nn.Module, others: Iterable[Tensor] = (), written: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Restore attributes, buffers, gradients and `requires_grad` at the end, whatever happens.

    Forward passes write to copies of the buffers, and of other tensors that modules keep. Containers that a
    module keeps, such as a queue, get their entries back. Gradients begin at None, so that nothing is added
    to the user's.

    Args:
        model: the model, with all its modules.
        others: weights that the model does not have.
        written: parameters that forward passes write, such as those of a momentum encoder.
    """
    kept = list(_kept_by(m.__dict__ for m in model.modules()))
    containers = [c for c in kept if not isinstance(c, Tensor | np.ndarray)]
    arrays = [(a, a.copy()) for a in kept if isinstance(a, np.ndarray) and a.flags.writeable]
    held = [t for t in kept if isinstance(t, Tensor)]
    tensors = [(t, _restorer(t)) for t in {id(t): t for t in [*model.buffers(), *held, *written]}.values()]
    weights = {id(p): p for p in [*model.parameters(), *others]}.values()
    params = [(p, p.grad, p.requires_grad) for p in weights]
    try:
        with entries_kept(containers):
            for t, _ in tensors:
                _let_write(t)
            for p, *_ in params:
                p.grad = None
            yield
    finally:
        for array, values in arrays:
            array[...] = values
        for _, restore in tensors:
            restore()
        for p, grad, requires_grad in params:
            if p.requires_grad is not requires_grad:
                p.requires_grad_(requires_grad)
            p.grad = grad


@contextmanager
def entries_kept(containers: Iterable[Any]) -> Iterator[None]:
    """Give lists, dicts, sets and deques their entries back at the end, also after an error."""
    entries = [(container, container.copy()) for container in containers]
    try:
        yield
    finally:
        for container, before in entries:
            _restore_entries(container, before)


_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque, tuple)
_NOT_WALKED = {"builtins", "torch", "numpy", "midflight", "functools", "weakref", "threading"}
"""Packages whose objects have no state that a forward pass of the user's writes, or restore their own."""


def _kept_by(tables: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Yield the containers, tensors and arrays that modules keep and that forward passes may write to.

    They may lie in other containers and in plain objects, such as a meter, up to `DEPTH` levels deep. The
    attributes of an object are a container.

    Args:
        tables: attributes of the modules.
    """
    known: set[int] = set()
    level: list[Any] = list(tables)
    for _ in range(DEPTH):
        below: list[Any] = []
        for thing in level:
            if id(thing) in known:
                continue
            known.add(id(thing))
            if isinstance(thing, Tensor | np.ndarray):
                if not isinstance(thing, Tensor) or _is_writable(thing):
                    yield thing
            elif type(thing) in _CONTAINERS:
                if len(thing) <= MOST_ENTRIES:
                    below += thing.values() if isinstance(thing, dict) else thing
                    if type(thing) is not tuple:
                        yield thing
            elif _is_plain_object(thing):
                below.append(thing.__dict__)
        level = below


def _is_plain_object(thing: Any) -> bool:
    kind = type(thing)
    return (
        hasattr(thing, "__dict__")
        and not isinstance(thing, nn.Module | type | Iterator)
        and not callable(thing)
        and kind.__module__.partition(".")[0] not in _NOT_WALKED
        and not isinstance(thing, torch.optim.Optimizer | DataLoader | Dataset)
    )


def _is_writable(thing: Any) -> bool:
    """Return whether it is a tensor, but no parameter, that a forward pass may write to in place."""
    weight = isinstance(thing, nn.Parameter)
    return isinstance(thing, Tensor) and not (weight or thing.requires_grad or thing.is_inference())


def _restore_entries(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        same = len(container) == len(before) and all(container.get(k) is v for k, v in before.items())
    else:
        same = len(container) == len(before) and all(map(operator.is_, container, before))
    if not same:
        container.clear()
        (container.extend if isinstance(container, list | deque) else container.update)(before)


def _uncompiled() -> Any:
    """Run compiled modules and functions eagerly, because other shapes would recompile them."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _no_parametrize_cache() -> Iterator[None]:
    """Switch off the cache of `parametrize.cached()`, which keeps values of the loop's own weights."""
    before = parametrize._cache_enabled, parametrize._cache
    try:
        parametrize._cache_enabled, parametrize._cache = 0, {}
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Switch off autocast's cache, which does not notice when the values of a weight are exchanged."""
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
"""The number of signals of one kind after which a hyper-step is interrupted, because it may hang."""


class _Waiting:
    """A handler that keeps signals until `signals_wait` is over.

    Signals that already wait for an outer block keep its handler.

    Args:
        impatient: the number of signals of one kind from which on they do not wait.
    """

    def __init__(self, impatient: int) -> None:
        self._impatient = impatient
        known = {s: signal.getsignal(s) for s in _SIGNALS}
        self.handlers = {s: h for s, h in known.items() if callable(h) and not isinstance(h, _Waiting)}
        self.came: list[tuple[int, FrameType | None]] = []
        self.over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came.append((number, frame))
        if self.over or sum(number == n for n, _ in self.came) >= self._impatient:
            self.handlers[signal.Signals(number)](number, frame)


@contextmanager
def signals_wait(impatient: int = IMPATIENT) -> Iterator[None]:
    """Delay signals with a Python handler, such as Ctrl-C, to the end of the block.

    Args:
        impatient: the number of signals of one kind from which on they do not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = _Waiting(impatient)
    try:
        for number in waiting.handlers:
            signal.signal(number, waiting)
        yield
    finally:
        try:
            _restore_handlers(dict(waiting.handlers))
        finally:
            waiting.over = True
            with ExitStack() as stack:  # calls the handler of each signal, even after one that raises
                for number, frame in reversed(waiting.came):
                    stack.callback(waiting.handlers[signal.Signals(number)], number, frame)


def _restore_handlers(left: dict[signal.Signals, Any]) -> None:
    """Restore each handler, even if one that is restored already is called and raises."""
    try:
        for number in list(left):
            signal.signal(number, left[number])
            del left[number]
    finally:
        if left:
            _restore_handlers(left)


class _LossModule(nn.Module):
    """A loss as a module, so that `functional_call` can give its model other weights."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self) -> Tensor:
        return self._loss()


def with_tensors(model: nn.Module, loss: Callable[[], Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the loss while the model has other weights and buffers, differentiable in these.

    Args:
        model: the model that the loss reads; not modified.
        loss: computes the loss, shape ().
        tensors: weights and buffers by their names in the model; a tied one is replaced at all its names.
    """
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(prefix="model"):  # gives a shared module once
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(prefix, recurse=False, remove_duplicate=False):
                places.setdefault(id(tensor), []).append(name)
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    everywhere = {place: t for name, t in tensors.items() for place in places[id(known[name])]}
    # with tie_weights=True, a module that has two names would lose its weights for good
    result: Tensor = torch.func.functional_call(_LossModule(model, loss), everywhere, (), tie_weights=False)
    return result
