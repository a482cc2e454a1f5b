"""Update rules against central differences and their own autograd, in float64."""

import pytest
import torch

from midflight.gradcheck import OPTIMIZERS
from midflight.updates import RULES, UpdateRule, read_options

ROWS = {
    **OPTIMIZERS,
    "Adam maximize": lambda p: torch.optim.Adam(p, weight_decay=0.1, maximize=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, weight_decay=0.1, amsgrad=True),
    "NAdam decoupled": lambda p: torch.optim.NAdam(
        p, weight_decay=0.1, decoupled_weight_decay=True, maximize=True
    ),
    "RAdam decoupled": lambda p: torch.optim.RAdam(
        p, weight_decay=0.1, decoupled_weight_decay=True, maximize=True
    ),
    "Adamax maximize": lambda p: torch.optim.Adamax(p, weight_decay=0.1, maximize=True),
    "RMSprop centered momentum": lambda p: torch.optim.RMSprop(
        p, weight_decay=0.1, centered=True, momentum=0.9, maximize=True
    ),
    "Adagrad options": lambda p: torch.optim.Adagrad(
        p, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5, maximize=True
    ),
    "Adadelta maximize": lambda p: torch.optim.Adadelta(p, weight_decay=0.1, maximize=True),
    "Adafactor maximize": lambda p: torch.optim.Adafactor(p, weight_decay=0.1, d=1.2, maximize=True),
    "ASGD options": lambda p: torch.optim.ASGD(p, lambd=0.1, weight_decay=0.1, maximize=True),
    "Muon plain": lambda p: torch.optim.Muon(p, nesterov=False, adjust_lr_fn="match_rms_adamw"),
}


def rule_of(row):
    return RULES[type(ROWS[row]([torch.zeros(1, 1)]))]


OPTIONS = [(row, option) for row in ROWS for option in sorted(rule_of(row).tunable)]
STEPS = [0, 8]  # without a state, and beyond the sixth step, at which RAdam's rectification begins


class At:
    """A rule with a random weight, gradient and v after some steps of torch."""

    def __init__(self, row, steps, *, dtype=torch.float64, grad_scale=1.0):
        torch.manual_seed(3)
        self.param = torch.randn(5, 3, dtype=dtype)
        optimizer = ROWS[row]([self.param])
        for group in optimizer.param_groups:
            if isinstance(group.get("eps"), float) and not isinstance(optimizer, torch.optim.Muon):
                group["eps"] = 1e-2  # at 1e-8 many first steps are the sign of g: no derivative to difference
        for _ in range(steps):
            self.param.grad = grad_scale * torch.randn_like(self.param)
            optimizer.step()
        self.rule = RULES[type(optimizer)]
        self.state = optimizer.state[self.param] if steps else {}
        self.options = read_options(optimizer.param_groups[0])
        self.grad = grad_scale * torch.randn_like(self.param)
        self.v = torch.randn_like(self.param)

    def step(self, grad=None, **options):
        grad = self.grad if grad is None else grad
        return self.rule.step(self.param, grad, self.state, {**self.options, **options})[0]

    def pullback(self, rule=None, **options):
        pullback = self.rule.pullback if rule is None else rule.pullback.__get__(self.rule)
        return pullback(self.v, self.param, self.grad, self.state, {**self.options, **options})


def derivative(f, h):
    """df/dx at 0 by differences of order h^4."""
    return float(8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def tuned(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("row", "option"), OPTIONS)
def test_every_tunable_option_is_differentiated_exactly(row, option, steps):
    at = At(row, steps)
    if option == "momentum" and not at.options["momentum"]:
        pytest.skip("torch keeps no buffer at momentum 0: the step is not continuous there")
    value = float(at.options[option]) or 0.01

    def moved(shift):
        # a tensor, for torch keeps NAdam's product of momenta in float32 if they are numbers
        return (at.v * at.step(**{option: torch.tensor(value + shift, dtype=torch.float64)})).sum()

    near_one = ["beta1", "beta2", "alpha", "rho", "momentum"]
    # small beside 1 - beta2 = 1e-3
    truth = derivative(moved, 1e-5 if option in near_one else 1e-3 * abs(value))
    _, found = at.pullback(**{option: tuned(value)})
    # rounding of the difference
    assert float(found[option]) == pytest.approx(truth, rel=1e-6, abs=1e-9)


SMOOTH = [row for row in ROWS if not rule_of(row).why_not_differentiable]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("row", SMOOTH)
def test_the_derivative_with_respect_to_the_gradient_is_exact(row, steps):
    at = At(row, steps)
    w, _ = at.pullback()
    found, truth = torch.empty(2, 5, 3, dtype=torch.float64)
    for i in range(w.numel()):
        one = torch.zeros_like(w)
        one.view(-1)[i] = 1.0
        found.view(-1)[i] = w.view(-1)[i]
        truth.view(-1)[i] = derivative(
            lambda shift, one=one: (at.v * at.step(at.grad + shift * one)).sum(), h=1e-4
        )
    # difference: 1e-16 / h of rounding, and h^4 beside gradients as small as eps = 1e-2
    assert float((found - truth).norm() / truth.norm()) < 1e-6


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("row", [row for row in ROWS if "pullback" in vars(type(rule_of(row)))])
def test_closed_form_pullback_equals_autograd_through_the_step(row, steps):
    at = At(row, steps)
    decay = tuned(0.1)
    w, options = at.pullback(weight_decay=decay)
    w_auto, options_auto = at.pullback(UpdateRule, weight_decay=decay)
    torch.testing.assert_close(w, w_auto)
    torch.testing.assert_close(options["weight_decay"], options_auto["weight_decay"])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("row", "option"), OPTIONS)
