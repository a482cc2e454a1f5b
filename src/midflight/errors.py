"""Define the exceptions that midflight raises on purpose, and how it warns."""

import sys
import warnings
from difflib import get_close_matches
from importlib.util import find_spec


class MidflightError(Exception):
    """Base class of every error that midflight raises on purpose."""

    exit_code = 2
    """Exit status of the command: 2 for bad input, 1 for a failure of the environment."""


class SpaceError(MidflightError, ValueError):
    """The search space, or a value for it, is invalid."""


class BindingError(MidflightError, ValueError):
    """A hyperparameter cannot be bound to the requested optimiser option."""


class UnreachedHyperparameter(MidflightError, RuntimeError):
    """A hyperparameter influences neither the training loss's gradient nor the update."""


class InvalidLoss(MidflightError, TypeError):
    """A loss function did not return one number with a gradient."""


class UnsupportedSetting(MidflightError, NotImplementedError):
    """midflight does not support this, for example a TorchScript model."""


class AnotherProcessFailed(MidflightError, RuntimeError):
    """A hyper-step failed in another of the processes that train together."""

    exit_code = 1


class UnknownGradient(MidflightError, RuntimeError):
    """midflight cannot tell how the gradient changed between `backward` and `step`."""


class UnusableLoader(MidflightError, TypeError, ValueError):
    """The tuner cannot read a loader without taking batches from the training loop, or it has no batch."""


class NoForwardMode(MidflightError, NotImplementedError):
    """The training loss contains an operation without a forward-mode derivative."""


class NotTwiceDifferentiable(MidflightError, RuntimeError):
    """The training loss contains an operation whose derivative cannot be differentiated."""


class UnsupportedOptimizer(MidflightError, TypeError):
    """There is no update rule for this optimiser, or for one of its options."""


class UnsupportedParameter(MidflightError, TypeError):
    """The update of a weight has no derivative here (sparse gradient, complex dtype)."""


class NoCompiler(MidflightError, RuntimeError):
    """torch.compile was requested but does not work here."""


class MissingExtra(MidflightError, ImportError):
    """An optional dependency is needed but not installed."""


class UnknownName(MidflightError, ValueError):
    """A name is not in the table of known names."""

    def __init__(self, kind: str, name: object, known: object) -> None:
        names = [str(k) for k in known] if hasattr(known, "__iter__") else [str(known)]
        folded = {n.casefold(): n for n in names}
        near = get_close_matches(str(name).casefold(), folded, 1)
        hint = f"; did you mean {folded[near[0]]}?" if near else "."
        super().__init__(f"{kind} must be one of {', '.join(names)}; got {name!r}{hint}")


def require_extra(module: str, extra: str) -> None:
    """Raise `MissingExtra` if `module` is not installed."""
    if find_spec(module) is None:
        raise MissingExtra(
            f"{module} must be installed for this, but is not; run pip install 'midflight[{extra}]'."
        )


def warn(message: str) -> None:
    """Warn at the line of the user's code that led here: the first one outside midflight and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("midflight", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
