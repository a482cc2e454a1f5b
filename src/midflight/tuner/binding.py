"""Give options of the optimiser, such as lr, their tuned values for the length of a step.

    option of a param_group = tuned value x factor,   factor = own number now / own number at first

The group's own number is the user's: schedulers and loops write it and read it back. The own number at first,
where the factor is 1, is the reference. The tuned value is written just before a step and taken out just
after it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor

from midflight._tensors import Tensors
from midflight.errors import BindingError, warn
from midflight.space import Space
from midflight.updates import Update, UpdateRule, read_option, read_options, rule_for, write_option

REGULARISERS = {"weight_decay", "lambd"}
"""Options that change what is learned; all others change how a step is taken."""
BELOW_ONE = {"beta1", "beta2", "momentum", "alpha", "rho"}
"""Options that must stay below 1, also with a factor over 1."""
LARGEST = 1 - 1e-6
"""The largest value of these."""
BELOW_ZERO = {"beta2_decay"}
"""Options that must not be above 0; no other may be below."""
FAR_START = 2.0
"""A learning rate without `init` is told if it starts further than this factor from the optimiser's own."""

Key = tuple[int, int]
"""(number of the optimiser, number of the group in it)"""
Bind = Sequence[str] | Mapping[str, str] | None
"""Names that are both hyperparameter and option, or {hyperparameter: option}; None means all such names."""


def _possible(option: str) -> tuple[float, float]:
    """Return the least and the largest value that an option may have."""
    if option in BELOW_ZERO:
        return -math.inf, 0.0
    return 0.0, 1.0 if option in BELOW_ONE or option == "betas" else math.inf


@dataclass(frozen=True)
class _Written:
    """A tuned value that was written over a group's own number."""

    key: Key
    group: dict[str, Any]
    option: str
    own: float
    written: float


@dataclass(frozen=True)
class _Left:
    """A tuned value that a tuner left in one option of one group when it was detached."""

    own: float
    written: float
    reference: float


_LEFT: WeakKeyDictionary[torch.optim.Optimizer, dict[tuple[int, str], _Left]] = WeakKeyDictionary()
"""optimiser -> (number of the group, option) -> what the last tuner left there"""
_HOLDERS: WeakKeyDictionary[torch.optim.Optimizer, WeakMethod[Callable[[], None]]] = WeakKeyDictionary()
"""optimiser -> `detach` of the tuner that is attached to it"""


@dataclass(frozen=True)
class _BoundOption:
    """One bound option of one group.

    Attributes:
        entry: index into the hyperparameter; None if it is a single number.
        reference: the own number at which the factor is 1; 0 if all groups had 0.
    """

    hyperparameter: str
    option: str
    entry: int | None
    reference: float


