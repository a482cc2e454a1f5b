"""The tuner in loops and models as people have them."""

import copy
import gc
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from toys import Recorder, X, Y, as_it_steps, cross_entropy, network, space, train, tuner, weights

import midflight as mf
from midflight.gradcheck import compare
from midflight.tuner.live import evaluating
from midflight.updates import read_options


def reads_as_it_steps(optimizer, option):
    """A list of what the first group says while a step is taken."""
    seen = []
    as_it_steps(optimizer, lambda groups: seen.append(read_options(groups[0])[option]))
    return seen


# ---- the hypergradient


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("estimator", sorted(set(mf.hypergrad.ESTIMATORS) - {"paper"}))
def test_the_live_loop_gives_the_hypergradient_of_the_pure_function(optimizer, estimator):
    s = space(torch.float64)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    batch = X.double(), Y, torch.randn(64, 8, dtype=torch.float64)
    optim = optimizer(model.parameters(), lr=0.01)

    def noisy(model, batch):
        x, y, draws = batch
        return F.cross_entropy(model(x + s["noise"] * draws), y)

    t = tuner(
        model, optim, s, noisy, train_loader=[batch], valid_loader=[batch], valid_loss_fn=cross_entropy,
        schedule=5, estimator=estimator, hyper_optimizer=Recorder, examples=64,
    )  # fmt: skip
    train(model, optim, 4, batch, noisy)

    def at(params):
        return lambda x: torch.func.functional_call(model, params, (x,))

    def train_loss(params, raws):
        with s.seeing(s.values(raws)):
            return noisy(at(params), batch)

    def updates(raws):
        options = {**read_options(optim.param_groups[0]), "weight_decay": s.values(raws)["weight_decay"]}
        return {
            n: mf.updates.Update(mf.updates.RULES[optimizer], options) for n, _ in model.named_parameters()
        }

    named = dict(model.named_parameters())
    state = {n: optim.state[p] for n, p in named.items()}
    problem = mf.hypergrad.Problem(train_loss, lambda params: cross_entropy(at(params), batch), updates)
    expected = mf.hypergradient(problem, named, s.raws, state, estimator)
    train(model, optim, 1, batch, noisy)
    found = dict(zip(s, t.hyper_optimizer.seen[0], strict=True))
    tolerance = 1e-7 if estimator == "central_difference" else 1e-12  # rounding / epsilon; rounding
    assert compare([found], [expected]).relative_error < tolerance


DRAWS = 300


@pytest.mark.filterwarnings("ignore:.*changed between two optimiser steps")
def test_with_noise_of_its_own_the_mean_hypergradient_is_the_loops():
    """E[-lr v . d/dlambda g], where v is at the weights after a step by one draw and g is of another."""
    s = mf.Space({"noise": mf.Float(0.0, 1.0, init=0.5)}, dtype=torch.float64)
    model = network(s).double()
    batch, start = (X.double(), Y), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    t = tuner(
        model, optimizer, s, train_loader=[batch], valid_loader=[batch], hyper_optimizer=Recorder, examples=64
    )
    for _ in range(DRAWS):
        model.load_state_dict(start)
        train(model, optimizer, 1, batch)
    found = torch.stack([seen[0] for seen in t.hyper_optimizer.seen])

    def gradient(create_graph):
        s.requires_grad_(create_graph)
        return torch.autograd.grad(
            cross_entropy(model, batch), list(model.parameters()), create_graph=create_graph
        )

    true = []
    for _ in range(DRAWS):
        model.load_state_dict(start)
        for p, g in zip(model.parameters(), gradient(False), strict=True):
            p.data.sub_(0.1 * g)
        v = torch.autograd.grad(cross_entropy(model.eval(), batch), list(model.train().parameters()))
        model.load_state_dict(start)
        g = gradient(True)
        true.append(torch.autograd.grad(g, s["noise"].raw, [-0.1 * u for u in v])[0])
    true = torch.stack(true)
    error = math.sqrt(float(found.var() + true.var()) / DRAWS)
    assert abs(float(found.mean() - true.mean())) < 4 * error  # standard errors
    assert 4 * error < 0.4 * abs(float(true.mean()))
    assert float(found.std()) == pytest.approx(float(true.std()), rel=0.2)


