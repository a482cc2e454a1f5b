"""Arguments that cannot be right are refused in a sentence; values are numbers where a number can stand."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from loops import Loop, data, network, noisy_loop
from torch import nn

import midflight as mf

NO_COUNTS = [math.nan, math.inf, 0, -1, 1.5, 10.0, True, False, "5", np.float64(3)]


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("name", ["total_steps", "examples", "schedule"])
def test_a_count_that_is_no_whole_number_of_at_least_1_is_refused(name, value):
    with pytest.raises((ValueError, TypeError), match=r"whole number|schedule must be"):
        noisy_loop().attach(**{name: value})


def test_a_schedule_that_is_no_whole_number_is_named():
    with pytest.raises(ValueError, match="schedule must be a whole number of at least 1, but schedule=0"):
        noisy_loop().attach(schedule=0)


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("kind", [mf.Every, mf.FrontLoaded])
def test_a_schedule_of_no_whole_number_is_refused(kind, value):
    with pytest.raises(ValueError, match="whole number"):
        kind(value)


@pytest.mark.parametrize("share", [math.nan, math.inf, 0, -0.1, 1.5, True])
def test_a_budget_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match="0 < share <= 1"):
        mf.TimeBudget(share)


@pytest.mark.parametrize("norm", [0, -1.0, math.nan, True])
def test_a_norm_that_is_not_positive_is_refused(norm):
    with pytest.raises(ValueError, match="max_grad_norm"):
        noisy_loop().attach(max_grad_norm=norm)


@pytest.mark.parametrize("lr", [0, -0.1, math.nan, math.inf, True])
def test_a_length_of_hypersteps_that_is_no_positive_number_is_refused(lr):
    with pytest.raises(ValueError, match="lr > 0"):
        mf.SignSteps([torch.zeros(())], lr=lr)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((0, math.inf), {}), ((-math.inf, 0), {}), ((math.nan, 1), {}), ((0, math.nan), {}), ((True, 2), {}),
        ((0, True), {}), (("0", 1), {}), ((None, 1), {}), ((1, 1), {}), ((2, 1), {}), ((0, 1j), {}),
        ((0, 1), {"log": True}), ((-1, 1), {"log": True}), ((0, 1), {"logit": True}),
        ((0.1, 1), {"logit": True}), ((0, 1), {"shape": (1.5,)}),
        ((0.1, 0.9), {"log": True, "logit": True}), ((0, 1), {"init": 2}), ((0, 1), {"init": math.nan}),
        ((0, 1), {"init": True}), ((0, 1), {"init": "0.5"}), ((0, 1), {"init": [0.1, 0.2]}),
        ((0, 1), {"shape": (0,)}), ((0, 1), {"shape": (-1,)}), ((0, 1), {"shape": 3}),
        ((0, 1), {"shape": (True,)}), ((0, 1), {"shape": (3,), "init": [0.1, 0.2]}),
    ],
    ids=str,
)  # fmt: skip
def test_a_float_that_cannot_be_is_refused_in_a_sentence(arguments, options):
    with pytest.raises(mf.errors.SpaceError, match=r"\.$"):
        mf.Float(*arguments, **options)


@pytest.mark.parametrize("name", ["", None, 1, "a b\n", b"x", ("x",)], ids=repr)
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(mf.errors.SpaceError, match="name"):
        mf.Space({name: mf.Float(0, 1)})


@pytest.mark.parametrize("spec", [0.5, None, (0, 1), mf.Int(1, 3), mf.Categorical(["a"]), mf.Float], ids=repr)
def test_an_entry_that_is_no_float_is_refused(spec):
    with pytest.raises(mf.errors.SpaceError, match="must be a Float"):
        mf.Space(x=spec)


def test_an_empty_space_is_refused():
    with pytest.raises(mf.errors.SpaceError, match="at least one"):
        mf.Space()


def test_a_space_of_very_many_numbers_says_to_use_a_shape():
    """With 100,000, each hyper-step would take half a minute and 1.2 GB."""
    loop = noisy_loop()
    loop.space = mf.Space({f"x{n}": mf.Float(0, 1) for n in range(10_001)})
    with pytest.raises(mf.errors.SpaceError, match=r"at most 10000 .* use one Float with shape="):
        loop.attach()


def test_a_vector_of_very_many_numbers_is_quick():
    space = mf.Space(weights=mf.Float(0, 2, init=1.0, shape=(1_000_000,)))
    x, y, _ = data(12, 1)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (loss * space["weights"][:12]).mean() if model.training else loss.mean()

    model = network()
    batch = x.float(), y
    loop = Loop(model, space, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, [batch], [batch])
    loop.attach(hyper_optimizer=mf.SignSteps).run(3)
    assert float(space["weights"].value.detach()[:12].std()) > 0


@pytest.mark.parametrize("function", [None, 3, "loss"], ids=str)
def test_a_loss_that_is_no_function_is_refused(function):
    loop = noisy_loop()
    loop.loss_fn = function
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        loop.attach()


@pytest.mark.parametrize(
    ("name", "value"),
    [("estimator", "exact"), ("estimator", None), ("horizon", "long"), ("horizon", 3), ("bind", "lr"),
     ("bind", ["nothing"]), ("bind", {"noise": "nothing"}), ("bind", {"noise": "nesterov"})],
)  # fmt: skip
def test_a_choice_that_does_not_exist_is_refused_by_a_sentence_that_names_what_does(name, value):
    with pytest.raises((mf.errors.MidflightError, TypeError), match=r"must|\.$"):
        noisy_loop().attach(**{name: value})


@pytest.mark.parametrize(
    "optimizer", [None, object(), [], "Adam"], ids=["None", "an object", "a list", "a name"]
)
def test_what_is_no_optimiser_is_refused(optimizer):
    loop = noisy_loop()
    loop.optimizer = optimizer
    with pytest.raises(mf.errors.UnsupportedOptimizer):
        loop.attach()


@pytest.mark.parametrize(
    "model", [None, 3, lambda x: x, nn.Linear], ids=["None", "a number", "a function", "a class"]
)
def test_what_is_no_model_is_refused_in_a_sentence(model):
    loop = noisy_loop()
    loop.model = model
    with pytest.raises(TypeError, match="model must be"):
        loop.attach()


def test_two_optimisers_of_the_same_weights_or_one_twice_are_refused():
    loop = noisy_loop()
    loop.optimizer = [loop.optimizer, loop.optimizer]
    with pytest.raises(mf.errors.UnsupportedOptimizer, match="different"):
        loop.attach()


# --- hyperparameters as numbers -----------------------------------------------------------------------------


@pytest.fixture
def x() -> mf.Hyperparameter:
    return mf.Space(x=mf.Float(0, 1, init=0.25))["x"]


def test_a_hyperparameter_is_formatted_like_a_number(x):
    assert f"{x:.3f}" == "0.250"
    assert f"{x:>8.2e}" == "2.50e-01"
    assert "0.25" in f"{x}"
    assert format(x, ".1%") == "25.0%"
    assert f"{x!r}".startswith("x = 0.25")


def test_a_hyperparameter_is_a_number_for_python_and_numpy(x):
    assert float(x) == 0.25
    assert int(x) == 0
    assert round(float(x), 1) == 0.2
    assert math.sqrt(x) == 0.5
    assert np.asarray(x) == 0.25
    assert np.float64(x) == 0.25
    assert x.item() == 0.25
    assert float(max(x, 0.1)) == 0.25
    assert bool(x)


def test_values_can_be_written_as_json():
    space = mf.Space(x=mf.Float(0, 1, init=0.25), v=mf.Float(0, 1, init=0.5, shape=(2,)))
    assert json.loads(json.dumps(space.as_dict())) == {"x": 0.25, "v": [0.5, 0.5]}


def test_the_log_can_be_written_as_json():
    loop = noisy_loop().attach().run(3)
    assert all(type(value) is float for value in loop.tuner.log().values())
    assert json.loads(json.dumps(loop.tuner.log()))["value/noise"] == pytest.approx(0.4)


def test_a_summary_writer_takes_a_hyperparameter(x, tmp_path):
    writer = pytest.importorskip("tensorboardX").SummaryWriter(str(tmp_path))
    writer.add_scalar("x", float(x), 0)
    writer.add_scalar("x", x, 0)
    writer.close()


# --- states that do not fit ---------------------------------------------------------------------------------


def state_of(**space: mf.Float) -> dict[str, Any]:
    return mf.Space(**space).state_dict()


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (mf.Float(0, 1, init=0.25), mf.Float(0, 10)),
        (mf.Float(1e-4, 1, log=True, init=0.01), mf.Float(1e-6, 1, log=True)),
        (mf.Float(1e-4, 1, log=True, init=0.01), mf.Float(0, 1)),
        (mf.Float(0, 1, init=0.25, shape=(3,)), mf.Float(0, 1, shape=(3,), init=0.5)),
    ],
    ids=["wider", "wider, log", "log, then linear", "the same"],
)
def test_a_state_that_is_loaded_in_another_range_keeps_the_value(saved, now):
    space = mf.Space(x=now)
    space.load_state_dict(state_of(x=saved))
    assert np.asarray(space["x"]) == pytest.approx(np.full(now.shape, saved.init), rel=1e-5)  # float32


@pytest.mark.parametrize(
    "now",
    [{"y": mf.Float(0, 1)}, {"x": mf.Float(0, 1, shape=(2,))}, {"x": mf.Float(0, 1), "y": mf.Float(0, 1)},
     {"x": mf.Float(0.5, 1)}],
    ids=["another name", "another shape", "one more", "value out of range"],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(now):
    with pytest.raises(mf.errors.SpaceError):
        mf.Space(**now).load_state_dict(state_of(x=mf.Float(0, 1, init=0.25)))


DECAY = {"weight_decay": mf.Float(1e-4, 1e-1, log=True, init=1e-2)}


def state_after_seven_steps() -> dict[str, Any]:
    return noisy_loop(**DECAY).attach(schedule=5).run(7).tuner.state_dict()


@pytest.mark.parametrize("changed", [{"schedule": 7}, {"total_steps": 50}, {"estimator": "t1t2"}], ids=str)
def test_a_state_can_be_loaded_with_another_number_or_estimator(changed):
    loop = noisy_loop(**DECAY).attach(**{"schedule": 5, **changed})
    loop.tuner.load_state_dict(state_after_seven_steps())
    assert loop.space.as_dict() == {"noise": pytest.approx(0.4), "weight_decay": pytest.approx(1e-2)}
    assert (loop.tuner.steps, loop.tuner.log()["hypersteps"]) == (7, 1)
    loop.run(14)
    assert loop.tuner.log()["hypersteps"] > 1


@pytest.mark.parametrize(
    "changed",
    [{"schedule": mf.FrontLoaded()}, {"schedule": mf.TimeBudget(0.1)}, {"horizon": "run"},
     {"hyper_optimizer": mf.SignSteps}, {"bind": ()}],
    ids=["FrontLoaded", "TimeBudget", "horizon", "hyper_optimizer", "bind"],
)  # fmt: skip
def test_a_state_of_a_tuner_with_another_policy_is_refused_and_changes_nothing(changed):
    state = noisy_loop(**DECAY)
    state.space.set(noise=0.7)
    state = state.attach(schedule=5).run(7).tuner.state_dict()
    loop = noisy_loop(**DECAY).attach(**{"schedule": 5, **changed})
    with pytest.raises((ValueError, mf.errors.BindingError), match=r"the saved tuner .*\.$"):
        loop.tuner.load_state_dict(state)
    assert loop.space.as_dict()["noise"] == pytest.approx(0.4)
    assert loop.tuner.steps == 0


def test_a_state_of_a_tuner_of_another_optimiser_is_refused():
    loop = noisy_loop(torch.optim.AdamW, **DECAY).attach(schedule=5)
    with pytest.raises(ValueError, match="the saved tuner was made with SGD, this one with AdamW"):
        loop.tuner.load_state_dict(state_after_seven_steps())
    assert loop.tuner.steps == 0


@pytest.mark.parametrize("state", [{}, {"steps": 3}, None, [], {"steps": 1, "space": {}}], ids=str)
def test_what_is_no_state_is_refused_in_a_sentence(state):
    loop = noisy_loop().attach()
    with pytest.raises((ValueError, TypeError, mf.errors.MidflightError), match=r"state"):
        loop.tuner.load_state_dict(state)


# --- drop-ins -----------------------------------------------------------------------------------------------


class BlockOfGPT2(nn.Module):
    """Attention as transformers writes it: it reads the rate of one dropout layer and calls the other."""

    def __init__(self, width: int = 8, heads: int = 2, rate: float = 0.1) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(rate), nn.Dropout(rate)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        dropout = self.attn_dropout.p if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return x + self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def test_the_tuned_dropout_stands_in_for_every_dropout_layer_of_a_gpt2():
    torch.manual_seed(0)
    space = mf.Space(rate=mf.Float(0.05, 0.8, init=0.3))
    model = nn.Sequential(
        nn.Embedding(20, 8), nn.Dropout(0.1), BlockOfGPT2(), BlockOfGPT2(), nn.Linear(8, 20)
    )
    tokens = torch.randint(20, (2, 6, 12))
    before = model.eval()(tokens[0])
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Dropout):
                setattr(module, name, mf.nn.Dropout(space["rate"]))
    assert sum(isinstance(m, mf.nn.Dropout) for m in model.modules()) == 5
    assert torch.equal(model.eval()(tokens[0]), before)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01)
    loop = Loop(model, space, optimizer, loss_fn, [tokens[0]], [tokens[1]])
    loop.attach(hyper_optimizer=mf.SignSteps).run(6)
    assert loop.tuner.log()["hypersteps"] == 6
    assert float(space["rate"]) != pytest.approx(0.3)
    assert model[2].attn_dropout.p == float(space["rate"])  # what attention reads follows the space


def test_the_tuned_dropout_has_the_attributes_of_torchs():
    space = mf.Space(rate=mf.Float(0.05, 0.8, init=0.3))
    layers = mf.nn.Dropout(space["rate"]), mf.nn.Dropout(0.3)
    assert all(type(layer.p) is float for layer in layers)
    assert [layer.p for layer in layers] == pytest.approx([0.3, 0.3])
    assert [layer.inplace for layer in layers] == [nn.Dropout().inplace] * 2


def test_check_compares_dropout_with_its_own_relaxation():
    torch.manual_seed(0)
    space = mf.Space(rate=mf.Float(0.05, 0.8, init=0.3))
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), mf.nn.Dropout(space["rate"]), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batches = [tuple(t.float() if t.is_floating_point() else t for t in data(n, n)[:2]) for n in (12, 20)]
    report = mf.check(
        model, optimizer, space, loss_fn, *batches
    )  # fmt: skip
    assert report.passed, str(report)
    assert not report.hints
    assert [line.estimator for line in report.lines if line.passed is not None] == ["one_step"]
