"""Call the tuner in hooks of `optimizer.step`, where the gradient is final."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, cast

import torch

from midflight.tuner.gradient import calling_scaler, scaler_stage

Callback = Callable[[torch.optim.Optimizer, bool], None]


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook, kept out of the graph of a function that the user compiles and that steps."""
    outside = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]

    @wraps(hook)
    def call(*args: Any) -> Any:
        return outside(*args) if torch.compiler.is_compiling() else hook(*args)

    return call


class StepHooks:
    """Calls back before and after each step of optimisers that train one model together.

    A `closure` is wrapped, because only after it the gradient is final.

    Args:
        optimizers: those whose steps are hooked; each steps once in a training step.
        before: (optimizer, whether it is the first to step in this training step) -> None, called when the
            gradient is final and the weights have not moved.
        after: (optimizer, whether it is the last) -> None, called when its weights have moved.
        restore: called right after a step, before the user's own hooks, such as a scheduler's.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        before: Callback,
        after: Callback,
        restore: Callable[[], None],
    ) -> None:
        self._optimizers = list(optimizers)
        self._before, self._after = before, after
        self._stepped: set[int] = set()
        """Ids of the optimisers that have stepped in the present training step."""
        self._calling: torch.optim.Optimizer | None = None
        """The optimiser for which `after` is running."""
        self._removed = False
        before_step, after_step = _untraced(self._on_step), _untraced(self._on_stepped)
        self._pre = {id(o): o.register_step_pre_hook(before_step) for o in self._optimizers}
        self._post = {id(o): o.register_step_post_hook(after_step) for o in self._optimizers}
        self._restore = restore
        just_stepped = _untraced(self._on_just_stepped)
        self._first = {id(o): o.register_step_post_hook(just_stepped) for o in self._optimizers}
        for o in self._optimizers:
            hooks = cast(OrderedDict[int, Any], o._optimizer_step_post_hooks)
            hooks.move_to_end(self._first[id(o)].id, last=False)

    def remove(self) -> None:
        """Remove all hooks.

        If `after` calls this, the hooks that torch is iterating over stay and do nothing.
        """
        self._removed = True
        for hook in self._pre.values():
            hook.remove()
        for key, hook in [*self._post.items(), *self._first.items()]:
            if self._calling is None or key != id(self._calling):
                hook.remove()

    def _on_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        args = args[1:] if args and args[0] is optimizer else args
        closure = kwargs.get("closure", args[0] if args else None)
        if closure is None:
            hooks = cast(OrderedDict[int, Any], optimizer._optimizer_step_pre_hooks)
            self._begin(optimizer, final=next(reversed(hooks)) == self._pre[id(optimizer)].id)
            return None

        def with_gradient() -> Any:
            loss = closure()
            self._begin(optimizer)
            return loss

        return (optimizer,), {**kwargs, "closure": with_gradient}

    def _begin(self, optimizer: torch.optim.Optimizer, final: bool = True) -> None:
        """Call `before` at the beginning of a step.

        Args:
            final: whether no hook of the user, which may clip, follows in this step.
        """
        if id(optimizer) in self._stepped:  # a second step before the others' first: a new training step
            self._stepped.clear()
        scaler = calling_scaler() if len(self._optimizers) > 1 else None
        if scaler is not None:  # a step that it skipped, for infinite gradients, counts as taken
            self._stepped |= {id(o) for o in self._optimizers if scaler_stage(scaler, o) == "STEPPED"}
        self._before(optimizer, not self._stepped and final)

    def _on_just_stepped(self, *_: Any) -> None:
        if not self._removed:
            self._restore()

    def _on_stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._removed:
            return
        self._stepped.add(id(optimizer))
        last = len(self._stepped) == len(self._optimizers)
        if last:
            self._stepped.clear()
        # the user may have added a hook since, such as clipping; ours must run after it
        hooks = cast(OrderedDict[int, Any], optimizer._optimizer_step_pre_hooks)
        hooks.move_to_end(self._pre[id(optimizer)].id)
        self._calling = optimizer
        try:
            self._after(optimizer, last)
        finally:
            self._calling = None