def test_the_gradient_may_be_accumulated_from_parts_of_the_batch():
    """Under SGD, whose step is linear in the gradient."""
    found = []
    for parts in (1, 4):
        torch.manual_seed(0)
        s = mf.Space({"l1": mf.Float(1e-3, 1.0, log=True), "weight_decay": mf.Float(1e-3, 1.0, log=True)},
                     dtype=torch.float64)  # fmt: skip
        model = nn.Linear(8, 3).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def loss(model, batch, s=s):
            return cross_entropy(model, batch) + s["l1"] * model.weight.abs().sum()

        batch = X.double(), Y
        t = tuner(model, optimizer, s, loss, train_loader=[batch], valid_loader=[batch],
                  valid_loss_fn=cross_entropy, hyper_optimizer=Recorder, schedule=3)  # fmt: skip
        for _ in range(9):
            optimizer.zero_grad()
            for part in zip(*(t.chunk(parts) for t in batch), strict=True):
                (loss(model, part) / parts).backward()
            optimizer.step()
        assert t.log()["undecided"] == 0
        found.append(torch.stack([torch.stack(seen) for seen in t.hyper_optimizer.seen]))
    assert found[0].shape == (3, 2)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("positional", [True, False])
def test_a_step_with_a_closure_gives_the_same_hypergradients(positional):
    found = []
    for by_closure in (False, True):
        torch.manual_seed(0)
        s = space(torch.float64)
        model = network(s).double()
        batch = X.double(), Y
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        t = tuner(model, optimizer, s, train_loader=[batch], valid_loader=[batch], hyper_optimizer=Recorder)
        for _ in range(3):

            def closure(model=model, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = cross_entropy(model, batch)
                loss.backward()
                return loss

            if not by_closure:
                closure()
                optimizer.step()
            elif positional:
                assert float(optimizer.step(closure).detach()) > 0
            else:
                optimizer.step(closure=closure)
        found.append((t.hyper_optimizer.seen, weights(model)))
    assert len(found[0][0]) == 3
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


# ---- the loop stays as it is


@pytest.mark.parametrize("horizon", ["run", "step"])
@pytest.mark.parametrize("estimator", sorted(set(mf.hypergrad.ESTIMATORS) - {"paper"}))
def test_a_tuner_that_moves_nothing_leaves_the_run_bit_for_bit_as_it_was(estimator, horizon):
    """Weights, running averages, random numbers, and gradients of leaves that are no weights."""

    def run(tuned):
        torch.manual_seed(0)
        s = space()
        layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 3)
        model, x = network(s, *layers), X.clone().requires_grad_()
        decay = 0.0 if tuned else float(s["weight_decay"])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=decay)
        t = None
        if tuned:
            t = tuner(model, optimizer, s, estimator=estimator, horizon=horizon, hyper_optimizer=Recorder)
        for _ in range(6):
            optimizer.zero_grad()
            for _ in range(2):
                cross_entropy(model, (x, Y)).backward()
            optimizer.step()
        rest = [t for state in optimizer.state.values() for t in state.values()]
        return [*model.state_dict().values(), x.grad, torch.get_rng_state(), *rest], t

    (plain, _), (tuned, t) = run(False), run(True)
    assert t.log()["hypersteps"] == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, tuned, strict=True))


@pytest.mark.parametrize("estimator", sorted(mf.hypergrad.ESTIMATORS))
def test_at_learning_rate_zero_the_weights_stay_bit_identical(estimator):
    s = space()
    model = network(s)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    t = tuner(model, optimizer, s, estimator=estimator)
    train(model, optimizer, 20)
    assert t.log()["hypersteps"] == 20
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_ordinary_models_train_on():
    """Frozen, unused and tied weights, BatchNorm, dropout, groups and a scheduler at once."""

    class Model(nn.Module):
        def __init__(self, s):
            super().__init__()
            self.noise = mf.nn.GaussianNoise(s["noise"])
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight
            self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.2)
            self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.norm(self.first(self.frozen(self.noise(x)))).tanh()
            return self.head(self.drop(self.second(x)))

    s = space()
    model = Model(s)
    frozen, unused = copy.deepcopy(model.frozen.state_dict()), model.unused.weight.clone()
    heads = list(model.head.parameters())
    rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = torch.optim.Adam([{"params": rest}, {"params": heads, "lr": 1e-2}], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    t = tuner(model, optimizer, s)
    model.drop.eval()
    running, start = model.norm.running_mean.clone(), s.as_dict()
    for step in range(12):
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model, (X, Y)).backward()
        optimizer.step()
        if step == 0:
            assert model.norm.training
            assert not model.drop.training  # each module back in its own mode
            torch.testing.assert_close(model.norm.num_batches_tracked, torch.tensor(1))
        scheduler.step()
    assert not torch.equal(running, model.norm.running_mean)
    assert all(torch.equal(v, model.frozen.state_dict()[k]) for k, v in frozen.items())
    assert torch.equal(unused, model.unused.weight)
    assert t.log()["hypersteps"] == 12
    assert all(s.as_dict()[name] != start[name] for name in s)


