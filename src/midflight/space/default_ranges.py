"""Give every kind of hyperparameter a default range.

A range contains usual values. Training can fail at its ends, for example at lr = 0.1 under Adam. Factors have
a log scale; rates and decay factors close to 0 or 1 have a logit scale.
"""

from dataclasses import replace
from typing import Any

from midflight.errors import UnknownName
from midflight.space.specs import Float

RANGES: dict[str, Float] = {
    # the update rule
    "lr": Float(1e-5, 1e-1, log=True, init=1e-3),
    "momentum": Float(0.5, 0.99, logit=True, init=0.9),
    "beta1": Float(0.5, 0.99, logit=True, init=0.9),
    "beta2": Float(0.9, 0.9999, logit=True, init=0.999),
    "eps": Float(1e-10, 1e-2, log=True, init=1e-8),
    "weight_decay": Float(1e-6, 1e-1, log=True, init=1e-4),
    "decoupled_weight_decay": Float(1e-4, 1.0, log=True, init=1e-2),
    # penalties
    "l1": Float(1e-7, 1e-2, log=True, init=1e-5),
    "l2": Float(1e-6, 1e-1, log=True, init=1e-4),
    "activation_l2": Float(1e-4, 10.0, log=True, init=1e-2),
    "max_norm": Float(1e-4, 1.0, log=True, init=1e-2),
    "max_norm_limit": Float(0.5, 5.0, log=True, init=1.0),
    "orthogonality": Float(1e-6, 1e-1, log=True, init=1e-3),
    # noise
    "noise": Float(0.0, 0.8, init=0.2),
    "multiplicative_noise": Float(0.0, 1.0, init=0.2),
    "dropout": Float(0.01, 0.8, logit=True, init=0.1),
    # the loss
    "label_smoothing": Float(0.0, 0.5, init=0.05),
    "focal_gamma": Float(0.0, 5.0, init=1.0),
    "temperature": Float(0.2, 5.0, log=True, init=1.0),
    "class_weight": Float(0.1, 10.0, log=True, init=1.0),
    "loss_weight": Float(1e-3, 10.0, log=True, init=1.0),
    "example_weight": Float(0.0, 1.0, init=0.5),
    "mixup": Float(0.0, 1.0, init=0.2),
    # images
    "rotation": Float(0.0, 45.0, init=5.0),
    "translation": Float(0.0, 0.3, init=0.05),
    "scale": Float(0.0, 0.5, init=0.05),
    "shear": Float(0.0, 30.0, init=5.0),
    "brightness": Float(0.0, 0.5, init=0.05),
    "contrast": Float(0.0, 1.0, init=0.1),
    "pixel_noise": Float(0.0, 0.5, init=0.05),
}
"""Kind of hyperparameter -> its default range."""


def default_range(kind: str, **changes: Any) -> Float:
    """Return a range of `RANGES` with some fields changed: `default_range("dropout", init=0.3, shape=(4,))`.

    Raises:
        UnknownName: there is no such kind.
        SpaceError: the changed range is invalid.
    """
    if kind not in RANGES:
        raise UnknownName("a kind of hyperparameter", kind, RANGES)
    return replace(RANGES[kind], **changes)
