"""Random numbers of the tuner's own, so that the user's stay as they would be without it."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch

SALT = 0x6D69_6466  # any number but 0: the tuner must not draw what the loop draws
DEPTH, OBJECTS = 4, 500
"""How far into a loader the tuner looks for generators and state."""


class Randomness:
    """Switches every random generator in reach to the tuner's own state for a while.

    Covered are the global generators of torch (CPU and CUDA), numpy and Python, and the generators that the
    given objects, such as loaders, hold in their attributes. The global ones begin at a seed of their own,
    the others where they stand.

    Args:
        holders: objects whose generators the user's loop may share.
    """

    def __init__(self, holders: Iterable[Any] = ()) -> None:
        seed = (torch.initial_seed() ^ SALT) % 2**32
        found = {
            id(g): g for holder in holders for g in _generators(holder) if g is not torch.default_generator
        }
        held = [_source(generator) for generator in found.values()]
        everyone = [_source(torch.default_generator), _numpy(), _python()]
        self._sources = [*everyone, *held]
        self._states: list[Any] = [*[None] * len(everyone), *[source.get() for source in held]]
        self._seed = seed
        self._borrowed = False
        self._cuda = 0

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Draw from the tuner's own numbers; the user's generators are as before afterwards."""
        if self._borrowed:
            yield
            return
        cuda = _cuda()[self._cuda :]  # started since
        sources = [*self._sources, *cuda]
        own = [*self._states, *[None] * (len(sources) - len(self._states))]
        before = [source.get() for source in sources]
        try:
            self._borrowed = True
            for n, (source, state) in enumerate(zip(sources, own, strict=True)):
                source.set(state) if state is not None else source.seed(self._seed + n)
            yield
            own = [source.get() for source in sources]
        finally:
            self._states, self._sources, self._cuda = own, sources, self._cuda + len(cuda)
            for source, state in zip(sources, before, strict=True):
                source.set(state)
            self._borrowed = False

    def state_dict(self) -> dict[str, Any]:
        """The tuner's own states; one entry per generator."""
        return {"states": [plain(state) for state in self._states], "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        count = len(self._sources)
        self._states = [*map(restored, state["states"]), *[None] * count][:count]
        self._seed = state["seed"]

    def snapshot(self) -> list[Any]:
        """The states now; to be called while `borrowed`."""
        return [source.get() for source in self._sources]

    def rewind(self, states: list[Any]) -> None:
        """Go back to a `snapshot`; to be called while `borrowed`."""
        for source, state in zip(self._sources, states, strict=False):
            source.set(state)


_ARRAY = "numpy"


def plain(states: Any) -> Any:
    """States without arrays of numpy, which `torch.load` refuses."""
    if isinstance(states, np.ndarray):
        return {_ARRAY: torch.from_numpy(states.copy())}
    if isinstance(states, dict):
        return {key: plain(value) for key, value in states.items()}
    return type(states)(map(plain, states)) if isinstance(states, list | tuple) else states


def restored(state: Any) -> Any:
    """The inverse of `plain`."""
    if isinstance(state, dict):
        if set(state) == {_ARRAY}:
            return state[_ARRAY].numpy()
        return {key: restored(value) for key, value in state.items()}
    return type(state)(map(restored, state)) if isinstance(state, list | tuple) else state


class NoRandomness(Randomness):
    """Leaves all generators alone, but for the global one of torch at `rewind`."""

    def __init__(self) -> None:
        self._sources = [_source(torch.default_generator)]
        self._states, self._seed, self._borrowed = [None], 0, True


class _Source:
    """One generator: how to read, write and seed it."""

    def __init__(self, get: Callable[[], Any], set: Callable[[Any], Any], seed: Callable[[int], Any]) -> None:
        self.get, self.set, self.seed = get, set, seed


def _numpy() -> _Source:
    return _Source(
        lambda: np.random.get_state(legacy=True), np.random.set_state, lambda n: np.random.seed(n % 2**32)
    )


def _python() -> _Source:
    return _Source(random.getstate, random.setstate, random.seed)


def _cuda() -> list[_Source]:
    """Of the devices that are in use already; asking the others would start them."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [_source(g) for g in torch.cuda.default_generators]


def _source(generator: Any) -> _Source:
    if isinstance(generator, torch.Generator):
        return _Source(generator.get_state, generator.set_state, generator.manual_seed)
    if isinstance(generator, random.Random):
        return _Source(generator.getstate, generator.setstate, generator.seed)
    if isinstance(generator, np.random.RandomState):
        return _Source(generator.get_state, generator.set_state, generator.seed)
    bits = generator.bit_generator  # of numpy.random.Generator

    def write(state: Any) -> None:
        bits.state = state

    return _Source(lambda: bits.state, write, lambda n: write(type(bits)(n).state))


GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


def _generators(holder: Any) -> Iterator[Any]:
    """The generators in the attributes of an object and of what it holds, a few levels deep."""
    level, seen = [holder], {id(holder)}
    for _ in range(DEPTH):
        following: list[Any] = []
        for obj in level:
            for value in [] if isinstance(obj, torch.nn.Module) else _parts(obj):
                if isinstance(value, GENERATORS):
                    yield value
                elif id(value) not in seen and len(seen) < OBJECTS:
                    seen.add(id(value))
                    following.append(value)
        level = following


def _parts(obj: Any) -> Iterable[Any]:
    """What an object holds, or the code of its class reads of its module."""
    if isinstance(obj, torch.Tensor | np.ndarray | str | bytes | int | float | type | type(sys)):
        return ()
    if isinstance(obj, Mapping):
        return list(obj.values())[:OBJECTS] if len(obj) <= OBJECTS else ()
    if isinstance(obj, list | tuple | set):
        return obj if len(obj) <= OBJECTS else ()
    if isinstance(obj, FunctionType):
        return [
            *(cell.cell_contents for cell in obj.__closure__ or () if _filled(cell)),
            *_of_its_module(obj),
        ]
    if isinstance(obj, partial):
        return [obj.func, *obj.args, *obj.keywords.values()]
    own = [*vars(obj).values()] if hasattr(obj, "__dict__") else []
    kinds = [kind for kind in type(obj).__mro__ if kind.__module__.partition(".")[0] not in _LIBRARIES]
    for kind in kinds:
        own += [getattr(obj, name) for name in _slots(kind) if hasattr(obj, name)]
        own += [g for f in vars(kind).values() if isinstance(f, FunctionType) for g in _of_its_module(f)]
    return [*own, getattr(obj, "__self__", None)]  # of a method


_LIBRARIES = {
    "builtins",
    "torch",
    "numpy",
    "random",
    "abc",
    "typing",
    "collections",
    "itertools",
    "functools",
}


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _of_its_module(function: FunctionType) -> list[Any]:
    """The generators among the global names that a function reads."""
    names = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [value for value in names if isinstance(value, GENERATORS)]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