def test_bfloat16_weights_are_tuned():
    s = space()
    model = network(s).bfloat16()
    batch = X.bfloat16(), Y
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tuner(model, optimizer, s, train_loader=[batch], valid_loader=[batch])
    start = s.as_dict()
    train(model, optimizer, 3, batch)
    assert all(s.as_dict()[name] != start[name] for name in s)


def test_a_users_own_function_of_a_hyperparameter_needs_no_registration():
    s = mf.Space(l1=mf.Float(1e-6, 1e-1, log=True, init=1e-2))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, batch):
        return cross_entropy(model, batch) + s["l1"] * model.weight.abs().sum()

    tuner(model, optimizer, s, loss, valid_loss_fn=cross_entropy)
    start = s.as_dict()
    train(model, optimizer, 3, loss_fn=loss)
    assert s.as_dict() != start


def test_a_loss_that_reads_no_hyperparameter_is_not_evaluated_by_the_tuner():
    s = mf.Space(weight_decay=mf.Float(1e-5, 1e-1, log=True))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.Adam(model.parameters())
    modes = []

    def loss(model, batch):
        modes.append(model.training)
        return cross_entropy(model, batch)

    tuner(model, optimizer, s, loss)
    train(model, optimizer, 1)  # the first hyper-step looks at what the loss reads
    modes.clear()
    train(model, optimizer, 4)
    assert modes == [False] * 4  # the validation loss, once for each hyper-step


def test_a_hyper_step_leaves_no_tensor_behind():
    def live():
        everything = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return everything - len(s) * len(t.trajectory)

    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s)
    gc.collect()
    gc.disable()  # a reference cycle would only be found by the collector
    try:
        train(model, optimizer, 3)
        before = live()
        train(model, optimizer, 4)  # the 8th hyper-step will note the weights again
        assert live() == before
    finally:
        gc.enable()


# ---- how hyperparameters move


def test_hyperparameters_move_every_kth_step_and_reach_the_optimizer():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    read = reads_as_it_steps(optimizer, "weight_decay")
    t = tuner(model, optimizer, s, schedule=5)
    start = s.as_dict()
    train(model, optimizer, 4)
    assert s.as_dict() == start
    assert read == [start["weight_decay"]] * 4
    train(model, optimizer, 1)
    assert all(s.as_dict()[name] != start[name] for name in s)
    assert read[4] == start["weight_decay"]  # the step that was judged
    train(model, optimizer, 1)
    assert read[5] == float(s["weight_decay"]) == t.log()["option/weight_decay"]
    assert optimizer.param_groups[0]["weight_decay"] == 0  # between steps the user's own


def test_steps_anneal_to_zero_over_the_run():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    plain = partial(mf.SignSteps, lr=0.03, agreement=0.0)
    t = tuner(model, optimizer, s, schedule=2, total_steps=40, hyper_optimizer=plain)
    lengths = []
    for _ in range(20):
        before = float(s["noise"].raw)
        train(model, optimizer, 2)
        lengths.append(abs(float(s["noise"].raw) - before))
    assert lengths[0] == pytest.approx(0.03, rel=1e-4)
    assert lengths[10] == pytest.approx(0.015, rel=1e-4)
    assert t.hyper_optimizer.param_groups[0]["lr"] == 0
    assert t.report() == []
    with pytest.warns(UserWarning, match="longer than total_steps=40"):
        train(model, optimizer, 1)
    train(model, optimizer, 1)  # said once


def test_a_run_that_ends_long_before_total_steps_is_reported():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s, total_steps=400)
    train(model, optimizer, 40)
    assert any("40 optimiser steps, but total_steps=400" in sentence for sentence in t.report())


