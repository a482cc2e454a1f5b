"""The implicit estimator against torch.linalg.solve and against dense linear algebra."""

import pytest
import torch

import midflight as mf
from midflight._tensors import add_scaled
from midflight.gradcheck import OPTIMIZERS, compare, loss_after, make_case, why_skipped
from midflight.hypergrad import ImplicitNeumann, Unrolled, implicit
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


def solved(a, b, terms):
    """A^-1 b by the estimator: U(theta, h) = (I - A) theta + h by plain SGD with lr 1, C2 = <b, theta>."""
    problem = mf.hypergrad.Problem(
        train_loss=lambda p, hp: join(p) @ (a @ join(p)) / 2 - join(p) @ hp["h"],
        valid_loss=lambda p: b @ join(p),
        updates=lambda _: {n: Update(SGD(), {**SGD_OPTIONS, "lr": 1.0}) for n in ("a", "b")},
    )
    zeros, state = torch.zeros_like(b), {"a": {}, "b": {}}
    return mf.hypergradient(problem, split(zeros), {"h": zeros}, state, ImplicitNeumann(terms))["h"]


def error(found, truth):
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("n", [3, 6, 30])
def test_the_neumann_series_equals_a_direct_solve(n):
    a, b = system(n, 10.0)
    assert error(solved(a, b, terms=400), torch.linalg.solve(a, b)) < 1e-10  # 0.9^400 = 5e-19


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


def test_the_implicit_estimator_equals_the_derivative_of_the_minimum():
    problem, minimum, xv, yv = ridge()
    l2 = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    theta = minimum(l2)
    (truth,) = torch.autograd.grad(((xv @ theta - yv) ** 2).mean() / 2, l2)
    params, state = split(theta.detach()), {"a": {}, "b": {}}
    found = mf.hypergradient(problem(0.1), params, {"l2": l2.detach()}, state, ImplicitNeumann(terms=3000))
    assert float(found["l2"]) == pytest.approx(float(truth), rel=1e-8)
    # one step sees the learning rate's share of it only
    one = mf.hypergradient(problem(0.1), params, {"l2": l2.detach()}, state)
    assert abs(float(one["l2"])) < 0.5 * abs(float(truth))
    assert loss_after(problem(0.1), params, {"l2": l2.detach()}, state) > 0


def test_the_series_on_a_rule_with_momentum_equals_dense_algebra():
    case = make_case("Adam", "weight_decay")
    found = mf.hypergradient(case.problem, case.params, case.hparams, case.state, ImplicitNeumann(terms=5))
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
    u = sum(torch.linalg.matrix_power(j_theta.T, k) @ v for k in range(5))
    assert float(found["weight_decay"]) == pytest.approx(float(u @ j_raw), rel=1e-8)


# --- wrong twins: what the direct solve must reject ---------------------------------------------------------


def test_a_series_of_a_few_terms_is_found_out():
    a, b = system(6, 10.0)
    assert error(solved(a, b, terms=20), torch.linalg.solve(a, b)) > 1e-2


def test_a_series_with_another_sign_is_found_out(monkeypatch):
    monkeypatch.setattr(implicit, "add_scaled", lambda a, b, scale: add_scaled(a, b, -scale))
    a, b = system(6, 10.0)
    assert error(solved(a, b, terms=400), torch.linalg.solve(a, b)) > 1e-2
