"""Spaces and transforms: what holds for any bounds and values."""

import json
import math
import numbers

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import midflight as mf

bounds = st.tuples(st.floats(1e-6, 1e3), st.floats(1.01, 1e4)).map(lambda b: (b[0], b[0] * b[1]))


@given(bounds, st.floats(0, 1), st.booleans())
def test_value_and_raw_are_inverse_and_stay_inside(interval, raw, log):
    low, high = interval
    transform = mf.Float(low, high, log=log).transform
    value = float(transform.value(torch.tensor(raw, dtype=torch.float64)))
    assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
    back = transform.raw(torch.tensor(value, dtype=torch.float64))
    assert float(back) == pytest.approx(raw, abs=1e-9)


@given(bounds, st.booleans())
def test_transforms_increase_from_low_to_high(interval, log):
    low, high = interval
    transform = mf.Float(low, high, log=log).transform
    values = transform.value(torch.linspace(0, 1, 11, dtype=torch.float64))
    assert bool((values.diff() > 0).all())
    assert float(values[0]) == pytest.approx(low)
    assert float(values[-1]) == pytest.approx(high)


def test_log_gradient_has_the_factor_ln10_times_value_per_decade():
    space = mf.Space({"l2": mf.Float(1e-5, 1e-2, log=True, init=1e-3)}, dtype=torch.float64)
    space.requires_grad_()
    (slope,) = torch.autograd.grad(space["l2"].value, space["l2"].raw)
    assert float(slope) == pytest.approx(math.log(10) * 3 * 1e-3)  # three decades per unit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 1.0), "low < high must hold, but low=1.0 and high=1.0"),
        ((2.0, 1.0), "low < high"),
        ((0.0, 1.0, True), "low > 0 must hold for log=True, but low=0.0; pass log=False or a positive low"),
        ((0.0, 1.0, False, 2.0), r"init in \[0, 1\] is needed, but got 2"),
        ((0.0, math.nan), "high must be a finite number, but high=nan"),
        ((math.nan, 1.0), "low must be a finite number"),
        ((0.0, math.inf), "high must be a finite number, but high=inf"),
        ((-math.inf, 0.0), "low must be a finite number"),
        ((True, 2), "low must be a finite number, but low=True"),
        (("0", 2), "low must be a finite number, but low='0'"),
        ((None, 2), "low must be a finite number"),
        ((0.0, 1.0, False, math.nan), r"init in \[0, 1\] is needed, but got nan"),
        ((0.0, 1.0, False, True), "init must be a number or a list of numbers, but got True"),
        ((0.0, 1.0, False, "much"), "init must be a number or a list of numbers, but got 'much'"),
    ],
)
def test_bad_bounds_are_refused_with_a_sentence(arguments, message):
    with pytest.raises(mf.errors.SpaceError, match=message):
        mf.Float(*arguments)


@pytest.mark.parametrize("shape", [3, (0,), (-1,), (2.0,), (True,), "ab", None])
def test_a_shape_that_cannot_be_is_refused(shape):
    with pytest.raises(mf.errors.SpaceError, match="shape must be a tuple of whole numbers"):
        mf.Float(0, 1, shape=shape)


def test_bounds_from_numpy_and_shapes_in_lists_are_taken():
    spec = mf.Float(np.float32(0.5), np.int64(2), shape=[2, 3])
    assert mf.Space(x=spec)["x"].value.shape == (2, 3)
    assert hash(spec) == hash(mf.Float(0.5, 2, shape=(2, 3)))


@pytest.mark.parametrize("name", ["", None, 3, ("a",)])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(mf.errors.SpaceError, match="name must be a printable text"):
        mf.Space({name: mf.Float(0, 1)})


