"""The declaration of a space: what it refuses, and that every engine samples from the same set."""

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import midflight as mf
from midflight import search
from midflight.search.engines.smac import configuration_space, from_config, to_config
from midflight.search.jobs import suggest

MOMENTUM = mf.Float(0.0, 0.9, when={"optimizer": "sgd"})
OPTIMIZER = mf.Categorical(["adam", "sgd"])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({}, "at least one hyperparameter"),
        ({"x": 3}, "x must be a Float, an Int or a Categorical, but got 3"),
        ({"x": mf.Float(0, 1, shape=(3,))}, "a searched Float must be one number, but x has shape"),
        ({"momentum": MOMENTUM}, "the condition of momentum must name another .*names 'optimizer'"),
        ({"a": mf.Int(1, 2, when={"a": 1})}, "the condition of a must name another hyperparameter"),
        (
            {"optimizer": OPTIMIZER, "m": mf.Float(0, 1, when={"optimizer": "rmsprop"})},
            "m requires optimizer='rmsprop', but optimizer must be one of 'adam', 'sgd'",
        ),
        (
            {"n": mf.Int(1, 4), "m": mf.Float(0, 1, when={"n": 5})},
            r"n=5, but n must be a whole number in \[1, 4\]",
        ),
        ({"n": mf.Int(1, 4), "m": mf.Float(0, 1, when={"n": ()})}, "must name a value of n, but names none"),
        ({"x": mf.Float(0, 1), "m": mf.Int(1, 2, when={"x": 0.5})}, "but x is continuous"),
        ({"x": mf.Float(0, 1, online=True), "m": mf.Int(1, 2, when={"x": 1})}, "but x is tuned during"),
        (
            {"a": mf.Int(1, 2, when={"b": 1}), "b": mf.Int(1, 2, when={"a": 1})},
            "must not form a cycle, but those of a, b",
        ),
        (
            {"a": mf.Int(1, 2), "b": mf.Int(1, 2, when={"a": 1}), "c": mf.Int(1, 2, when={"a": 2, "b": 1})},
            r"the condition of c can never hold: it needs a to be one of \[2\], but b .* \[1\]",
        ),
    ],
)
def test_a_space_that_cannot_be_is_refused_with_a_sentence(specs, message):
    with pytest.raises(mf.errors.SpaceError, match=message):
        search.Space(specs)


def test_a_name_declared_twice_is_refused():
    with pytest.raises(mf.errors.SpaceError, match="once, but x is declared twice"):
        search.Space({"x": mf.Int(1, 2)}, x=mf.Float(0, 1))


def test_an_online_whole_number_cannot_even_be_written_and_the_tuner_points_to_the_search():
    with pytest.raises(TypeError, match="online"):
        mf.Int(1, 2, online=True)
    for spec in (mf.Int(1, 2), OPTIMIZER):
        with pytest.raises(
            mf.errors.SpaceError, match=r"has no gradient; declare it in a midflight\.search\.Space"
        ):
            mf.Space(x=spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mf.Int(1.5, 2), "low must be a whole number, but got 1.5"),
        (lambda: mf.Int(2, 2), "low < high must hold"),
        (lambda: mf.Int(0, 2, log=True), "low > 0 must hold for log=True"),
        (lambda: mf.Categorical([]), "at least one value"),
        (lambda: mf.Categorical("adam"), "must be a list"),
        (lambda: mf.Categorical([1, True]), "True came twice"),
        (lambda: mf.Categorical({"a", "b"}), "must be a list"),  # its order differs between processes
        (lambda: mf.Categorical({"a": 1}), "must be a list"),
        (lambda: mf.Categorical(3), "must be a list"),
        (lambda: mf.Int(True, 2), "low must be a whole number"),
        (lambda: search.Space([("x", mf.Int(1, 2))]), "needs a dict of names"),
        (lambda: search.Space({1: mf.Int(1, 2)}), "must be a text, but got 1"),
        (lambda: mf.Categorical([[1], [2]]), "must be a string, a number, a boolean or None"),
    ],
)
def test_bad_declarations_are_refused_with_a_sentence(make, message):
    with pytest.raises(mf.errors.SpaceError, match=message):
        make()


choices = st.lists(st.sampled_from(["a", "b", 3, 0.5, None, True]), min_size=1, max_size=4, unique_by=repr)
kinds = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 90), st.booleans()).map(
        lambda b: mf.Int(b[0], b[0] + b[1], log=b[2])
    ),
    st.tuples(st.floats(1e-4, 1.0), st.floats(1.5, 1e3), st.booleans()).map(
        lambda b: mf.Float(b[0], b[0] * b[1], log=b[2])
    ),
    st.floats(1e-3, 0.5).map(lambda high: mf.Float(high / 2, high, logit=True)),
    choices.map(mf.Categorical),
    st.just(mf.Float(0.0, 1.0, online=True)),
)


