"""What is tuned inside the trials: where it starts, what flows back, and what an objective may do."""

import contextlib
import math

import numpy as np
import pytest
import torch

import midflight as mf
from midflight import search
from midflight.search import checkpoint, problems
from midflight.search import search as run_module
from midflight.search.jobs import nearest_values
from midflight.search.ledger import Record, best
from midflight.search.problems import MLP_SPACE, Mlp
from midflight.search.trial import Job, run_job

SPACE = search.Space(
    layers=mf.Int(1, 9),
    net=mf.Categorical(["mlp", "cnn"]),
    decay=mf.Float(1e-6, 1e-2, log=True, init=1e-4, online=True),
    shift=mf.Float(0.0, 1.0, init=0.25, online=True, when={"net": "cnn"}),
)


def record(number, loss, layers, net="mlp", state="complete", **online):
    config = {"layers": layers, "net": net}
    return Record(number, state, config, losses={1: loss}, trajectory=[(1, online)] if online else [])


def test_the_start_is_where_the_nearest_of_the_better_half_ended():
    earlier = [
        record(0, 0.10, layers=9, decay=1e-3),
        record(1, 0.20, layers=3, decay=1e-5),
        record(2, 0.90, layers=2, decay=1e-2),  # nearest, but of the worse half
        record(3, 0.80, layers=2, decay=1e-2),
        record(4, 0.01, layers=2, decay=1e-2, state="pruned"),
        record(5, 0.01, layers=2),  # tuned nothing
    ]
    assert nearest_values(SPACE, {"layers": 2, "net": "mlp"}, earlier) == {"decay": 1e-5}
    assert nearest_values(SPACE, {"layers": 8, "net": "mlp"}, earlier) == {"decay": 1e-3}
    assert nearest_values(SPACE, {"layers": 2, "net": "mlp"}, earlier[:1]) == {}
    # of two that are equally near, the better one
    assert nearest_values(SPACE, {"layers": 6, "net": "mlp"}, earlier) == {"decay": 1e-3}


def tunes(trial):
    """Ends with decay = 1e-5 for mlp and 1e-3 for cnn, with a loss that does not depend on it."""
    tuned = trial.online()
    tuned["decay"].set(1e-5 if trial.params["net"] == "mlp" else 1e-3)
    trial.report(1, 1 / trial.params["layers"], space=tuned)


@pytest.mark.parametrize("warm", [True, False])
def test_later_trials_start_from_what_earlier_ones_learned(warm):
    found = search.run(tunes, SPACE, engine="random", trials=30, epochs=1, warm_start=warm)
    for r in found.records:
        expected = {"decay": 1e-4, **({"shift": 0.25} if r.config["net"] == "cnn" else {})}
        if warm and (values := nearest_values(SPACE, r.config, found.records[: r.number])):
            expected |= {name: values[name] for name in expected if name in values}
        assert r.starts == pytest.approx(expected)
    learned = [r.starts["decay"] for r in found.records[10:]]
    assert (min(learned) < 2e-5 and max(learned) > 5e-4) if warm else all(x == learned[0] for x in learned)
    assert found.best.params == {**found.best.config, **found.best.online}
    assert found.best.params["decay"] == pytest.approx(1e-5 if found.best.config["net"] == "mlp" else 1e-3)


def test_online_hyperparameters_come_as_a_space_for_the_tuner_only_where_they_are_active():
    seen = []

    def objective(trial):
        tuned = trial.online()
        assert isinstance(tuned, mf.Space)
        assert tuned.as_dict() == pytest.approx({n: trial.params[n] for n in tuned})
        seen.append((trial.params["net"], *tuned))
        return 1.0

    search.run(objective, SPACE, engine="random", trials=12, epochs=1)
    assert set(seen) == {("mlp", "decay"), ("cnn", "decay", "shift")}
    offline = search.run(
        lambda trial: float(trial.online() is not None), SPACE.offline(), engine="random", trials=3, epochs=1
    )
    assert [r.loss for r in offline.records] == [0.0] * 3
    assert all("decay" in r.config for r in offline.records)


def test_a_trial_may_return_its_loss_instead_of_reporting():
    found = search.run(lambda trial: trial.params["layers"], SPACE, engine="tpe", trials=5, epochs=3)
    assert all(r.losses == {3: r.config["layers"]} for r in found.records)


