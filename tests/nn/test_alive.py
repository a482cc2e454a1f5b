"""No kind of hyperparameter is silently dead: from either end of its range, tuning finds the better side.

Each problem is small and built so that the better side is not in doubt, and for the very next step
too, for that is as far as the tuner looks. It starts once at the lowest value, once at the highest.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight.nn import losses, penalties


def tuned(spec, build, start, steps=20, every=1, lr=0.08, seed=0, **options):
    """The raw coordinates after training from `start`, 0 or 1.

    Args:
        build: hyperparameter -> model, optimizer, step -> training loss, model -> validation loss. A batch
            is the number of a step.
    """
    torch.manual_seed(seed)
    space = mf.Space({"h": spec})
    with torch.no_grad():
        space["h"].raw.fill_(float(start))
    model, optimizer, train_loss, valid_loss = build(space["h"])
    tuner = mf.Tuner(
        model,
        optimizer,
        space,
        lambda _, step: train_loss(step),
        range(every - 1, steps, every),
        [None],
        valid_loss_fn=lambda m, _: valid_loss(m),
        schedule=every,
        horizon="step",
        hyper_optimizer=partial(mf.SignSteps, lr=lr, agreement=0.0),
        **options,
    )
    for step in range(steps):
        optimizer.zero_grad()
        train_loss(step).backward()
        optimizer.step()
    assert tuner.log()["hypersteps"] == steps // every
    return space["h"].raw.detach()


def assert_moves(better, spec, build, **options):
    """From both ends to the better side; the far end is left by a good part of the range."""
    for start in (0, 1):
        raw = tuned(spec, build, start, **options)
        assert bool((raw > 0.6).all() if better == "high" else (raw < 0.4).all()), f"from {start} to {raw}"


def linear(weight):
    """A linear model that starts at these weights, (outputs, inputs)."""
    model = nn.Linear(*reversed(weight.shape), bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    return model


def sgd(model, lr=0.01):
    return torch.optim.SGD(model.parameters(), lr=lr)


# ---- the update rule


def far_from_the_optimum(make):
    """Training and validation want the same weights, far away, and every step falls short of them."""

    def build(h):
        model = linear(torch.zeros(1, 5))
        target = torch.full((1, 5), 100.0)

        def loss(model):
            return (model.weight - target).square().sum() / 2

        return model, make(model.parameters()), lambda step: loss(model), loss

    return build


def test_learning_rate():
    """Higher: a step of any rate in the range falls short of the one optimum."""
    spec = mf.Float(1e-4, 1e-1, log=True)
    for make in (torch.optim.SGD, torch.optim.Adam):
        assert_moves(
            "high", spec, far_from_the_optimum(lambda p, make=make: make(p, lr=1e-2)), bind={"h": "lr"}
        )


def test_momentum():
    """Higher: the buffer points to the optimum, which stays far away at this learning rate."""
    build = far_from_the_optimum(lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9))
    assert_moves("high", mf.space.RANGES["momentum"], build, bind={"h": "momentum"})


def test_eps():
    """Lower: eps only shortens steps that already fall short."""
    build = far_from_the_optimum(lambda p: torch.optim.Adam(p, lr=1e-2))
    assert_moves("low", mf.space.RANGES["eps"], build, bind={"h": "eps"})


def test_beta1():
    """Higher: the batches at which the tuner looks pull the wrong way; memory of the others protects."""

    def build(h):
        model = linear(torch.zeros(1, 5))

        def train_loss(step):
            return (-1.0 if step % 2 else 3.0) * -model.weight.sum()

        return model, torch.optim.Adam(model.parameters(), lr=1e-2), train_loss, lambda m: -m.weight.sum()

    assert_moves("high", mf.space.RANGES["beta1"], build, every=2, steps=60, bind={"h": "beta1"})


def test_beta2():
    """Lower: the gradients shrink, and a memory of the large ones makes the steps too short on a way that
    has no end."""

    def build(h):
        model = linear(torch.zeros(1, 5))

        def train_loss(step):
            return 0.95**step * -model.weight.sum()

        return model, torch.optim.Adam(model.parameters(), lr=1e-2), train_loss, lambda m: -m.weight.sum()

    assert_moves("low", mf.space.RANGES["beta2"], build, bind={"h": "beta2"})


def too_long_weights(make_optimizer=sgd, penalty=None):
    """Training pulls each weight to 2, validation wants it at 0.5: what shrinks them helps."""

    def build(h):
        model = linear(torch.full((1, 5), 2.0))

        def train_loss(step):
            loss = (model.weight - 2).square().sum() / 2
            return loss if penalty is None else loss + h * penalty(model.weight)

        return model, make_optimizer(model), train_loss, lambda m: (m.weight - 0.5).square().sum() / 2

    return build


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_weight_decay(make):
    """Higher: `too_long_weights`."""
    build = too_long_weights(lambda model: make(model.parameters(), lr=1e-3))
    assert_moves("high", mf.space.RANGES["weight_decay"], build, bind={"h": "weight_decay"})


# ---- penalties


@pytest.mark.parametrize(
    ("kind", "penalty"),
    [
        ("l1", lambda w: penalties.l1([w])),
        ("l2", lambda w: penalties.l2([w])),
        ("max_norm", lambda w: penalties.max_norm(w, 1.0)),
    ],
)
def test_penalties_of_the_norm(kind, penalty):
    """Higher: `too_long_weights`."""
    assert_moves("high", mf.space.RANGES[kind], too_long_weights(penalty=penalty))


def test_max_norm_limit():
    """Lower: `too_long_weights`, |w| = 4.5 in training and 1.1 in validation."""

    def build(h):
        return too_long_weights(penalty=lambda w: penalties.max_norm(w, h) / h.value.detach())(1.0)

    assert_moves("low", mf.Float(0.5, 4.0, log=True), build)


def test_activation_l2():
    """Higher: validation has half the targets of training, so activations should be half as large."""

    def build(h):
        x, true = torch.randn(64, 4), torch.randn(3, 4)
        model = linear(true)

        def train_loss(step):
            out = model(x)
            return (out - x @ true.T).square().mean() + h * penalties.activation_l2(out)

        return model, sgd(model, 1e-3), train_loss, lambda m: (m(x) - x @ true.T / 2).square().mean()

    assert_moves("high", mf.space.RANGES["activation_l2"], build)


def test_orthogonality():
    """Higher: validation wants an orthogonal matrix Q, training 1.5 Q."""

    def build(h):
        q = torch.linalg.qr(torch.randn(4, 4)).Q
        model = linear(1.5 * q)

        def train_loss(step):
            return (model.weight - 1.5 * q).square().sum() + h * penalties.orthogonality(model.weight)

        return model, sgd(model), train_loss, lambda m: (m.weight - q).square().sum()

    assert_moves("high", mf.space.RANGES["orthogonality"], build)


# ---- noise


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("noise", mf.nn.GaussianNoise),
        ("multiplicative_noise", mf.nn.MultiplicativeNoise),
        ("dropout", mf.nn.Dropout),
    ],
)
def test_noise_and_dropout(kind, layer):
    """Higher: on the inputs of a linear model all three act as a ridge penalty, and validation has half the
    targets of training."""

    def build(h):
        x, true = torch.randn(2000, 4), torch.ones(1, 4)
        model = nn.Sequential(layer(h), linear(true))

        def train_loss(step):
            return (model(x) - x @ true.T).square().mean()

        return model, sgd(model, 0.1), train_loss, lambda m: (m(x) - x @ true.T / 2).square().mean()

    assert_moves("high", mf.space.RANGES[kind], build, steps=40)


def test_noise_per_unit():
    """Of two units validation wants one more, the other less than training: noise shrinks weights, so it
    should leave the first and grow on the second."""

    def build(h):
        x = torch.randn(2000, 2)
        model = nn.Sequential(mf.nn.GaussianNoise(h), linear(torch.tensor([[1.0, 1.0]])))

        def valid_loss(m):
            return (m(x) - 1.5 * x[:, :1]).square().mean()

        return (
            model,
            sgd(model, 0.1),
            lambda step: (model(x) - x.sum(1, keepdim=True)).square().mean(),
            valid_loss,
        )

    for start in (0, 1):
        wanted, unwanted = tuned(mf.Float(0, 0.8, shape=(2,)), build, start, steps=60)
        assert wanted < 0.4
        assert unwanted > 0.6


# ---- the loss


def one_logit(logit, share, valid_share, loss):
    """One logit for class 0 against class 1: `share` of the training labels and `valid_share` of validation's
    are class 0."""

    def build(h):
        model = linear(torch.tensor([[logit], [0.0]]))
        ones = torch.ones(100, 1)
        y, y_valid = ((torch.arange(100) >= 100 * s).long() for s in (share, valid_share))
        return (
            model,
            sgd(model),
            lambda step: loss(model(ones), y, h),
            lambda m: F.cross_entropy(m(ones), y_valid),
        )

    return build


def test_label_smoothing():
    """Higher: training labels are all class 0, of the validation labels 30 % are not."""

    def loss(logits, y, h):
        return losses.cross_entropy(logits, y, label_smoothing=h)

    assert_moves("high", mf.space.RANGES["label_smoothing"], one_logit(3.0, 1.0, 0.7, loss))


def test_focal_gamma():
    """Higher: class 1, a tenth of the training labels and hard, is half of the validation labels."""

    def loss(logits, y, h):
        return losses.cross_entropy(logits, y, focal_gamma=h)

    assert_moves("high", mf.Float(0.0, 3.0), one_logit(2.0, 0.9, 0.5, loss))


def test_temperature():
    """Higher: every label is class 0, and at a logit of 4 a low temperature has nothing left to learn."""

    def loss(logits, y, h):
        return losses.cross_entropy(logits, y, temperature=h)

    assert_moves("high", mf.Float(0.5, 2.0, log=True), one_logit(4.0, 1.0, 1.0, loss))


def test_class_weights():
    """Class 0 higher, class 1 lower: equal in training, nine to one in validation."""

    def loss(logits, y, h):
        return losses.cross_entropy(logits, y, class_weight=h)

    for start in (0, 1):
        first, second = tuned(
            mf.default_range("class_weight", shape=(2,)), one_logit(0.0, 0.5, 0.9, loss), start
        )
        assert first > 0.6
        assert second < 0.4


def test_weights_of_a_sum_of_losses():
    """The loss that validation also has goes up, the one that pulls to another point goes down."""

    def build(h):
        model = linear(torch.zeros(1, 5))

        def train_loss(step):
            return h[0] * (model.weight - 1).square().sum() + h[1] * (model.weight + 1).square().sum()

        return model, sgd(model, 1e-3), train_loss, lambda m: (m.weight - 1).square().sum()

    for start in (0, 1):
        useful, harmful = tuned(mf.Float(0, 10, shape=(2,)), build, start)
        assert useful > 0.6
        assert harmful < 0.4


def test_example_weights():
    """Lower for the 30 % of training labels that are flipped: validation is clean."""
    n = 200
    flipped = torch.arange(n) % 10 < 3

    def build(h):
        x, x_valid, true = torch.randn(n, 5), torch.randn(n, 5), torch.randn(5)
        y, y_valid = ((inputs @ true > 0).long() for inputs in (x, x_valid))
        y = torch.where(flipped, 1 - y, y)
        model = linear(torch.zeros(2, 5))
        ids = torch.arange(n).split(50)

        def train_loss(step):
            batch = ids[step % len(ids)]
            return losses.cross_entropy(model(x[batch]), y[batch], example_weight=h[batch])

        return model, sgd(model, 0.1), train_loss, lambda m: F.cross_entropy(m(x_valid), y_valid)

    for start in (0, 1):
        raw = tuned(mf.default_range("example_weight", shape=(n,)), build, start, steps=100)
        assert float((raw[flipped] < 0.5).float().mean()) > 0.8
        assert float((raw[~flipped] > 0.5).float().mean()) > 0.8


def test_mixup():
    """Higher: training has only inputs of -1 and 1 with certain classes, validation those between them with
    classes in proportion, and mixing makes them."""

    def build(h):
        x = torch.tensor([[-1.0], [1.0]]).repeat(100, 1)
        y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(100, 1)
        x_valid = torch.linspace(-1, 1, 50)[:, None]
        y_valid = torch.cat([(1 - x_valid) / 2, (1 + x_valid) / 2], 1)
        model = linear(torch.tensor([[-3.0], [3.0]]))

        def train_loss(step):
            mixed, target = losses.mixup(x, y, h)
            return F.cross_entropy(model(mixed), target)

        return model, sgd(model, 0.1), train_loss, lambda m: F.cross_entropy(m(x_valid), y_valid)

    assert_moves("high", mf.space.RANGES["mixup"], build, steps=40, lr=0.04)


# ---- augmentation


@pytest.mark.parametrize(
    ("kind", "magnitude"),
    [(kind, kind) for kind in ("rotation", "translation", "scale", "shear", "brightness", "contrast")]
    + [("pixel_noise", "noise")],
)
def test_augmentation(kind, magnitude):
    """Higher: a linear model must say 1 to a picture and to its changes; it does to the picture, all that
    training has, but it also looks along a direction in which the changes, validation's, differ."""
    pytest.importorskip("kornia")
    spec = mf.space.RANGES[kind]

    def build(h):
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
        picture = (-((rows - 0.3) ** 2) / 0.1 - (columns + 0.2) ** 2 / 0.5).exp()
        pictures = picture.expand(64, 1, 8, 8)
        changed = mf.nn.Augment(**{magnitude: spec.high})(pictures)
        x = picture.flatten()
        direction = (changed[0] - changed[1]).flatten()
        direction = direction - (direction @ x) / (x @ x) * x
        weight = x / (x @ x) + direction / (direction @ direction)
        model = nn.Sequential(mf.nn.Augment(**{magnitude: h}), nn.Flatten(), linear(weight[None]))
        return (
            model,
            sgd(model, 1e-3),
            lambda step: (model(pictures) - 1).square().mean(),
            lambda m: (m(changed) - 1).square().mean(),
        )

    assert_moves("high", spec, build, steps=40)
