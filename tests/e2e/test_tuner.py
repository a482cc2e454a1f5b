"""The tuner in loops and models as people have them."""

import copy
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight.testing import compare
from midflight.updates import read_options

X, Y = torch.randn(64, 8), torch.randint(0, 3, (64,))


def space(dtype=None):
    return mf.Space(
        {
            "weight_decay": mf.Float(1e-5, 1e-1, log=True, init=1e-3),
            "noise": mf.Float(0.0, 0.8, init=0.3),
        },
        dtype=dtype,
    )


def network(space, *layers):
    layers = layers or (nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    return nn.Sequential(mf.nn.GaussianNoise(space["noise"]), *layers)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def tuner(model, optimizer, space, **options):
    options = {"bind": ["weight_decay"], "every": 1, **options}
    return mf.Tuner(model, optimizer, space, validate=cross_entropy, valid_loader=[(X, Y)], **options)


def train(model, optimizer, backward, steps, x=X, y=Y):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(F.cross_entropy(model(x), y))
        optimizer.step()


def train_by_function(model, optimizer, backward, steps, x=X, y=Y):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(lambda: F.cross_entropy(model(x), y))
        optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("estimator", sorted(set(mf.ESTIMATORS) - {"paper"}))
def test_the_live_loop_gives_the_hypergradient_of_the_pure_function(optimizer, estimator):
    torch.set_default_dtype(torch.float64)
    try:
        s = space()
        model, x = network(s), X.double()
        optim = optimizer(model.parameters(), lr=0.01)
        moved = []
        t = mf.Tuner(
            model, optim, s, validate=cross_entropy, valid_loader=[(x, Y)], bind=["weight_decay"],
            every=5, estimator=estimator, hyper_optimizer=lambda raws: Recorder(raws, moved),
        )  # fmt: skip
        train_by_function(model, optim, t.backward, 4, x=x)

        def forward(params, inputs):
            return F.cross_entropy(torch.func.functional_call(model, params, (inputs,)), Y)

        def train_loss(params, raws):
            with s.using(raws), torch.random.fork_rng(devices=[]):
                return forward(params, x)

        def valid_loss(params):
            model.eval()
            loss = forward(params, x)
            model.train()
            return loss

        def updates(raws):
            with s.using(raws):
                options = {**read_options(optim.param_groups[0]), "weight_decay": s["weight_decay"].value}
            return {n: mf.Update(mf.RULES[optimizer], options) for n, _ in model.named_parameters()}

        named = dict(model.named_parameters())
        state = {n: optim.state[p] for n, p in named.items()}
        problem = mf.Problem(train_loss, valid_loss, updates)
        expected = mf.hypergradient(problem, named, s.raws, state, estimator)
        train_by_function(model, optim, t.backward, 1, x=x)
        found = dict(zip(s, moved[0], strict=True))
        tolerance = 1e-7 if estimator == "central_difference" else 1e-12  # rounding / epsilon; rounding
        assert compare([found], [expected]).relative_error < tolerance
    finally:
        torch.set_default_dtype(torch.float32)


class Recorder(torch.optim.Optimizer):
    """Moves nothing and keeps the hypergradients it was given."""

    def __init__(self, raws, seen):
        super().__init__(raws, {"lr": 1.0})
        self.seen = seen

    def step(self, closure=None):
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


def test_backward_fills_the_same_gradients_as_loss_backward():
    s = space()
    model = network(s)
    twin = copy.deepcopy(model)
    t = tuner(model, torch.optim.Adam(model.parameters()), s)
    torch.manual_seed(1)
    t.backward(F.cross_entropy(model(X), Y))
    torch.manual_seed(1)
    F.cross_entropy(twin(X), Y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.grad_fn is None


def test_backward_accumulates_and_reaches_leaves_that_are_not_weights():
    s = space()
    model, x = network(s), X.clone().requires_grad_()
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s)
    for hyper in (False, True):  # the tuner has to see one step to know its last micro-batch
        x.grad, before = None, s["noise"].raw.clone()
        torch.manual_seed(1)
        t.backward(F.cross_entropy(model(x), Y))
        once = x.grad.clone()
        torch.manual_seed(1)
        assert s["noise"].raw.requires_grad == hyper
        t.backward(F.cross_entropy(model(x), Y))
        torch.testing.assert_close(x.grad, 2 * once)
        optimizer.step()
    assert not torch.equal(s["noise"].raw, before)


@pytest.mark.parametrize("estimator", sorted(mf.ESTIMATORS))
def test_at_learning_rate_zero_the_weights_stay_bit_identical(estimator):
    s = space()
    model = network(s)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_by_function(model, optimizer, tuner(model, optimizer, s, estimator=estimator).backward, 20)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_hyperparameters_move_every_kth_step_and_reach_the_optimizer():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    t = tuner(model, optimizer, s, every=5)
    assert optimizer.param_groups[0]["weight_decay"] == float(s["weight_decay"])
    start = s.as_dict()
    train(model, optimizer, t.backward, 4)
    assert s.as_dict() == start
    train(model, optimizer, t.backward, 1)
    assert all(s.as_dict()[name] != start[name] for name in s)
    assert optimizer.param_groups[0]["weight_decay"] == float(s["weight_decay"])


def test_steps_anneal_to_zero_over_the_run():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    plain = partial(mf.SignSteps, lr=0.03, agreement=0.0)
    t = tuner(model, optimizer, s, every=2, total_steps=40, hyper_optimizer=plain)
    lengths = []
    for _ in range(20):
        before = float(s["noise"].raw.detach())
        train(model, optimizer, t.backward, 2)
        lengths.append(abs(float(s["noise"].raw.detach()) - before))
    assert lengths[0] == pytest.approx(0.03, rel=1e-4)
    assert lengths[10] == pytest.approx(0.015, rel=1e-4)
    train(model, optimizer, t.backward, 2)
    assert t.hyper_optimizer.param_groups[0]["lr"] == 0


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


def test_sign_steps_wait_more_for_agreement_under_foresight_unless_told_otherwise():
    raw = torch.tensor(0.5, requires_grad=True)
    default, given = mf.SignSteps([raw]), mf.SignSteps([raw], agreement=0.3)
    assert [s.param_groups[0]["agreement"] for s in (default, given)] == [0.5, 0.3]
    for steps in (default, given):
        steps.foresee(calm=0.5)
    assert [s.param_groups[0]["agreement"] for s in (default, given)] == [0.375, 0.15]


def test_with_gradient_accumulation_hyper_steps_come_at_the_last_micro_batch_only():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    t = tuner(model, optimizer, s, every=None, total_steps=200)
    at = []
    for step in range(50):
        optimizer.zero_grad()
        for micro in range(4):
            if s["noise"].raw.requires_grad:
                at.append((step, micro))
            t.backward(cross_entropy(model, (X, Y)) / 4)
        optimizer.step()
    assert {micro for _, micro in at} == {3}
    assert len(at) == len(t.trajectory) - 1 == 10
    assert sum(step < 25 for step, _ in at) > 6  # most of them early


def test_finish_gives_the_model_the_weights_with_the_least_validation_loss():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, train_loader=[(X, Y)], total_steps=60)
    train(model, optimizer, t.backward, 60)
    with torch.no_grad():
        model[1].weight.add_(1.0)  # the last step went astray
    last = {n: p.detach().clone() for n, p in model.named_parameters()}
    candidates = {"last": last, "average": t.foresight.average(), "earlier": t.foresight.best}
    model.eval()
    expected = {
        name: float(cross_entropy(lambda x, at=at: torch.func.functional_call(model, at, x), (X, Y)).detach())
        for name, at in candidates.items()
    }
    model.train()
    losses = t.finish()
    assert losses == pytest.approx(expected)
    assert list(losses.values()) == sorted(expected.values())
    best = candidates[next(iter(losses))]
    assert all(torch.equal(p, best[n]) for n, p in model.named_parameters())
    assert list(losses)[-1] == "last"


