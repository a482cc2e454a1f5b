"""Every kind of hyperparameter: exact hypergradients, and parity with torch where torch has the thing."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import midflight as mf
from midflight.gradcheck import KINDS, OPTIMIZERS, central_difference, compare, make_case, why_skipped

DOUBLE = torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["SGD momentum", "Adam"])
def test_hypergradient_equals_central_difference(optimizer, kind):
    reason = why_skipped(optimizer, kind)
    if reason:
        pytest.skip(reason)
    cases = [make_case(optimizer, kind, seed) for seed in range(2)]
    truths = [central_difference(c.problem, c.params, c.hparams, c.state) for c in cases]
    estimates = [mf.hypergradient(c.problem, c.params, c.hparams, c.state) for c in cases]
    assert all(truth[kind].norm() > 0 for truth in truths)
    assert compare(estimates, truths).relative_error < 1e-6  # rounding of the difference: about 1e-8


def test_a_kind_is_skipped_only_for_a_named_reason():
    reasons = {why_skipped(o, k) for o, k in itertools.product(OPTIMIZERS, KINDS)} - {None}
    for reason in reasons:
        assert "no option" in reason or "momentum 0" in reason or "has no derivative" in reason
    with pytest.raises(ValueError, match="SGD has no option beta1"):
        make_case("SGD", "beta1")


def test_every_kind_has_a_range_and_every_range_a_kind():
    ranges = [mf.space.RANGES[name].transform for name in mf.space.RANGES]
    assert all(kind.spec.transform in ranges for kind in KINDS.values())
    renamed = {"decoupled_weight_decay"}  # its row is weight_decay under AdamW
    assert set(mf.space.RANGES) - renamed <= set(KINDS)
    assert mf.default_range("dropout", init=0.3, shape=(4,)).shape == (4,)
    with pytest.raises(mf.errors.UnknownName, match="dropout"):
        mf.default_range("drop_out")


# ---- noise and dropout


@pytest.mark.parametrize("layer", [mf.nn.GaussianNoise, mf.nn.MultiplicativeNoise, mf.nn.Dropout])
def test_random_layers_are_the_identity_in_eval_mode_and_keep_the_dtype(layer):
    x = torch.randn(3, 5)
    assert torch.equal(layer(0.5).eval()(x), x)
    assert layer(0.5)(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer(0.0)(x), x)


def test_noise_has_its_own_level_for_each_feature():
    space = mf.Space(std=mf.Float(0, 2, shape=(2,), init=[0.5, 2.0]))
    x = torch.full((50_000, 2), 3.0)
    for layer, expected in ((mf.nn.GaussianNoise, [0.5, 2.0]), (mf.nn.MultiplicativeNoise, [1.5, 6.0])):
        # standard error of a standard deviation: 1 / sqrt(2 n) = 0.3 %
        torch.testing.assert_close(layer(space["std"])(x).std(0), torch.tensor(expected), rtol=0.02, atol=0)


def test_a_layer_reads_a_function_of_hyperparameters_anew_at_every_pass():
    space = mf.Space(std=mf.Float(0, 2, shape=(2,), init=[0.5, 2.0]))
    layer = mf.nn.GaussianNoise(lambda: space["std"][1])
    x = torch.zeros(20_000)
    assert float(layer(x).std()) == pytest.approx(2, rel=0.03)
    space.set(std=[0.5, 1.0])
    assert float(layer(x).std()) == pytest.approx(1, rel=0.03)


def test_the_forward_pass_of_dropout_is_bernoulli():
    x = torch.ones(40_000)
    found = mf.nn.Dropout(0.25)(x)
    assert set(found.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert float((found == 0).float().mean()) == pytest.approx(0.25, abs=0.01)  # 4 standard errors


def test_dropout_has_the_attributes_of_torchs():
    space = mf.Space(p=mf.Float(0.1, 0.9, init=0.25))
    for rate in (0.25, space["p"], lambda: space["p"].value):
        layer = mf.nn.Dropout(rate)
        assert layer.p == pytest.approx(0.25)
        assert layer.inplace is nn.Dropout(0.25).inplace is False
        x = torch.ones(40_000)
        assert float((F.dropout(x, layer.p) == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    space.set(p=0.5)
    assert type(layer.p) is float
    assert layer.p == pytest.approx(0.5)


def test_dropout_stands_where_a_gpt_2_has_torchs():
    """transformers' attention reads `self.attn_dropout.p` and calls the layers elsewhere."""
    space = mf.Space({"p": mf.Float(0.01, 0.8, init=0.3)}, dtype=DOUBLE)
    space.requires_grad_()

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)

        def forward(self, q):
            drop = self.attn_dropout.p if self.training else 0.0
            return self.resid_dropout(F.scaled_dot_product_attention(q, q, q, dropout_p=drop))

    model = Attention()
    for name in ("attn_dropout", "resid_dropout"):
        setattr(model, name, mf.nn.Dropout(space["p"]))
    out = model(torch.randn(1, 2, 4, 8, dtype=DOUBLE))
    assert bool((out == 0).any())
    out.square().sum().backward()
    assert float(space["p"].raw.grad) != 0


