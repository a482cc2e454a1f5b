"""How the training gradient depends on the hyperparameters: on which examples, and in which of three ways."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from toys import Recorder, cross_entropy, train, tuner

import midflight as mf
from midflight.hypergrad.mixed import rounding_of
from midflight.hypergrad.one_step import OneStep
from midflight.tuner import mixed_partial
from midflight.tuner.live import with_tensors
from midflight.updates import read_options, rule_for
from once_only import Fused

_DATA = torch.Generator().manual_seed(0)
X = torch.randn(32, 6, dtype=torch.float64, generator=_DATA)
Y = torch.randint(0, 3, (32,), generator=_DATA)
WHOLE, HALVES = (X, Y), [(X[:16], Y[:16]), (X[16:], Y[16:])]


def space(**more):
    return mf.Space(
        {"scale": mf.Float(0.5, 2.0, init=1.2), "penalty": mf.Float(0.0, 1.0, init=0.1), **more},
        dtype=torch.float64,
    )


def smooth(space):
    """Nonlinear in one hyperparameter, linear in the other."""

    def loss(model, batch):
        outputs = model(batch[0] * space["scale"].value)
        return F.cross_entropy(outputs, batch[1]) + space["penalty"].value * outputs.square().mean()

    return loss


def linear(space):
    def loss(model, batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        penalty = (batch[0] @ model[0].weight.T).square().mean()
        return space["scale"].value * losses.mean() + space["penalty"].value * penalty

    return loss


def adam(params):
    return torch.optim.Adam(params, lr=0.05)


def sgd(params):
    return torch.optim.SGD(params, lr=0.5, momentum=0.9)


def hyper_step(make_loss, part=WHOLE, middle=nn.Tanh, make=adam, build=None, **options):
    """(hypergradients, the tuner) of one hyper-step in the middle of a training on the whole batch.

    The model is a perceptron with this middle layer, or what `build` gives.
    """
    torch.manual_seed(0)
    s = space()
    perceptron = partial(nn.Sequential, nn.Linear(6, 8), middle(), nn.Linear(8, 3))
    model = (build or perceptron)().double()
    optimizer, loss = make(model.parameters()), make_loss(s)
    t = tuner(
        model, optimizer, s, loss, train_loader=[part], valid_loader=[(X.flip(0), Y)],
        valid_loss_fn=cross_entropy, schedule=4, hyper_optimizer=Recorder, **options,
    )  # fmt: skip
    train(model, optimizer, 4, WHOLE, loss)
    return torch.stack(t.hyper_optimizer.seen[0]), t


@pytest.mark.parametrize("loss", [smooth, linear])
def test_the_parts_of_a_batch_average_to_the_hypergradient_of_the_whole(loss):
    """Under SGD, whose step is linear in the gradient."""
    whole, _ = hyper_step(loss, make=sgd)
    parts = [hyper_step(loss, part, make=sgd)[0] for part in HALVES]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole, rtol=1e-9, atol=0)
    assert not torch.allclose(parts[0], whole, rtol=1e-3)


@pytest.mark.parametrize("loss", [smooth, linear])
@pytest.mark.parametrize("estimator", ["one_step", "central_difference"])
def test_of_a_batch_the_first_examples_are_taken(loss, estimator):
    few, t = hyper_step(loss, examples=16, estimator=estimator, make=sgd)
    half, _ = hyper_step(loss, HALVES[0], estimator=estimator, make=sgd)
    torch.testing.assert_close(few, half, rtol=1e-9, atol=0)
    assert t.log()["mixed_partial/examples"] == 16


@pytest.mark.parametrize("loss", [smooth, linear])
@pytest.mark.parametrize("examples", [8, 16, 32])
def test_of_few_examples_adam_is_differentiated_where_they_count_for_their_share_of_the_step(loss, examples):
    """-v . d theta'(h) with g = (1 - n/B) g of the step + n/B g of the n(h), v held at theta'."""
    torch.manual_seed(0)
    s = space()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer, function = adam(model.parameters()), loss(s)
    t = tuner(
        model, optimizer, s, function, train_loader=[WHOLE], valid_loader=[(X.flip(0), Y)],
        valid_loss_fn=cross_entropy, schedule=4, hyper_optimizer=Recorder, examples=examples,
    )  # fmt: skip
    train(model, optimizer, 3, WHOLE, function)
    optimizer.zero_grad()
    function(model, WHOLE).backward()
    named, rule = dict(model.named_parameters()), rule_for(optimizer)
    before = {n: p.detach().clone() for n, p in named.items()}
    state = {n: {k: x.clone() for k, x in optimizer.state[p].items()} for n, p in named.items()}
    whole = {n: p.grad.clone() for n, p in named.items()}
    options = read_options(optimizer.param_groups[0])
    twin = copy.deepcopy(model)
    optimizer.step()
    s.requires_grad_()
    few = torch.autograd.grad(
        function(twin, (X[:examples], Y[:examples])), list(twin.parameters()), create_graph=True
    )
    v = torch.autograd.grad(cross_entropy(model, (X.flip(0), Y)), list(named.values()))
    part = examples / 32
    w = [
        rule.pullback(u, before[n], (1 - part) * whole[n] + part * g.detach(), state[n], options)[0]
        for (n, g), u in zip(zip(named, few, strict=True), v, strict=True)
    ]
    truth = torch.autograd.grad(few, list(s.raws.values()), w)
    torch.testing.assert_close(torch.stack(t.hyper_optimizer.seen[0]), torch.stack(truth), rtol=1e-9, atol=0)


def test_a_loss_that_does_not_take_a_part_of_a_batch_gets_the_whole():
    def of_32(space):
        def loss(model, batch):
            assert len(batch[0]) == 32
            return smooth(space)(model, batch)

        return loss

    found, t = hyper_step(of_32, examples=16)
    torch.testing.assert_close(found, hyper_step(smooth)[0], rtol=1e-9, atol=0)
    assert t.log()["mixed_partial/examples"] == 0


def test_the_way_is_chosen_by_the_structure_of_the_loss():
    assert hyper_step(smooth)[1].mixed_partial == "double backward"
    assert hyper_step(linear)[1].mixed_partial == "forward mode"


@pytest.mark.parametrize("loss", [smooth, linear])
@pytest.mark.parametrize(
    ("way", "tolerance"), [("double backward", 1e-9), ("forward mode", 1e-9), ("difference", 1e-5)]
)
def test_the_three_ways_agree(loss, way, tolerance):
    """Difference: off by its epsilon, 2e-8, squared, and by rounding, 1e-16 over it."""
    chosen, _ = hyper_step(loss)
    asked, t = hyper_step(loss, estimator=OneStep(mixed=way))
    assert t.mixed_partial == way
    torch.testing.assert_close(asked, chosen, rtol=tolerance, atol=0)


def test_code_that_is_differentiable_once_only_is_differenced():
    found, t = hyper_step(smooth, middle=Fused)
    assert t.mixed_partial == "difference"
    torch.testing.assert_close(found, hyper_step(smooth)[0], rtol=1e-5, atol=0)
    with pytest.raises(mf.errors.NotTwiceDifferentiable, match="central_difference"):
        hyper_step(smooth, middle=Fused, estimator=OneStep(mixed="double backward"))


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_tangents_stop_where_gradients_do(how):
    """A target that the model makes without gradients, as in self-distillation; the loss is linear."""

    def distilled(space):
        def loss(model, batch):
            with torch.no_grad() if how == "no_grad" else nullcontext():
                target = model(batch[0]).softmax(1)
            if how == "detach":
                target = target.detach()
            student = model(1.3 * batch[0]).log_softmax(1)
            distance = F.kl_div(student, target, reduction="batchmean")
            likelihood = F.cross_entropy(model(batch[0]), batch[1])
            return space["scale"].value * likelihood + space["penalty"].value * distance

        return loss

    found, t = hyper_step(distilled)
    truth, _ = hyper_step(distilled, estimator=OneStep(mixed="double backward"))
    assert t.mixed_partial == "forward mode"
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_double_backward_that_runs_out_of_memory_becomes_a_difference(half, at, monkeypatch):
    real, calls = mixed_partial.MixedPartial._double_backward, []

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def runs_out(self, batch, params):
        calls.append(batch)
        if len(calls) < at:
            return real(self, batch, params)
        return (real(self, batch, params)[0], out_of_memory) if half == "second" else out_of_memory()

    def found():
        torch.manual_seed(0)
        s = space()
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        t = tuner(
            model, optimizer, s, smooth(s), train_loader=[WHOLE], valid_loader=[(X.flip(0), Y)],
            valid_loss_fn=cross_entropy, hyper_optimizer=Recorder,
        )  # fmt: skip
        train(model, optimizer, 5, WHOLE, smooth(s))
        return torch.tensor(t.hyper_optimizer.seen), t.mixed_partial

    truth, _ = found()
    monkeypatch.setattr(mixed_partial.MixedPartial, "_double_backward", runs_out)
    values, method = found()
    assert method == "difference"
    assert len(calls) == at
    torch.testing.assert_close(values, truth, rtol=1e-5, atol=0)


HALF = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast, float16": lambda: torch.autocast("cpu", torch.float16),
}


def in_half_precision(how, middle, seed):
    """Hypergradients with respect to a scale and noise; in float32 with `how` None."""
    torch.manual_seed(seed)
    s = mf.Space(scale=mf.Float(0.5, 2.0, init=1.2), penalty=mf.Float(0.0, 1.0, init=0.1))
    x, y = torch.randn(64, 32), torch.randint(0, 3, (64,))
    model = nn.Sequential(nn.Linear(32, 64), middle(), nn.Linear(64, 64), middle(), nn.Linear(64, 3))
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-3), smooth(s)

    def in_half(model, batch):
        with HALF[how]() if how else nullcontext():
            return loss(model, batch)

    t = tuner(
        model, optimizer, s, in_half, train_loader=[(x, y)], valid_loader=[(x.flip(0), y)],
        valid_loss_fn=cross_entropy, schedule=20, hyper_optimizer=Recorder,
    )  # fmt: skip
    train(model, optimizer, 20, (x, y), in_half)
    return torch.stack(t.hyper_optimizer.seen[0]), t.mixed_partial


def errors_in_half_precision(how):
    """Of the difference relative to double backward in float32, over seeds."""
    seeds = range(4)
    found = torch.stack([in_half_precision(how, Fused, seed)[0] for seed in seeds])
    truth = torch.stack([in_half_precision(None, nn.Tanh, seed)[0] for seed in seeds])
    return ((found - truth).norm(dim=0) / truth.norm(dim=0)).tolist()


@pytest.mark.parametrize("how", HALF)
def test_a_difference_in_half_precision_steps_further(how):
    assert in_half_precision(how, Fused, 0)[1] == "difference"
    assert max(errors_in_half_precision(how)) < 0.1


def test_a_difference_with_the_step_of_single_precision_is_found_out(monkeypatch):
    monkeypatch.setattr(mixed_partial, "rounding_of", lambda *_: torch.finfo(torch.float32).eps)
    monkeypatch.setattr(mixed_partial, "has_own_backward", lambda _: False)  # it is checked otherwise
    assert max(errors_in_half_precision("autocast")) > 1


def test_products_of_float32_that_torch_may_round_count_as_half_precision():
    weights, product = {"w": torch.ones(2, 2)}, lambda: torch.ones(2, 2) @ torch.ones(2, 2)
    assert rounding_of(product, weights) == torch.finfo(torch.float32).eps
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert rounding_of(product, weights) == torch.finfo(torch.bfloat16).eps
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_kernel_on_which_the_model_insists_is_replaced():
    found = []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):

        class Insists(nn.Module):
            def __init__(self):
                super().__init__()
                self.project, self.last = nn.Linear(3, 9), nn.Linear(6, 3)

            def forward(self, x, kernel=kernel):
                q, k, v = self.project(x.view(-1, 1, 2, 3)).chunk(3, -1)
                with sdpa_kernel(kernel):
                    return self.last(F.scaled_dot_product_attention(q, k, v).flatten(1))

        hypergradients, t = hyper_step(smooth, build=Insists)
        assert t.mixed_partial == "double backward"
        found.append(hypergradients)
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_changes_nothing(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return self[4](checkpoint(nn.Sequential(*self[1:4]), self[0](x), use_reentrant=reentrant))

    def build(kind):
        return kind(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    found = [hyper_step(smooth, build=partial(build, kind))[0] for kind in (nn.Sequential, Checkpointed)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


def test_attention_whose_fused_kernels_are_differentiable_once_only_needs_no_difference():
    """Against attention written out, whose gradient is that of the fused kernel."""

    class Attention(nn.Module):
        def __init__(self, by_hand):
            super().__init__()
            self.by_hand, self.project, self.last = by_hand, nn.Linear(3, 9), nn.Linear(6, 3)

        def forward(self, x):
            q, k, v = self.project(x.view(-1, 2, 3)).chunk(3, -1)
            if self.by_hand:
                return self.last(((q @ k.mT / 3**0.5).softmax(-1) @ v).flatten(1))
            return self.last(F.scaled_dot_product_attention(q, k, v).flatten(1))

    (written_out, _), (fused, t) = (hyper_step(smooth, build=partial(Attention, by)) for by in (True, False))
    assert t.mixed_partial == "double backward"
    torch.testing.assert_close(fused, written_out, rtol=1e-7, atol=0)


def test_linear_losses_with_batch_norm_and_many_weights_need_no_double_backward():
    found = {}
    for way in (None, "double backward"):
        torch.manual_seed(0)
        s = mf.Space(
            {"l1": mf.Float(0.0, 0.1), "weight": mf.Float(0.0, 1.0, shape=(32,))}, dtype=torch.float64
        )
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

        def loss(model, batch, s=s):
            losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
            return (s["weight"] * losses).mean() + s["l1"] * model[0].weight.abs().sum()

        t = tuner(
            model, optimizer, s, loss, train_loader=[WHOLE], valid_loader=[WHOLE],
            valid_loss_fn=cross_entropy, estimator=OneStep(mixed=way), hyper_optimizer=Recorder,
        )  # fmt: skip
        train(model, optimizer, 5, WHOLE, loss)
        found[t.mixed_partial] = torch.cat([g.reshape(-1) for seen in t.hyper_optimizer.seen for g in seen])
    assert list(found) == ["forward mode", "double backward"]
    assert bool((found["forward mode"] != 0).all())
    torch.testing.assert_close(found["forward mode"], found["double backward"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("make_loss", [smooth, linear])
def test_a_module_under_two_names_keeps_its_weights(make_loss):
    shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = nn.Sequential(nn.Linear(6, 6), shared, nn.Tanh(), shared, nn.Linear(6, 3)).double()
    before = {id(t) for t in [*model.parameters(), *model.buffers()]}
    s = space()
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), make_loss(s)
    t = tuner(
        model, optimizer, s, loss, train_loader=[WHOLE], valid_loader=[WHOLE], valid_loss_fn=cross_entropy
    )
    train(model, optimizer, 2, WHOLE, loss)
    assert t.log()["hypersteps"] == 2
    assert {id(t) for t in [*model.parameters(), *model.buffers()]} == before
    assert all(p.grad is not None for p in model.parameters())


def test_a_weight_of_two_modules_is_replaced_in_both():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
    model[1].weight = model[0].weight
    ones = with_tensors(model, lambda: model(X).sum(), {"0.weight": torch.ones(6, 6, dtype=torch.float64)})
    torch.testing.assert_close(ones, 36 * X.sum())
    assert model[0].weight is model[1].weight


def test_a_module_under_two_names_has_its_own_weights_again_after_others():
    shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = nn.Sequential(shared, nn.Tanh(), shared).double()
    before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    others = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert not with_tensors(model, lambda: model(X), others).any()
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == before


def test_a_hyperparameter_of_noise_sees_other_numbers_at_each_hyper_step():
    s, draws = mf.Space({"noise": mf.Float(0.0, 1.0)}, dtype=torch.float64), []

    class Noise(nn.Module):
        def forward(self, x):
            if not self.training:
                return x
            draw = torch.randn_like(x)
            draws.append(float(draw[0, 0]))
            return x + s["noise"] * draw

    model = nn.Sequential(Noise(), nn.Linear(6, 3)).double()
    optimizer, last = torch.optim.SGD(model.parameters(), lr=0.1), []
    tuner(
        model, optimizer, s, train_loader=[WHOLE], valid_loader=[WHOLE],
        on_hyperstep=lambda *_: last.append(draws[-1]),
    )  # fmt: skip
    train(model, optimizer, 6, WHOLE)
    assert len({*draws}) >= 12  # of the loop's six and the tuner's six
    assert len({*last}) == 6


class Heads(nn.Module):
    """Attention on (batch, heads, time, width), which torch runs in a fused kernel without forward mode."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(11, 16), nn.Linear(16, 48), nn.Linear(16, 11)

    def forward(self, x):
        h = self.embed(x)
        q, k, v = self.qkv(h).view(*x.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h + mixed.transpose(1, 2).reshape(h.shape))


def test_a_loss_weight_of_a_model_with_fused_attention_is_differentiated_in_forward_mode():
    torch.manual_seed(0)
    values = mf.Space(weight=mf.Float(0.1, 1.0, init=0.5))
    x = torch.randint(0, 11, (16, 9))

    def loss_fn(model, x):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        return values["weight"] * loss if model.training else loss

    found = []
    for estimator in ("one_step", "central_difference"):
        torch.manual_seed(0)
        model = Heads()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tuned = mf.Tuner(
            model, optimizer, values, loss_fn, [x], [x], schedule=1, horizon="step", hyper_optimizer=Recorder,
            estimator=estimator,
        )  # fmt: skip
        loss_fn(model, x).backward()
        optimizer.step()
        found.append(float(tuned.hyper_optimizer.seen[-1][0]))
        assert tuned.mixed_partial == ("forward mode" if estimator == "one_step" else "difference")
        tuned.detach()
    assert found[0] == pytest.approx(found[1], rel=0.01)  # float32
