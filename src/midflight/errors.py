"""What can go wrong at the border between a user's code and ours."""

from importlib.util import find_spec


class MidflightError(Exception):
    """Base of every error that midflight raises on purpose."""

    exit_code = 2
    """Of the command: 2 for bad input, 1 where the environment failed."""


class SpaceError(MidflightError, ValueError):
    """A search space, or a value for it, that cannot be."""


class BindingError(MidflightError, ValueError):
    """A hyperparameter cannot be bound to the optimiser option that was asked for."""


class UnreachedHyperparameter(MidflightError, RuntimeError):
    """A hyperparameter influences neither the training loss's gradient nor the update."""


class InvalidLoss(MidflightError, TypeError):
    """A loss function did not return one number with a gradient."""


class UnsupportedSetting(MidflightError, NotImplementedError):
    """Something that midflight cannot do right yet, such as tuning over several processes."""


class UnknownGradient(MidflightError, RuntimeError):
    """What happened to the gradient between `backward` and `step` could not be told."""


class UnusableLoader(MidflightError, TypeError):
    """A loader cannot be read by the tuner without taking batches from the training loop."""


class NoForwardMode(MidflightError, NotImplementedError):
    """The training loss holds an operation without a forward-mode derivative."""


class NotTwiceDifferentiable(MidflightError, RuntimeError):
    """The training loss holds an operation whose derivative cannot be differentiated."""


class UnsupportedOptimizer(MidflightError, TypeError):
    """There is no update rule for this optimiser, or for one of its options."""


class UnsupportedParameter(MidflightError, TypeError):
    """A weight whose update cannot be differentiated (sparse gradient, complex dtype)."""


class NoCompiler(MidflightError, RuntimeError):
    """torch.compile was asked for and does not work here."""


class MissingExtra(MidflightError, ImportError):
    """An optional dependency is needed and not installed."""


class UnknownName(MidflightError, ValueError):
    """A name that is not in one of midflight's tables."""

    def __init__(self, kind: str, name: object, known: object) -> None:
        names = ", ".join(str(k) for k in known) if hasattr(known, "__iter__") else str(known)
        super().__init__(f"{kind} must be one of {names}; got {name!r}.")


def require_extra(module: str, extra: str) -> None:
    """Raise `MissingExtra` if `module` is not installed."""
    if find_spec(module) is None:
        raise MissingExtra(
            f"{module} is needed for this, but is not installed; pip install 'midflight[{extra}]'"
        )
