"""Estimators against central differences, closed forms and each other, in float64."""

from functools import cache

import pytest
import torch

import midflight as mf
from midflight.gradcheck import OPTIMIZERS, central_difference, compare, loss_after, make_case, why_skipped
from midflight.hypergrad import CLAIMS, ESTIMATORS
from midflight.hypergrad.problem import Dependence, double_backward
from midflight.updates import SGD, Update, rule_for

KINDS = ["weight_decay", "noise"]  # the others are in test_kinds.py
SGD_OPTIONS = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "weight_decay": 0.0}


PAIRS = [(o, k) for o in OPTIMIZERS for k in KINDS if why_skipped(o, k) is None]


@cache
def cases_of(optimizer, kind):
    return [make_case(optimizer, kind, seed) for seed in range(2)]


@cache
def truths_of(optimizer, kind, steps):
    """No estimator changes a case, as another test shows, so all of them share the truth."""
    cases = cases_of(optimizer, kind)
    return [central_difference(c.problem, c.params, c.hparams, c.state, steps) for c in cases]


@pytest.mark.parametrize(("optimizer", "kind"), PAIRS)
def test_each_estimator_keeps_its_claim_against_central_differences(optimizer, kind):
    cases = cases_of(optimizer, kind)
    for estimator, claim in CLAIMS.items():
        truths = truths_of(optimizer, kind, claim.steps)
        estimates = [mf.hypergradient(c.problem, c.params, c.hparams, c.state, estimator) for c in cases]
        assert compare(estimates, truths).relative_error < claim.tolerance, estimator


def test_every_optimizer_is_compared_in_both_unless_its_step_has_no_derivative_by_the_noise():
    rules = {o: rule_for(make([torch.zeros(1, 1)])) for o, make in OPTIMIZERS.items()}
    without = {(o, "noise") for o, rule in rules.items() if rule.why_not_differentiable}
    assert set(PAIRS) == {(o, k) for o in OPTIMIZERS for k in KINDS} - without


@pytest.mark.parametrize(("optimizer", "kind"), PAIRS)
def test_exact_at_the_first_step_when_the_optimizer_has_no_state_yet(optimizer, kind, monkeypatch):
    make = OPTIMIZERS[optimizer]

    def with_larger_eps(params):
        # at eps = 1e-8 many first steps are the sign of g: a derivative too small to difference
        optim = make(params)
        for group in optim.param_groups:
            if isinstance(group.get("eps"), float):
                group["eps"] = max(group["eps"], 1e-2)
        return optim

    monkeypatch.setitem(OPTIMIZERS, optimizer, with_larger_eps)
    c = make_case(optimizer, kind, steps=0)
    truth = central_difference(c.problem, c.params, c.hparams, c.state)
    assert compare([mf.hypergradient(c.problem, c.params, c.hparams, c.state)], [truth]).relative_error < 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_hypergradient_changes_nothing(estimator):
    c = make_case("Adam", "weight_decay")
    before = {n: p.clone() for n, p in c.params.items()}
    state = {n: {k: v.clone() for k, v in s.items()} for n, s in c.state.items()}
    mf.hypergradient(c.problem, c.params, c.hparams, c.state, estimator)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in c.params.items())
    assert all(torch.equal(state[n][k], v) for n, s in c.state.items() for k, v in s.items())


def quadratic(lr, l2):
    """C1 = |theta - a|^2 / 2 with coupled L2 in the optimiser, C2 = |theta - b|^2 / 2."""
    a, b = torch.randn(2, 5, dtype=torch.float64)
    problem = mf.hypergrad.Problem(
        train_loss=lambda p, h: (h["curvature"] * (p["w"] - a) ** 2).sum() / 2,
        valid_loss=lambda p: ((p["w"] - b) ** 2).sum() / 2,
        updates=lambda h: {"w": Update(SGD(), {**SGD_OPTIONS, "lr": lr, "weight_decay": h["l2"]})},
    )
    params = {"w": torch.randn(5, dtype=torch.float64)}
    hparams = {"l2": torch.tensor(l2, dtype=torch.float64), "curvature": torch.rand(5, dtype=torch.float64)}
    return problem, params, hparams, a, b