def test_sign_steps_are_full_where_signs_agree_and_part_of_one_where_they_do_not():
    raw = torch.tensor([0.5, 0.5], requires_grad=True)
    steps, before = mf.SignSteps([raw], lr=0.1, agreement=0.25), [0.5, 0.5]
    mean = [0.0, 0.0]
    for n, signs in enumerate([(1, 1), (1, -1), (1, -1), (1, 1)], 1):
        raw.grad = torch.tensor(signs) * torch.tensor([1e-9, 1e9])
        steps.step()
        mean = [0.9 * m + 0.1 * s for m, s in zip(mean, signs, strict=True)]
        unbiased = [m / (1 - 0.9**n) for m in mean]
        before = [
            b - 0.1 * (0.75 * s + 0.25 * m * abs(m)) for b, s, m in zip(before, signs, unbiased, strict=True)
        ]
        assert raw.tolist() == pytest.approx(before, abs=1e-6)
    assert before[0] == pytest.approx(0.1)


def test_sign_steps_wait_more_for_agreement_at_averaged_weights_unless_told_otherwise():
    raw = torch.tensor(0.5, requires_grad=True)
    default, given = mf.SignSteps([raw]), mf.SignSteps([raw], agreement=0.3)
    assert [s.param_groups[0]["agreement"] for s in (default, given)] == [0.5, 0.3]
    for steps in (default, given):
        steps.set_averaging(0.5)
    assert [s.param_groups[0]["agreement"] for s in (default, given)] == [0.375, 0.15]


def test_with_gradient_accumulation_a_step_is_one_of_the_optimiser():
    s, at = space(), []
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    t = tuner(model, optimizer, s, schedule=None, total_steps=200, on_hyperstep=lambda n, _: at.append(n))
    for _ in range(200):
        optimizer.zero_grad()
        for _ in range(4):
            (cross_entropy(model, (X, Y)) / 4).backward()
        optimizer.step()
    assert t.steps == 200
    assert len(at) == len(t.trajectory) - 1 == 10
    assert sum(step <= 100 for step in at) > 6  # most of them early


def test_raw_values_stay_in_the_unit_interval():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tuner(model, optimizer, s, hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.7))
    for _ in range(10):
        train(model, optimizer, 1)
        assert all(0 <= float(raw) <= 1 for raw in s.raws.values())


def test_after_each_hyper_step_a_callback_gets_the_log():
    s, seen = space(), []
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s, schedule=3, on_hyperstep=lambda *call: seen.append(call))
    train(model, optimizer, 9)
    assert [step for step, _ in seen] == [3, 6, 9]
    assert seen[-1][1] == t.log()
    assert t.log()["value/noise"] == float(s["noise"])
    assert t.log()["hypersteps"] == 3
    assert all(type(x) is float for x in t.log().values())


# ---- the end of a run, and going on with one


@pytest.fixture
def ended():
    """(model, tuner) after a run of 60 steps, the last of which went astray."""
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, horizon="run", total_steps=60)
    train(model, optimizer, 60)
    return model, t


def test_finish_gives_the_model_the_weights_with_the_least_validation_loss(ended):
    model, t = ended
    with torch.no_grad():
        model[1].weight.add_(1.0)  # the last step went astray
    last = {n: p.detach().clone() for n, p in model.named_parameters()}
    candidates = {"last": last, **t.horizon.candidates()}
    model.eval()
    expected = {
        name: float(cross_entropy(lambda x, at=at: torch.func.functional_call(model, at, x), (X, Y)).detach())
        for name, at in candidates.items()
    }
    model.train()
    losses = t.finish()
    assert set(losses) == {"last", "average", "earlier"}
    assert losses == pytest.approx(expected)
    assert list(losses.values()) == sorted(expected.values())
    best = candidates[next(iter(losses))]
    assert all(torch.equal(p, best[n]) for n, p in model.named_parameters())
    assert list(losses)[-1] == "last"


def test_finish_takes_the_last_weights_over_others_that_are_not_finite_or_worse(ended):
    model, t = ended
    last = {n: p.detach().clone() for n, p in model.named_parameters()}
    t.horizon.best = {n: torch.full_like(p, float("nan")) for n, p in last.items()}
    t.horizon._average = {n: p + 3 for n, p in last.items()}
    losses = t.finish()
    assert list(losses) == ["last", "average", "earlier"]
    assert all(torch.equal(p, last[n]) for n, p in model.named_parameters())


def test_at_the_next_weights_finish_has_the_last_weights_only():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s)
    train(model, optimizer, 10)
    assert list(t.finish()) == ["last"]


