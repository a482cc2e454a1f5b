"""Declare the space of a search once for all engines: searched, tuned and conditional hyperparameters."""

import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from midflight.errors import SpaceError, UnknownName
from midflight.space import Categorical, Choice, Float, Int, When
from midflight.space import Space as TunedSpace

Spec: TypeAlias = Float | Int | Categorical
Config: TypeAlias = dict[str, Any]
"""Name -> value of the hyperparameters that are active in one configuration."""

KINDS = {"Float": Float, "Int": Int, "Categorical": Categorical}


class Space:
    """The named hyperparameters of a search.

    An entry with `when=` is active only if each hyperparameter in its condition (its parents) is active
    and has one of the given values.

    Args:
        specs: name -> `Float`, `Int` or `Categorical`; for names that are not Python identifiers.
        named: the same as keyword arguments.

    Raises:
        SpaceError: the space is empty, a name is given twice, an entry has another type, a searched `Float`
            has a shape, or a condition is invalid: it names itself, an unknown or a continuous
            hyperparameter, an impossible value, or forms a cycle.
    """

    def __init__(self, specs: Mapping[str, Spec] | None = None, /, **named: Spec) -> None:
        specs = {} if specs is None else specs
        if not isinstance(specs, Mapping):
            raise SpaceError(f"a Space needs a dict of names and hyperparameters, but got {specs!r}.")
        twice = sorted(set(specs) & set(named))
        if twice:
            raise SpaceError(f"a name can be declared once, but {', '.join(twice)} is declared twice.")
        self.specs: dict[str, Spec] = _parents_first({**specs, **named})

    def __iter__(self) -> Iterator[str]:
        """Yield the names, each after its parents."""
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, name: str) -> Spec:
        if name not in self.specs:
            raise UnknownName("a hyperparameter of this space", name, self.specs)
        return self.specs[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @property
    def searched(self) -> dict[str, Spec]:
        """The hyperparameters that an engine chooses, each after its parents."""
        return {name: spec for name, spec in self.specs.items() if not getattr(spec, "online", False)}

    @property
    def online(self) -> dict[str, Float]:
        """The hyperparameters that are tuned during each trial."""
        return {name: spec for name, spec in self.specs.items() if isinstance(spec, Float) and spec.online}

    def is_active(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether the condition of `name` holds in `config`, which must hold the values of its parents."""
        return all(
            parent in config and config[parent] in values
            for parent, values in conditions(self.specs[name]).items()
        )

    def active(self, config: Mapping[str, Any]) -> list[str]:
        """Return the names that are active in a configuration, online ones included."""
        found: Config = {}
        for name in self.specs:
            if self.is_active(name, found):
                found[name] = config.get(name)
        return list(found)

    def tuned(self, starts: Mapping[str, Any]) -> TunedSpace | None:
        """Return a tuner's space of the online hyperparameters in `starts`, with these values; or None."""
        specs = {n: replace(spec, init=starts[n]) for n, spec in self.online.items() if n in starts}
        return TunedSpace(specs) if specs else None

    def starts(self, config: Mapping[str, Any]) -> Config:
        """Return the declared initial values of the online hyperparameters that are active in `config`."""
        active = self.active(config)
        specs = {name: spec for name, spec in self.online.items() if name in active}
        return TunedSpace(specs).as_dict() if specs else {}

    def offline(self) -> "Space":
        """Return a copy in which an engine searches every hyperparameter."""
        return Space(
            {name: replace(spec, online=False) if isinstance(spec, Float) else spec
             for name, spec in self.specs.items()}
        )  # fmt: skip

    def distances(self, config: Config, others: Sequence[Config]) -> npt.NDArray[np.float64]:
        """Return the distances, shape (n,), of a configuration to n others (Gower 1971).

        A distance in [0, 1] is the mean over the hyperparameters that are active in either configuration. A
        number contributes the difference of its unit coordinates, a category 0 or 1, and a hyperparameter
        that is active in one configuration only contributes 1.
        """
        searched = self.searched.items()
        found = np.stack([_coordinates(name, spec, [config, *others]) for name, spec in searched], axis=1)
        terms = np.abs(found[1:] - found[0])
        terms = np.where([isinstance(spec, Categorical) for _, spec in searched], np.sign(terms), terms)
        inactive = np.isnan(found[1:]).astype(int) + np.isnan(found[0])
        terms = np.choose(inactive, [terms, 1.0, 0.0])
        mean: npt.NDArray[np.float64] = terms.sum(1) / np.maximum(1, (inactive < 2).sum(1))
        return mean

    def distance(self, a: Config, b: Config) -> float:
        """Return the distance of two configurations; `distances` defines it."""
        return float(self.distances(a, [b])[0])

    def checked(self, config: Mapping[str, Any], what: str) -> Config:
        """Return a whole or partial configuration with plain Python values.

        Args:
            what: what it is, for messages.

        Raises:
            SpaceError: a name is not searched or not active, or a value is not possible.
        """
        if not isinstance(config, Mapping):
            raise SpaceError(f"{what} must be a dict of names and values, but got {config!r}.")
        found: Config = {}
        for name, value in config.items():
            if name not in self.searched:
                raise SpaceError(
                    f"{what} may name {', '.join(self.searched)}, which the engine searches, but it names "
                    f"{name!r}."
                )
            found[name] = plain_value(self[name], name, value, f"{what} has")
        for name in found:
            if not self.is_active(name, found):
                raise SpaceError(
                    f"{what} may give {name} only where {self[name].when} holds, but is {found}."
                )
        return {name: found[name] for name in self.searched if name in found}

    def differences(self, other: "Space") -> str:
        """Return in words where the other space differs; "" if it does not."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        return "; ".join(
            f"{name}: {_declared(mine.get(name))}, now {_declared(theirs.get(name))}"
            for name in {**mine, **theirs}
            if mine.get(name) != theirs.get(name)
        ) or "the order of its names" * ([*mine] != [*theirs])

    def to_json(self) -> str:
        """Return the space as JSON; see `from_json`."""
        specs = {name: {"kind": type(spec).__name__, **asdict(spec)} for name, spec in self.specs.items()}
        return json.dumps(specs, default=lambda array: array.tolist())  # of numpy or torch

    @staticmethod
    def from_json(text: str) -> "Space":
        """Invert `to_json`."""
        specs = {}
        for name, fields in json.loads(text).items():
            kind = KINDS[fields.pop("kind")]
            fields["when"] = fields["when"] and {
                parent: tuple(value) if isinstance(value, list) else value
                for parent, value in fields["when"].items()
            }
            specs[name] = kind(**fields)
        return Space(specs)


def conditions(spec: Spec) -> dict[str, tuple[Choice, ...]]:
    """Return parent -> values for which `spec` is active; {} if it is always active."""
    when: When = spec.when or {}
    return {
        parent: tuple(values) if isinstance(values, tuple | list) else (values,)
        for parent, values in when.items()
    }


def plain_value(spec: Spec, name: str, value: Any, what: str) -> Choice:
    """Return `value` as a Python value of `spec`, also if it is one of numpy.

    Raises:
        SpaceError: it is not possible; the message begins with `what`.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    number = isinstance(plain, numbers.Real) and not isinstance(plain, bool)
    if isinstance(spec, Categorical):
        allowed = f"one of {', '.join(map(repr, spec.choices))}"
        same = [c for c in spec.choices if type(c) is type(plain) or (number and not isinstance(c, bool))]
        possible = isinstance(plain, Choice) and plain in same
    elif isinstance(spec, Int):
        allowed = f"a whole number in [{spec.low}, {spec.high}]"
        possible = number and isinstance(plain, int) and spec.low <= plain <= spec.high
    else:
        allowed = f"a number in [{spec.low:g}, {spec.high:g}]"
        possible = number and spec.low <= plain <= spec.high
    if not possible:
        raise SpaceError(f"{what} {name}={value!r}, but {name} must be {allowed}.")
    if isinstance(spec, Categorical):
        return spec.choices[spec.choices.index(plain)]
    return plain if isinstance(spec, Int) else float(plain)


def _coordinates(name: str, spec: Spec, configs: Sequence[Config]) -> npt.NDArray[np.float64]:
    """Return unit coordinates, shape (n,); a category has its index, an inactive hyperparameter NaN."""
    if isinstance(spec, Categorical):
        return np.array([spec.choices.index(c[name]) if name in c else math.nan for c in configs])
    scale = spec if isinstance(spec, Float) else Float(spec.low, spec.high, log=spec.log)
    values = torch.tensor([c.get(name, math.nan) for c in configs], dtype=torch.float64)
    return scale.transform.raw(values).numpy()


def _declared(fields: dict[str, Any] | None) -> str:
    """Return a stored declaration as text, such as Int(low=1, high=4)."""
    if fields is None:
        return "nothing"
    given = ", ".join(
        f"{key}={value!r}" for key, value in fields.items() if value not in (None, []) and key != "kind"
    )
    return f"{fields['kind']}({given})"


def _parents_first(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Check the entries and sort each after its parents, otherwise in the declared order."""
    if not specs:
        raise SpaceError("a Space needs at least one hyperparameter, such as layers=Int(1, 4).")
    for name, spec in specs.items():
        if not isinstance(name, str) or not name:
            raise SpaceError(f"the name of a hyperparameter must be a text, but got {name!r}.")
        if not isinstance(spec, Float | Int | Categorical):
            raise SpaceError(f"{name} must be a Float, an Int or a Categorical, but got {spec!r}.")
        if isinstance(spec, Float) and spec.shape and not spec.online:
            raise SpaceError(
                f"a searched Float must be one number, but {name} has shape {spec.shape}; "
                "pass online=True or declare one per entry."
            )
        for parent, values in conditions(spec).items():
            _check_condition(specs, name, parent, values)
    ordered: dict[str, Spec] = {}
    required: dict[str, dict[str, set[Choice]]] = {}
    waiting = dict(specs)
    while waiting:
        ready = next((n for n, spec in waiting.items() if not set(conditions(spec)) - set(ordered)), None)
        if ready is None:
            raise SpaceError(
                f"conditions must not form a cycle, but those of {', '.join(waiting)} depend on each other."
            )
        ordered[ready] = waiting.pop(ready)
        required[ready] = _required_values(ready, conditions(ordered[ready]), required)
    return ordered


def _required_values(
    name: str, own: Mapping[str, tuple[Choice, ...]], required: Mapping[str, dict[str, set[Choice]]]
) -> dict[str, set[Choice]]:
    """Return ancestor -> values for which `name` can be active, given all conditions above it."""
    found = {parent: set(values) for parent, values in own.items()}
    for parent in own:
        for grandparent, values in required[parent].items():
            both = found.get(grandparent, values) & values
            if not both:
                raise SpaceError(
                    f"the condition of {name} can never hold: it needs {grandparent} to be one of "
                    f"{sorted(found[grandparent], key=str)}, but {parent} is active only with one of "
                    f"{sorted(values, key=str)}."
                )
            found[grandparent] = both
    return found


def _check_condition(specs: Mapping[str, Spec], name: str, parent: str, values: tuple[Choice, ...]) -> None:
    if parent not in specs or parent == name:
        others = ", ".join(n for n in specs if n != name) or "none"
        raise SpaceError(
            f"the condition of {name} must name another hyperparameter of the space ({others}), "
            f"but names {parent!r}."
        )
    spec = specs[parent]
    if isinstance(spec, Float):
        kind = "tuned during training" if spec.online else "continuous"
        raise SpaceError(
            f"the condition of {name} must name an Int or a Categorical, but {parent} is {kind}."
        )
    for value in values:
        plain_value(spec, parent, value, f"the condition of {name} requires")
    if not values:
        raise SpaceError(f"the condition of {name} must name a value of {parent}, but names none.")