@st.composite
def spaces(draw):
    """Up to six hyperparameters, each perhaps under a condition on one or two of those before it."""
    specs = {"root": draw(choices.map(mf.Categorical))}
    for n in range(draw(st.integers(1, 5))):
        spec = draw(kinds)
        parents = [p for p, s in specs.items() if isinstance(s, mf.Int | mf.Categorical)]
        when = {
            parent: tuple(draw(st.lists(st.sampled_from(_values(specs[parent])), min_size=1, max_size=2)))
            for parent in draw(st.lists(st.sampled_from(parents), max_size=2, unique=True))
        }
        specs[f"h{n}"] = type(spec)(**{**vars(spec), "when": when or None})
    try:
        return search.Space(specs)
    except mf.errors.SpaceError:  # two conditions that exclude each other
        return search.Space(root=specs["root"])


def _values(spec):
    return spec.choices if isinstance(spec, mf.Categorical) else (spec.low, spec.high)


def assert_declared(space, config):
    """A configuration holds exactly what its own values make active, each a value of its kind."""
    assert [*config] == [name for name in space.active(config) if name in space.searched]
    for name in space.searched:
        spec = space[name]
        holds = all(config.get(p, ...) in values for p, values in _conditions(spec).items())
        assert (name in config) == holds
        if not holds:
            continue
        if isinstance(spec, mf.Categorical):
            assert config[name] in spec.choices
            assert type(config[name]) in {type(choice) for choice in spec.choices}
        else:
            assert spec.low <= config[name] <= spec.high
            assert isinstance(config[name], int if isinstance(spec, mf.Int) else float)


def _conditions(spec):
    return {p: v if isinstance(v, tuple) else (v,) for p, v in (spec.when or {}).items()}


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(spaces(), st.integers(0, 99))
def test_what_optuna_samples_is_what_was_declared(space, seed):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(8):
        trial = study.ask()
        config = suggest(trial, space)
        assert_declared(space, config)
        for name, found in trial.distributions.items():
            spec = space[name]
            if isinstance(spec, mf.Categorical):
                assert found.choices == spec.choices
            else:
                assert (found.low, found.high, found.log) == (spec.low, spec.high, spec.log)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(spaces(), st.integers(0, 99))
def test_what_configspace_samples_is_what_was_declared(space, seed):
    configs = configuration_space(space, seed)
    assert set(configs) == set(space.searched)
    for sampled in configs.sample_configuration(8):
        config = to_config(space, sampled)
        assert_declared(space, config)
        assert to_config(space, from_config(space, configs, config)) == config


def test_both_translations_reach_every_category_and_both_sides_of_a_condition():
    space = search.Space(
        optimizer=mf.Categorical(["adam", "sgd", None]),
        momentum=mf.Float(0, 1, when={"optimizer": ("sgd", None)}),
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    by_optuna = [suggest(study.ask(), space) for _ in range(60)]
    configs = configuration_space(space, 0)
    by_configspace = [to_config(space, c) for c in configs.sample_configuration(60)]
    for found in (by_optuna, by_configspace):
        seen = {(config["optimizer"], "momentum" in config) for config in found}
        assert seen == {("adam", False), ("sgd", True), (None, True)}


@settings(max_examples=50)
@given(spaces())
def test_a_space_survives_json(space):
    again = search.Space.from_json(space.to_json())
    assert again == space
    assert again.specs == space.specs


def test_a_space_of_numpy_numbers_is_that_of_plain_ones():
    numpy = search.Space(
        n=mf.Int(np.int64(1), np.int8(4)),
        c=mf.Categorical(np.array([1, 2])),
        s=mf.Categorical([np.str_("a"), np.float64(0.5), np.bool_(True)]),
        x=mf.Float(np.float32(0), np.float64(1)),
        d=mf.Float(0, 1, online=True, init=np.float32(0.5), when={"n": np.int64(2)}),
    )
    plain = search.Space(
        n=mf.Int(1, 4), c=mf.Categorical([1, 2]), s=mf.Categorical(["a", 0.5, True]), x=mf.Float(0.0, 1.0),
        d=mf.Float(0, 1, online=True, init=0.5, when={"n": 2}),
    )  # fmt: skip
    assert search.Space.from_json(numpy.to_json()) == plain
    assert not plain.differences(numpy)


def test_distance_is_gowers():
    space = search.Space(
        n=mf.Int(1, 5), lr=mf.Float(1e-4, 1, log=True), o=OPTIMIZER, m=mf.Float(0, 2, when={"o": "sgd"}),
        d=mf.Float(0, 1, online=True),
    )  # fmt: skip
    a = {"n": 1, "lr": 1e-4, "o": "sgd", "m": 0.0}
    assert space.distance(a, a) == 0
    assert space.distance(a, {**a, "n": 5}) == pytest.approx(1 / 4)
    assert space.distance(a, {**a, "lr": 1e-2}) == pytest.approx(0.5 / 4)
    assert space.distance(a, {**a, "m": 1.0}) == pytest.approx(0.5 / 4)
    other = {"n": 1, "lr": 1e-4, "o": "adam"}
    assert space.distance(a, other) == space.distance(other, a) == pytest.approx(2 / 4)
    assert space.distance(other, {**other, "n": 5}) == pytest.approx(1 / 3)  # m is in neither


def test_offline_leaves_nothing_to_tune():
    space = search.Space(n=mf.Int(1, 2), d=mf.Float(0, 1, online=True, when={"n": 2}))
    assert set(space.offline().searched) == {"n", "d"}
    assert not space.offline().online
    assert space.offline()["d"].when == {"n": 2}
