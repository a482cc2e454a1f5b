"""The one seam: hooks of `optimizer.step`, where the gradient is final."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, cast

import torch

from midflight.tuner.gradient import calling_scaler, scaler_stage

Before = Callable[[torch.optim.Optimizer, bool], None]
After = Callable[[torch.optim.Optimizer, bool], None]


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which runs outside where the user compiles a function that steps."""
    outside = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]

    @wraps(hook)
    def call(*args: Any) -> Any:
        return outside(*args) if torch.compiler.is_compiling() else hook(*args)

    return call


class StepHooks:
    """Calls back before and after the steps of some optimisers that train one model in turns.

    A `closure` is wrapped: the gradient is there once it has run.

    Args:
        optimizers: each steps once in a training step.
        before: (optimizer, whether it is the first of them in this training step), with the final gradient.
        after: (optimizer, whether it is the last), once its weights have moved.
        restore: called right after a step, before the hooks of the user, such as a scheduler's.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        before: Before,
        after: After,
        restore: Callable[[], None],
    ) -> None:
        self._optimizers = list(optimizers)
        self._before, self._after = before, after
        self._stepped: set[int] = set()
        self._calling: torch.optim.Optimizer | None = None
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
        """Call back no more.

        Called from `after`, it leaves hooks that do nothing: torch is going through them.
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
        """A step begins.

        Args:
            final: whether no hook of the user's, which may clip, is still to come in this step.
        """
        if id(optimizer) in self._stepped:  # again, before the others: a new training step
            self._stepped.clear()
        scaler = calling_scaler() if len(self._optimizers) > 1 else None
        if scaler is not None:  # whose step it left out, for infinite gradients, counts as taken
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
        # a user's own pre-hook, such as clipping, may have been added since: ours comes after it
        hooks = cast(OrderedDict[int, Any], optimizer._optimizer_step_pre_hooks)
        hooks.move_to_end(self._pre[id(optimizer)].id)
        self._calling = optimizer
        try:
            self._after(optimizer, last)
        finally:
            self._calling = None