def test_a_dropout_rate_of_one_is_refused():
    with pytest.raises(ValueError, match="rate < 1 must hold, but it may become 1"):
        mf.nn.Dropout(mf.Space(p=mf.Float(0, 1))["p"])


def dropout_slopes(f, rate, draws):
    """Draws of the layer's derivative of f(mask), f: (draws, units) -> (draws,)."""
    space = mf.Space({"p": mf.Float(0.01, 0.9, init=rate, shape=(draws, 1))}, dtype=DOUBLE)
    space.requires_grad_()
    ones = torch.ones(draws, 3, dtype=DOUBLE)
    p = space["p"].value
    layer = mf.nn.Dropout(lambda: p)
    return torch.autograd.grad(f(layer(ones)).sum(), p)[0][:, 0]


def true_slope(f, rate):
    """d/dp of the expectation over all 2^3 masks."""
    p = torch.tensor(rate, dtype=DOUBLE, requires_grad=True)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=DOUBLE)
    weights = torch.where(masks > 0, 1 - p, p).prod(1)
    return float(torch.autograd.grad((weights * f(masks / (1 - p))).sum(), p)[0])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropout_has_the_derivative_of_the_expectation_where_f_is_quadratic_in_each_entry(rate):
    def f(m):
        return m[:, 0] ** 2 * m[:, 1] ** 2 * (m[:, 2] + 1) + 3 * m[:, 0] * m[:, 2] + m[:, 1] ** 2

    found, true = dropout_slopes(f, rate, 200_000), true_slope(f, rate)
    assert abs(float(found.mean()) - true) < 4 * float(found.std()) / 200_000**0.5  # standard errors
    assert float(found.std()) / 200_000**0.5 < 0.03 * abs(true)


def test_dropout_is_biased_by_little_where_f_is_smooth():
    def f(m):
        return (m @ torch.tensor([0.4, -0.25, 0.15], dtype=DOUBLE)).tanh() ** 2

    found, true = dropout_slopes(f, 0.3, 200_000), true_slope(f, 0.3)
    assert float(found.mean()) == pytest.approx(true, rel=0.15)  # the trapezoid rule's error: 7 %


# ---- losses