@pytest.mark.parametrize(
    "spec", [mf.Float(0.0, 1e39), mf.Float(1e-60, 1.0, log=True), mf.Float(1.0, 1.0 + 1e-9)]
)
def test_a_range_that_float32_cannot_hold_is_refused_but_float64_holds_it(spec):
    with pytest.raises(mf.errors.SpaceError, match=r"the range of x must fit into torch.float32"):
        mf.Space(x=spec)
    assert spec.low <= float(mf.Space({"x": spec}, dtype=torch.float64)["x"]) <= spec.high


def test_an_empty_space_and_a_foreign_entry_are_refused():
    with pytest.raises(mf.errors.SpaceError, match="at least one"):
        mf.Space()
    with pytest.raises(mf.errors.SpaceError, match="must be a Float"):
        mf.Space(layers=3)
    with pytest.raises(mf.errors.UnknownName, match="noise"):
        mf.Space(noise=mf.Float(0, 1))["nose"]


def test_a_hyperparameter_stands_wherever_a_tensor_can():
    space = mf.Space(a=mf.Float(0, 10, init=3), b=mf.Float(0, 10, init=2))
    a, b, x = space["a"], space["b"], torch.tensor([1.0, 2.0])
    for found, expected in [
        (a + b, 5), (a - b, 1), (a * b, 6), (a / b, 1.5), (a**b, 9), (-a, -3), (1 + a, 4), (1 - a, -2),
        (2 * a, 6), (6 / a, 2), (2**a, 8),
    ]:  # fmt: skip
        torch.testing.assert_close(found, torch.tensor(float(expected)))
    torch.testing.assert_close(x * a, x * 3)
    torch.testing.assert_close(torch.stack([a, b]), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(torch.where(x > 1, a, b), torch.tensor([2.0, 3.0]))
    assert bool(a > b)
    assert float(a) == 3


def test_a_hyperparameter_is_a_number_for_those_who_print_and_log():
    space = mf.Space(x=mf.Float(0, 10, init=3.14159), each=mf.Float(0, 1, shape=(2,), init=[0.25, 0.5]))
    x = space["x"]
    space.requires_grad_()
    assert f"{x:.3f} {x:8.1e}" == "3.142  3.1e+00"
    assert f"{x}" == repr(x)
    assert round(x, 2) == 3.14
    assert np.isscalar(x)  # as TensorBoard's make_np asks, which then takes np.array([x])
    assert isinstance(x, numbers.Number)
    assert np.array([x]) == pytest.approx([3.14159])
    assert np.asarray(x).shape == ()
    assert np.mean([x, 1.0]) == pytest.approx(2.070795)
    assert np.asarray(space["each"], dtype=np.float32).tolist() == [0.25, 0.5]
    assert json.loads(json.dumps(space.as_dict())) == space.as_dict()
    assert math.sqrt(x) == pytest.approx(3.14159**0.5)
    assert x.raw.requires_grad


def test_tensorboard_takes_a_hyperparameter():
    tensorboard = pytest.importorskip("torch.utils.tensorboard.summary", exc_type=ImportError)
    space = mf.Space(x=mf.Float(0, 10, init=2.5))
    assert tensorboard.scalar("x", space["x"]).value[0].simple_value == 2.5


def test_numbers_of_numpy_leave_the_gradient_to_the_hyperparameter():
    space = mf.Space(x=mf.Float(0, 10, init=3))
    x = space["x"]
    space.requires_grad_()
    for found, expected in [(np.float64(2) * x, 6), (np.float32(1) - x, -2), (x / np.float64(2), 1.5)]:
        assert isinstance(found, torch.Tensor)
        assert found.requires_grad
        assert float(found.detach()) == expected


def test_hyperparameters_are_no_parameters_or_buffers_of_the_model():
    space = mf.Space(noise=mf.Float(0, 1))
    layer = mf.nn.GaussianNoise(space["noise"]).double()
    assert list(layer.parameters()) == []
    assert list(layer.buffers()) == []
    assert layer.std is space["noise"]


@pytest.mark.parametrize("scale", [{}, {"log": True}, {"logit": True}])
@pytest.mark.parametrize("raw", [0.0, 1.0])
def test_values_read_at_a_bound_can_be_set_again(scale, raw):
    space = mf.Space(x=mf.Float(0.001, 0.8, **scale))
    space["x"].raw.fill_(raw)
    space.set(**space.as_dict())
    assert float(space["x"].raw) == pytest.approx(raw, abs=1e-6)


def test_state_round_trips_and_refuses_another_space():
    space = mf.Space(a=mf.Float(0, 1, init=0.3), b=mf.Float(1e-3, 1, log=True))
    state = space.state_dict()
    space.set(a=0.9, b=0.01)
    space.load_state_dict(state)
    assert space.as_dict()["a"] == pytest.approx(0.3)
    with pytest.raises(mf.errors.SpaceError, match="same space"):
        mf.Space(c=mf.Float(0, 1)).load_state_dict(state)


SCALES = {"linear": {}, "log": {"log": True}, "logit": {"logit": True}}


@given(
    st.tuples(st.floats(0.01, 0.4), st.floats(0.6, 0.99)),
    st.tuples(st.floats(0.001, 0.01), st.floats(0.99, 0.999)),
    st.sampled_from(sorted(SCALES)),
    st.sampled_from(sorted(SCALES)),
    st.floats(0, 1),
)
def test_a_state_loaded_into_a_wider_range_or_another_scale_keeps_the_value(narrow, wide, a, b, raw):
    saved = mf.Space({"x": mf.Float(*narrow, **SCALES[a])}, dtype=torch.float64)
    saved["x"].raw.fill_(raw)
    loaded = mf.Space({"x": mf.Float(*wide, **SCALES[b])}, dtype=torch.float64)
    loaded.load_state_dict(saved.state_dict())
    assert float(loaded["x"]) == pytest.approx(float(saved["x"]), rel=1e-9)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    saved = mf.Space(a=mf.Float(0, 1, init=0.9), b=mf.Float(0, 8, init=7, shape=(2,)))
    for specs, message in [
        (
            {"b": mf.Float(0, 5, shape=(2,))},
            r"the saved b does not fit: a value in \[0, 5\] is needed, but got 7",
        ),
        ({"b": mf.Float(0, 8, shape=(3,))}, r"b must have shape \(3,\), but was saved with \(2,\)"),
        ({"b": mf.Float(0, 8)}, r"b must have shape \(\), but was saved with \(2,\)"),
    ]:
        space = mf.Space({"a": mf.Float(0, 1, init=0.3), **specs})
        before = space.as_dict()
        with pytest.raises(mf.errors.SpaceError, match=message):
            space.load_state_dict(saved.state_dict())
        assert space.as_dict() == before


def test_a_state_survives_torch_save_bit_for_bit(tmp_path):
    space = mf.Space(a=mf.Float(1e-5, 1, log=True, init=0.3), b=mf.Float(0.1, 0.9, logit=True, shape=(2,)))
    torch.save(space.state_dict(), tmp_path / "space.pt")
    raws = {name: raw.clone() for name, raw in space.raws.items()}
    space.set(a=0.5, b=[0.2, 0.3])
    space.load_state_dict(torch.load(tmp_path / "space.pt", weights_only=True))
    assert all(torch.equal(raw, raws[name]) for name, raw in space.raws.items())


def test_a_state_of_raw_coordinates_alone_is_taken_in_the_range_of_now():
    space = mf.Space(a=mf.Float(0, 2))
    space.load_state_dict({"raw": {"a": torch.tensor(0.25)}})
    assert float(space["a"]) == 0.5


def test_seeing_the_values_at_other_raws_ends_with_the_block():
    space = mf.Space(a=mf.Float(0, 1, init=0.3), b=mf.Float(0, 1, init=0.1))
    with space.seeing(space.values({"a": torch.tensor(0.7)})):
        assert float(space["a"]) == pytest.approx(0.7)
        assert float(space["b"]) == 0.1
    assert float(space["a"]) == 0.3
    assert space.values()["a"] == space["a"].value


def test_noise_is_drawn_with_the_floor_below_it_and_keeps_its_gradient():
    space = mf.Space({"noise": mf.Float(0, 1, init=0.0)}, dtype=torch.float64)
    space.requires_grad_()
    layer = mf.nn.GaussianNoise(space["noise"])
    x = torch.zeros(20_000, dtype=torch.float64)
    noisy = layer(x)
    assert float(noisy.detach().std()) == pytest.approx(0.05, rel=0.05)  # 5 % of the range
    (gradient,) = torch.autograd.grad(noisy.square().mean(), space["noise"].raw)
    assert float(gradient) == pytest.approx(2 * 0.05, rel=0.05)  # d std^2 / d std at the floor
    assert torch.equal(layer.eval()(x), x)


def test_a_space_says_which_values_stand_at_a_bound():
    space = mf.Space(
        low=mf.Float(0, 1, init=0.0), high=mf.Float(1e-3, 1, log=True, init=1.0), between=mf.Float(0, 2),
        some=mf.Float(0, 1, shape=(4,), init=[0.0, 1.0, 1.0, 0.5]),
    )  # fmt: skip
    low, high, between, some = repr(space).splitlines()
    assert low.endswith("[0, 1], at the lower bound)")
    assert high.endswith("[0.001, 1], at the upper bound)")
    assert between.endswith("[0, 2])")
    assert some.endswith("1 of 4 at the lower bound, 2 of 4 at the upper bound)")


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [((0.0, 0.5), r"write x=mf\.Float\(0\.0, 0\.5\)\."), (0.3, r"write x=mf\.Float\(low, high\)\.")],
    ids=str,
)
def test_what_is_no_float_is_refused_with_what_to_write(spec, remedy):
    with pytest.raises(mf.errors.SpaceError, match=remedy):
        mf.Space(x=spec)