class Binding:
    """The options of a model's optimisers that are bound to hyperparameters.

    Args:
        bind: which hyperparameters are options; None binds every name of the space that is one.

    Raises:
        BindingError: a name is no hyperparameter, or no tunable option of an optimiser; or its shape does not
            fit the groups.
        UnsupportedOptimizer: there is no update rule for an optimiser.

    Attributes:
        rules: the update rule of each optimiser.
        tunable: names of the options that some rule can tune.
        options: hyperparameter -> option.
        guessed: whether `bind` is None, so that equal names alone bind a hyperparameter to an option.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], space: Space, bind: Bind = None) -> None:
        if isinstance(bind, str):
            raise BindingError(f'bind must be a list such as ["{bind}"], but got the text "{bind}".')
        self._optimizers = list(optimizers)
        self._space = space
        self.rules: list[UpdateRule] = [rule_for(optimizer) for optimizer in self._optimizers]
        self.tunable: frozenset[str] = frozenset().union(*(rule.tunable for rule in self.rules))
        self.options = self._chosen(bind)
        self.guessed = bind is None
        for name in self.options:
            self._require_bindable(name)
        parts = [part for option in self.options.values() for part in _parts(option)]
        for part in parts:
            if parts.count(part) > 1:
                raise BindingError(f"an option can be bound once, but {part} is bound twice.")
        self._references = self._find_references()
        self._schedules = {key: _scheduled(group) for key, group in self._groups()}
        self._written: list[_Written] = []
        self._left: dict[tuple[Key, str], tuple[float, float]] = {}
        """(own, written) of the options in which `detach` left a tuned value."""
        self._numbers: dict[str, Any] = {}
        """The last result of `_values`."""
        self._versions: dict[str, tuple[int, int]] = {}
        """The raw coordinates of which these are the values: (id, version)."""
        self._stepped, self._detached = False, False
        self._hooks: list[Any] = []

    def attach(self, detach: Callable[[], None], moves: bool = True) -> None:
        """Connect to the optimisers, which until then are only read.

        An optimiser has one tuner. Another one that is attached to it is detached, with a warning.

        Args:
            detach: method of the tuner that owns this binding; it detaches that tuner.
            moves: whether the values move from where they are now; False for a replay, which sets them.
        """
        for optimizer in self._optimizers:
            holder = _HOLDERS.get(optimizer)
            detach_other = None if holder is None else holder()
            if detach_other is not None:
                warn(
                    f"another tuner or replay holds this {type(optimizer).__name__}; it is detached, and the "
                    "new one takes its place. Call detach() or finish() on the old one first.",
                )
                detach_other()
        self._references = self._find_references(say=True)
        for name in [name for name, option in self.options.items() if option == "lr" and moves]:
            self._warn_of_another_start(name)
        for key, group in self._groups():
            for (g, option), left in _LEFT.get(self._optimizers[key[0]], {}).items():
                if g == key[1] and option in self._bound_options():
                    _take_back(group, option, left.own, left.written)
        for optimizer in self._optimizers:
            _HOLDERS[optimizer] = WeakMethod(detach)
            _LEFT.pop(optimizer, None)
            self._hooks.append(optimizer.register_state_dict_pre_hook(lambda _: self.restore()))

    def _warn_of_another_start(self, name: str) -> None:
        """Warn if there is no `init`, and the value starts far from the optimiser's learning rate."""
        spec, raw = self._space[name].spec, self._space.raws[name]
        own = max(self._references[name, "lr"].values(), default=0.0)
        if spec.init is not None or spec.shape or float(raw.detach()) != 0.5 or not own:
            return
        value = float(spec.transform.value(raw.detach()))
        if not own / FAR_START <= value <= own * FAR_START:
            inside = spec.low <= own <= spec.high
            there = f"pass init={own:.3g}" if inside else f"widen the range to contain {own:.3g}"
            warn(
                f"{name} starts at {value:.3g}, the middle of its range, and not at the {own:.3g} of the "
                f"optimiser; {there} to start there, or pass init={value:.3g} to start here."
            )

    @property
    def step_options(self) -> list[str]:
        """Hyperparameters bound to an option that changes how a step is taken, such as lr."""
        return [name for name, option in self.options.items() if option not in REGULARISERS]

    @property
    def unbound(self) -> list[str]:
        """Hyperparameters that are no options, so the model or the loss must read them."""
        return [name for name in self._space if name not in self.options]

    def require_unread(self, read: Iterable[str]) -> None:
        """Raise `BindingError` if the loss reads a hyperparameter that only its name makes an option.

        Args:
            read: hyperparameters that the loss reads.
        """
        both = [name for name in read if name in self.options] if self.guessed else []
        if both:
            name = min(both)
            raise BindingError(
                f"{name} is an option of the optimiser and is read by the loss; pass bind= with the names "
                f'that are options, such as bind=["{name}"] or bind=(), or rename it in the space.'
            )

    def write(self, optimizer: torch.optim.Optimizer) -> None:
        """Write tuned values into the options of one optimiser, until `restore`.

        Raises:
            BindingError: the factor of an option is not known, or the hyperparameter has no entry for its
                group.
        """
        self.update_references()
        self._require_known()
        self._write([optimizer])

    def _write(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        values = self._values()
        tuned = [  # all are read before the first is written, for groups may share one tensor
            (key, group, option, read_option(group, option), value)
            for key, group in self._groups()
            if self._optimizers[key[0]] in optimizers
            for option, value in self._tuned(key, group, values).items()
        ]
        for key, group, option, own, value in tuned:
            # noted before it is written, so that an interrupt in between can be undone
            self._written.append(_Written(key, group, option, own, _rounded(group, option, value)))
            write_option(group, option, value)

    def restore(self) -> None:
        """Give the groups their own numbers back, except where the user has written others since."""
        for w in reversed(self._written):
            _take_back(w.group, w.option, w.own, w.written)
        self._written = []

    def updates(self, params: Mapping[str, Tensor], values: Tensors) -> dict[str, Update]:
        """Return the rule and options of each weight, with bound options as functions of the hyperparameters.

        Args:
            params: name -> weight.
            values: hyperparameter -> its value, with a graph where derivatives are wanted.

        Returns:
            name -> update, for those weights that an optimiser has.
        """
        names = {id(p): name for name, p in params.items()}
        found: dict[str, Update] = {}
        for key, group in self._groups():
            update = Update(self.rules[key[0]], {**read_options(group), **self._tuned(key, group, values)})
            found |= {names[id(p)]: update for p in group["params"] if id(p) in names}
        return {name: found[name] for name in params if name in found}

    def actual(self) -> dict[str, float]:
        """Return each bound option as the first group that has it would use it in a step now."""
        found: dict[str, float] = {}
        for key, group in self._groups():
            for option, value in self._tuned(key, group, self._values()).items():
                found.setdefault(option, read_option(group, option) if self._detached else value)
        return found

    def schedule_factor(self) -> float:
        """Return the factor of the loop's schedule on lr now, the largest of all groups, at most 1.

        It is 1 if no group says what its lr is without a schedule.
        """
        factors = []
        for key, group in self._groups():
            own = read_option(group, "lr") if "lr" in group else 0.0
            reference = self._reference(key, "lr") or _at_factor_one(_scheduled(group), "lr", own)
            if reference:  # 0 in a group that stands still
                factors.append(own / reference)
        return min(1.0, max(factors, default=1.0))

    def detach(self) -> None:
        """Disconnect from the optimisers, and leave tuned value x factor in the groups."""
        self.restore()
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            for optimizer in self._optimizers:
                _HOLDERS.pop(optimizer, None)
        self._hooks = []
        if self._detached:
            return
        self._write(self._optimizers)
        for w in self._written:
            self._left[w.key, w.option] = w.own, w.written
            reference = self._reference(w.key, w.option)
            left = _Left(w.own, w.written, w.own if reference is None else reference)
            _LEFT.setdefault(self._optimizers[w.key[0]], {})[w.key[1], w.option] = left
        self._written, self._detached = [], True

    def state_dict(self) -> dict[str, Any]:
        """Return the references of the groups, and the tuned values that `detach` left in them."""
        references = {part: dict(known) for part, known in self._references.items()}
        return {"references": references, "left": dict(self._left)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`; raise `BindingError` if other options were bound."""
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

    def _values(self) -> dict[str, Any]:
        """Return the bound hyperparameters, name -> number or list of numbers.

        Tensors are read only if they have changed, because that waits for a GPU.
        """
        for name in self.options:
            raw = self._space[name].raw
            version = id(raw), raw._version
            if self._versions.get(name) != version:
                self._versions[name] = version
                self._numbers[name] = self._space[name].tolist()
        return self._numbers

    def update_references(self) -> None:
        """Before the first step, take in what happened since the tuner was made.

        A scheduler made since knows the references better. An optimiser state loaded since may hold values
        that an earlier tuner left.
        """
        if self._stepped:
            return
        self._stepped = True
        for key, group in self._groups():
            for option in self._bound_options():
                if (key, option) in self._left:
                    _take_back(group, option, *self._left[key, option])
            if key in self._schedules and (scheduled := _scheduled(group)) != self._schedules[key]:
                for (_, option), known in self._references.items():
                    if key in known:
                        known[key] = _at_factor_one(scheduled, option, known[key])
        self._left = {}

    def _require_known(self) -> None:
        """Raise `BindingError` for a group whose option has no reference, or whose entry does not exist."""
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
        """Return the reference of an option of a group; None for a group that was added since."""
        return next((known.get(key) for (_, o), known in self._references.items() if o == option), None)

    def _tuned(self, key: Key, group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a group that are tuned, option -> tuned value x factor.

        Args:
            values: hyperparameter -> tensor, or number or list of numbers; the result is of the same kind.
        """
        found: dict[str, Any] = {}
        for place in self._places(key):
            name = place.hyperparameter
            value = values[name] if place.entry is None else values[name][place.entry]
            factor = self._factor(place, group)
            if factor != 1:
                value = value * factor
            if place.option in BELOW_ONE and factor > 1:
                value = value.clamp(max=LARGEST) if isinstance(value, Tensor) else min(value, LARGEST)
            found[place.option] = value
        return found

    def _places(self, key: Key) -> Iterable[_BoundOption]:
        """Yield the bound options of a group, without those that are 0 there but not in all groups."""
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
        own = (w.own for w in self._written if w.group is group and w.option == place.option)
        return next(own, read_option(group, place.option)) / place.reference

    def _find_references(self, say: bool = False) -> dict[tuple[str, str], dict[Key, float]]:
        """Return (hyperparameter, option) -> group -> reference; 0 where a group has no such option."""
        found: dict[tuple[str, str], dict[Key, float]] = {}
        for name, bound in self.options.items():
            for option in _parts(bound):
                now = self._own_numbers(option)
                left = self._left_references(option, now)
                if left:
                    found[name, option] = {**now, **left}
                elif option == "lr":
                    found[name, option] = self._lr_references(name, now, say)
                else:
                    found[name, option] = {
                        key: now[key] and _at_factor_one(_scheduled(group), option, now[key])
                        for key, group in self._groups()
                    }
        return found

    def _own_numbers(self, option: str) -> dict[Key, float]:
        """Return each group's own number; 0 where it has no such option."""
        return {
            key: read_option(group, option) if option in self.rules[key[0]].tunable else 0.0
            for key, group in self._groups()
        }

    def _left_references(self, option: str, now: Mapping[Key, float]) -> dict[Key, float]:
        """Return the references of an earlier tuner, for groups that still have the value it left."""
        found = {}
        for (o, g), number in now.items():
            left = _LEFT.get(self._optimizers[o], {}).get((g, option))
            if left is not None and left.written == number:
                found[o, g] = left.reference
        return found

    def _lr_references(self, name: str, now: dict[Key, float], say: bool) -> dict[Key, float]:
        """Return the learning rates at factor 1, which torch's schedulers keep as initial_lr or max_lr.

        A scheduler that is over leaves these behind. So if steps were taken and the groups have the tuned
        value itself, that is the reference.
        """
        known = dict(now)
        for key, group in self._groups():
            if "lr" in self.rules[key[0]].tunable:
                known[key] = _at_factor_one(_scheduled(group), "lr", now[key])
        stepped = any(getattr(self._optimizers[o], "_opt_called", False) for o, _ in now)
        if not stepped or known == now:
            return known
        values = self._space[name].value.detach().flatten().tolist()
        used = [lr for lr in now.values() if lr]
        own = [max(used, default=0.0)] if len(values) == 1 else used
        if len(own) == len(values) and all(
            math.isclose(a, b, rel_tol=1e-6) for a, b in zip(own, values, strict=True)
        ):
            return now
        if say:
            key = next(key for key in now if now[key] != known[key])
            warn(
                f"lr of a param_group is {now[key]:g}, but its scheduler says that it was {known[key]:g} at "
                f"first; the tuned value counts times {now[key] / known[key]:g}. If that scheduler is over, "
                "delete initial_lr and max_lr from the param_groups before the tuner is made.",
            )
        return known

    def _has_betas(self) -> bool:
        return {"beta1", "beta2"} <= self.tunable

    def _chosen(self, bind: Bind) -> dict[str, str]:
        """Return hyperparameter -> option."""
        if bind is None:
            pairs = {"betas"} if self._has_betas() else set()
            return {
                name: name
                for name in self._space
                if name in self.tunable or (name in pairs and self._space[name].spec.shape == (2,))
            }
        return dict(bind) if isinstance(bind, Mapping) else {name: name for name in bind}

    def _require_bindable(self, name: str) -> None:
        """Raise `BindingError` if there is no such hyperparameter or option, or the shape does not fit."""
        option = self.options[name]
        if name not in self._space:
            known = ", ".join(self._space)
            raise BindingError(f"bind must name hyperparameters of the space ({known}), but got {name!r}.")
        spec, (low, high) = self._space[name].spec, _possible(option)
        if not low <= spec.low < spec.high <= high:
            raise BindingError(
                f"the range of {name} must lie in [{low:g}, {high:g}], as {option} must, but it is "
                f"[{spec.low:g}, {spec.high:g}]."
            )
        shape = spec.shape
        if option == "betas" and self._has_betas():
            if shape != (2,):
                raise BindingError(
                    f"a hyperparameter bound to betas must have shape (2,), but {name} has {shape}."
                )
            return
        if option not in self.tunable:
            kinds = ", ".join(type(o).__name__ for o in self._optimizers)
            raise BindingError(
                f"a bound option of {kinds} must be one of {', '.join(sorted(self.tunable))}, "
                f"but got {option!r}."
            )
        own = self._own_numbers(option)
        sizes = {len(own), sum(number != 0 for number in own.values())} - {0}
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


def _take_back(group: dict[str, Any], option: str, own: float, written: float) -> None:
    if read_option(group, option) == written:
        write_option(group, option, own)


def _rounded(group: Mapping[str, Any], option: str, value: float) -> float:
    """Return what a group reads once this value is written into it: tensors round to their type."""
    betas = group.get("betas", ())
    now = betas[option == "beta2"] if option in ("beta1", "beta2") else group.get(option)
    return float(torch.tensor(value, dtype=now.dtype)) if isinstance(now, Tensor) else float(value)


_SCHEDULED = {"lr": ("max_lr", "initial_lr"), "momentum": ("max_momentum",), "beta1": ("max_momentum",)}
"""Option -> keys of a group under which torch's schedulers keep its value at factor 1."""


def _scheduled(group: Mapping[str, Any]) -> dict[str, float]:
    """Return what torch's schedulers keep in a group, key -> number."""
    keys = {key for kept in _SCHEDULED.values() for key in kept}
    return {key: float(group[key]) for key in keys if isinstance(group.get(key), float | int | Tensor)}


def _at_factor_one(scheduled: Mapping[str, float], option: str, otherwise: float) -> float:
    return next((scheduled[key] for key in _SCHEDULED.get(option, ()) if key in scheduled), otherwise)