def random_logits(shape=(7, 4), scale=3.0):
    logits = (scale * torch.randn(shape, dtype=DOUBLE)).requires_grad_()
    return logits, torch.randint(0, shape[1], (shape[0], *shape[2:]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 5), (2, 4, 3, 2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_equals_torch(shape, reduction, smoothing, weighted, soft):
    logits, y = random_logits(shape)
    target = torch.randn_like(logits).softmax(1) if soft else y
    weight = torch.rand(4, dtype=DOUBLE) if weighted else None
    ours = mf.nn.losses.cross_entropy(
        logits, target, label_smoothing=smoothing, class_weight=weight, reduction=reduction
    )
    theirs = F.cross_entropy(logits, target, weight, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_temperature_and_focal_gamma_are_what_their_papers_say():
    logits, y = random_logits()
    p = (logits / 2).softmax(1)[torch.arange(7), y]
    torch.testing.assert_close(
        mf.nn.losses.cross_entropy(logits, y, temperature=2, focal_gamma=1.5),
        (-((1 - p) ** 1.5) * p.log()).mean(),  # Lin et al. 2017, Eq. 4
    )


def test_example_weights_multiply_and_do_not_compete():
    logits, y = random_logits()
    each, a = F.cross_entropy(logits, y, reduction="none"), torch.rand(7, dtype=DOUBLE, requires_grad=True)
    found = mf.nn.losses.cross_entropy(logits, y, example_weight=a)
    torch.testing.assert_close(found, (a * each).mean())
    torch.testing.assert_close(torch.autograd.grad(found, a)[0], each / 7)
    pixels, labels = random_logits((7, 4, 3))
    each = F.cross_entropy(pixels, labels, reduction="none")
    torch.testing.assert_close(
        mf.nn.losses.cross_entropy(pixels, labels, example_weight=a, reduction="none"), a[:, None] * each
    )


OPTIONS = {
    "label_smoothing": 0.1, "focal_gamma": 0.5, "temperature": 1.3,
    "class_weight": [0.5, 1.0, 2.0, 1.5], "example_weight": [0.3, 0.6, 0.9, 0.2, 0.5, 0.7, 1.0],
}  # fmt: skip


def test_cross_entropy_is_twice_differentiable_in_logits_and_options_together():
    logits, y = random_logits(scale=1.0)
    options = [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in OPTIONS.values()]

    def loss(logits, *options):
        return mf.nn.losses.cross_entropy(logits, y, **dict(zip(OPTIONS, options, strict=True)))

    assert torch.autograd.gradcheck(loss, (logits, *options))
    assert torch.autograd.gradgradcheck(loss, (logits, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("y", [0, 1])
def test_extreme_logits_give_finite_losses_and_derivatives(dtype, gamma, y):
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [60.0, 0, 0]], dtype=dtype, requires_grad=True)
    options = {"label_smoothing": 0.0, "focal_gamma": gamma, "temperature": 1.0}
    options = {name: torch.tensor(v, dtype=dtype, requires_grad=True) for name, v in options.items()}
    loss = mf.nn.losses.cross_entropy(logits, torch.full((3,), y), **options)
    inputs = [logits, *options.values()]
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), inputs, materialize_grads=True)
    assert all(bool(torch.isfinite(g).all()) for g in (loss, *first, *second))


def test_masked_logits_of_minus_infinity_are_as_in_torch():
    logits = torch.tensor([[1.0, -math.inf, 0.5]], requires_grad=True)
    y = torch.tensor([0])
    torch.testing.assert_close(mf.nn.losses.cross_entropy(logits, y), F.cross_entropy(logits, y))
    focal = mf.nn.losses.cross_entropy(logits, y, focal_gamma=torch.tensor(0.5))
    assert bool(torch.isfinite(torch.autograd.grad(focal, logits)[0]).all())


def test_a_hyperparameter_stands_for_every_option_of_the_loss():
    specs = {
        name: mf.Float(0, 3, init=value, shape=torch.tensor(value).shape) for name, value in OPTIONS.items()
    }
    space = mf.Space(specs, dtype=DOUBLE)
    space.requires_grad_()
    logits, y = random_logits()
    numbers = {name: torch.tensor(v, dtype=DOUBLE) for name, v in OPTIONS.items()}
    loss = mf.nn.losses.cross_entropy(logits, y, **{name: space[name] for name in space})
    torch.testing.assert_close(loss, mf.nn.losses.cross_entropy(logits, y, **numbers))
    grads = torch.autograd.grad(loss, list(space.raws.values()))
    assert all(bool((g != 0).all()) for g in grads)


def test_a_weighted_sum_of_losses_needs_no_function():
    space = mf.Space(a=mf.Float(0, 2, init=0.5), b=mf.Float(0, 2, init=1.5))
    space.requires_grad_()
    first, second = torch.tensor(3.0), torch.tensor(4.0)
    loss = space["a"] * first + space["b"] * second
    assert float(loss.detach()) == pytest.approx(7.5)
    assert [float(g) for g in torch.autograd.grad(loss, list(space.raws.values()))] == [6.0, 8.0]


class Calls(TorchDispatchMode):
    """Counts the operators that are called, and those that write more than `large` entries."""

    def __init__(self, large):
        super().__init__()
        self.large, self.count, self.of_large = large, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(out, torch.Tensor) and out.numel() >= self.large and not func.is_view:
            self.of_large += 1
        return out


def test_a_hundred_thousand_example_weights_cost_no_more_operators_than_a_hundred():
    counts, n_large = [], 100_000
    for n in (100, n_large):
        torch.manual_seed(0)
        space = mf.Space(w=mf.default_range("example_weight", shape=(n,)))
        model = nn.Linear(20, 5)
        batch = torch.randn(64, 20), torch.randint(0, 5, (64,)), torch.randint(0, n, (64,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(model, batch, space=space):
            x, y, ids = batch
            return mf.nn.losses.cross_entropy(model(x), y, example_weight=space["w"][ids])

        mf.Tuner(
            model, optimizer, space, loss, [batch], [batch], schedule=1, horizon="step", examples=64,
            valid_loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        )  # fmt: skip
        for step in range(4):
            optimizer.zero_grad()
            loss(model, batch).backward()
            with Calls(n_large) as calls:
                optimizer.step()
            if step == 3:  # the first ones look at the loop
                counts.append(calls)
        moved = space["w"].raw != space["w"].spec.transform.raw(torch.tensor(0.5))
        assert 0 < int(moved.sum()) <= len(batch[2].unique())
    small, large = counts
    assert large.count == small.count
    assert large.of_large < 60  # a few passes over the vector


def test_mixup_mixes_inputs_and_targets_alike_and_its_gradient_is_pathwise():
    x, y = torch.randn(9, 3, 2, dtype=DOUBLE), torch.eye(9, dtype=DOUBLE)
    s = torch.tensor(0.6, dtype=DOUBLE, requires_grad=True)
    mixed_x, mixed_y = mf.nn.losses.mixup(x, y, s)
    (slope,) = torch.autograd.grad(mixed_x.square().sum(), s)
    mixed_x, mixed_y = mixed_x.detach(), mixed_y.detach()
    torch.testing.assert_close(torch.einsum("nm,mij->nij", mixed_y, x), mixed_x)
    torch.testing.assert_close(mixed_y.sum(1), torch.ones(9, dtype=DOUBLE))
    assert float(mixed_y.diagonal().min()) >= 1 - 0.6 / 2
    assert float(slope) == pytest.approx(float(2 * (mixed_x * (mixed_x - x)).sum()) / 0.6)
    same_x, same_y = mf.nn.losses.mixup(x, y, 0.0)
    assert torch.equal(same_x, x)
    assert torch.equal(same_y, y)


def test_mixup_at_strength_one_has_the_moments_of_beta_one_one():
    x = torch.tensor([[0.0], [1.0]], dtype=DOUBLE).repeat(20_000, 1)
    mixed, _ = mf.nn.losses.mixup(x, x, 1.0)
    shares = (mixed - x).abs()[(mixed != x)]  # uniform in [0, 1/2]: mean 1/4, variance 1/48
    assert float(shares.mean()) == pytest.approx(1 / 4, abs=0.005)
    assert float(shares.var()) == pytest.approx(1 / 48, rel=0.03)


def test_mixup_and_reduction_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="one_hot"):
        mf.nn.losses.mixup(torch.randn(3, 2), torch.tensor([0, 1, 2]), 0.5)
    with pytest.raises(ValueError, match="average"):
        mf.nn.losses.cross_entropy(torch.randn(3, 2), torch.tensor([0, 1, 0]), reduction="average")


# ---- penalties


def test_an_l2_penalty_in_the_loss_is_the_weight_decay_of_sgd():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    decayed = torch.optim.SGD(a.parameters(), lr=0.1, weight_decay=0.3)
    penalised = torch.optim.SGD(b.parameters(), lr=0.1)
    x = torch.randn(4, 3)
    a(x).sum().backward()
    (b(x).sum() + 0.3 * mf.nn.penalties.l2(b.parameters())).backward()
    decayed.step()
    penalised.step()
    torch.testing.assert_close(a.weight, b.weight)


def test_penalties_are_their_formulas():
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]])
    assert float(mf.nn.penalties.l1([w, w])) == 16
    assert float(mf.nn.penalties.l2([w])) == 13
    assert float(mf.nn.penalties.activation_l2(w, 2 * w)) == pytest.approx(26 / 6 * 5)
    assert float(mf.nn.penalties.max_norm(w, 3.0)) == 4
    assert float(mf.nn.penalties.max_norm(w, torch.tensor([4.0, 1.0, 0.5]))) == 1.25
    q = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE)).Q[:3]
    for orthogonal in (q, q.T):
        assert float(mf.nn.penalties.orthogonality(orthogonal)) == pytest.approx(0)
        assert float(mf.nn.penalties.orthogonality(2 * orthogonal)) == pytest.approx(
            27
        )  # (4 - 1)^2, three times