def test_one_step_on_a_quadratic_equals_its_closed_form():
    lr, l2 = 0.1, 0.03
    problem, params, hparams, a, b = quadratic(lr, l2)
    found = mf.hypergradient(problem, params, hparams, {"w": {}})
    theta, c = params["w"], hparams["curvature"]
    v = theta - lr * (c * (theta - a) + l2 * theta) - b
    torch.testing.assert_close(found["l2"], -lr * (v * theta).sum())
    torch.testing.assert_close(found["curvature"], -lr * v * (theta - a))


def test_the_cheap_form_takes_v_before_the_step():
    lr = 0.1
    problem, params, hparams, a, b = quadratic(lr, 0.03)
    found = mf.hypergradient(problem, params, hparams, {"w": {}}, "one_step_cheap")
    theta = params["w"]
    torch.testing.assert_close(found["l2"], -lr * ((theta - b) * theta).sum())
    torch.testing.assert_close(found["curvature"], -lr * (theta - b) * (theta - a))


def test_t1t2_is_exact_for_plain_sgd_and_ignores_adam():
    sgd, adam = make_case("SGD", "noise"), make_case("Adam", "noise")
    for case, exact in ((sgd, True), (adam, False)):
        truth = central_difference(case.problem, case.params, case.hparams, case.state)
        found = mf.hypergradient(case.problem, case.params, case.hparams, case.state, "t1t2")
        assert (compare([found], [truth]).relative_error < 1e-6) is exact


def test_paper_eq_5_is_minus_eta_times_gradient_times_weights():
    case = make_case("Adam", "weight_decay")
    found = mf.hypergradient(case.problem, case.params, case.hparams, case.state, "paper")
    raw = case.hparams["weight_decay"].clone().requires_grad_()
    updates = case.problem.updates({"weight_decay": raw})
    grads = case.problem.train_grads(
        {n: p.requires_grad_() for n, p in case.params.items()}, {"weight_decay": raw}
    )
    new = {n: u.rule.step(case.params[n], grads[n], case.state[n], u.options)[0] for n, u in updates.items()}
    v = case.problem.valid_grads(new)
    lr = next(iter(updates.values())).options["lr"]
    eq5 = -lr * sum((v[n] * case.params[n]).sum() for n in v)
    decay = next(iter(updates.values())).options["weight_decay"]
    (slope,) = torch.autograd.grad(decay, raw)
    torch.testing.assert_close(found["weight_decay"], (eq5 * slope).detach())


def test_paper_eq_6_has_mean_zero_where_the_derivative_has_not():
    case = make_case("SGD", "noise")
    found = torch.stack(
        [
            mf.hypergradient(case.problem, case.params, case.hparams, case.state, "paper")["noise"]
            for _ in range(400)
        ]
    )
    assert abs(found.mean()) < 3 * found.std() / 400**0.5  # three standard errors, fixed seed
    assert found.std() > 0


def test_paper_names_what_it_cannot_handle():
    problem, params, hparams, *_ = quadratic(0.1, 0.03)
    with pytest.raises(mf.errors.UnreachedHyperparameter, match="curvature"):
        mf.hypergradient(problem, params, hparams, {"w": {}}, "paper")


def test_an_unreached_hyperparameter_is_an_error_that_names_it():
    problem, params, hparams, *_ = quadratic(0.1, 0.03)
    with pytest.raises(mf.errors.UnreachedHyperparameter, match="forgotten"):
        mf.hypergradient(problem, params, {**hparams, "forgotten": torch.tensor(0.5)}, {"w": {}})


def test_an_estimator_of_ones_own_says_where_it_wants_v():
    class HalfWay(mf.hypergrad.Estimator):
        def at(self, step):
            new = step.next_params()
            return {name: (new[name] + p) / 2 for name, p in step.params.items()}

        def __call__(self, step, v):
            return mf.hypergrad.ESTIMATORS["one_step"](step, v)

    lr = 0.1
    problem, params, hparams, a, b = quadratic(lr, 0.03)
    found = mf.hypergradient(problem, params, hparams, {"w": {}}, HalfWay())
    theta, c = params["w"], hparams["curvature"]
    v = theta - lr / 2 * (c * (theta - a) + 0.03 * theta) - b
    torch.testing.assert_close(found["l2"], -lr * (v * theta).sum())