@pytest.mark.parametrize("horizon", ["run", "step"])
@pytest.mark.parametrize("schedule", [3, None])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(horizon, schedule):
    def build():
        torch.manual_seed(0)
        s = space()
        model = network(s)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        data = torch.utils.data.TensorDataset(X, Y)
        parts = data, copy.copy(data)
        t1, t2 = (DataLoader(part, batch_size=10, shuffle=True, drop_last=True) for part in parts)
        t = tuner(
            model, optimizer, s, train_loader=t1, valid_loader=t2, schedule=schedule, horizon=horizon,
            total_steps=120,
        )  # fmt: skip
        return s, model, optimizer, t

    s, model, optimizer, t = build()
    train(model, optimizer, 50)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), t.state_dict(), torch.get_rng_state()))
    train(model, optimizer, 70)

    s2, model2, optimizer2, t2 = build()
    model2.load_state_dict(saved[0])
    optimizer2.load_state_dict(saved[1])
    t2.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    train(model2, optimizer2, 70)
    assert s.as_dict() == s2.as_dict()
    assert t.log() == t2.log()
    assert all(torch.equal(v, model2.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_state_kept_in_memory_stays_as_it_was_while_the_run_goes_on():
    s = mf.Space(lr=mf.Float(1e-4, 1.0, log=True, init=1e-2), noise=mf.Float(0.0, 0.8, init=0.3))
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s, horizon="run", hyper_optimizer=torch.optim.Adam)
    train(model, optimizer, 40)
    kept = t.state_dict()
    before = repr(tree_leaves(kept))
    train(model, optimizer, 40)
    assert repr(tree_leaves(kept)) == before
    t.load_state_dict(kept)
    train(model, optimizer, 40)  # nor does a run that goes on from it change it
    assert repr(tree_leaves(kept)) == before


def test_a_state_of_another_range_keeps_the_values_and_begins_a_trajectory_of_its_own():
    def made(noise):
        s = mf.Space(noise=noise)
        model = network(s)
        optimizer = torch.optim.Adam(model.parameters())
        return s, model, optimizer, tuner(model, optimizer, s)

    s, model, optimizer, t = made(mf.Float(0.0, 0.8, init=0.3))
    train(model, optimizer, 5)
    value = float(s["noise"])
    wider, _, _, again = made(mf.Float(0.0, 1.6))
    again.load_state_dict(t.state_dict())
    assert float(wider["noise"]) == pytest.approx(value)
    assert again.steps == 5
    assert float(again.trajectory.at(1.0)["noise"]) == pytest.approx(value / 1.6)
    with pytest.raises(mf.errors.SpaceError, match="the saved noise does not fit"):
        made(mf.Float(0.79, 0.8))[3].load_state_dict(t.state_dict())


def test_detaching_stops_the_tuning_and_leaves_the_tuned_options():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    hooks = {name: dict(x) for name, x in vars(optimizer).items() if "hook" in name}
    with tuner(model, optimizer, s):
        train(model, optimizer, 3)
    start, before = s.as_dict(), weights(model)
    assert optimizer.param_groups[0]["weight_decay"] == start["weight_decay"] != 1e-3
    assert {name: dict(x) for name, x in vars(optimizer).items() if "hook" in name} == hooks
    train(model, optimizer, 3)
    assert s.as_dict() == start
    assert not torch.equal(weights(model)[0], before[0])


# ---- bound options


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        (["decay"], "weight_decay, noise"),
        ({"noise": "betas"}, r"shape \(2,\)"),
        ({"noise": "warmth"}, "weight_decay"),
        ("weight_decay", r'\["weight_decay"\]'),
    ],
)
def test_a_binding_that_cannot_be_is_refused(bind, message):
    s = space()
    model = network(s)
    with pytest.raises(mf.errors.BindingError, match=message):
        tuner(model, torch.optim.Adam(model.parameters()), s, bind=bind)