def test_finish_takes_the_last_weights_over_others_that_are_not_finite_or_worse():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, train_loader=[(X, Y)], total_steps=60)
    train(model, optimizer, t.backward, 60)
    last = {n: p.detach().clone() for n, p in model.named_parameters()}
    t.foresight.best = {n: torch.full_like(p, float("nan")) for n, p in last.items()}
    t.foresight._average = {n: p + 3 for n, p in last.items()}
    losses = t.finish()
    assert list(losses) == ["last", "average", "earlier"]
    assert all(torch.equal(p, last[n]) for n, p in model.named_parameters())


def test_without_foresight_finish_has_the_last_weights_only():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s)
    train(model, optimizer, t.backward, 10)
    assert list(t.finish()) == ["last"]


def test_raw_values_stay_in_the_unit_interval():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.7))
    for _ in range(10):
        train(model, optimizer, t.backward, 1)
        assert all(0 <= float(raw.detach()) <= 1 for raw in s.raws.values())


@pytest.mark.parametrize("foresight", [False, True])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(foresight):
    def build():
        torch.manual_seed(0)
        s = space()
        model = network(s)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        data = torch.utils.data.TensorDataset(X, Y)
        loader = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True, drop_last=True)
        t = mf.Tuner(
            model, optimizer, s, validate=cross_entropy, valid_loader=loader, bind=["weight_decay"],
            train_loader=loader if foresight else None, every=3, total_steps=60,
        )  # fmt: skip
        return s, model, optimizer, t

    s, model, optimizer, t = build()
    train(model, optimizer, t.backward, 25)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), t.state_dict(), torch.get_rng_state()))
    train(model, optimizer, t.backward, 35)

    s2, model2, optimizer2, t2 = build()
    model2.load_state_dict(saved[0])
    optimizer2.load_state_dict(saved[1])
    t2.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    train(model2, optimizer2, t2.backward, 35)
    assert s.as_dict() == s2.as_dict()
    assert (t.foresight and t.foresight.caution) == (t2.foresight and t2.foresight.caution)
    assert all(torch.equal(v, model2.state_dict()[k]) for k, v in model.state_dict().items())


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
    running = model.norm.running_mean.clone()
    for step in range(12):
        optimizer.zero_grad(set_to_none=True)
        t.backward(F.cross_entropy(model(X), Y))
        if step == 0:
            assert model.norm.training
            assert not model.drop.training  # each module back in its own mode
            torch.testing.assert_close(model.norm.num_batches_tracked, torch.tensor(1))
        optimizer.step()
        scheduler.step()
    assert not torch.equal(running, model.norm.running_mean)
    assert all(torch.equal(v, model.frozen.state_dict()[k]) for k, v in frozen.items())
    assert torch.equal(unused, model.unused.weight)
    assert t.failures.skipped == 0