def test_max_norm_has_finite_second_derivatives_at_a_row_of_zeros():
    w = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    (g,) = torch.autograd.grad(mf.nn.penalties.max_norm(w, 1.0), w, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), w)
    assert bool(torch.isfinite(second).all())


# ---- augmentation


def test_augmentation_is_the_identity_in_eval_mode_and_at_magnitude_zero():
    pytest.importorskip("kornia")
    x = torch.rand(2, 3, 5, 7)
    everything = dict.fromkeys(("translation", "scale", "brightness", "contrast", "noise"), 0.2)
    augment = mf.nn.Augment(rotation=10.0, shear=10.0, **everything)
    assert augment(x).shape == x.shape
    assert not torch.equal(augment(x), x)
    assert torch.equal(augment.eval()(x), x)
    assert torch.equal(mf.nn.Augment()(x), x)
    still = mf.nn.Augment(rotation=lambda: torch.tensor(0.0))
    torch.testing.assert_close(still(x), x)


def test_geometry_moves_the_picture_by_the_amount_that_was_drawn(monkeypatch):
    pytest.importorskip("kornia")
    monkeypatch.setattr("midflight.nn.augment._uniform", lambda *shape, like: torch.ones(shape))
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 2] = 1.0  # two pixels left of the centre
    for magnitudes, expected in [
        ({"rotation": 90.0}, {(6, 4), (2, 4)}),
        ({"translation": 1 / 9}, {(5, 3)}),
        ({"scale": math.log(2)}, {(4, 0)}),
    ]:
        moved = mf.nn.Augment(**magnitudes)(x)[0, 0]
        place = divmod(int(moved.argmax()), 9)
        assert place in expected
        assert float(moved.max()) == pytest.approx(1, abs=1e-3)
    bar = torch.zeros(1, 1, 9, 9)
    bar[..., 4] = 1.0
    sheared = mf.nn.Augment(shear=45.0)(bar)[0, 0]
    assert [int(row.argmax()) for row in sheared[1:8]] in ([*range(1, 8)], [*range(7, 0, -1)])


