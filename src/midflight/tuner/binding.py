"""Which hyperparameters are options of the optimiser, and what the optimiser reads of them.

    option of a group = tuned value x factor,   factor = what the group says now / what it said at first

The group's own number is the user's: schedulers and loops write it and read it back. The tuned value is what
the option would be at factor 1. It is put in just before a step and taken out just after it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midflight.errors import BindingError
from midflight.space import Space
from midflight.trees import Tensors
from midflight.updates import Update, UpdateRule, read_option, read_options, rule_for, write_option

REGULARISERS = {"weight_decay", "lambd"}
"""Options that shape what is learned; all others say how a step is taken."""
BELOW_ONE = {"beta1", "beta2", "momentum", "alpha", "rho"}
"""Options that a factor over 1 must not take to 1."""
LARGEST = 1 - 1e-6

Bind = Sequence[str] | Mapping[str, str] | None
"""Names that are both hyperparameter and option, or {hyperparameter: option}; None for all such names."""


@dataclass(frozen=True)
class _Place:
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
        self._references: dict[str, list[float]] = {}
        for name in self.options:
            self._check(name)
            self._references[name] = self._first_settings(self.options[name])
        self._written: list[tuple[dict[str, Any], str, float, float]] = []
        self._versions: dict[str, tuple[int, int]] = {}
        self._known: dict[str, Any] = {}
        self._stepped, self._settled = False, False
        self._hooks = [o.register_state_dict_pre_hook(lambda _: self.restore()) for o in self._optimizers]

    @property
    def steering(self) -> list[str]:
        """Hyperparameters bound to an option that says how the step is taken, such as lr."""
        return [name for name, option in self.options.items() if option not in REGULARISERS]

    @property
    def unbound(self) -> list[str]:
        """Hyperparameters that are no options: the model or the loss reads them."""
        return [name for name in self._space if name not in self.options]

    def write(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the options of one optimiser their tuned values, until `restore`."""
        self._catch_up()
        values = self._numbers()
        for o, g, group in self._groups():
            if self._optimizers[o] is optimizer:
                for option, tuned in self._tuned(o, g, group, values).items():
                    # noted before it is written, so that whatever stops this can be undone
                    self._written.append(
                        (group, option, read_option(group, option), _rounded(group, option, tuned))
                    )
                    write_option(group, option, tuned)

    def restore(self) -> None:
        """Give the groups their own numbers back, unless somebody has written others since."""
        for group, option, own, written in reversed(self._written):
            if read_option(group, option) == written:
                write_option(group, option, own)
        self._written = []

    def updates(self, params: Mapping[str, Tensor], values: Tensors) -> dict[str, Update]:
        """Rule and options of each of these weights, the bound options as functions of `values`."""
        names = {id(p): name for name, p in params.items()}
        found: dict[str, Update] = {}
        for o, g, group in self._groups():
            update = Update(self.rules[o], {**read_options(group), **self._tuned(o, g, group, values)})
            found |= {names[id(p)]: update for p in group["params"] if id(p) in names}
        return {name: found[name] for name in params if name in found}

    def actual(self) -> dict[str, float]:
        """Each bound option as the first group that has it reads it at a step now."""
        found: dict[str, float] = {}
        for o, g, group in self._groups():
            for option, value in self._tuned(o, g, group, self._numbers()).items():
                found.setdefault(option, read_option(group, option) if self._settled else value)
        return found

    def detach(self) -> None:
        """Take the tuned values out and let the optimisers go."""
        self.restore()
        for hook in self._hooks:
            hook.remove()

    def settle(self) -> None:
        """Leave the tuned values in the groups for good, at the factors of now."""
        for optimizer in self._optimizers:
            self.write(optimizer)
        self._written, self._settled = [], True

    def state_dict(self) -> dict[str, Any]:
        """What the groups said at first."""
        return {name: list(references) for name, references in self._references.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`; raises `BindingError` if other options were bound."""
        if set(state) != set(self._references):
            raise BindingError(
                f"the saved tuner had {sorted(state)} bound, this one {sorted(self._references)}; "
                "bind the same."
            )
        self._references = {name: list(references) for name, references in state.items()}
        self._stepped = True

    def _groups(self) -> Iterable[tuple[int, int, dict[str, Any]]]:
        """(optimiser, number of the group among all groups, group)"""
        n = 0
        for o, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups:
                yield o, n, group
                n += 1

    def _numbers(self) -> dict[str, Any]:
        """The values of now, as numbers or lists of them; read from tensors only when those have changed."""
        for name in self.options:
            raw = self._space[name].raw
            version = id(raw), raw._version
            if self._versions.get(name) != version:
                self._versions[name] = version
                self._known[name] = self._space[name].value.detach().tolist()
        return self._known

    def _catch_up(self) -> None:
        """A scheduler may have been made after the tuner; it knows better what its factor 1 is."""
        if not self._stepped:
            self._stepped = True
            for name, option in self.options.items():
                known = self._references[name]
                for (_, g, group), before in zip(self._groups(), list(known), strict=False):
                    if before and option == "lr":
                        known[g] = _setting({"lr": before, **_scheduled(group)}, option)

    def _tuned(self, o: int, g: int, group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Option -> its tuned value in this group, a tensor or a number; without those it leaves out."""
        found: dict[str, Any] = {}
        for name, option in self.options.items():
            for place in self._places(name, option, o, g, group):
                value = values[name] if place.entry is None else values[name][place.entry]
                factor = self._factor(place, group)
                found[place.option] = value if factor == 1 else value * factor
                if place.option in BELOW_ONE and factor > 1:
                    cap = found[place.option]
                    found[place.option] = (
                        cap.clamp(max=LARGEST) if isinstance(cap, Tensor) else min(cap, LARGEST)
                    )
        return found

    def _places(self, name: str, option: str, o: int, g: int, group: Mapping[str, Any]) -> list[_Place]:
        if option == "betas":
            return [_Place(name, f"beta{i + 1}", i, 0.0) for i in range(2) if "betas" in group]
        references = self._references[name]
        while len(references) <= g:  # a group that was added later
            references.append(_setting(group, option))
        if option not in self.rules[o].tunable or (references[g] == 0 and any(references)):
            return []
        entry = None
        if self._space[name].spec.shape:
            used = [n for n, r in enumerate(references) if r != 0] or list(range(len(references)))
            size = self._space[name].raw.numel()
            entry = g if size == len(references) else used.index(g)
            return [_Place(name, option, entry, references[g])]
        return [_Place(name, option, None, max(references, key=abs))]

    @staticmethod
    def _factor(place: _Place, group: Mapping[str, Any]) -> float:
        if place.reference == 0:
            return 1.0
        return read_option(group, place.option) / place.reference

    def _first_settings(self, option: str) -> list[float]:
        """What each group says at factor 1; 0 where it has no such option."""
        return [
            _setting(group, option) if option in self.rules[o].tunable else 0.0
            for o, _, group in self._groups()
        ]

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
        settings = self._first_settings(option)
        sizes = {len(settings), sum(s != 0 for s in settings)} - {0}
        if shape and (len(shape) > 1 or shape[0] not in sizes):
            allowed = " or ".join(f"({size},)" for size in sorted(sizes))
            raise BindingError(
                f"a bound hyperparameter must have shape () or one entry per param_group, {allowed}, "
                f"but {name} has {shape}."
            )


def _setting(group: Mapping[str, Any], option: str) -> float:
    """What a group says at factor 1: torch's schedulers keep the learning rate as initial_lr or max_lr."""
    if option == "lr" and _scheduled(group):
        return float(group.get("max_lr", group.get("initial_lr")))
    return read_option(group, option) if option in read_options(group) else 0.0


def _rounded(group: Mapping[str, Any], option: str, value: float) -> float:
    """What a group says once this value is written into it."""
    now = group.get(option)
    return float(torch.tensor(value, dtype=now.dtype)) if isinstance(now, Tensor) else float(value)


def _scheduled(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: group[key]
        for key in ("initial_lr", "max_lr")
        if isinstance(group.get(key), float | int | Tensor)
    }