def test_a_gradient_that_is_clipped_before_the_step_is_pulled_back_through_its_jacobian():
    """Against the closed form of the step with g c / |g| in place of g."""
    lr, c = 0.1, 0.05
    problem, params, hparams, a, b = quadratic(lr, 0.03)
    hparams = {name: h.clone().requires_grad_() for name, h in hparams.items()}
    theta = params["w"]

    def clipped(curvature):
        g = curvature * (theta - a)
        return c * g / g.norm()

    def loss(l2, curvature):
        return ((theta - lr * (clipped(curvature) + l2 * theta) - b) ** 2).sum() / 2

    truth = torch.autograd.grad(loss(*hparams.values()), list(hparams.values()))
    grads = problem.train_grads({"w": theta.clone().requires_grad_()}, hparams, create_graph=True)
    size = grads["w"].detach().norm()
    unit = grads["w"].detach() / size
    step = mf.hypergrad.Step(
        params=params, grads={"w": c * unit}, state={"w": {}}, updates=problem.updates(hparams),
        hparams=hparams, values=hparams,
        dependence=lambda: Dependence(lambda w: double_backward(grads, hparams, w)),
        clipped=lambda w: {"w": c / size * (w["w"] - unit * (unit @ w["w"]))},
    )  # fmt: skip
    one_step = mf.hypergrad.ESTIMATORS["one_step"]
    found = one_step(step, problem.valid_grads(one_step.at(step)))
    for name, t in zip(hparams, truth, strict=True):
        torch.testing.assert_close(found[name], t)
    with pytest.raises(mf.errors.UnsupportedSetting, match="clipped gradients; use 'one_step'"):
        mf.hypergrad.ESTIMATORS["unrolled"].at(step)


def test_an_unknown_estimator_is_an_error_that_lists_the_known():
    problem, params, hparams, *_ = quadratic(0.1, 0.03)
    with pytest.raises(mf.errors.UnknownName, match="one_step"):
        mf.hypergradient(problem, params, hparams, {"w": {}}, "two_step")


def test_the_oracle_itself_differentiates_a_known_function():
    problem, params, hparams, *_ = quadratic(0.1, 0.03)
    found = central_difference(problem, params, hparams, {"w": {}})
    exact = mf.hypergradient(problem, params, hparams, {"w": {}})
    torch.testing.assert_close(found["curvature"], exact["curvature"], rtol=1e-8, atol=1e-10)
    assert loss_after(problem, params, hparams, {"w": {}}) > 0


# --- wrong twins: what the central difference must reject ---------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop", "SGD momentum"])
@pytest.mark.parametrize("twin", ["one_step_cheap", "t1t2", "paper", "implicit_neumann"])
def test_an_estimator_of_something_else_is_found_out(twin, optimizer, kind):
    c = make_case(optimizer, kind)
    truth = central_difference(c.problem, c.params, c.hparams, c.state)
    found = mf.hypergradient(c.problem, c.params, c.hparams, c.state, twin)
    found_out = compare([found], [truth]).relative_error > 100 * CLAIMS["one_step"].tolerance
    # both equations are those of a decoupled decay
    assert found_out is not ((optimizer, kind) == ("AdamW", "weight_decay") and twin in ("t1t2", "paper"))


@pytest.mark.parametrize("part", ["loss", "options"])
def test_an_estimator_that_forgets_a_part_is_found_out(part):
    problem, params, hparams, *_ = quadratic(0.1, 0.03)
    problem = mf.hypergrad.Problem(problem.train_loss, problem.valid_loss, problem.updates)
    joined = {"both": torch.tensor(0.3, dtype=torch.float64)}

    def of_both(values):
        h = values["both"]
        fixed = torch.tensor(0.3, dtype=torch.float64)
        loss, option = (fixed, h) if part == "loss" else (h, fixed)
        return {"curvature": loss * hparams["curvature"], "l2": option * 0.1}

    def as_problem(forget):
        split = (
            of_both
            if forget
            else lambda v: {"curvature": v["both"] * hparams["curvature"], "l2": v["both"] * 0.1}
        )
        return mf.hypergrad.Problem(
            lambda p, v: problem.train_loss(p, split(v)),
            problem.valid_loss,
            lambda v: problem.updates(split(v)),
        )

    truth = central_difference(as_problem(False), params, joined, {"w": {}})
    right, wrong = (mf.hypergradient(as_problem(x), params, joined, {"w": {}}) for x in (False, True))
    assert compare([right], [truth]).relative_error < CLAIMS["one_step"].tolerance
    assert compare([wrong], [truth]).relative_error > 100 * CLAIMS["one_step"].tolerance
