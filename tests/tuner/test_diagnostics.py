"""What the tuner reports about a run."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset
from toys import X, Y, cross_entropy, network, space, train, tuner

import midflight as mf
from midflight.tuner.diagnostics import DECISIONS, Signal


def reports(**options):
    """The report after each ten of twenty steps."""
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, **options)
    for _ in range(2):
        train(model, optimizer, 10)
        yield t.report()


def test_hyperparameters_pinned_at_their_bounds_are_reported():
    early, late = reports(hyper_optimizer=lambda raws: torch.optim.SGD(raws, lr=1e9))
    assert early == []  # ten moves say little
    decay, noise = late
    assert decay.startswith("weight_decay stood at its ")
    assert "bound" in noise
    assert "for the last 20 of 20 hyper-steps" in noise


def test_a_hyperparameter_that_moves_inside_its_bounds_is_not_reported():
    assert list(reports(hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.02))) == [[], []]


def test_tuning_many_hyperparameters_on_few_rows_is_reported_as_overfitting():
    torch.manual_seed(0)
    x, y = torch.randn(400, 20), torch.randint(0, 2, (400,))  # nothing to learn
    whole = x[:100], y[:100]
    t2, third = ([(x[i : i + 5], y[i : i + 5]) for i in range(a, a + 100, 5)] for a in (100, 200))
    s = mf.Space(bias=mf.Float(-3.0, 3.0, init=0.0, shape=(20,)))
    model = torch.nn.Linear(20, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def loss(model, batch):
        return cross_entropy(model, batch) + s["bias"].value @ (model.weight[1] - model.weight[0])

    t = tuner(
        model, optimizer, s, loss, train_loader=[whole], valid_loader=t2, valid_loss_fn=cross_entropy,
        hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.05, agreement=0.0),
    )  # fmt: skip
    assert not any("T2" in sentence for sentence in t.report(third))
    train(model, optimizer, 300, whole, loss)
    before = torch.get_rng_state()
    assert any("T2 is overfitted" in sentence for sentence in t.report(third))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_the_two_splits_need_two_batches_each():
    s = space()
    model = network(s)
    t = tuner(model, torch.optim.Adam(model.parameters()), s)
    with pytest.raises(ValueError, match="at least 2 batches"):
        t.report(third=[(X, Y), (X, Y)])


def digits_like(loss_fn, s, **options):
    """A tuner on a small network, and its loop."""
    model = network(s) if "noise" in s else torch.nn.Linear(X.shape[1], 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = mf.Tuner(model, optimizer, s, loss_fn, [(X, Y)], [(X, Y)], **options)
    return t, model, optimizer


def test_few_hyper_steps_are_reported_with_what_they_took():
    s, now = space(), [0.0]

    def clock():
        now[0] += 1  # a second for each training step
        return now[0]

    def valid_loss_fn(model, batch):
        now[0] += 20
        return cross_entropy(model, batch)

    budget = mf.TimeBudget(0.03, clock=clock)
    t, model, optimizer = digits_like(cross_entropy, s, schedule=budget, valid_loss_fn=valid_loss_fn)
    train(model, optimizer, 120)
    (sentence,) = [line for line in t.report() if "of 120 optimiser steps had a hyper-step" in line]
    assert "of the training time" in sentence


def test_a_hyperparameter_that_was_not_reached_yet_is_reported_before_it_is_an_error():
    s = mf.Space(noise=mf.Float(0.0, 0.8), weight_decy=mf.Float(1e-4, 1e-1, log=True))
    t, model, optimizer = digits_like(cross_entropy, s, schedule=2)
    train(model, optimizer, 6)
    (sentence,) = [line for line in t.report() if line.startswith("weight_decy reached neither")]
    for cause in (
        "meant as the option weight_decay?",
        "read it anew",
        "model.eval()",
        "are beta1, beta2, eps",
    ):
        assert cause in sentence


def test_a_validation_loss_that_reads_a_hyperparameter_is_reported():
    s = mf.Space(smoothing=mf.Float(0.0, 0.5, init=0.1))

    def loss_fn(model, batch):
        return mf.nn.losses.cross_entropy(model(batch[0]), batch[1], label_smoothing=s["smoothing"])

    t, model, optimizer = digits_like(loss_fn, s, schedule=2)
    with pytest.warns(UserWarning, match="validation loss itself reads smoothing, .* pass a valid_loss_fn"):
        train(model, optimizer, 6)
    assert any("the validation loss itself reads smoothing" in line for line in t.report())
    t, model, optimizer = digits_like(loss_fn, s, schedule=2, valid_loss_fn=cross_entropy)
    train(model, optimizer, 6)
    assert t.report() == []


def test_arguments_in_another_order_are_refused_with_the_right_one():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    for wrong in [(optimizer, model, s, cross_entropy), (model, optimizer, cross_entropy, s)]:
        with pytest.raises(TypeError, match=r"the order is Tuner\(model, optimizer, space, loss_fn"):
            mf.Tuner(*wrong, [(X, Y)], [(X, Y)])


def test_an_optimiser_that_never_stepped_is_reported():
    s = space()
    model = network(s)
    t = tuner(model, torch.optim.Adam(model.parameters()), s, total_steps=40)
    train(model, torch.optim.Adam(model.parameters()), 40)
    assert t.report() == [
        "the tuner's optimiser never stepped; build the tuner after the optimiser that the loop uses."
    ]


def test_weights_of_an_earlier_moment_that_win_clearly_are_reported():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, horizon="run")
    train(model, optimizer, 3)
    for losses, clear in [
        ({"earlier": 0.5, "average": 0.6, "last": 0.7}, True),
        ({"earlier": 0.5, "average": 0.52, "last": 0.7}, False),
        ({"last": 0.5, "average": 0.6, "earlier": 0.7}, False),
        ({"last": 0.5}, False),
    ]:
        t._finished = losses
        assert any("finish kept the average weights" in sentence for sentence in t.report()) == clear
    assert t.finish() == t._finished


def test_the_report_names_the_source_whose_share_changed_most():
    mixture = mf.Mixture(["code", "law", "letters"], floor=0)
    model = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    s = mf.Space(mixture=mixture)

    def loss(model, batch):
        return mixture.value.sum() * cross_entropy(model, batch)

    t = mf.Tuner(model, optimizer, s, loss, [(X, Y)], [(X, Y)], valid_loss_fn=cross_entropy)
    run = t._controller
    for n, shares in enumerate([[1, 1, 1], [0.3, 0.6, 0.1]]):
        s.set(mixture=shares)
        run.trajectory.record(n, s)
    run.steps, run.best_step, t._finished = 2, 0, {"earlier": 0.5, "average": 0.6, "last": 0.7}
    (sentence,) = [line for line in t.report() if line.startswith("finish kept")]
    assert "(mixture/law was 0.333 there, and is 0.6 at the end)" in sentence


def test_a_validation_loss_that_rises_is_reported_with_the_step_of_its_least_value():
    x, y = torch.randn(20, 30), torch.randint(0, 3, (20,))  # nothing to learn but the rows themselves
    s = mf.Space(weight_decay=mf.Float(1e-6, 1e-5, log=True))
    model = torch.nn.Sequential(torch.nn.Linear(30, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = mf.Tuner(model, optimizer, s, cross_entropy, [(x, y)], [(-x, y)], total_steps=200)
    for done in range(2):
        train(model, optimizer, 100, (x, y))
        said = [
            line
            for line in t.report()
            if line.startswith("the validation loss of the averaged weights has risen from")
        ]
        assert len(said) == 1, done
    assert f"at step {t._controller.best_step} to" in said[0]
    t.finish()
    (said,) = [line for line in t.report() if line.startswith("finish kept the average weights of step")]
    assert "weight_decay" in said


def test_a_hyperparameter_whose_signs_are_random_is_reported_and_one_that_moves_is_not():
    signal = Signal()
    flips = 1.0, -1.0
    for n in range(DECISIONS):
        assert signal.report({}) == []
        signal.observe({"random": flips[n % 2], "steady": flips[int(n % 4 == 0)]})
    (sentence,) = signal.report({"random": "from 1 to 2"})
    assert sentence.startswith(
        f"random went from 1 to 2 by hypergradients of random signs, {DECISIONS} in all"
    )
    again = Signal()
    again.load_state_dict(signal.state_dict())
    assert again.report({"random": ""}) == signal.report({"random": ""})


def test_a_run_without_a_finite_loss_ends_with_a_warning_at_the_users_line():
    s = space()
    model = network(s)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    t = tuner(model, optimizer, s, valid_loss_fn=lambda m, b: cross_entropy(m, b) * math.nan)
    train(model, optimizer, 1)
    assert t.report()[0].startswith("1 hyper-step was left out")
    with pytest.warns(UserWarning, match="no weights of this run have a finite validation loss") as said:
        t.finish()
    assert said[0].filename == __file__


def test_the_warning_of_a_longer_run_points_at_the_loop():
    s = space()
    model = network(s)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner(model, optimizer, s, total_steps=2)
    with pytest.warns(UserWarning, match="longer than total_steps=2") as said:
        train(model, optimizer, 3)
    assert said[0].filename == train.__code__.co_filename


def test_the_log_has_the_examples_that_are_used():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s, train_loader=[(X[:16], Y[:16])])
    train(model, optimizer, 1)
    assert t.log()["mixed_partial/examples"] == 16


def test_what_is_called_otherwise_than_a_loss_is_refused_at_once():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    for wrong, message in [
        (lambda model, x, y: None, r"called as loss_fn\(model, batch\), but takes \(model, x, y\)"),
        (lambda model: None, r"but takes \(model\)"),
        (lambda batch, model: None, r"but takes \(batch, model\); exchange the two"),
        (lambda b, m: None, r"but takes \(b, m\); exchange the two"),
        (torch.nn.CrossEntropyLoss(), "CrossEntropyLoss takes outputs and targets"),
        (torch.nn.functional.cross_entropy, "cross_entropy takes outputs and targets"),
        ([(X, Y)], "the order is Tuner"),
    ]:
        with pytest.raises(TypeError, match=message):
            tuner(model, optimizer, s, wrong)
    for right in (lambda m, b: None, lambda *parts: None, lambda model, batch, weight=1: None):
        tuner(model, optimizer, s, right).detach()


@pytest.mark.parametrize(
    ("returned", "remedy"),
    [
        (None, "end it with return"), ((1, 2), "return the loss alone"), (0.5, r"remove \.item\(\)"),
        ({"loss": 1}, "return the loss alone"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_loss_must_not_return_is_refused_with_what_to_do(returned, remedy):
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    tuner(model, optimizer, s, lambda model, batch: returned)
    with pytest.raises(mf.errors.InvalidLoss, match=remedy):
        train(model, optimizer, 1)


def test_validation_on_the_training_data_is_warned_of_at_the_users_line():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    data, other = TensorDataset(X, Y), TensorDataset(X, Y)
    one = DataLoader(data, batch_size=8)
    half = DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(range(32)))
    for a, b in [(one, one), (one, DataLoader(data, batch_size=16, shuffle=True))]:
        with pytest.warns(UserWarning, match="read the same data") as said:
            mf.Tuner(model, optimizer, s, cross_entropy, a, b).detach()
        assert said[0].filename == __file__
    for a, b in [(one, DataLoader(other)), (one, DataLoader(Subset(data, [0, 1]))), (one, half)]:
        mf.Tuner(model, optimizer, s, cross_entropy, a, b).detach()


def ended(values, best=math.nan, low=0.0, high=1.0):
    """The report of a run whose hyperparameter moved through these values; `best` is the least C2, of now
    1."""
    s = mf.Space(lr=mf.Float(1e-6, 10.0, log=True, init=1e-3), x=mf.Float(low, high, init=values[0]))
    model = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    t = mf.Tuner(model, optimizer, s, lambda m, b: cross_entropy(m, b) + s["x"], [(X, Y)], [(X, Y)])
    run = t._controller
    run.horizon.best, run.horizon.best_loss, run.horizon.recent_loss = {"w": X}, best, 1.0
    for n, value in enumerate(values):
        s.set(x=value)
        run.bounds.observe(s)
        run.trajectory.record(n, s)
    run.steps = run.hypersteps = len(values)
    return t, s, model


@pytest.mark.parametrize(
    ("values", "best", "advice"),
    [
        ([0.5] + [1.0] * 40, 0.99, "; widen its range if a better value may lie beyond."),
        ([0.5] + [1.0] * 40, 0.5, ", but validation is no better there; compare with a fixed run."),
        ([0.5] + [0.0] * 40, 0.99, "hyper-steps."),
        ([0.5] + [1.0, 0.97] * 20, 0.99, "; widen its range if a better value may lie beyond."),
        ([0.5] + [0.0, 0.03] * 20, 0.99, "hyper-steps."),
    ],
    ids=["paid", "did not pay", "natural bound", "near", "near a natural bound"],
)
def test_a_wider_range_is_advised_only_where_it_may_help(values, best, advice):
    t, _, _ = ended(values, best)
    (sentence,) = [line for line in t.report() if line.startswith("x stood ")]
    assert sentence.startswith(f"x stood {'at' if values[-1] in (0.0, 1.0) else 'near'} its ")
    assert sentence.endswith(advice)
    assert ("widen" in sentence) == ("widen" in advice)


def test_a_learning_rate_that_fell_far_is_reported():
    t, s, _ = ended([0.5] * 3)
    assert not any(" fell " in line for line in t.report())
    s.set(lr=2e-6)
    assert any(line.startswith("lr fell from 0.001 to 2e-06") for line in t.report())


def test_weights_that_are_not_finite_are_reported():
    t, _, model = ended([0.5] * 3)
    assert not any("not finite" in line for line in t.report())
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    assert "the weights are not finite; start from a lower lr." in t.report()


def test_hypergradients_of_0_are_not_of_random_signs():
    signal = Signal()
    for _ in range(2 * DECISIONS):
        signal.observe({"idle": 0.0})
    assert signal.report({"idle": "from 1 to 1"}) == []


def test_finish_warns_of_a_hyperparameter_that_was_never_reached():
    s = mf.Space(noise=mf.Float(0.0, 0.8), unused=mf.Float(0.0, 1.0))
    t, model, optimizer = digits_like(cross_entropy, s, schedule=2)
    train(model, optimizer, 6)
    with pytest.warns(UserWarning, match="unused reached neither"):
        t.finish()


def test_print_says_what_is_tuned_how_and_at_what_cost():
    s = space()
    model = network(s)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, schedule=5, total_steps=40)
    assert "step 0 of 40, 0 hyper-steps\n" in f"{t}\n"
    assert "not computed yet" in repr(t)
    train(model, optimizer, 20)
    lines = repr(t).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("step 20 of 40, 4 hyper-steps, which took ")
    assert lines[1] == "estimator one_step, mixed partial: double backward"
    assert lines[2] == "schedule Every, horizon NextStep, hyper_optimizer SignSteps, guard off"
    assert lines[3] == "left out: 0 unclear, 0 not finite; went back 0 times"
    decay = float(s["weight_decay"])
    assert lines[4].endswith(f": option weight_decay, {decay:.4g} now")
    assert lines[5].endswith(": read by the loss")
    t.detach()
    assert repr(t).splitlines()[1:] == lines[1:]


def test_processes_that_join_after_the_tuner_was_built_are_an_error(monkeypatch):
    s = space()
    model = network(s)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    tuner(model, optimizer, s)
    monkeypatch.setattr("midflight.tuner.distributed._count", lambda: 2)
    with pytest.raises(mf.errors.UnsupportedSetting, match="init_process_group"):
        train(model, optimizer, 1)
