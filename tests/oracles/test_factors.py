"""Gradients left as their two factors, against the gradients themselves, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import midflight as mf
from midflight.hypergrad import one_step
from midflight.training_gradient import TrainingGradient

SEEDED = torch.Generator().manual_seed(0)
X, Y = torch.randn(5, 6, generator=SEEDED), torch.randint(0, 3, (5,), generator=SEEDED)


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(self.layer(x).tanh()))


class Unused(nn.Module):
    """A product that does not reach the loss, of a weight that does in another way."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        self.layer(x)
        return self.last((x @ self.layer.weight).tanh())


class AlsoInput(nn.Module):
    """A weight that is the input of a product with itself."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.last((x @ self.layer(self.layer.weight)).tanh())


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last((self.layer(x) * self.layer.bias).tanh())


class InPlace(nn.Module):
    """An input that changes in place after its product; torch keeps a copy, for its memory has gaps."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = (1 * x).view(5, 3, 2).transpose(1, 2)
        x += self.second(self.first(x).tanh())
        return self.last(x.flatten(1))


class Residual(nn.Module):
    """The same, where torch keeps a copy in mixed precision."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = 1 * x
        x += 5 * self.second(self.first(x).tanh())
        return self.last(x)


class Quantised(nn.Parameter):
    """A weight of which products see a function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.as_subclass(torch.Tensor).tanh(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def quantised():
    model = mlp()
    model[0].weight = Quantised(model[0].weight.data.double())
    return model


class Vector(nn.Module):
    """A weight of one dimension."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(1, 3)
        self.vector = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.last(F.linear(self.first(x).tanh(), self.vector).tanh()[:, None])


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return self[2](checkpoint(nn.Sequential(*self[:2]), x, use_reentrant=False))


class ByExample(nn.Sequential):
    """Through vmap."""

    def forward(self, x):
        return torch.vmap(super().forward)(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        tokens = torch.stack([x, x.flip(0)], 1)
        return self.last(self.attend(tokens, tokens, tokens)[0]).mean(1)


def hooked():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].weight.register_hook(lambda g: 2 * g)
    return model


def under_two_names():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 3))


def hooked_inside():
    """The gradient of what a layer gives is changed on its way, by torch's two kinds of hooks."""
    model = mlp()
    model[0].register_forward_hook(lambda module, args, y: y.register_hook(lambda g: 3 * g) and None)
    model[2].register_full_backward_hook(lambda module, of_input, of_output: (5 * of_input[0],))
    return model


def frozen():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def reparametrised():
    first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 3))


def tokens():
    first = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Tanh(), nn.Flatten())
    return first.append(nn.Linear(8, 3))


def mlp(kind=nn.Sequential, between=nn.Tanh):
    return kind(nn.Linear(6, 8), between(), nn.Linear(8, 3))


BOTH = {"0.weight", "0.bias", "2.weight", "2.bias"}
MODELS = {
    "perceptron": (mlp, BOTH),
    "changed in place": (lambda: mlp(between=lambda: nn.ELU(inplace=True)), BOTH),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 3, bias=False)), {"0.weight"}),
    "normalised": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), BOTH),
    "input changed in place": (InPlace, {"second.weight", "second.bias", "last.weight", "last.bias"}),
    "a weight of its own kind": (quantised, {"2.weight", "2.bias"}),
    "a vector": (Vector, {"first.weight", "first.bias", "last.weight", "last.bias"}),
    "under two names": (under_two_names, {"3.weight", "3.bias"}),
    "used twice": (Twice, {"last.weight", "last.bias"}),
    "does not reach the loss": (Unused, {"last.weight", "last.bias"}),
    "its own input": (AlsoInput, {"last.weight", "last.bias"}),
    "bias elsewhere too": (SharedBias, {"layer.weight", "last.weight", "last.bias"}),
    "reparametrised": (reparametrised, {"2.weight", "2.bias"}),
    "three dimensions": (tokens, {"1.weight", "1.bias", "4.weight", "4.bias"}),
    "checkpointed": (lambda: mlp(Checkpointed), BOTH),
    "by example": (lambda: mlp(ByExample), set()),
    "attention": (Attention, {"last.weight", "last.bias"}),
    "a hook": (hooked, {"2.weight", "2.bias"}),
    "hooks inside": (hooked_inside, BOTH),
    "frozen": (frozen, {"2.weight"}),
}  # fmt: skip


def taken(build, dtype=torch.float64):
    """What depends on the hyperparameter, by a probe and by the recorded gradients; w; and what is tuned."""
    torch.manual_seed(0)
    model = build().to(dtype)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    space = mf.Space(scale=mf.Float(0.5, 2.0, init=1.2), dtype=dtype)

    def loss():
        return F.cross_entropy(model(X.to(dtype) * space["scale"].value), Y)

    gradient = TrainingGradient(model, params, space, one_step)
    (_, probed), (_, recorded) = gradient.take(loss(), loss), gradient.take(loss(), None)
    w = {n: torch.randn_like(p) for n, p in params.items()}
    return probed, recorded, w, space["scale"].raw


def derivatives(probed, recorded, w, raw):
    """d<w, g>/d raw by factors, and by the gradients."""
    left = [pair for factors in probed.factors for pair in factors.along(w)]
    for pairs in (
        left + [(g, w[n]) for n, g in probed.grads.items()],
        [(g, w[n]) for n, g in recorded.grads.items()],
    ):
        outputs, cotangents = zip(*[(g, c.to(g)) for g, c in pairs if g.requires_grad], strict=True)
        yield torch.autograd.grad(outputs, raw, cotangents)[0]


@pytest.mark.parametrize("name", MODELS)
def test_factors_stand_for_the_gradients_they_are_left_as(name):
    probed, recorded, w, raw = taken(MODELS[name][0])
    torch.testing.assert_close(*derivatives(probed, recorded, w, raw), rtol=1e-10, atol=0)


@pytest.mark.parametrize("build", [mlp, Residual, tokens, Twice, lambda: mlp(Checkpointed)])
def test_factors_in_mixed_precision(build):
    with torch.autocast("cpu", torch.bfloat16):
        found = taken(build, torch.float32)
    assert found[0].factors[0].delta.dtype == torch.bfloat16
    torch.testing.assert_close(*derivatives(*found), rtol=0.1, atol=0)


def test_products_that_somebody_else_redefines_are_left_alone():
    class OfTanh(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.linear:
                args = (args[0].tanh(), args[1].tanh(), *args[2:])
            return func(*args, **(kwargs or {}))

    with OfTanh():
        probed, recorded, w, raw = taken(mlp)
    assert not probed.factors
    torch.testing.assert_close(*derivatives(probed, recorded, w, raw), rtol=1e-10, atol=0)


def test_an_input_that_changes_before_the_hyper_step_is_over_is_an_error():
    probed, _, w, _ = taken(mlp)
    with torch.no_grad():
        probed.factors[0].x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        probed.factors[0].along(w)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_left_as_factors_where_one_product_is_the_only_way_to_the_loss(name):
    probed, recorded, *_ = taken(MODELS[name][0])
    left = {n for f in probed.factors for n in (f.weight, f.bias) if n}
    assert left == MODELS[name][1]
    assert left.isdisjoint(probed.grads)
    assert left | set(probed.grads) == set(recorded.grads)
