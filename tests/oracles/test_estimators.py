"""Estimators against central differences, closed forms and each other, in float64."""

import pytest
import torch

import midflight as mf
from midflight.hypergrad import CLAIMS, ESTIMATORS
from midflight.testing import KINDS, OPTIMIZERS, central_difference, compare, loss_after, make_case
from midflight.updates import RULES, SGD, Update, read_option, read_options

SGD_OPTIONS = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "weight_decay": 0.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", CLAIMS)
def test_an_estimator_keeps_its_claim_against_central_differences(estimator, optimizer, kind):
    claim = CLAIMS[estimator]
    cases = [make_case(optimizer, kind, seed) for seed in range(3)]
    truths = [central_difference(c.problem, c.params, c.hparams, c.state, claim.steps) for c in cases]
    estimates = [mf.hypergradient(c.problem, c.params, c.hparams, c.state, estimator) for c in cases]
    assert compare(estimates, truths).relative_error < claim.tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exact_at_the_first_step_when_the_optimizer_has_no_state_yet(optimizer, kind, monkeypatch):
    if "Adam" in optimizer:
        # at eps = 1e-8 Adam's first step is the sign of g: its derivative is too small to difference
        make = {"Adam": torch.optim.Adam, "Adam amsgrad": torch.optim.Adam, "AdamW": torch.optim.AdamW}[
            optimizer
        ]
        monkeypatch.setitem(
            OPTIMIZERS, optimizer, lambda p: make(p, eps=1e-2, amsgrad="amsgrad" in optimizer)
        )
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
    problem = mf.Problem(
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
    with pytest.raises(mf.UnreachedHyperparameter, match="curvature"):
        mf.hypergradient(problem, params, hparams, {"w": {}}, "paper")


def test_an_unreached_hyperparameter_is_an_error_that_names_it():
    problem, params, hparams, *_ = quadratic(0.1, 0.03)
    with pytest.raises(mf.UnreachedHyperparameter, match="forgotten"):
        mf.hypergradient(problem, params, {**hparams, "forgotten": torch.tensor(0.5)}, {"w": {}})


def test_an_unknown_estimator_is_an_error_that_lists_the_known():
    problem, params, hparams, *_ = quadratic(0.1, 0.03)
    with pytest.raises(mf.UnknownName, match="one_step"):
        mf.hypergradient(problem, params, hparams, {"w": {}}, "two_step")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_closed_form_pullback_equals_autograd_through_the_step(optimizer, steps):
    case = make_case(optimizer, "weight_decay", steps=steps)
    updates = case.problem.updates({"weight_decay": case.hparams["weight_decay"].requires_grad_()})
    for name, u in updates.items():
        param, state = case.params[name], case.state[name]
        grad, v = torch.randn(2, *param.shape, dtype=torch.float64)
        w, options = u.rule.pullback(v, param, grad, state, u.options)
        w_auto, options_auto = super(type(u.rule), u.rule).pullback(v, param, grad, state, u.options)
        torch.testing.assert_close(w, w_auto)
        torch.testing.assert_close(options["weight_decay"], options_auto["weight_decay"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tuned", ["weight_decay", "lr"])
def test_a_gradient_of_exactly_zero_gives_finite_derivatives(optimizer, tuned):
    param = torch.nn.Parameter(torch.zeros(4))
    optim = OPTIMIZERS[optimizer]([param])
    options = {**read_options(optim.param_groups[0]), tuned: torch.tensor(0.01, requires_grad=True)}
    rule = RULES[type(optim)]
    w, found = rule.pullback(torch.ones(4), param.detach(), torch.zeros(4), {}, options)
    assert torch.isfinite(w).all()
    assert torch.isfinite(found[tuned]).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_tunable_option_is_differentiated_exactly(optimizer):
    torch.manual_seed(3)
    param = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    optim = OPTIMIZERS[optimizer]([param])
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optim.step()
    rule, grad, v = RULES[type(optim)], torch.randn_like(param), torch.randn(6, dtype=torch.float64)
    for option in sorted(rule.tunable):
        if option == "momentum" and not optim.param_groups[0]["momentum"]:
            continue  # torch keeps no buffer at momentum 0: the step is not continuous there
        at = max(
            0.01, read_option(optim.param_groups[0], option)
        )  # eps = 1e-8 is below the difference's rounding

        def moved(shift, option=option, at=at):
            options = {**read_options(optim.param_groups[0]), option: at + shift}
            new, _ = rule.step(param.detach(), grad, optim.state[param], options)
            return float((v * new).sum())

        h = 1e-5 if "beta" in option else 1e-3 * at  # small beside 1 - beta2 = 1e-3
        truth = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        options = {
            **read_options(optim.param_groups[0]),
            option: torch.tensor(at, dtype=torch.float64, requires_grad=True),
        }
        _, found = rule.pullback(v, param.detach(), grad, optim.state[param], options)
        assert float(found[option]) == pytest.approx(truth, rel=1e-6)  # rounding of the difference


def test_the_oracle_itself_differentiates_a_known_function():
    problem, params, hparams, *_ = quadratic(0.1, 0.03)
    found = central_difference(problem, params, hparams, {"w": {}})
    exact = mf.hypergradient(problem, params, hparams, {"w": {}})
    torch.testing.assert_close(found["curvature"], exact["curvature"], rtol=1e-8, atol=1e-10)
    assert loss_after(problem, params, hparams, {"w": {}}) > 0