def test_brightness_and_contrast_are_their_formulas(monkeypatch):
    monkeypatch.setattr("midflight.nn.augment._uniform", lambda *shape, like: torch.ones(shape))
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(mf.nn.Augment(brightness=0.3)(x), x + 0.3)
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(mf.nn.Augment(contrast=math.log(2))(x), mean + 2 * (x - mean))


def test_weights_before_the_augmentation_are_differentiated_twice():
    pytest.importorskip("kornia")
    w = torch.randn(1, 1, 3, 3, dtype=DOUBLE, requires_grad=True)
    m = torch.tensor(10.0, dtype=DOUBLE, requires_grad=True)
    x = torch.rand(2, 1, 5, 5, dtype=DOUBLE)

    def loss(w, m):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            augment = mf.nn.Augment(rotation=lambda: m, translation=0.1)
            return augment(F.conv2d(x, w, padding=1)).square().mean()

    assert torch.autograd.gradgradcheck(loss, (w, m))


def test_without_kornia_geometry_says_what_to_install_and_the_rest_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.geometry.transform", None)
    with pytest.raises(mf.errors.MissingExtra, match=r"pip install midflight\[augment\]"):
        mf.nn.Augment(rotation=5.0)
    mf.nn.Augment(brightness=0.2, contrast=0.2, noise=0.1)(torch.rand(2, 1, 4, 4))


# ---- wrong twins: what the central difference must reject


class TwiceTheGradient(torch.autograd.Function):
    """The identity, with a derivative of 2."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_with_a_wrong_derivative_is_found_out(kind, monkeypatch):
    optimizer = "Adam" if why_skipped("SGD momentum", kind) else "SGD momentum"
    if why_skipped(optimizer, kind):
        pytest.skip(why_skipped(optimizer, kind))
    case = make_case(optimizer, kind)
    right = central_difference(case.problem, case.params, case.hparams, case.state)
    values = mf.Space.values
    doubled = TwiceTheGradient.apply
    monkeypatch.setattr(
        mf.Space, "values", lambda *given: {name: doubled(v) for name, v in values(*given).items()}
    )
    same = central_difference(case.problem, case.params, case.hparams, case.state)
    assert compare([same], [right]).relative_error < 1e-6  # the truth reads no derivative
    wrong = mf.hypergradient(case.problem, case.params, case.hparams, case.state)
    assert compare([wrong], [right]).relative_error == pytest.approx(1, abs=1e-3)
