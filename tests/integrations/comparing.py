"""What the tests of the hosts share: a training's end, compared bit for bit."""

import signal

import pytest
import torch


def state(model, space):
    return {name: t.clone() for name, t in model.state_dict().items()} | space.as_dict()


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one
    )


def press_control_c():
    signal.raise_signal(signal.SIGINT)


def raise_interrupt():
    raise KeyboardInterrupt


def fail():
    raise ArithmeticError


def at_call(n, do):
    """A function that does this at its n-th call. It counts where no tuner restores the count."""
    left = n

    def call():
        nonlocal left
        left -= 1
        if left == 0:
            do()

    return call


STOPS = (press_control_c, raise_interrupt, fail)
"""What may happen within a training batch."""


def assert_detached(optimizer, space, factor=1.0):
    """No hook is left, and steps by hand go on with the tuned values."""
    assert not optimizer._optimizer_step_pre_hooks
    for name, value in space.as_dict().items():
        for group in optimizer.param_groups:
            if group.get(name):  # an option of 0 is not tuned
                assert group[name] == pytest.approx(value * (factor if name == "lr" else 1.0), rel=1e-6)
