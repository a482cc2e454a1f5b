"""Hyperparameters whose values the training loss takes out of the graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import midflight as mf
from midflight.tuner.stop_gradient import StoppedReads

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Still(torch.optim.SGD):
    """Moves nothing, and keeps the hypergradients."""

    def __init__(self, raws):
        super().__init__(list(raws), lr=1.0)
        self.given = []

    def step(self, closure=None):
        self.given = {
            i: p.grad.clone() for i, p in enumerate(self.param_groups[0]["params"]) if p.grad is not None
        }


def teacher(space, model, x, z):
    """Consistency with a target of the model itself, which sees noise as well."""
    with torch.no_grad():
        target = model(x - space["a"] * z).softmax(-1)
    return F.cross_entropy(model(x + space["a"] * z), target)


def detached_weight(space, model, x, z):
    return space["a"].value.detach() ** 2 * model(x).square().mean() + space["a"] * model(x).abs().mean()


def number(space, model, x, z):
    return float(space["a"]) * model(x).square().mean() + 0.1 * space["a"] * model(x).sum(1).mean()


def data_attribute(space, model, x, z):
    return (space["a"] * z).data.square().mean() * model(x).square().mean() + space["a"] * model(
        z
    ).abs().mean()


def value_used_without_grad(space, model, x, z):
    level = space["a"].value
    with torch.no_grad():
        target = model(x - level * z).softmax(-1)
    return F.cross_entropy(model(x + level * z), target)


def nothing(space, model, x, z):
    return model(x + space["a"] * z).square().mean()


LOSSES = [teacher, detached_weight, number, data_attribute, value_used_without_grad, nothing]


def built(loss):
    torch.manual_seed(0)
    space = mf.Space(a=mf.Float(0, 1, init=0.4))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, z, y = torch.randn(16, 4), torch.randn(16, 4), torch.randint(3, (16,))

    def loss_fn(model, batch):
        return loss(space, model, batch[0], batch[1]) + F.cross_entropy(model(batch[0]), batch[2])

    def valid(model, batch):
        return F.cross_entropy(model(batch[0]), batch[2])

    return space, model, torch.optim.SGD(model.parameters(), 0.5), loss_fn, valid, (x, z, y)


def after_step(loss, shift):
    space, model, optimizer, loss_fn, valid, batch = built(loss)
    space["a"].raw.add_(shift)
    loss_fn(model, batch).backward()
    optimizer.step()
    return valid(model, batch).item()


def stepped(loss):
    space, model, optimizer, loss_fn, valid, batch = built(loss)
    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, [batch], [batch], valid_loss_fn=valid, schedule=1, horizon="step",
        hyper_optimizer=Still,
    )  # fmt: skip
    loss_fn(model, batch).backward()
    optimizer.step()
    return tuner


def found(loss):
    return float(stepped(loss).hyper_optimizer.given[0])


def truth(loss, h=1e-4):
    return (after_step(loss, h) - after_step(loss, -h)) / (2 * h)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_hypergradient_is_that_of_the_step_though_the_loss_stops_gradients(loss):
    tolerance = 1e-6 if loss is nothing else 1e-3  # of a difference in steps of .01
    assert found(loss) == pytest.approx(truth(loss), rel=tolerance)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss is not nothing])
def test_a_derivative_by_autograd_alone_is_found_out(loss, monkeypatch):
    monkeypatch.setattr(StoppedReads, "_note", lambda self, tensors: None)
    assert abs(found(loss) / truth(loss) - 1) > 0.1


def test_what_layers_of_the_library_take_out_on_purpose_does_not_count():
    space = mf.Space(a=mf.Float(0, 1, init=0.0), b=mf.Float(0.1, 0.5, init=0.2))
    space.requires_grad_()
    layers = nn.Sequential(mf.nn.GaussianNoise(space["a"]), mf.nn.Dropout(space["b"]))
    with StoppedReads(space) as reads:
        layers(torch.randn(5, 4))
    assert reads.names == set()
    with StoppedReads(space) as reads, torch.no_grad():  # a teacher that sees noise, say
        layers[0](torch.randn(5, 4))
    assert reads.names == {"a"}


def test_values_that_are_only_logged_cost_nothing_though_gradients_of_relu_networks_jump():
    torch.manual_seed(0)
    space = mf.Space(a=mf.Float(0, 1, init=0.4))
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 3))
    batch = torch.randn(64, 4), torch.randint(3, (64,))
    logged = []

    def loss_fn(model, batch):
        x, y = batch
        out = model(x + space["a"] * torch.randn_like(x)) if model.training else model(x)
        loss = F.cross_entropy(out, y)
        logged.append((float(space["a"]), loss.item(), (out.detach().argmax(1) == y).sum()))
        return loss

    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    tuner = mf.Tuner(model, optimizer, space, loss_fn, [batch], [batch], schedule=1)
    loss_fn(model, batch).backward()
    optimizer.step()
    assert tuner.state_dict()["hyperstep"]["mixed"]["by_difference"] == []


def test_what_is_differenced_is_saved():
    state = stepped(teacher).state_dict()
    assert state["hyperstep"]["mixed"]["by_difference"] == ["a"]
    again = stepped(nothing)
    assert again.state_dict()["hyperstep"]["mixed"]["by_difference"] == []
    again.load_state_dict(state)
    assert again.state_dict()["hyperstep"]["mixed"]["by_difference"] == ["a"]