def test_a_group_without_the_option_is_left_alone_and_others_keep_their_proportions():
    """The truth is a central difference of the step as torch takes it."""
    torch.manual_seed(0)
    s = mf.Space({"weight_decay": mf.Float(1e-3, 1.0, log=True, init=0.1)}, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    decays = [0.02, 0.0, 0.01, 0.0]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(model.parameters(), decays, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    batch, read = (X.double(), Y), []
    as_it_steps(optimizer, lambda groups: read.append([g["weight_decay"] for g in groups]))
    t = tuner(
        model, optimizer, s, train_loader=[batch], valid_loader=[batch], hyper_optimizer=Recorder, schedule=2
    )
    train(model, optimizer, 1, batch)
    twin = copy.deepcopy(model)

    def loss_after(shift):
        other = copy.deepcopy(twin)
        value = float(s["weight_decay"].transform.value(s["weight_decay"].raw + shift))
        shares = [1.0, 0.0, 0.5, 0.0]
        cross_entropy(other, batch).backward()
        with torch.no_grad():
            for p, share in zip(other.parameters(), shares, strict=True):
                p.sub_(0.1 * (p.grad + share * value * p))
            return float(cross_entropy(other, batch))

    truth = (loss_after(1e-4) - loss_after(-1e-4)) / 2e-4
    train(model, optimizer, 1, batch)
    assert read == [pytest.approx([0.1, 0.0, 0.05, 0.0])] * 2
    assert float(t.hyper_optimizer.seen[0][0]) == pytest.approx(truth, rel=1e-6)
    assert [g["weight_decay"] for g in optimizer.param_groups] == decays


def test_a_bound_option_is_the_tuned_value_times_the_schedulers_factor():
    s = mf.Space(lr=mf.Float(1e-4, 1.0, log=True, init=0.02))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    read = reads_as_it_steps(optimizer, "lr")
    t = tuner(model, optimizer, s, schedule=100)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(4):
        train(model, optimizer, 1)
        scheduler.step()
    assert read == pytest.approx([0.02, 0.01, 0.005, 0.0025])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**5)
    assert t.log()["option/lr"] == pytest.approx(0.02 / 16)
    t.detach()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 / 16)


def test_what_the_loop_writes_into_an_option_counts_as_its_factor():
    s = mf.Space(lr=mf.Float(1e-4, 1.0, log=True, init=0.02))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    read = reads_as_it_steps(optimizer, "lr")
    tuner(model, optimizer, s, schedule=100)
    for factor in (1.0, 0.1):
        optimizer.param_groups[0]["lr"] = 0.5 * factor
        train(model, optimizer, 1)
    assert read == pytest.approx([0.02, 0.002])


@pytest.mark.parametrize(("per", "count"), [("layer", 2), ("tensor", 4)])
def test_an_option_can_be_tuned_for_each_layer_or_tensor(per, count):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    groups = mf.param_groups(model, per=per)
    assert len(groups) == count
    values = [10.0 ** -(i + 1) for i in range(count)]
    decay = mf.Float(1e-4, 1e-1, log=True, shape=(count,), init=values)
    s = mf.Space(weight_decay=decay, lr=mf.Float(1e-4, 1e-1, log=True, init=3e-3))
    optimizer, written = torch.optim.Adam(groups), []
    as_it_steps(optimizer, lambda groups: written.extend(g["weight_decay"] for g in groups))
    t = tuner(model, optimizer, s, estimator="one_step_cheap", hyper_optimizer=Recorder)
    train(model, optimizer, 3)
    assert written[:count] == pytest.approx(values)
    last = t.hyper_optimizer.seen[-1][0]
    assert last.shape == (count,)
    assert len(set(last.tolist())) == count


def test_entries_may_be_given_for_those_groups_only_that_have_the_option():
    s = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True, shape=(2,), init=[1e-2, 1e-3]))
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    decays = [0.5, 0.0, 0.1, 0.0]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(model.parameters(), decays, strict=True)]
    optimizer, read = torch.optim.SGD(groups, lr=0.1), []
    as_it_steps(optimizer, lambda groups: read.append([g["weight_decay"] for g in groups]))
    t = tuner(model, optimizer, s, hyper_optimizer=Recorder)
    train(model, optimizer, 1)
    assert read == [pytest.approx([1e-2, 0.0, 1e-3, 0.0])]
    assert bool((t.hyper_optimizer.seen[0][0] != 0).all())


def test_modules_are_evaluated_and_go_back_each_to_its_own_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()), nn.Dropout())
    model[1][0].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before == [True, True, True, False, True]