def test_bfloat16_weights_are_tuned():
    s = space()
    model = network(s, nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    t = mf.Tuner(
        model, optimizer, s, validate=cross_entropy, valid_loader=[(X.bfloat16(), Y)],
        every=1, bind=["weight_decay"],
    )  # fmt: skip
    start = s.as_dict()
    train(model, optimizer, t.backward, 3, x=X.bfloat16())
    assert all(s.as_dict()[name] != start[name] for name in s)


def test_a_users_own_function_of_a_hyperparameter_needs_no_registration():
    s = mf.Space(l1=mf.Float(1e-6, 1e-1, log=True, init=1e-2))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    t = tuner(model, optimizer, s, bind=[])
    start = s.as_dict()
    train(model, optimizer, lambda loss: t.backward(loss + s["l1"] * model.weight.abs().sum()), 3)
    assert s.as_dict() != start


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        (["decay"], "weight_decay, noise"),
        ({"noise": "betas"}, "weight_decay"),
        ("weight_decay", r'\["weight_decay"\]'),
    ],
)
def test_a_binding_that_cannot_be_is_refused(bind, message):
    s = space()
    model = network(s)
    with pytest.raises(mf.BindingError, match=message):
        tuner(model, torch.optim.Adam(model.parameters()), s, bind=bind)


def test_groups_that_differ_are_not_merged_silently():
    s = space()
    model = network(s)
    groups = [
        {"params": [p], "weight_decay": wd} for p, wd in zip(model.parameters(), (1e-2, 0, 0, 0), strict=True)
    ]
    with pytest.raises(mf.BindingError, match="agree"):
        tuner(model, torch.optim.Adam(groups), s)


def test_a_bound_option_that_someone_else_sets_is_an_error():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(mf.BindingError, match="scheduler"):
        t.backward(F.cross_entropy(model(X), Y))


