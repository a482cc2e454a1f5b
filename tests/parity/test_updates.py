"""Each update rule equals its optimiser over 16 random steps."""

import sys

import pytest
import torch

from midflight.errors import UnsupportedOptimizer
from midflight.updates import REFUSED, RULES, BlackBox, read_options, rule_for

# name -> (class of the optimiser, its options); also for an optimiser that is not in torch
CASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD maximize": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam options": (torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "Adam maximize": (torch.optim.Adam, {"maximize": True, "weight_decay": 0.1}),
    "Adam decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "Adam foreach": (torch.optim.Adam, {"foreach": True, "weight_decay": 0.1}),
    "Adam fused": (torch.optim.Adam, {"fused": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW amsgrad": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "AdamW fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "NAdam options": (
        torch.optim.NAdam,
        {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "momentum_decay": 0.1},
    ),
    "NAdam decoupled": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "NAdam maximize": (torch.optim.NAdam, {"weight_decay": 0.1, "maximize": True}),
    "NAdam foreach": (torch.optim.NAdam, {"weight_decay": 0.1, "foreach": True}),
    "RAdam": (torch.optim.RAdam, {}),
    "RAdam options": (
        torch.optim.RAdam,
        {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "RAdam never rectified": (torch.optim.RAdam, {"betas": (0.8, 0.6)}),
    "RAdam decoupled": (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam maximize": (torch.optim.RAdam, {"weight_decay": 0.1, "maximize": True}),
    "RAdam foreach": (torch.optim.RAdam, {"weight_decay": 0.1, "foreach": True}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adamax options": (
        torch.optim.Adamax,
        {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "Adamax maximize": (torch.optim.Adamax, {"weight_decay": 0.1, "maximize": True}),
    "Adamax foreach": (torch.optim.Adamax, {"weight_decay": 0.1, "foreach": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop options": (torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
    "RMSprop centered": (torch.optim.RMSprop, {"centered": True, "weight_decay": 0.1}),
    "RMSprop momentum": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "maximize": True}),
    "RMSprop foreach": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "foreach": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adagrad options": (
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
    ),
    "Adagrad maximize": (torch.optim.Adagrad, {"weight_decay": 0.1, "maximize": True}),
    "Adagrad foreach": (torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "foreach": True}),
    "Adagrad fused": (torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "fused": True}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adadelta options": (
        torch.optim.Adadelta,
        {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
    ),
    "Adadelta foreach": (torch.optim.Adadelta, {"weight_decay": 0.1, "foreach": True}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Adafactor options": (
        torch.optim.Adafactor,
        {"lr": 0.2, "beta2_decay": -0.5, "eps": (1e-3, 2.0), "d": 1.5, "weight_decay": 0.1},
    ),
    "Adafactor maximize": (torch.optim.Adafactor, {"weight_decay": 0.1, "maximize": True}),
    "Adafactor foreach": (torch.optim.Adafactor, {"weight_decay": 0.1, "foreach": True}),
    "ASGD": (torch.optim.ASGD, {}),
    "ASGD options": (
        torch.optim.ASGD,
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 4, "weight_decay": 0.1, "maximize": True},
    ),
    "ASGD foreach": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.1, "t0": 10, "foreach": True}),
    "Muon": (torch.optim.Muon, {}),
    "Muon options": (
        torch.optim.Muon,
        {"lr": 0.1, "momentum": 0.8, "nesterov": False, "weight_decay": 0.0, "ns_steps": 3},
    ),
    "Muon adjusted": (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw", "eps": 10.0}),
}

CAPTURABLE = ["Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "ASGD"]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request, monkeypatch):
    """The dtype of the weights; in float64 torch's Muon is kept from rounding to bfloat16, as ours."""
    if request.param == torch.float64:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    return request.param


def assert_equal_up_to_rounding(ours, theirs, scale=1.0):
    # 16 steps of a few ulp each
    tolerance = scale * {torch.float32: 2e-5, torch.float64: 1e-12}[theirs.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


SHAPES = [
    (name, shape)
    for name, (make, _) in CASES.items()
    for shape in ([(7, 5), (3, 8)] if make is torch.optim.Muon else [(7, 5), (6,), ()])
]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_rule_equals_torch_over_16_random_steps(name, shape, dtype):
    make, options = CASES[name]
    ours = torch.randn(shape, dtype=dtype)
    theirs = ours.clone()
    optimizer = make([theirs], **options)
    rule = rule_for(optimizer)
    state = {}
    for _ in range(16):
        theirs.grad = torch.randn(shape, dtype=dtype)
        ours, state = rule.step(ours, theirs.grad, state, read_options(optimizer.param_groups[0]))
        optimizer.step()
        # the foreach form of ASGD takes a power in float32
        scale = 1e6 if name == "ASGD foreach" and dtype == torch.float64 else 1.0
        assert_equal_up_to_rounding(ours, theirs, scale)
    assert set(state) == set(optimizer.state[theirs])


@pytest.mark.parametrize("name", CASES)
def test_rule_goes_on_from_torchs_own_state(name, dtype):
    make, options = CASES[name]
    weight = torch.randn(7, 5, dtype=dtype)
    optimizer = make([weight], **options)
    for _ in range(8):  # RAdam's rectification begins at the sixth
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    weight.grad = torch.randn_like(weight)
    expected, state = rule_for(optimizer).step(
        weight.clone(), weight.grad, optimizer.state[weight], read_options(optimizer.param_groups[0])
    )
    optimizer.step()
    assert_equal_up_to_rounding(expected, weight)
    for key, x in optimizer.state[weight].items():
        # scalars of the state are float32
        torch.testing.assert_close(state[key], x, rtol=1e-6, atol=1e-6, check_dtype=x.ndim > 0)


@pytest.mark.parametrize("switch", ["capturable", "differentiable"])
@pytest.mark.parametrize("optimizer", CAPTURABLE)
def test_rule_equals_torch_when_its_scalars_are_tensors(optimizer, switch, monkeypatch):
    make = getattr(torch.optim, optimizer)
    monkeypatch.setattr(  # capturable asks for a GPU, but its arithmetic does not
        sys.modules[make.__module__], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"]
    )
    ours = torch.randn(7, 5, dtype=torch.float64)
    theirs = ours.clone()
    optimizer = make([theirs], lr=0.02, weight_decay=0.1, **{switch: True})
    state = {}
    for _ in range(16):
        theirs.grad = torch.randn(7, 5, dtype=torch.float64)
        options = read_options(optimizer.param_groups[0])
        ours, state = rule_for(optimizer).step(ours, theirs.grad, state, options)
        optimizer.step()
        # torch corrects the bias in float32: 1 - 0.999 is good to 6e-5, once per step of length 0.02
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (32, 32)], ids=str)
def test_muon_rounds_to_bfloat16_exactly_where_torch_does(shape):
    ours = torch.randn(shape)
    theirs = ours.clone()
    optimizer = torch.optim.Muon([theirs])
    state = {}
    for _ in range(5):
        # of low rank but for noise: one digit rounded elsewhere would grow to percents of the step
        theirs.grad = torch.randn(shape[0], 1) @ torch.randn(1, shape[1]) + 0.01 * torch.randn(shape)
        ours, state = rule_for(optimizer).step(
            ours, theirs.grad, state, read_options(optimizer.param_groups[0])
        )
        optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_every_optimizer_of_torch_has_a_rule_or_a_refusal():
    everything = {
        x for x in vars(torch.optim).values() if isinstance(x, type) and x is not torch.optim.Optimizer
    }
    assert everything <= set(RULES) | set(REFUSED)


@pytest.mark.parametrize(
    ("optimizer", "advice"), [("LBFGS", "use SGD"), ("Rprop", "use RMSprop"), ("SparseAdam", "sparse=False")]
)
def test_a_refusal_says_what_to_do(optimizer, advice):
    with pytest.raises(UnsupportedOptimizer, match=advice):
        rule_for(getattr(torch.optim, optimizer)([torch.zeros(1)]))


def test_a_subclass_steps_as_its_base_unless_it_has_a_step_of_its_own():
    class WithDefaults(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1, momentum=0.9)

    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    weights = [torch.nn.Parameter(torch.zeros(1))]
    assert rule_for(WithDefaults(weights)) is RULES[torch.optim.SGD]
    assert isinstance(rule_for(Mine(weights, lr=0.1)), BlackBox)


# --- wrong twins: what the comparison with torch must reject ------------------------------------------------


class IgnoresOption:
    """A rule that takes an option for another value."""

    def __init__(self, rule, option, value):
        self._rule, self._changed = rule, {option: value}

    def step(self, param, grad, state, options):
        return self._rule.step(param, grad, state, {**options, **self._changed})


class ForgetsState:
    """A rule that finds zeros in one part of its state."""

    def __init__(self, rule, key):
        self._rule, self._key = rule, key

    def step(self, param, grad, state, options):
        known = {key: torch.zeros_like(x) if key == self._key else x for key, x in state.items()}
        return self._rule.step(param, grad, known, options)


def differs_from_torch(rule, name):
    """Whether weights or state are others than torch's after 20 steps."""
    make, options = CASES[name]
    torch.manual_seed(0)
    ours = torch.randn(7, 5, dtype=torch.float64)
    theirs = ours.clone()
    optimizer, state = make([theirs], **options), {}
    for _ in range(20):
        theirs.grad = torch.randn_like(theirs)
        ours, state = rule.step(ours, theirs.grad, state, read_options(optimizer.param_groups[0]))
        optimizer.step()
    if state.keys() != optimizer.state[theirs].keys():
        return True
    pairs = [(ours, theirs), *((state[key], x) for key, x in optimizer.state[theirs].items())]
    return any(not torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6) for a, b in pairs)


def options_that_matter():
    for name, (make, _) in CASES.items():
        if "foreach" in name or "fused" in name:
            continue
        ours, usual = (
            read_options(make([torch.zeros(2, 2)], **o).param_groups[0]) for o in (CASES[name][1], {})
        )
        yield from ((name, option, usual[option]) for option in ours if ours[option] != usual[option])


def states_that_matter():
    """(optimiser, part of its state) -> the cases that have it."""
    found = {}
    for name, (make, _) in CASES.items():
        if "foreach" not in name and "fused" not in name:
            for key in stepped(name):
                found.setdefault((make, key), []).append(name)
    return found


def stepped(name):
    make, options = CASES[name]
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer = make([weight], **options)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    return list(optimizer.state[weight])


STATES = states_that_matter()


@pytest.mark.parametrize(("name", "option", "value"), list(options_that_matter()))
def test_a_rule_that_ignores_an_option_is_found_out(name, option, value, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    rule = RULES[CASES[name][0]]
    assert not differs_from_torch(rule, name)
    assert differs_from_torch(IgnoresOption(rule, option, value), name)


@pytest.mark.parametrize(("make", "key"), STATES)
def test_a_rule_that_forgets_a_part_of_its_state_is_found_out_by_a_case(make, key, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    twin = ForgetsState(RULES[make], key)
    assert any(differs_from_torch(twin, name) for name in STATES[make, key])