def test_a_gradient_of_exactly_zero_gives_finite_derivatives(row, option, steps):
    at = At(row, steps, dtype=torch.float32, grad_scale=0.0)
    at.options["weight_decay"] = 0.0
    if "eps" in at.options:
        at.options["eps"] = ROWS[row]([torch.zeros(1, 1)]).param_groups[0]["eps"]
    value = tuned(0.01, torch.float32)
    w, found = at.pullback(**{option: value})
    for x in (at.step(), at.step(**{option: value}), w, found[option]):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize(
    ("dtype", "option_dtype"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
@pytest.mark.parametrize(("row", "option"), OPTIONS)
def test_an_option_may_be_a_scalar_tensor_of_another_dtype(row, option, dtype, option_dtype):
    at = At(row, 8, dtype=dtype)
    value = float(at.options[option]) or 0.01
    new = at.step(**{option: tuned(value, option_dtype)})
    _, found = at.pullback(**{option: tuned(value, option_dtype)})
    assert new.dtype == dtype
    assert found[option].shape == ()
    # a float32 option leaves 6e-5 of 1 - beta2 = 1e-3
    torch.testing.assert_close(new, at.step(**{option: value}), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in SMOOTH])
def test_a_rule_that_is_not_differentiable_has_derivatives_by_its_options_only(row):
    at = At(row, 3)
    w, options = at.pullback(lr=tuned(0.02))
    assert not w.any()
    assert options["lr"] != 0
    assert not at.pullback()[0].any()  # nor does it need a tuned option


def test_radam_is_not_adaptive_before_its_sixth_step():
    before, after = At("RAdam", 4), At("RAdam", 5)
    for option, value in (("beta2", 0.999), ("eps", 1e-2)):
        assert before.pullback(**{option: tuned(value)})[1][option] == 0
        assert after.pullback(**{option: tuned(value)})[1][option] != 0


def test_rmsprop_keeps_a_variance_that_rounds_below_zero_finite():
    rule, options = RULES[torch.optim.RMSprop], At("RMSprop centered", 0).options
    param, grad = torch.ones(4), torch.full((4,), 0.1)
    state = {}
    for _ in range(2000):  # a gradient that never changes has variance 0
        param, state = rule.step(param, grad, state, options)
        w, _ = rule.pullback(torch.ones(4), param, grad, state, options)
        assert torch.isfinite(param).all()
        assert torch.isfinite(w).all()


# --- wrong twins: what the central difference must reject ---------------------------------------------------


class AsIfSGD(UpdateRule):
    """Takes each step for one along the gradient: w = -lr v."""

    def pullback(self, v, param, grad, state, options):
        return -options["lr"] * v, {}


class HoldsTheScale(UpdateRule):
    """Takes Adam's denominator for a constant."""

    def pullback(self, v, param, grad, state, options):
        t = float(state["step"]) + 1
        second = options["beta2"] * state["exp_avg_sq"] + (1 - options["beta2"]) * grad * grad
        root = (second / (1 - options["beta2"] ** t)).sqrt() + options["eps"]
        return -options["lr"] * (1 - options["beta1"]) / (1 - options["beta1"] ** t) * v / root, {}


class WithoutBiasCorrection(UpdateRule):
    """Takes an early step for one in the long run."""

    def pullback(self, v, param, grad, state, options):
        late = {**state, "step": torch.tensor(1e6)}
        return RULES[torch.optim.Adam].pullback(v, param, grad, late, options)


class TakesDecoupledForCoupled(UpdateRule):
    """Lets the decay of AdamW go through the moments."""

    def pullback(self, v, param, grad, state, options):
        other = {**options, "decoupled_weight_decay": not options["decoupled_weight_decay"]}
        return RULES[torch.optim.AdamW].pullback(v, param, grad, state, other)


def error_of_w(row, pullback_of):
    """|w - truth| / |truth| for the w that another rule would give."""
    at = At(row, 8)
    w, truth = at.pullback(pullback_of)[0].reshape(-1), torch.empty(15, dtype=torch.float64)
    for i in range(15):
        one = torch.eye(15, dtype=torch.float64)[i].view(5, 3)
        truth[i] = derivative(lambda shift, one=one: (at.v * at.step(at.grad + shift * one)).sum(), h=1e-4)
    return float((w - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("row", "twin"),
    [
        *((row, AsIfSGD) for row in SMOOTH if row not in ("SGD", "ASGD", "ASGD options")),
        *((row, HoldsTheScale) for row in ("Adam", "AdamW")),
        *((row, WithoutBiasCorrection) for row in ("Adam", "AdamW")),
        *((row, TakesDecoupledForCoupled) for row in ("Adam maximize", "AdamW amsgrad")),
    ],
)
def test_a_wrong_derivative_by_the_gradient_is_found_out(row, twin):
    assert error_of_w(row, twin) > 1e-3


@pytest.mark.parametrize("row", ["Adam", "Adam maximize", "AdamW", "NAdam decoupled", "RAdam decoupled"])
def test_the_derivative_by_decay_of_the_other_kind_is_found_out(row):
    at = At(row, 8)
    other = not at.options["decoupled_weight_decay"]
    truth = float(at.pullback(weight_decay=tuned(0.1))[1]["weight_decay"])
    wrong = float(at.pullback(weight_decay=tuned(0.1), decoupled_weight_decay=other)[1]["weight_decay"])
    assert abs(wrong / truth - 1) > 1e-3
