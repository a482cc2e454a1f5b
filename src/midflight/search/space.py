"""One declaration of a space, for every engine: what is searched, what is tuned inside, and when."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import torch

from midflight.errors import SpaceError, UnknownName
from midflight.space import Categorical, Choice, Float, Int, When
from midflight.space import Space as TunedSpace

Spec: TypeAlias = Float | Int | Categorical
Config: TypeAlias = dict[str, Any]
"""Name -> value of the hyperparameters that are active in one configuration."""

KINDS = {"Float": Float, "Int": Int, "Categorical": Categorical}


class Space:
    """Named hyperparameters of a search.

    An entry with `when=` is active in a configuration only if each hyperparameter named there is active
    and has one of the values named.

    Args:
        specs: name -> `Float`, `Int` or `Categorical`, for names that are no Python identifiers.
        named: the same as keywords.

    Raises:
        SpaceError: it is empty; a name comes twice; an entry is of another type; a condition names itself,
            an unknown or a continuous hyperparameter, a value that it cannot have, or runs in a circle;
            a searched `Float` is not one number.
    """

    def __init__(self, specs: Mapping[str, Spec] | None = None, /, **named: Spec) -> None:
        specs = specs or {}
        twice = sorted(set(specs) & set(named))
        if twice:
            raise SpaceError(f"a name can be declared once, but {', '.join(twice)} came twice.")
        self.specs: dict[str, Spec] = _in_order_of_conditions({**specs, **named})

    def __iter__(self) -> Iterator[str]:
        """The names, each after those that its condition reads."""
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
        """What an engine chooses, each after those that its condition reads."""
        return {name: spec for name, spec in self.specs.items() if not _online(spec)}

    @property
    def online(self) -> dict[str, Float]:
        """What is tuned inside each trial."""
        return {name: spec for name, spec in self.specs.items() if isinstance(spec, Float) and spec.online}

    def is_active(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether the condition of `name` holds in `config`, the values of those declared before it."""
        return all(
            parent in config and config[parent] in values
            for parent, values in conditions(self.specs[name]).items()
        )

    def active(self, config: Mapping[str, Any]) -> list[str]:
        """The names that belong to a configuration, online ones included; other entries are ignored."""
        found: Config = {}
        for name, spec in self.specs.items():
            if self.is_active(name, found):
                found[name] = None if _online(spec) else config[name]
        return list(found)

    def tuned(self, starts: Mapping[str, Any]) -> TunedSpace | None:
        """The tuner's space of the online hyperparameters in `starts`, there; None if there are none."""
        specs = {name: spec for name, spec in self.online.items() if name in starts}
        return (
            TunedSpace({name: replace(spec, init=starts[name]) for name, spec in specs.items()})
            if specs
            else None
        )

    def starts(self, config: Mapping[str, Any]) -> Config:
        """Where the online hyperparameters that are active in `config` begin by their declaration."""
        active = self.active(config)
        specs = {name: spec for name, spec in self.online.items() if name in active}
        return TunedSpace(specs).as_dict() if specs else {}

    def offline(self) -> "Space":
        """The same space with nothing left to tune: an engine searches everything."""
        return Space(
            {name: replace(spec, online=False) if isinstance(spec, Float) else spec
             for name, spec in self.specs.items()}
        )  # fmt: skip

    def distance(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
        """How far apart two configurations are, in [0, 1]: the mean over the searched hyperparameters.

        Numbers differ by their unit coordinates, categories by 0 or 1, and one that is active in one
        configuration only by 1 (Gower 1971). What is active in neither is left out.
        """
        terms = [
            1.0 if (name in a) != (name in b) else _difference(spec, a[name], b[name])
            for name, spec in self.searched.items()
            if name in a or name in b
        ]
        return sum(terms) / len(terms) if terms else 0.0

    def to_json(self) -> str:
        """The declaration as text; see `from_json`."""
        return json.dumps(
            {name: {"kind": type(spec).__name__, **asdict(_plain(spec))} for name, spec in self.specs.items()}
        )

    @staticmethod
    def from_json(text: str) -> "Space":
        """The space that `to_json` wrote."""
        specs = {}
        for name, fields in json.loads(text).items():
            kind = KINDS[fields.pop("kind")]
            fields["when"] = fields["when"] and {
                parent: tuple(value) if isinstance(value, list) else value
                for parent, value in fields["when"].items()
            }
            if "shape" in fields:
                fields["shape"] = tuple(fields["shape"])
            specs[name] = kind(**fields)
        return Space(specs)


def conditions(spec: Spec) -> dict[str, tuple[Choice, ...]]:
    """Name of a parent -> the values at which `spec` is active; empty if it always is."""
    when: When = spec.when or {}
    return {
        parent: tuple(values) if isinstance(values, tuple | list) else (values,)
        for parent, values in when.items()
    }


def unit(spec: Float | Int, value: Any) -> float:
    """The unit coordinate of a number, in [0, 1]."""
    scale = spec if isinstance(spec, Float) else Float(spec.low, spec.high, log=spec.log)
    return float(scale.transform.raw(torch.tensor(float(value), dtype=torch.float64)))


def _online(spec: Spec) -> bool:
    return isinstance(spec, Float) and spec.online


def _difference(spec: Spec, a: Any, b: Any) -> float:
    return float(a != b) if isinstance(spec, Categorical) else abs(unit(spec, a) - unit(spec, b))


def _plain(spec: Spec) -> Spec:
    """Without tensors, for JSON."""
    if isinstance(spec, Float) and spec.init is not None:
        return replace(spec, init=torch.as_tensor(spec.init, dtype=torch.float64).tolist())
    return spec


def _in_order_of_conditions(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The entries, checked, each after its parents, otherwise as declared."""
    if not specs:
        raise SpaceError("a Space needs at least one hyperparameter, such as layers=Int(1, 4).")
    for name, spec in specs.items():
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
    needed: dict[str, dict[str, set[Choice]]] = {}
    waiting = dict(specs)
    while waiting:
        ready = next((n for n, spec in waiting.items() if not set(conditions(spec)) - set(ordered)), None)
        if ready is None:
            raise SpaceError(
                f"conditions must not run in a circle, but those of {', '.join(waiting)} wait for each other."
            )
        ordered[ready] = waiting.pop(ready)
        needed[ready] = _needed(ready, conditions(ordered[ready]), needed)
    return ordered


def _needed(
    name: str, own: Mapping[str, tuple[Choice, ...]], needed: Mapping[str, dict[str, set[Choice]]]
) -> dict[str, set[Choice]]:
    """Parent -> the values with which `name` can be active, the conditions of its parents included."""
    found = {parent: set(values) for parent, values in own.items()}
    for parent in own:
        for grandparent, values in needed[parent].items():
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
        what = "is tuned while the model trains" if spec.online else "is continuous"
        raise SpaceError(
            f"the condition of {name} must name an Int or a Categorical, but {parent} {what} and equals no "
            "value in particular."
        )
    for value in values:
        if isinstance(spec, Categorical):
            possible, allowed = value in spec.choices, f"one of {', '.join(map(repr, spec.choices))}"
        else:
            possible = isinstance(value, int) and spec.low <= value <= spec.high
            allowed = f"a whole number in [{spec.low}, {spec.high}]"
        if not possible:
            raise SpaceError(f"the condition of {name} waits for {parent}={value!r}, but that is {allowed}.")
    if not values:
        raise SpaceError(f"the condition of {name} names no value of {parent}, so it could never hold.")
