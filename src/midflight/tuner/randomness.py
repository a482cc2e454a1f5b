"""Give the tuner its own random numbers, so that the user's are the same as without it."""

import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map, tree_map_only

SALT = 0x6D69_6466
"""The tuner's seed is the user's XOR this. Any number but 0 will do: the two must not draw the same."""
DEPTH, OBJECTS, ENTRIES = 10, 20_000, 500
"""Limits of the search for generators and state: levels, objects, and entries of a container."""


class Randomness:
    """Switches random generators to the tuner's own states and back.

    These are the global generators of torch (CPU and CUDA), numpy and Python, and those that the given
    objects, such as loaders and losses, hold or read. The tuner's own states begin at a seed for the global
    generators, and at the present state for the others.

    Args:
        holders: objects whose generators the user's loop may use too.
    """

    def __init__(self, holders: Iterable[Any] = ()) -> None:
        seed = (torch.initial_seed() ^ SALT) % 2**32
        found = [g for g in held(holders, generators()) if g is not torch.default_generator]
        shared = [_source(torch.default_generator), _numpy(), _python()]
        held_ones = [_source(generator) for generator in found]
        self._sources = [*shared, *held_ones]
        self._states: list[Any] = [*[None] * len(shared), *[source.get() for source in held_ones]]
        """The tuner's own state of each source; None before the first use of a global generator."""
        self._seed = seed
        self._borrowed = False
        self._cuda = 0
        """How many CUDA devices are among the sources."""

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Draw the tuner's own numbers in this block; restore the user's states at the end."""
        if self._borrowed:
            yield
            return
        cuda = _cuda()[self._cuda :]  # those initialised since the last block
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
        """Return the tuner's own states, one entry per generator."""
        return {"states": [plain(state) for state in self._states], "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        count = len(self._sources)
        self._states = [*map(restored, state["states"]), *[None] * count][:count]
        self._seed = state["seed"]

    def snapshot(self) -> list[Any]:
        """Return the present states; call it within `borrowed`."""
        return [source.get() for source in self._sources]

    def rewind(self, states: list[Any]) -> None:
        """Return to the states of a `snapshot`; call it within `borrowed`."""
        for source, state in zip(self._sources, states, strict=False):
            source.set(state)


_ARRAY = "numpy"


def plain(states: Any) -> Any:
    """Return states with torch tensors in place of numpy arrays, which `torch.load` refuses."""
    return tree_map_only(np.ndarray, lambda array: {_ARRAY: torch.from_numpy(array.copy())}, states)


def restored(states: Any) -> Any:
    """Return states with numpy arrays again; the inverse of `plain`."""
    return tree_map(lambda x: x[_ARRAY].numpy() if _is_array(x) else x, states, is_leaf=_is_array)


def _is_array(state: Any) -> bool:
    return isinstance(state, dict) and state.keys() == {_ARRAY}


class _Source(NamedTuple):
    """Functions that read, write and seed the state of one generator."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    seed: Callable[[int], Any]


def _numpy() -> _Source:
    return _Source(
        lambda: np.random.get_state(legacy=True), np.random.set_state, lambda n: np.random.seed(n % 2**32)
    )


def _python() -> _Source:
    return _Source(random.getstate, random.setstate, random.seed)


def _cuda() -> list[_Source]:
    """Return the generators of all CUDA devices; none before CUDA is used, because asking initialises it."""
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


def generators() -> tuple[type, ...]:
    """Return the classes of random generators, without importing numpy.random, which is slow."""
    loaded = "numpy.random" in sys.modules
    of_numpy = (np.random.RandomState, np.random.Generator) if loaded else ()
    return torch.Generator, random.Random, *of_numpy


def held(
    holders: Iterable[Any], kinds: Any, parts: Callable[[Any], Iterable[Any]] | None = None
) -> list[Any]:
    """Return all objects of these kinds that the given ones are, hold or read, each once, up to DEPTH levels.

    Args:
        holders: where to begin.
        kinds: a class or a tuple of classes.
        parts: object -> what it holds; `parts_of` by default.
    """
    found: list[Any] = []
    level, seen = list(holders), dict[int, Any]()
    for _ in range(DEPTH):
        following: list[Any] = []
        for value in level:
            for thing in value.modules() if isinstance(value, torch.nn.Module) else [value]:
                empty = isinstance(thing, dict | list | tuple) and not thing
                if empty or isinstance(thing, _ATOMS) or id(thing) in seen or len(seen) >= OBJECTS:
                    continue
                seen[id(thing)] = thing
                if isinstance(thing, kinds):
                    found.append(thing)
                following += (parts or parts_of)(thing)
        level = following
    return found


_ATOMS = (torch.Tensor, np.ndarray, str, bytes, int, float, type, type(sys), type(None), logging.Logger)


def parts_of(obj: Any) -> list[Any]:
    """Return what an object holds, and what its code reads: closures and globals of its module."""
    if isinstance(obj, generators()):
        return []
    if isinstance(obj, Mapping | list | tuple | set):
        entries = obj.values() if isinstance(obj, Mapping) else obj
        return list(entries) if len(obj) <= ENTRIES else []
    if isinstance(obj, FunctionType):
        return _read_by(obj)
    if isinstance(obj, partial):
        return [obj.func, *obj.args, *obj.keywords.values()]
    own = [getattr(obj, "__self__", None), getattr(obj, "__func__", None)]  # of a method
    if hasattr(obj, "__dict__"):
        own += [value for name, value in vars(obj).items() if name not in _TABLES]
    for kind in type(obj).__mro__:
        if not _is_library(kind.__module__):
            own += [getattr(obj, name) for name in _slots(kind) if hasattr(obj, name)]
            functions = (getattr(f, "__func__", f) for f in vars(kind).values())
            own += [thing for f in functions if isinstance(f, FunctionType) for thing in _read_by(f)]
    return own


_TABLES = {"_parameters", "_buffers", "_modules"}
"""Attributes of a module that are skipped: parameters and buffers are tensors, `held` visits its modules."""


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


_LIBRARIES = {*sys.stdlib_module_names, "multiprocess", "torch", "numpy", "midflight"}
"""Packages whose code reads no data; `datasets` uses `multiprocess`, a copy of the standard library's."""


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _read_by(function: FunctionType) -> list[Any]:
    """Return what is in a function's closure and defaults, and the globals that it names."""
    closure = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if _is_library(function.__globals__.get("__name__", "")):
        return [*closure, *defaults]
    names, theirs = _names(function.__code__), function.__globals__
    known = [theirs[name] for name in names if name in theirs]
    modules = [m for m in known if isinstance(m, ModuleType) and not _is_library(m.__name__)]
    of_modules = [vars(m)[name] for m in modules for name in names if name in vars(m)]
    return [*closure, *defaults, *known, *of_modules]


@cache
def _names(code: CodeType) -> tuple[str, ...]:
    """Return the names in a function and in those nested in it, always in the same order."""
    within = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return tuple(dict.fromkeys([*code.co_names, *within]))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