def test_a_diverged_loss_ends_a_trial_and_is_the_worst():
    def objective(trial):
        for epoch in range(1, 4):
            trial.report(epoch, math.nan if trial.number % 2 and epoch == 2 else 1.0, state={"epoch": epoch})

    for engine in ("random", "tpe", "smac"):
        found = search.run(objective, SPACE, engine=engine, trials=8, epochs=3)
        odd = [r for r in found.records if r.number % 2 and r.epoch >= 2]
        assert odd
        assert all(r.state == "pruned" and r.message == "the loss was not finite" for r in odd)
        assert all(r.losses[2] == math.inf for r in odd)
        assert found.best.number not in [r.number for r in odd]


def test_failed_trials_are_told_and_the_search_goes_on():
    def objective(trial):
        if trial.number in (1, 3, 4, 5):
            raise ValueError("a shape does not fit")
        return 1.0

    found = search.run(objective, SPACE, engine="random", trials=7, epochs=1)
    failed = [r for r in found.records if r.state == "failed"]
    assert [r.number for r in failed] == [1, 3, 4, 5]
    assert all(r.message.startswith("ValueError: a shape does not fit (test_online.py:") for r in failed)

    def hopeless(trial):
        raise ValueError("no data")

    with pytest.raises(search.ObjectiveFailed, match=r"the first 3 trials all failed.*no data") as raised:
        search.run(hopeless, SPACE, engine="random", trials=7, epochs=1)
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("epochs", "message"), [((1, 1), "1 < epoch <= 2"), ((3,), "0 < epoch <= 2"), ((), "did neither")]
)
def test_reports_must_go_forward(epochs, message):
    def objective(trial):
        for epoch in epochs:
            trial.report(epoch, 1.0)

    with pytest.raises(search.ObjectiveFailed, match=message):
        search.run(objective, SPACE, engine="random", trials=3, epochs=2)


def test_a_state_that_cannot_be_read_safely_is_refused_at_its_first_report():
    with pytest.raises(search.ObjectiveFailed, match=r"must hold tensors.*arrays by torch\.from_numpy"):
        search.run(
            lambda trial: trial.report(1, 1.0, state={"x": np.ones(3)}),
            SPACE,
            engine="random",
            trials=3,
            epochs=2,
        )


def test_trials_are_seeded_alike_and_the_callers_generators_are_left_alone():
    drawn = []

    def objective(trial):
        drawn.append((float(torch.rand(())), float(np.random.rand())))
        return 1.0

    torch.manual_seed(5)
    expected = float(torch.rand(()))
    torch.manual_seed(5)
    search.run(objective, SPACE, engine="random", trials=3, epochs=1)
    assert len(set(drawn)) == 1
    assert float(torch.rand(())) == expected


def test_ctrl_c_leaves_what_was_found():
    def objective(trial):
        if trial.number == 2:
            raise KeyboardInterrupt
        trial.report(1, 1.0 + trial.number, state={"number": trial.number})

    with pytest.raises(search.Interrupted) as stopped:
        search.run(objective, SPACE, engine="random", trials=9, epochs=1)
    result = stopped.value.result
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert [r.state for r in result.records] == ["complete", "complete", "unfinished"]
    assert result.load() == {"number": 0}


def test_time_ends_a_search_in_the_middle_of_a_trial():
    def objective(trial):
        for epoch in range(1, 10_000):
            trial.report(epoch, 1 / epoch, state={"epoch": epoch})

    found = search.run(objective, SPACE, engine="random", seconds=0.3, epochs=10_000)
    assert [r.state for r in found.records] == ["unfinished"]
    assert found.best.number == 0
    assert found.load() == {"epoch": found.best.epoch}


def test_the_best_is_the_least_of_those_trained_to_the_end():
    assert best([]) is None
    assert best([record(0, math.nan, 1)]) is None
    records = [
        record(0, 0.5, 1, state="pruned"),
        record(1, 0.7, 1),
        record(2, 0.6, 1),
        record(3, 0.1, 1, state="failed"),
    ]
    assert best(records).number == 2
    longer = Record(4, "pruned", {}, losses={1: 0.9, 2: 0.8})
    assert best([records[0], longer]).number == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of seconds and trials"),
        ({"trials": 1, "address": "auto"}, "options of the engine random are none, but got address="),
        ({"trials": 1, "epochs": 0}, "epochs > 0"),
        ({"trials": 1, "workers": 2}, "must be a function at the top of a module"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(search.SearchError, match=message):
        search.run(lambda trial: 1.0, SPACE, engine="random", **arguments)


def test_a_missing_engine_names_its_extra(monkeypatch):
    from midflight import errors

    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "smac" else True)
    with pytest.raises(mf.errors.MissingExtra, match=r"pip install 'midflight\[search\]'"):
        search.run(lambda trial: 1.0, SPACE, engine="smac", trials=1)


