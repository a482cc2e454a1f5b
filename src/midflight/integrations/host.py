"""What the callbacks for other libraries share: one tuner per training, its state, and its numbers."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn

from midflight.errors import UnusableLoader
from midflight.space import Space
from midflight.tuner import Tuner
from midflight.tuner.live import Loss, entries_kept
from midflight.tuner.optimizers import Optimizers

OURS = ("self", "model", "optimizer", "space", "loss_fn", "train_loader", "valid_loader")
"""Arguments of `Tuner` that a callback takes from its library."""
OPTIONS = tuple(name for name in inspect.signature(Tuner.__init__).parameters if name not in OURS)
"""Arguments of `Tuner` that a callback passes on."""
PREFIX = "tune/"
"""The beginning of the names under which a library's logger gets the numbers of `Tuner.log`."""


class Host:
    """Builds a tuner when a library begins to train, and finishes it when the training ends.

    Args:
        space: the hyperparameters to tune; or a function that returns them once the training begins.
        finish: whether the training ends with `Tuner.finish`; otherwise it ends with `Tuner.detach`.
        options: arguments of `Tuner`.

    Attributes:
        tuner: the `Tuner` of the present or the last training; None before the first.

    Raises:
        TypeError: an option is no argument of `Tuner`, or one that the library gives; or `space` is neither a
            `Space` nor a function.
    """

    def __init__(self, space: Space | Callable[[], Space], finish: bool, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise TypeError(f"options must be among {', '.join(OPTIONS)}; got {', '.join(unknown)}.")
        if not isinstance(space, Space) and not callable(space):
            raise TypeError(
                f"space must be a Space, or a function that returns one, but got a {type(space).__name__}."
            )
        self._space, self._finish, self._options = space, finish, dict(options)
        self.tuner: Tuner | None = None
        self._state: Mapping[str, Any] | None = None
        """Loaded before the tuner exists."""

    def steps_left(self, total: int, done: int) -> int:
        """Return `total_steps` of the next tuner, which counts the steps done if it goes on from a state."""
        return total if self._state is not None else total - done

    def begin(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        loss_fn: Loss,
        loaders: tuple[Iterable[Any] | None, Iterable[Any] | None],
        total_steps: int | None,
        write: Callable[[dict[str, float]], Any],
    ) -> Tuner:
        """Build the tuner of a training, and give it the state that was loaded.

        Args:
            model, optimizer, loss_fn: as for `Tuner`.
            loaders: of T1 and T2; None if the library has none.
            total_steps: as for `Tuner`; an option of this name has precedence.
            write: takes the numbers of `Tuner.log` after each hyper-step, named with PREFIX.

        Raises:
            UnusableLoader: the library has no loader of one of them.
        """
        self.detach()
        for name, loader in zip(("training", "validation"), loaders, strict=True):
            if loader is None:
                raise UnusableLoader(
                    f"tuning needs {name} data, but the training has none; give the training some, or pass "
                    f"{name[:5]}_loader= if Tune has it."
                )
        also = self._options.get("on_hyperstep")

        def on_hyperstep(step: int, numbers: dict[str, float]) -> None:
            write({PREFIX + name: number for name, number in numbers.items()})
            if also is not None:
                also(step, numbers)

        space = self._space if isinstance(self._space, Space) else self._space()
        options = {"total_steps": total_steps, **self._options, "on_hyperstep": on_hyperstep}
        self.tuner = Tuner(model, optimizer, space, loss_fn, *loaders, **options)  # type: ignore[arg-type]
        if self._state is not None:
            state, self._state = self._state, None
            self.tuner.load_state_dict(state)
        return self.tuner

    def end(self) -> None:
        """End the tuning, because the training ended."""
        if self.tuner is not None and self._finish:
            self.tuner.finish()
        self.detach()

    def detach(self) -> None:
        """End the tuning, because the training failed or another begins."""
        if self.tuner is not None:
            self.tuner.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tuner, or the one loaded for the next; empty if there is neither."""
        if self._state is not None:
            return dict(self._state)
        return {} if self.tuner is None else self.tuner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state for the tuner of the next training; an empty one lets it begin anew."""
        self._state = state or None


def only(loaders: Any) -> Iterable[Any] | None:
    """Return the one loader among those that a library has; None if it has none.

    Raises:
        UnusableLoader: there are several.
    """
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if not isinstance(loaders, list | tuple):
        return loaders  # type: ignore[no-any-return]
    if len(loaders) > 1:
        raise UnusableLoader(
            f"tuning needs one loader, but the training has {len(loaders)}; pass the one to use as "
            "train_loader= or valid_loader= of Tune."
        )
    return loaders[0] if loaders else None


FEW_ENTRIES = 1000
"""A list or dict with more entries is data rather than a count, and copying it at each loss takes time."""


def unchanged(thing: Any) -> AbstractContextManager[None]:
    """Restore an object's attributes at the end, and lists and dicts in them, such as a library's counts.

    Lists and dicts may be nested three deep, as in `attribute[mode][name].append(number)`. Those with more
    than FEW_ENTRIES entries are left alone, and so are those inside them.
    """
    found, level = [vars(thing)], [vars(thing)]
    for _ in range(3):
        values = [v for c in level for v in (c.values() if isinstance(c, dict) else c)]
        level = [v for v in values if type(v) in (dict, defaultdict, list) and len(v) <= FEW_ENTRIES]
        found += level
    return entries_kept(found)


class OnFailure:
    """Replaces a method of an object: does the same, and calls `do` if an exception or Ctrl-C leaves it.

    The exception is raised again. This serves libraries that do not tell their callbacks about an exception.
    The replacement is an attribute of the object. So a copy of the object has a copy of the replacement,
    which calls the method of the copy.

    Args:
        owner: the object; its attribute of this name is set.
        method: name of the method.
        do: a bound method, so that copies call it on a copy of its own object.
    """

    def __init__(self, owner: Any, method: str, do: Callable[[], Any]) -> None:
        self._owner, self._method, self._do = owner, method, do
        self._before = vars(owner).get(method)
        """What the user had set on the object under this name; None if nothing."""
        vars(owner)[method] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._before or partial(getattr(type(self._owner), self._method), self._owner)
        try:
            return call(*args, **kwargs)
        except BaseException:
            self._do()
            raise

    def remove(self) -> None:
        """Restore the method, unless the user has replaced it since."""
        if vars(self._owner).get(self._method) is self:
            del vars(self._owner)[self._method]
            if self._before is not None:
                vars(self._owner)[self._method] = self._before


@contextmanager
def silenced(thing: Any, *methods: str) -> Iterator[None]:
    """Let these methods of an object do nothing, because a hyper-step is no step of the library."""
    attributes: dict[str, Any] = vars(thing)
    own = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(dict.fromkeys(methods, _nothing))
    try:
        yield
    finally:
        for name in methods:
            del attributes[name]
        attributes.update(own)


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""
