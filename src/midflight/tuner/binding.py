"""Which hyperparameters are options of the optimiser, and what the optimiser reads of them.

    option of a group = tuned value x factor,   factor = what the group says now / what it said at first

The group's own number is the user's: schedulers and loops write it and read it back. The tuned value is what
the option would be at factor 1. It is put in just before a step and taken out just after it.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor

from midflight._tensors import Tensors
from midflight.errors import BindingError
from midflight.space import Space
from midflight.updates import Update, UpdateRule, read_option, read_options, rule_for, write_option

REGULARISERS = {"weight_decay", "lambd"}
"""Options that shape what is learned; all others say how a step is taken."""
BELOW_ONE = {"beta1", "beta2", "momentum", "alpha", "rho"}
"""Options that a factor over 1 must not take to 1."""
LARGEST = 1 - 1e-6

Key = tuple[int, int]
"""(number of the optimiser, number of the group in it)"""
Bind = Sequence[str] | Mapping[str, str] | None
"""Names that are both hyperparameter and option, or {hyperparameter: option}; None for all such names."""


@dataclass(frozen=True)
class _Left:
    """What a tuner left in one option of one group when it let go."""

    own: float
    written: float
    reference: float


_LEFT: WeakKeyDictionary[torch.optim.Optimizer, dict[tuple[int, str], _Left]] = WeakKeyDictionary()
"""optimiser -> (group, option) -> what the last tuner left there"""
_HOLDERS: WeakKeyDictionary[torch.optim.Optimizer, WeakMethod[Callable[[], None]]] = WeakKeyDictionary()
"""optimiser -> `detach` of the tuner that holds it"""


@dataclass(frozen=True)
class _BoundOption:
    """One option of one group.

    Attributes:
        entry: of the hyperparameter; None for a single number.
        reference: what the group said at first, or what stands for it; 0 if all groups said 0.
    """

    hyperparameter: str
    option: str
    entry: int | None
    reference: float


class Binding:
    """The bound options of the optimisers of a model.

    Args:
        optimizers: torch optimisers with an update rule.
        space: where the hyperparameters are.
        bind: which of them are options; None binds every name of the space that is one.

    Raises:
        BindingError: a name is no hyperparameter, or no tunable option of an optimiser; or its shape does not
            fit the groups.
        UnsupportedOptimizer: there is no update rule for an optimiser.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], space: Space, bind: Bind = None) -> None:
        if isinstance(bind, str):
            raise BindingError(f'bind must be a list such as ["{bind}"], but got the text "{bind}".')
        self._optimizers = list(optimizers)
        self._space = space
        self.rules: list[UpdateRule] = [rule_for(optimizer) for optimizer in self._optimizers]
        self.options = self._chosen(bind)
        """hyperparameter -> option"""
        self.guessed = bind is None
        """Whether nobody named the options: each hyperparameter called like an option is one."""
        for name in self.options:
            self._check(name)
        parts = [part for option in self.options.values() for part in _parts(option)]
        for part in parts:
            if parts.count(part) > 1:
                raise BindingError(f"an option can be bound once, but {part} is bound twice.")
        self._references = self._first_settings()
        self._schedules = {key: _scheduled(group) for key, group in self._groups()}
        self._written: list[tuple[dict[str, Any], str, float, float]] = []
        self._left: dict[tuple[Key, str], tuple[float, float]] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._known: dict[str, Any] = {}
        self._stepped, self._settled = False, False
        self._hooks: list[Any] = []

    def attach(self, detach: Callable[[], None]) -> None:
        """Take hold of the optimisers; until then they are only read.

        An optimiser has one tuner. One that holds it already is detached, with a warning.

        Args:
            detach: method of the tuner that this belongs to; it lets go.
        """
        for optimizer in self._optimizers:
            holder = _HOLDERS.get(optimizer)
            let_go = None if holder is None else holder()
            if let_go is not None:
                warnings.warn(
                    f"another tuner or replay holds this {type(optimizer).__name__}; it is detached, and the "
                    "new one takes its place. Call detach() or finish() on the old one first.",
                    stacklevel=3,
                )
                let_go()
        self._references = self._first_settings(say=True)
        for key, group in self._groups():
            for (g, option), left in _LEFT.get(self._optimizers[key[0]], {}).items():
                if g == key[1] and option in self._bound_options():
                    self._take_back(group, option, left.own, left.written)
        for optimizer in self._optimizers:
            _HOLDERS[optimizer] = WeakMethod(detach)
            _LEFT.pop(optimizer, None)
            self._hooks.append(optimizer.register_state_dict_pre_hook(lambda _: self.restore()))

    @property
    def step_options(self) -> list[str]:
        """Hyperparameters bound to an option that says how the step is taken, such as lr."""
        return [name for name, option in self.options.items() if option not in REGULARISERS]

    @property
    def unbound(self) -> list[str]:
        """Hyperparameters that are no options: the model or the loss reads them."""
        return [name for name in self._space if name not in self.options]

    def require_unread(self, read: Iterable[str]) -> None:
        """Raise `BindingError` if the loss reads one of these as well and nobody named it an option."""
        both = [name for name in read if name in self.options] if self.guessed else []
        if both:
            name = min(both)
            raise BindingError(
                f"{name} is an option of the optimiser and is read by the loss; pass bind= with the names "
                f'that are options, such as bind=["{name}"] or bind=(), or rename it in the space.'
            )

    def write(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the options of one optimiser their tuned values, until `restore`.

        Raises:
            BindingError: the factor of an option is not known, or no entry is for its group.
        """
        self._catch_up()
        self._require_known()
        self._put([optimizer])

    def _put(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        values = self._numbers()
        tuned = [  # of all before the first is written, for groups may share one tensor
            (group, option, read_option(group, option), value)
            for key, group in self._groups()
            if any(self._optimizers[key[0]] is o for o in optimizers)
            for option, value in self._tuned(key, group, values).items()
        ]
        for group, option, own, value in tuned:
            # noted before it is written, so that whatever stops this can be undone
            self._written.append((group, option, own, _rounded(group, option, value)))
            write_option(group, option, value)

    def restore(self) -> None:
        """Give the groups their own numbers back, unless somebody has written others since."""
        for group, option, own, written in reversed(self._written):
            self._take_back(group, option, own, written)
        self._written = []

    @staticmethod
    def _take_back(group: dict[str, Any], option: str, own: float, written: float) -> None:
        if read_option(group, option) == written:
            write_option(group, option, own)

    def updates(self, params: Mapping[str, Tensor], values: Tensors) -> dict[str, Update]:
        """Rule and options of each of these weights, the bound options as functions of `values`."""
        names = {id(p): name for name, p in params.items()}
        found: dict[str, Update] = {}
        for key, group in self._groups():
            update = Update(self.rules[key[0]], {**read_options(group), **self._tuned(key, group, values)})
            found |= {names[id(p)]: update for p in group["params"] if id(p) in names}
        return {name: found[name] for name in params if name in found}

    def actual(self) -> dict[str, float]:
        """Each bound option as the first group that has it reads it at a step now."""
        found: dict[str, float] = {}
        for key, group in self._groups():
            for option, value in self._tuned(key, group, self._numbers()).items():
                found.setdefault(option, read_option(group, option) if self._settled else value)
        return found

    def detach(self) -> None:
        """Take the tuned values out and let the optimisers go."""
        self.restore()
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            for optimizer in self._optimizers:
                _HOLDERS.pop(optimizer, None)
        self._hooks = []

    def settle(self) -> None:
        """Leave the tuned values in the groups for good, at the factors of now."""
        if self._settled:
            return
        self._put(self._optimizers)
        for key, group in self._groups():
            for written_in, option, own, written in self._written:
                if written_in is group:
                    self._left[key, option] = own, written
                    reference = self._reference(key, option)
                    left = _Left(own, written, own if reference is None else reference)
                    _LEFT.setdefault(self._optimizers[key[0]], {})[key[1], option] = left
        self._written, self._settled = [], True

    def state_dict(self) -> dict[str, Any]:
        """What the groups said at first, and what a settled one left in them."""
        references = {part: dict(known) for part, known in self._references.items()}
        return {"references": references, "left": dict(self._left)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`; raises `BindingError` if other options were bound."""
        references = state["references"]
        if set(references) != set(self._references):
            saved, here = (sorted({name for name, _ in x}) for x in (references, self._references))
            raise BindingError(f"the saved tuner had {saved} bound, this one {here}; bind the same.")
        self._references = {part: dict(known) for part, known in references.items()}
        self._left = dict(state["left"])
        self._stepped = False
        self._schedules = {}

    def _groups(self) -> Iterable[tuple[Key, dict[str, Any]]]:
        for o, optimizer in enumerate(self._optimizers):
            for g, group in enumerate(optimizer.param_groups):
                yield (o, g), group

    def _numbers(self) -> dict[str, Any]:
        """The values of now, as numbers or lists of them; read from tensors only when those have changed."""
        for name in self.options:
            raw = self._space[name].raw
            version = id(raw), raw._version
            if self._versions.get(name) != version:
                self._versions[name] = version
                self._known[name] = self._space[name].tolist()
        return self._known

    def _catch_up(self) -> None:
        """Before the first step: a scheduler may have been made since, and it knows better what its factor 1
        is; or the optimiser's state was loaded, with what a tuner left in it.
        """
        if self._stepped:
            return
        self._stepped = True
        for key, group in self._groups():
            for option in self._bound_options():
                if (key, option) in self._left:
                    self._take_back(group, option, *self._left[key, option])
            if key in self._schedules and (scheduled := _scheduled(group)) != self._schedules[key]:
                for (_, option), known in self._references.items():
                    if key in known:
                        known[key] = _at_factor_one(scheduled, option, known[key])
        self._left = {}

    def _require_known(self) -> None:
        for (name, option), known in self._references.items():
            for key, group in self._groups():
                if option not in self.rules[key[0]].tunable:
                    continue
                own = read_option(group, option)
                if own and not any(known.values()):
                    raise BindingError(
                        f"{option} of every param_group was 0 when the tuner was made and is {own:g} now, so "
                        "that its factor is not known; make the optimiser with the value that stands for "
                        "factor 1."
                    )
                added = self._space[name].spec.shape and option == self.options[name] and key not in known
                if added and (own or not any(known.values())):
                    raise BindingError(
                        f"{name} has one entry per param_group, but none for a group that was added since; "
                        f"set its {option} to 0, or make a new tuner with as many entries as groups."
                    )

    def _bound_options(self) -> set[str]:
        return {option for _, option in self._references}

    def _reference(self, key: Key, option: str) -> float | None:
        """What a group said at first; None if it had no say then."""
        return next((known.get(key) for (_, o), known in self._references.items() if o == option), None)

    def _tuned(self, key: Key, group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Option -> its tuned value in this group, a tensor or a number; without those it leaves out."""
        found: dict[str, Any] = {}
        for place in self._places(key):
            name = place.hyperparameter
            value = values[name] if place.entry is None else values[name][place.entry]
            factor = self._factor(place, group)
            found[place.option] = value if factor == 1 else value * factor
            if place.option in BELOW_ONE and factor > 1:
                cap = found[place.option]
                found[place.option] = cap.clamp(max=LARGEST) if isinstance(cap, Tensor) else min(cap, LARGEST)
        return found

    def _places(self, key: Key) -> Iterable[_BoundOption]:
        for (name, option), known in self._references.items():
            used = {k: reference for k, reference in known.items() if reference} or known
            if option not in self.rules[key[0]].tunable or (key in known and key not in used):
                continue
            largest = max(used.values(), key=abs)
            if self.options[name] == "betas":
                yield _BoundOption(name, option, int(option == "beta2"), largest)
            elif not self._space[name].spec.shape:
                yield _BoundOption(name, option, None, largest)
            elif key in known:
                all_groups = self._space[name].raw.numel() == len(known)
                yield _BoundOption(name, option, list(known if all_groups else used).index(key), known[key])

    def _factor(self, place: _BoundOption, group: Mapping[str, Any]) -> float:
        if place.reference == 0:
            return 1.0
        own = (x for g, option, x, _ in self._written if g is group and option == place.option)
        return next(own, read_option(group, place.option)) / place.reference

    def _first_settings(self, say: bool = False) -> dict[tuple[str, str], dict[Key, float]]:
        """(hyperparameter, option) -> group -> what it says at factor 1; 0 where it has no such option."""
        found: dict[tuple[str, str], dict[Key, float]] = {}
        for name, bound in self.options.items():
            for option in _parts(bound):
                now = self._settings(option)
                left = self._left_references(option, now)
                if left:
                    found[name, option] = {**now, **left}
                elif option == "lr":
                    found[name, option] = self._of_schedule(name, now, say)
                else:
                    found[name, option] = {
                        key: now[key] and _at_factor_one(_scheduled(group), option, now[key])
                        for key, group in self._groups()
                    }
        return found

    def _settings(self, option: str) -> dict[Key, float]:
        """What each group says; 0 where it has no such option."""
        return {
            key: read_option(group, option) if option in self.rules[key[0]].tunable else 0.0
            for key, group in self._groups()
        }

    def _left_references(self, option: str, now: Mapping[Key, float]) -> dict[Key, float]:
        """What groups said at first to a tuner that is gone, where its number still stands."""
        found = {}
        for (o, g), x in now.items():
            left = _LEFT.get(self._optimizers[o], {}).get((g, option))
            if left is not None and left.written == x:
                found[o, g] = left.reference
        return found

    def _of_schedule(self, name: str, now: dict[Key, float], say: bool) -> dict[Key, float]:
        """The learning rates at factor 1: torch's schedulers keep them as initial_lr or max_lr.

        A scheduler that is over leaves them behind. Where the groups say the tuned value itself once steps
        were taken, that is factor 1.
        """
        known = dict(now)
        for key, group in self._groups():
            if "lr" in self.rules[key[0]].tunable:
                known[key] = _at_factor_one(_scheduled(group), "lr", now[key])
        stepped = any(getattr(self._optimizers[o], "_opt_called", False) for o, _ in now)
        if not stepped or known == now:
            return known
        values = self._space[name].value.detach().flatten().tolist()
        used = [x for x in now.values() if x]
        said = [max(used, default=0.0)] if len(values) == 1 else used
        if len(said) == len(values) and all(
            math.isclose(a, b, rel_tol=1e-6) for a, b in zip(said, values, strict=True)
        ):
            return now
        if say:
            key = next(key for key in now if now[key] != known[key])
            warnings.warn(
                f"lr of a param_group is {now[key]:g}, but its scheduler says that it was {known[key]:g} at "
                f"first; the tuned value counts times {now[key] / known[key]:g}. If that scheduler is over, "
                "delete initial_lr and max_lr from the param_groups before the tuner is made.",
                stacklevel=5,
            )
        return known

    def _chosen(self, bind: Bind) -> dict[str, str]:
        tunable = frozenset().union(*(rule.tunable for rule in self.rules))
        if bind is None:
            pairs = {"betas"} if {"beta1", "beta2"} <= tunable else set()
            return {
                name: name
                for name in self._space
                if name in tunable or (name in pairs and self._space[name].spec.shape == (2,))
            }
        return dict(bind) if isinstance(bind, Mapping) else {name: name for name in bind}

    def _check(self, name: str) -> None:
        option, kinds = self.options[name], ", ".join(type(o).__name__ for o in self._optimizers)
        if name not in self._space:
            known = ", ".join(self._space)
            raise BindingError(f"bind must name hyperparameters of the space ({known}), but got {name!r}.")
        tunable = frozenset().union(*(rule.tunable for rule in self.rules))
        shape = self._space[name].spec.shape
        if option == "betas" and {"beta1", "beta2"} <= tunable:
            if shape != (2,):
                raise BindingError(
                    f"a hyperparameter bound to betas must have shape (2,), but {name} has {shape}."
                )
            return
        if option not in tunable:
            raise BindingError(
                f"a bound option of {kinds} must be one of {', '.join(sorted(tunable))}, but got {option!r}."
            )
        settings = self._settings(option)
        sizes = {len(settings), sum(s != 0 for s in settings.values())} - {0}
        if shape and (len(shape) > 1 or shape[0] not in sizes):
            allowed = " or ".join(f"({size},)" for size in sorted(sizes))
            raise BindingError(
                f"a bound hyperparameter must have shape () or one entry per param_group, {allowed}, "
                f"but {name} has {shape}."
            )
        tensors = [id(x) for _, group in self._groups() if isinstance(x := group.get(option), Tensor)]
        if shape and len(set(tensors)) < len(tensors):
            raise BindingError(
                f"param_groups share one tensor as their {option}, but {name} has an entry for each; give "
                "each group a tensor of its own."
            )


def _parts(option: str) -> tuple[str, ...]:
    return ("beta1", "beta2") if option == "betas" else (option,)


def _rounded(group: Mapping[str, Any], option: str, value: float) -> float:
    """What a group says once this value is written into it."""
    betas = group.get("betas", ())
    now = betas[option == "beta2"] if option in ("beta1", "beta2") else group.get(option)
    return float(torch.tensor(value, dtype=now.dtype)) if isinstance(now, Tensor) else float(value)


_SCHEDULED = {"lr": ("max_lr", "initial_lr"), "momentum": ("max_momentum",), "beta1": ("max_momentum",)}
"""Option -> where torch's schedulers note in a group what it is at factor 1."""


def _scheduled(group: Mapping[str, Any]) -> dict[str, float]:
    """What torch's schedulers noted in a group."""
    keys = {key for noted in _SCHEDULED.values() for key in noted}
    return {key: float(group[key]) for key in keys if isinstance(group.get(key), float | int | Tensor)}


def _at_factor_one(scheduled: Mapping[str, float], option: str, otherwise: float) -> float:
    return next((scheduled[key] for key in _SCHEDULED.get(option, ()) if key in scheduled), otherwise)
