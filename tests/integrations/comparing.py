"""What the tests of the hosts share: a training's end, compared bit for bit."""

import torch


def state(model, space):
    return {name: t.clone() for name, t in model.state_dict().items()} | space.as_dict()


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one
    )
