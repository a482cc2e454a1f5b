"""Solvers against torch.linalg.solve, and the implicit estimators against dense linear algebra."""

import pytest
import torch

import midflight as mf
from midflight.gradcheck import OPTIMIZERS, compare, loss_after, make_case, why_skipped
from midflight.hypergrad import ImplicitCG, ImplicitNeumann, Unrolled
from midflight.hypergrad.solvers import conjugate_gradient, neumann
from midflight.updates import SGD, Update

SGD_OPTIONS = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "weight_decay": 0.0}


def system(n, condition, seed=0):
    """A symmetric positive definite matrix with the given condition number, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    a = q @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), n).double()) @ q.T
    return (a + a.T) / 2, torch.randn(n, dtype=torch.float64, generator=generator)


def split(x):
    return {"a": x[:2], "b": x[2:]}


def join(tree):
    return torch.cat([tree["a"], tree["b"]])


@pytest.mark.parametrize("n", [3, 6, 30])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_conjugate_gradients_equal_a_direct_solve(n, condition):
    a, b = system(n, condition)
    found = conjugate_gradient(lambda u: split(a @ join(u)), split(b), iterations=10 * n, tolerance=1e-14)
    truth = torch.linalg.solve(a, b)
    assert float((join(found) - truth).norm() / truth.norm()) < 1e-10


def test_conjugate_gradients_need_one_iteration_per_eigenvalue():
    a = torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0, 5.0], dtype=torch.float64))
    b = torch.ones(5, dtype=torch.float64)
    found = conjugate_gradient(lambda u: split(a @ join(u)), split(b), iterations=3)
    torch.testing.assert_close(join(found), torch.linalg.solve(a, b), rtol=1e-12, atol=1e-12)


def test_conjugate_gradients_of_zero_are_zero():
    found = conjugate_gradient(lambda u: u, split(torch.zeros(5)), iterations=5)
    assert torch.equal(join(found), torch.zeros(5))


def test_the_neumann_series_equals_a_direct_solve():
    a, b = system(6, 10.0)
    found = neumann(lambda u: split(join(u) - a @ join(u)), split(b), terms=400)  # 0.9^400 = 5e-19
    truth = torch.linalg.solve(a, b)
    assert float((join(found) - truth).norm() / truth.norm()) < 1e-10


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [(o, k) for o in OPTIMIZERS for k in ("weight_decay", "noise") if why_skipped(o, k) is None],
)
def test_one_term_and_one_unrolled_step_are_one_step(optimizer, kind):
    case = make_case(optimizer, kind)
    arguments = (case.problem, case.params, case.hparams, case.state)
    exact = mf.hypergradient(*arguments)
    for estimator in (Unrolled(steps=1), ImplicitNeumann(terms=1)):
        assert compare([mf.hypergradient(*arguments, estimator)], [exact]).relative_error < 1e-9


def ridge():
    """Least squares with coupled L2 by gradient descent, at its minimum: everything is known."""
    torch.manual_seed(0)
    x, y, xv, yv = torch.randn(20, 6), torch.randn(20), torch.randn(9, 6), torch.randn(9)
    x, y, xv, yv = (t.double() for t in (x, y, xv, yv))
    h = x.T @ x / 20

    def problem(lr):
        return mf.hypergrad.Problem(
            train_loss=lambda p, _: ((x @ torch.cat([p["a"], p["b"]]) - y) ** 2).mean() / 2,
            valid_loss=lambda p: ((xv @ torch.cat([p["a"], p["b"]]) - yv) ** 2).mean() / 2,
            updates=lambda hp: {
                n: Update(SGD(), {**SGD_OPTIONS, "lr": lr, "weight_decay": hp["l2"]}) for n in ("a", "b")
            },
        )

    def minimum(l2):
        return torch.linalg.solve(h + l2 * torch.eye(6, dtype=torch.float64), x.T @ y / 20)

    return problem, minimum, xv, yv


@pytest.mark.parametrize(
    "estimator",
    [ImplicitCG(iterations=40), ImplicitNeumann(terms=3000)],
    ids=["cg", "neumann"],
)
def test_implicit_estimators_equal_the_derivative_of_the_minimum(estimator):
    problem, minimum, xv, yv = ridge()
    l2 = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    theta = minimum(l2)
    (truth,) = torch.autograd.grad(((xv @ theta - yv) ** 2).mean() / 2, l2)
    params, state = split(theta.detach()), {"a": {}, "b": {}}
    found = mf.hypergradient(problem(0.1), params, {"l2": l2.detach()}, state, estimator)
    assert float(found["l2"]) == pytest.approx(float(truth), rel=1e-8)
    # one step sees the learning rate's share of it only
    one = mf.hypergradient(problem(0.1), params, {"l2": l2.detach()}, state)
    assert abs(float(one["l2"])) < 0.5 * abs(float(truth))
    assert loss_after(problem(0.1), params, {"l2": l2.detach()}, state) > 0


def test_conjugate_gradients_on_a_rule_with_momentum_equal_dense_algebra():
    case = make_case("Adam", "weight_decay")
    found = mf.hypergradient(
        case.problem, case.params, case.hparams, case.state, ImplicitCG(iterations=60, damping=0.5)
    )
    names = list(case.params)
    sizes = [case.params[n].numel() for n in names]

    def update(flat, raw):
        pieces = flat.split(sizes)
        params = {n: p.view_as(case.params[n]) for n, p in zip(names, pieces, strict=True)}
        hparams = {"weight_decay": raw}
        grads = case.problem.train_grads(params, hparams, create_graph=True)
        updates = case.problem.updates(hparams)
        new = [updates[n].rule.step(params[n], grads[n], case.state[n], updates[n].options)[0] for n in names]
        return torch.cat([x.reshape(-1) for x in new])

    flat = torch.cat([case.params[n].reshape(-1) for n in names]).requires_grad_()
    raw = case.hparams["weight_decay"].clone().requires_grad_()
    j_theta, j_raw = torch.autograd.functional.jacobian(update, (flat, raw))
    new = dict(zip(names, update(flat, raw).detach().split(sizes), strict=True))
    v = case.problem.valid_grads({n: x.view_as(case.params[n]) for n, x in new.items()})
    v = torch.cat([v[n].reshape(-1) for n in names])
    a = torch.eye(len(flat), dtype=torch.float64) - j_theta.T
    u = torch.linalg.solve(a.T @ a + 0.5 * torch.eye(len(flat), dtype=torch.float64), a.T @ v)
    assert float(found["weight_decay"]) == pytest.approx(float(u @ j_raw), rel=1e-8)


# --- wrong twins: what the direct solve must reject ---------------------------------------------------------


@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_conjugate_gradients_that_stop_early_are_found_out(condition):
    a, b = system(30, condition)
    found = conjugate_gradient(lambda u: split(a @ join(u)), split(b), iterations=5)
    truth = torch.linalg.solve(a, b)
    assert float((join(found) - truth).norm() / truth.norm()) > 1e-4


def test_a_series_of_a_few_terms_or_with_another_sign_is_found_out():
    a, b = system(6, 10.0)
    truth = torch.linalg.solve(a, b)
    for sign, terms in ((1, 20), (-1, 400)):
        found = neumann(lambda u, sign=sign: split(sign * (join(u) - a @ join(u))), split(b), terms=terms)
        assert float((join(found) - truth).norm() / truth.norm()) > 1e-2
