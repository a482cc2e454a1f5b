"""Which hyperparameters are options of the optimiser, and keeping the two in step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from midflight.errors import BindingError
from midflight.space import Space
from midflight.trees import Tensors
from midflight.updates import Update, read_option, read_options, rule_for, write_option

REGULARISERS = {"weight_decay", "lambd"}
"""Options that shape what is learned; all others say how a step is taken."""

Bind = Sequence[str] | Mapping[str, str]
"""Names that are both hyperparameter and option, or {hyperparameter: option}."""


class Binding:
    """The bound options of one optimiser.

    Args:
        optimizer: a torch optimiser with an update rule.
        space: where the hyperparameters are.
        bind: which of them are options.
        compile: whether the update rule is compiled, where it can be.

    Raises:
        BindingError: a name is no hyperparameter, or no tunable option of the optimiser; or its
            param_groups differ in an option to which one number is bound.
        UnsupportedOptimizer: there is no update rule for the optimiser.
        NoCompiler: it cannot be compiled here.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, space: Space, bind: Bind, compile: bool = False
    ) -> None:
        if isinstance(bind, str):
            raise BindingError(f'bind must be a list such as ["{bind}"], but got the text "{bind}".')
        self._optimizer = optimizer
        self._space = space
        self._rule = rule_for(optimizer)
        if compile:
            self._rule = self._rule.compiled(optimizer.param_groups[0]["params"][0].device)
        self.options = dict(bind) if isinstance(bind, Mapping) else {name: name for name in bind}
        for name, option in self.options.items():
            self._check(name, option)

    @property
    def steering(self) -> list[str]:
        """Hyperparameters bound to an option that says how the step is taken, such as lr."""
        return [name for name, option in self.options.items() if option not in REGULARISERS]

    def write(self) -> None:
        """Set the bound options of the optimiser to the values of the space."""
        for i, group in enumerate(self._optimizer.param_groups):
            for option, value in self._tuned(i, self._values()).items():
                write_option(group, option, float(value))

    def verify(self) -> None:
        """Raise `BindingError` if somebody else has set a bound option."""
        for i, group in enumerate(self._optimizer.param_groups):
            for option, value in self._tuned(i, self._values()).items():
                found, wanted = read_option(group, option), float(value)
                if abs(found - wanted) > 1e-6 * abs(wanted):  # a tensor option may be float32
                    raise BindingError(
                        f"{option} of the optimiser must stay at the value of its hyperparameter "
                        f"({wanted:g}), but it is {found:g}; nothing else, such as a scheduler, may set it."
                    )

    def updates(self, params: Mapping[str, Tensor], values: Tensors) -> dict[str, Update]:
        """Rule and options of each of these weights, the bound options as functions of `values`."""
        names = {id(p): name for name, p in params.items()}
        updates = [
            Update(self._rule, {**read_options(group), **self._tuned(i, values)})
            for i, group in enumerate(self._optimizer.param_groups)
        ]
        return {
            names[id(p)]: update
            for group, update in zip(self._optimizer.param_groups, updates, strict=True)
            for p in group["params"]
            if id(p) in names
        }

    def _values(self) -> Tensors:
        return {name: self._space[name].value.detach() for name in self.options}

    def _tuned(self, group: int, values: Tensors) -> Tensors:
        """Option -> its value in the param_group of this number."""
        return {
            option: values[name][group] if values[name].ndim else values[name]
            for name, option in self.options.items()
        }

    def _check(self, name: str, option: str) -> None:
        if name not in self._space:
            known = ", ".join(self._space)
            raise BindingError(f"bind must name hyperparameters of the space ({known}), but got {name!r}.")
        if option not in self._rule.tunable:
            raise BindingError(
                f"a bound option of {type(self._optimizer).__name__} must be one of "
                f"{', '.join(sorted(self._rule.tunable))}, but got {option!r}."
            )
        groups = self._optimizer.param_groups
        shape = self._space[name].spec.shape
        if shape not in ((), (len(groups),)):
            raise BindingError(
                f"a bound hyperparameter must have shape () or one entry per param_group, ({len(groups)},), "
                f"but {name} has {shape}."
            )
        settings = {read_option(group, option) for group in groups}
        if len(settings) > 1 and shape == ():
            raise BindingError(
                f"the param_groups must agree on {option} before one number is bound to it, but they have "
                f"{sorted(settings)}; give {name} shape=({len(groups)},) for a value per group."
            )