@pytest.mark.parametrize(
    ("use", "instead"),
    [
        (lambda h, x, y: torch.nn.Dropout(h)(x), r"use mf\.nn\.Dropout\(space"),
        (lambda h, x, y: F.dropout(x, p=h), r"use mf\.nn\.Dropout\(space"),
        (lambda h, x, y: F.cross_entropy(x, y, label_smoothing=h), r"use mf\.nn\.losses\.cross_entropy"),
        (lambda h, x, y: F.leaky_relu(x, h), "write it with operations on tensors"),
    ],
    ids=["Dropout", "dropout", "cross_entropy", "leaky_relu"],
)
def test_a_function_that_takes_numbers_only_says_what_to_use_instead(use, instead):
    space = mf.Space(x=mf.Float(0, 0.5))
    space.requires_grad_()
    with pytest.raises(TypeError, match=f"a plain number where it was given a hyperparameter.*{instead}"):
        use(space["x"], torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))


def test_an_error_that_is_not_the_hyperparameters_stays_as_it_is():
    with pytest.raises(TypeError, match="matmul"):
        torch.matmul("a", mf.Space(x=mf.Float(0, 1))["x"])


@pytest.mark.parametrize(
    ("high", "init", "now", "usual"),
    [
        (0.8, 0.2, 0.2, 0.8),
        (800.0, 0.2, 0.2, 4.0),
        (800.0, 0.2, 10.0, 60.0),
        (800.0, 0.0, 0.0, 45.0 * 45.0 / 800.0),
    ],
)
def test_a_step_on_a_linear_scale_depends_on_the_values_and_not_on_the_width(high, init, now, usual):
    transform = mf.Float(0.0, high, init=init).transform
    stride = transform.stride(transform.raw(torch.tensor(now)))
    assert high * float(stride) == pytest.approx(usual, rel=1e-4)


def test_a_step_in_an_absurdly_wide_range_is_not_lost_in_rounding():
    transform = mf.Float(-1e6, 1e6, init=0.0).transform
    raw = transform.raw(torch.tensor(0.0))
    assert float(raw + 0.08 * transform.stride(raw)) != float(raw)