def test_a_hyperparameter_used_nowhere_is_an_error_that_names_it():
    s = space()
    model = network(s)
    t = tuner(model, torch.optim.Adam(model.parameters()), s, bind=[])
    with pytest.raises(mf.UnreachedHyperparameter, match="weight_decay"):
        t.backward(F.cross_entropy(model(X), Y))


def test_sparse_and_complex_weights_and_foreign_optimizers_are_refused():
    s = mf.Space(weight_decay=mf.Float(1e-5, 1e-1, log=True))
    sparse = nn.Embedding(5, 3, sparse=True)
    t = tuner(sparse, torch.optim.SGD(sparse.parameters(), lr=0.1), s)
    with pytest.raises(mf.UnsupportedParameter, match="sparse=False"):
        t.backward(sparse(torch.tensor([1, 2])).sum())
    phase = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(mf.UnsupportedParameter, match="complex64"):
        tuner(phase, torch.optim.SGD(phase.parameters(), lr=0.1), s)
    model = nn.Linear(2, 2)
    with pytest.raises(mf.UnsupportedOptimizer, match="LBFGS"):
        tuner(model, torch.optim.LBFGS(model.parameters()), s)


@pytest.mark.parametrize("options", [{"every": 0}, {"total_steps": 0}])
def test_counts_below_one_are_refused(options):
    s = space()
    model = network(s)
    with pytest.raises(ValueError, match="must hold"):
        tuner(model, torch.optim.Adam(model.parameters()), s, **options)


def test_an_empty_validation_loader_is_an_error():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = mf.Tuner(model, optimizer, s, validate=cross_entropy, valid_loader=[], bind=["weight_decay"], every=1)
    with pytest.raises(ValueError, match="at least one batch"):
        t.backward(F.cross_entropy(model(X), Y))


def test_a_hypergradient_that_is_not_finite_moves_nothing_and_is_counted():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = mf.Tuner(
        model, optimizer, s, validate=lambda m, b: cross_entropy(m, b) * float("nan"),
        valid_loader=[(X, Y)], bind=["weight_decay"], every=1,
    )  # fmt: skip
    start = s.as_dict()
    train(model, optimizer, t.backward, 3)
    assert s.as_dict() == start
    assert t.failures.skipped == 3


def test_an_error_in_the_validation_pass_leaves_the_weights_in_place():
    s = space()
    model = network(s)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fails(model, batch):
        raise RuntimeError("no data")

    t = mf.Tuner(model, optimizer, s, validate=fails, valid_loader=[0], bind=["weight_decay"], every=1)
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no data"):
        t.backward(F.cross_entropy(model(X), Y))
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert model.training


def test_detaching_stops_the_tuning():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s)
    t.detach()
    start = s.as_dict()
    train(model, optimizer, lambda loss: loss.backward(), 3)
    assert s.as_dict() == start


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
        train(model, optimizer, t.backward, 2)
        before = live()
        train(model, optimizer, t.backward, 5)
        assert live() == before
    finally:
        gc.enable()


def test_a_function_for_the_loss_gives_the_same_run_as_a_tensor():
    ends = []
    for loop in (train, train_by_function):
        torch.manual_seed(0)
        s = space()
        model = network(s, nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        t = tuner(model, optimizer, s, every=3)
        loop(model, optimizer, t.backward, 30)
        ends.append((s.as_dict(), model.state_dict()))
    assert t.mixed_partial == "double backward"
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(v, ends[1][1][k]) for k, v in ends[0][1].items())


def test_hyperparameters_linear_in_the_loss_need_no_double_backward():
    weights, twin = [], []
    for function in (True, False):
        torch.manual_seed(0)
        s = mf.Space(l1=mf.Float(0.0, 0.1), weight=mf.Float(0.0, 1.0, shape=(64,)))
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        t = tuner(model, optimizer, s, bind=[], hyper_optimizer=lambda raws: torch.optim.SGD(raws, lr=1e3))

        def loss(model=model, s=s):
            losses = F.cross_entropy(model(X), Y, reduction="none")
            return (s["weight"] * losses).mean() + s["l1"] * model[0].weight.abs().sum()

        for _ in range(5):
            optimizer.zero_grad()
            t.backward(loss if function else loss())
            optimizer.step()
        (weights if function else twin).extend(s.raws.values())
        assert (t.mixed_partial or "double backward").startswith("forward" if function else "double")
    for a, b in zip(weights, twin, strict=True):
        assert float((a - 0.5).detach().abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32, five steps


def test_a_function_that_reads_no_hyperparameter_is_evaluated_once_per_hyper_step():
    s = mf.Space(weight_decay=mf.Float(1e-5, 1e-1, log=True))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s)
    calls = []

    def loss():
        calls.append(1)
        return F.cross_entropy(model(X), Y)

    t.backward(loss)  # the first hyper-step looks at the structure
    optimizer.step()
    calls.clear()
    t.backward(loss)
    assert len(calls) == 1