def test_mlp_reads_the_test_set_once_after_its_last_epoch(monkeypatch):
    seen, evaluate = [], problems.evaluate
    monkeypatch.setattr(
        problems, "evaluate", lambda model, rows: (seen.append(len(rows)), evaluate(model, rows))[1]
    )
    found = search.run(Mlp("digits", train=100), MLP_SPACE, engine="random", trials=1, epochs=3)
    _, t2, test = problems.splits("digits", 100)
    assert seen == [len(t2)] * 3 + [len(test)]
    assert found.best.extra.keys() == {"test_error"}


def test_mlp_cloned_by_pbt_trains_with_its_own_options(tmp_path):
    space, path = MLP_SPACE.offline(), tmp_path / "c.pt"
    shape = {"layers": 1, "width": 32, "activation": "relu", "batch_norm": False, "optimizer": "sgd"}
    parent = {**shape, "lr": 0.1, "momentum": 0.5, "weight_decay": 1e-3, "noise": 0.1, "dropout": 0.1}
    child = {**parent, "lr": 0.0012, "momentum": 0.9, "weight_decay": 1e-5}
    for config, goes_on in ((parent, False), (child, True)):
        run_job(Job(0, config, {}, 2, 0, space, path), Mlp("digits", train=100), lambda _, on=goes_on: on)
    group = checkpoint.load(path).state["optimizer"]["param_groups"][0]
    assert {name: group[name] for name in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.0012, "momentum": 0.9, "weight_decay": 1e-5,
    }  # fmt: skip


SEARCHED = search.Space(lr=mf.Float(1e-4, 1.0, log=True), momentum=mf.Float(0.0, 0.99), width=mf.Int(1, 9))


def trained(restore):
    """An objective with a torch optimiser and a schedule; `restore` loads its state, or changes it after."""
    used = []

    def objective(trial):
        weight = torch.nn.Parameter(torch.ones(()))
        params = trial.params
        optimizer = torch.optim.SGD([weight], lr=params["lr"], momentum=params["momentum"])
        state = trial.load()
        if state:
            restore(optimizer, state["nested"][0])
        for epoch in range(state["epoch"] + 1 if state else 1, trial.epochs + 1):
            weight.grad = torch.ones(())
            optimizer.step()
            group = optimizer.param_groups[0]
            used.append((group["lr"], group["momentum"]))
            trial.report(epoch, 1.0, {"epoch": epoch, "nested": [optimizer.state_dict()]})

    return objective, used


PARENT = {"lr": 0.1, "momentum": 0.5, "width": 3}
CHILD = {"lr": 0.0012, "momentum": 0.9, "width": 3}


def test_what_a_copied_trial_trains_with_is_what_its_configuration_says(tmp_path):
    objective, used = trained(lambda optimizer, state: optimizer.load_state_dict(state))
    for config, on in ((PARENT, False), (CHILD, True)):
        outcome = run_job(
            Job(0, config, {}, 3, 0, SEARCHED, tmp_path / "c.pt"), objective, lambda _, on=on: on
        )
    assert outcome.how == "complete"
    assert used == [(0.1, 0.5), (0.0012, 0.9), (0.0012, 0.9)]


def test_a_copied_trial_that_trains_with_the_other_ones_values_is_refused(tmp_path):
    def wrong(optimizer, state):
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 0.1  # the parent's

    objective, _ = trained(wrong)
    for config, on in ((PARENT, False), (CHILD, True)):
        outcome = run_job(
            Job(0, config, {}, 3, 0, SEARCHED, tmp_path / "c.pt"), objective, lambda _, on=on: on
        )
    assert outcome.how == "failed"
    assert "must train with lr=0.0012, but its optimiser has the 0.1 of the trial" in outcome.message