def test_betas_are_bound_one_by_one():
    s = mf.Space(beta1=mf.Float(0.5, 0.99, logit=True, init=0.8), beta2=mf.Float(0.9, 0.9999, logit=True))
    model = nn.Linear(8, 3)
    optimizer, read = torch.optim.AdamW(model.parameters(), lr=0.01), []
    as_it_steps(optimizer, lambda groups: read.append(groups[0]["betas"]))
    start = s.as_dict()
    tuner(model, optimizer, s)
    train(model, optimizer, 5)
    assert read[0] == pytest.approx((0.8, start["beta2"]))
    assert all(s.as_dict()[name] != start[name] for name in s)
    values = tuple(s.as_dict().values())
    train(model, optimizer, 1)
    assert read[-1] == pytest.approx(values)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_shape_that_fits_no_groups_is_refused():
    s = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True, shape=(3,)))
    model = nn.Linear(8, 3)
    with pytest.raises(mf.errors.BindingError, match=r"one entry per param_group, \(1,\)"):
        tuner(model, torch.optim.Adam(model.parameters()), s)


# ---- what cannot be


def test_a_hyperparameter_used_nowhere_is_an_error_that_names_it_after_ten_hyper_steps():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    tuner(model, optimizer, s, bind=())
    train(model, optimizer, 9)
    with pytest.raises(mf.errors.UnreachedHyperparameter, match="weight_decay did not in 10"):
        train(model, optimizer, 1)


def test_a_hyperparameter_that_is_used_now_and_then_is_no_error():
    s = space()
    noise, net = mf.nn.GaussianNoise(s["noise"]), nn.Linear(8, 3)
    optimizer, calls = torch.optim.Adam(net.parameters()), []

    def loss(model, batch):
        calls.append(1)
        x = noise(batch[0]) if len(calls) % 7 == 0 and model.training else batch[0]
        return F.cross_entropy(model(x), batch[1])

    t = tuner(net, optimizer, s, loss, bind=["weight_decay"])
    train(net, optimizer, 40)
    assert t.log()["hypersteps"] == 40


def test_sparse_and_complex_weights_and_foreign_optimizers_are_refused():
    s = mf.Space(weight_decay=mf.Float(1e-5, 1e-1, log=True))
    sparse = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    tuner(sparse, optimizer, s)
    with pytest.raises(mf.errors.UnsupportedParameter, match="sparse=False"):
        train(sparse, optimizer, 1, torch.tensor([1, 2]), lambda model, ids: model(ids).sum())
    phase = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(mf.errors.UnsupportedParameter, match="complex64"):
        tuner(phase, torch.optim.SGD(phase.parameters(), lr=0.1), s)
    model = nn.Linear(2, 2)
    with pytest.raises(mf.errors.UnsupportedOptimizer, match="LBFGS"):
        tuner(model, torch.optim.LBFGS(model.parameters()), s)


@pytest.mark.parametrize("number", [0, -1, 1.5, math.nan, math.inf, True, "3"])
@pytest.mark.parametrize("name", ["schedule", "total_steps", "examples"])
def test_a_count_must_be_a_whole_number_of_at_least_one(name, number):
    s = space()
    model = network(s)
    with pytest.raises((ValueError, TypeError), match="must be"):
        tuner(model, torch.optim.Adam(model.parameters()), s, **{name: number})


@pytest.mark.parametrize("name", ["train_loader", "valid_loader"])
def test_an_empty_loader_is_an_error(name):
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    for empty in ([], DataLoader([1], batch_size=2, drop_last=True)):
        with pytest.raises(
            mf.errors.UnusableLoader, match=f"{name} must give batches.*drop_last=True"
        ) as found:
            tuner(model, optimizer, s, **{name: empty})
        assert isinstance(found.value, ValueError)


def test_a_hypergradient_that_is_not_finite_moves_nothing_and_is_counted():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s, valid_loss_fn=lambda m, b: cross_entropy(m, b) * float("nan"))
    start = s.as_dict()
    train(model, optimizer, 3)
    assert s.as_dict() == start
    assert (t.log()["skipped"], t.log()["hypersteps"]) == (3, 0)


def test_an_error_in_the_validation_pass_leaves_the_weights_in_place():
    s = space()
    model = network(s)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fails(model, batch):
        raise RuntimeError("no data")

    tuner(model, optimizer, s, valid_loss_fn=fails)
    pointers, before = [p.data_ptr() for p in model.parameters()], weights(model)
    cross_entropy(model, (X, Y)).backward()
    grads, rng = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step()
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), rng)
    assert optimizer.param_groups[0]["weight_decay"] == 0