def test_reevaluating_leaves_buffers_and_random_numbers_as_they_were():
    s = space()
    model = network(s, nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    t = tuner(model, optimizer, s, estimator="unrolled")
    torch.manual_seed(5)
    t.backward(lambda: F.cross_entropy(model(X), Y))
    after = torch.randn(3)
    torch.manual_seed(5)
    F.cross_entropy(twin(X), Y).backward()
    assert torch.equal(after, torch.randn(3))
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize(
    "estimator", ["unrolled", "central_difference", "forward_over_reverse", "implicit_cg"]
)
def test_an_estimator_that_needs_a_function_says_so(estimator):
    s = space()
    model = network(s)
    t = tuner(model, torch.optim.Adam(model.parameters()), s, estimator=estimator)
    with pytest.raises(mf.NeedsClosure, match="lambda"):
        t.backward(F.cross_entropy(model(X), Y))


class OnceOnly(torch.autograd.Function):
    """tanh whose derivative cannot be differentiated again, as in fused kernels."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g / ctx.saved_tensors[0].cosh() ** 2


def test_central_difference_serves_code_that_cannot_be_differentiated_twice():
    class Fused(nn.Module):
        def forward(self, x):
            return OnceOnly.apply(x)

    s = mf.Space(noise=mf.Float(0.0, 0.8, init=0.3))
    model = network(s, nn.Linear(8, 16), Fused(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with pytest.raises(mf.NotTwiceDifferentiable, match="central_difference"):
        train(model, optimizer, tuner(model, optimizer, s, bind=[]).backward, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    start = s.as_dict()
    t = tuner(model, optimizer, s, bind=[], estimator="central_difference")
    train_by_function(model, optimizer, t.backward, 3)
    assert s.as_dict() != start


@pytest.mark.parametrize(("per", "count"), [("layer", 2), ("tensor", 4)])
def test_an_option_can_be_tuned_for_each_layer_or_tensor(per, count):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    groups = mf.param_groups(model, per=per)
    assert len(groups) == count
    decay = mf.Float(1e-4, 1e-1, log=True, shape=(count,), init=[10.0 ** -(i + 1) for i in range(count)])
    s = mf.Space(weight_decay=decay, lr=mf.Float(1e-4, 1e-1, log=True))
    optimizer = torch.optim.Adam(groups)
    seen = []
    t = tuner(
        model, optimizer, s, bind=["weight_decay", "lr"], estimator="one_step_cheap",
        hyper_optimizer=lambda raws: Recorder(raws, seen),
    )  # fmt: skip
    written = [group["weight_decay"] for group in optimizer.param_groups]
    assert written == pytest.approx([10.0 ** -(i + 1) for i in range(count)])
    train(model, optimizer, t.backward, 3)
    assert seen[-1][0].shape == (count,)
    assert len(set(seen[-1][0].tolist())) == count


def test_betas_are_bound_one_by_one():
    s = mf.Space(beta1=mf.Float(0.5, 0.99, logit=True, init=0.8), beta2=mf.Float(0.9, 0.9999, logit=True))
    model = nn.Linear(8, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    t = tuner(model, optimizer, s, bind=["beta1", "beta2"])
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.8, float(s["beta2"])))
    start = s.as_dict()
    train(model, optimizer, t.backward, 4)
    assert all(s.as_dict()[name] != start[name] for name in s)
    assert optimizer.param_groups[0]["betas"] == pytest.approx(tuple(s.as_dict().values()))


def test_a_shape_that_fits_no_groups_is_refused():
    s = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True, shape=(3,)))
    model = nn.Linear(8, 3)
    with pytest.raises(mf.BindingError, match=r"one entry per param_group, \(1,\)"):
        tuner(model, torch.optim.Adam(model.parameters()), s)