def test_an_objective_cannot_change_what_the_ledger_says():
    def objective(trial):
        trial.params.pop("width")
        trial.params["lr"] = 99.0
        return trial.params["lr"]

    found = search.run(objective, SEARCHED, engine="random", trials=3, epochs=1)
    assert [r.loss for r in found.records] == [r.config["lr"] for r in found.records]


@pytest.fixture
def population(monkeypatch):
    """Makes `search.run` train a population, in this process."""
    from dataclasses import replace

    from midflight.search.engines.population import Population

    def built(name, task, options, build=run_module.build):
        moves = Population(task)
        return replace(build(name, task, options), explore=moves.explore, interval=moves.interval)

    monkeypatch.setattr(run_module, "build", built)


@pytest.mark.parametrize("cut_at", [None, (2, 4), (0, 7)])
def test_a_population_trains_what_its_ledger_says_also_after_a_restart(population, cut_at, tmp_path):
    trained_with = {}

    def objective(trial):
        state, params = trial.load(), trial.params
        for epoch in range(state["epoch"] + 1 if state else 1, trial.epochs + 1):
            trained_with[trial.number] = params
            loss = abs(math.log10(params["lr"]) + 2) + 1 / epoch
            trial.report(epoch, loss, {"epoch": epoch, "lr": torch.tensor(params["lr"])})

    def cut(record):
        if cut_at == (record.number, record.epoch) and "cut" not in trained_with:
            trained_with["cut"] = True
            raise KeyboardInterrupt

    options = {"engine": "random", "trials": 8, "epochs": 10, "storage": str(tmp_path / "s.journal")}
    if cut_at:
        with pytest.raises(search.Interrupted):
            search.run(objective, SEARCHED, callbacks=[cut], **options)
    found = search.run(objective, SEARCHED, **options)
    trained_with.pop("cut", None)
    assert [(r.state, r.epoch) for r in found.records] == [("complete", 10)] * 8
    assert {r.number: r.config for r in found.records} == trained_with
    proposed = [t.params for t in found.ledger.study.trials]
    moved = [r for r in found.records if r.config != proposed[r.number]]
    assert moved
    for r in moved:
        assert any(r.config["width"] == config["width"] for config in proposed)
        assert r.online["lr"] == r.config["lr"]
    assert float(found.load()["lr"]) == pytest.approx(found.best.config["lr"])
    worst = max(abs(math.log10(config["lr"]) + 2) for config in proposed)
    assert max(r.loss for r in found.records) < worst


def test_a_population_needs_states_to_copy(population):
    with pytest.raises(search.SearchError, match="must pass state= to trial"):
        search.run(
            lambda trial: [trial.report(e, 1.0) for e in range(1, 11)] and None,
            SEARCHED, engine="random", trials=4, epochs=10,
        )  # fmt: skip


def test_an_error_of_a_callback_ends_the_search_and_is_not_the_trials(tmp_path):
    def wrong(record):
        if record.epoch == 1:
            raise ZeroDivisionError("of the callback")

    options = {"engine": "random", "trials": 2, "epochs": 2, "storage": str(tmp_path / "s.journal")}
    with pytest.raises(ZeroDivisionError, match="of the callback"):
        search.run(lambda trial: trial.report(1, 1.0), SPACE, callbacks=[wrong], **options)
    found = search.run(lambda trial: 1.0, SPACE, **options)
    assert [r.state for r in found.records] == ["complete"] * 2


def test_an_error_of_a_callback_ends_the_search_also_if_the_objective_catches_it():
    def wrong(record):
        if record.epoch == 1:
            raise ZeroDivisionError("of the callback")

    def objective(trial):
        try:
            trial.report(1, 1.0)
        except ZeroDivisionError:
            return 1.0

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        search.run(objective, SPACE, engine="random", trials=2, epochs=2, callbacks=[wrong])


def test_an_error_of_a_callback_ends_the_search_also_if_the_search_ends_the_trial_that_caught_it():
    def wrong(record):
        if record.epoch == 1:
            raise ZeroDivisionError("of the callback")

    def objective(trial):
        with contextlib.suppress(ZeroDivisionError):
            trial.report(1, 1.0)
        trial.report(2, math.nan)

    with pytest.raises(ZeroDivisionError, match="of the callback"):
        search.run(objective, SPACE, engine="random", trials=1, epochs=2, callbacks=[wrong])
