"""Two processes that train one model: equal to the bit, and equal to one process with the joined batch."""

from functools import partial

import pytest
import torch
from torch import distributed, nn
from two_processes import (
    STEPS,
    STILL,
    Run,
    both,
    diverging,
    exact,
    in_two_processes,
    one_bad_batch,
    resumed,
    said,
    same,
    tuned,
)

import midflight as mf
from midflight.tuner.distributed import Processes
from midflight.tuner.gradient import ReceivedGradient

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed.")


def uneven(rank, count):
    """One process has more validation batches than the other, whose model has buffers."""
    run = Run(rank, count, layers=[nn.BatchNorm1d(8)], total_steps=STEPS)
    x, y = run.t2
    run.attach(
        run.valid_loss_fn, valid_loader=[(x[k:], y[k:]) for k in range(3 if rank else 1)], total_steps=STEPS
    )
    return run.steps().result()


def failing(rank, count):
    """The validation loss fails in one process; both go on afterwards."""
    run = Run(rank, count, **STILL)

    def valid_loss_fn(model, batch):
        if rank == 1:
            raise KeyError("no such class")
        return run.valid_loss_fn(model, batch)

    run.attach(valid_loss_fn, schedule=1, horizon="step")
    found = said(run.steps)
    run.tuner.detach()
    run.optimizer.zero_grad()
    run.steps(1)
    return found


def failing_at_the_end(rank, count):
    """The validation loss fails in one process, in `finish`."""
    run, ended = Run(rank, count, **STILL), []

    def valid_loss_fn(model, batch):
        if rank == 1 and ended:
            raise KeyError("no such class")
        return run.valid_loss_fn(model, batch)

    run.attach(valid_loss_fn, schedule=1, horizon="step")
    run.steps()
    ended.append(1)
    return said(run.tuner.finish)


def without_wrapper(rank, count):
    return said(lambda: Run(rank, count, wrap=False, **STILL).steps())


def refusals(rank, count):
    def hooked():
        run = Run(rank, count, **STILL)
        run.tuner.detach()
        run.model.register_comm_hook(None, half_of)
        mf.Tuner(run.model, run.optimizer, run.space, run.loss_fn, [run.t1], [run.t2])

    return {
        "time": said(lambda: Run(rank, count, schedule=mf.TimeBudget(0.1))),
        "batch norm": said(lambda: Run(rank, count, layers=[nn.SyncBatchNorm(8)], wrap=False)),
        "hook": said(hooked),
    }


def half_of(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer() / 2)
    return future


def twin_without_mean(rank, count):
    real = Processes.mean
    Processes.mean = lambda self, tensors: tensors
    try:
        return exact(rank, count)
    finally:
        Processes.mean = real


CASES = {
    "plain": exact,
    "clipped": partial(exact, clip=0.05),
    "accumulated": partial(exact, passes=2),
    "tuned": tuned,
    "tuned, accumulated and clipped": partial(tuned, clip=0.05, passes=2),
    "batch norm and dropout": partial(tuned, layers=[partial(nn.BatchNorm1d, 8), partial(nn.Dropout, 0.2)]),
    "diverging": diverging,
    "one bad batch": one_bad_batch,
    "uneven": uneven,
    "resumed": resumed,
    "failing": failing,
    "failing at the end": failing_at_the_end,
    "without wrapper": without_wrapper,
    "refusals": refusals,
    "twin without mean": twin_without_mean,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("processes"), CASES)


@pytest.fixture(scope="module")
def found(folder):
    return both(folder)


@pytest.mark.parametrize(
    "case", [name for name, case in CASES.items() if partial(case).func in (exact, tuned)]
)
def test_processes_stay_equal_to_the_bit(found, case):
    assert same(found[0][case], found[1][case])


@pytest.mark.parametrize("case", ["plain", "clipped", "accumulated"])
def test_hypergradients_are_those_of_one_process_with_the_joined_batch(found, case):
    alone, together = CASES[case](0, 1), found[0][case]
    assert len(together["hypergradients"]) == len(alone["hypergradients"]) > 9
    for a, b in zip(together["hypergradients"], alone["hypergradients"], strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    torch.testing.assert_close(together["weights"], alone["weights"], rtol=1e-12, atol=1e-12)
    assert together["finished"] == pytest.approx(alone["finished"], rel=1e-12)


@pytest.mark.parametrize("case", ["tuned", "tuned, accumulated and clipped"])
def test_a_tuned_run_is_that_of_one_process_with_the_joined_batch(found, case):
    alone = CASES[case](0, 1)
    assert found[0][case]["values"] == pytest.approx(alone["values"], rel=1e-9)
    assert found[0][case]["values"]["lr"] != pytest.approx(1e-2, rel=0.05)


def test_a_run_that_diverges_goes_back_in_all_processes(found):
    one, other = (each["diverging"] for each in found)
    assert one["restored"] == other["restored"] >= 1
    assert same(one, other)
    assert bool(one["weights"].isfinite().all())


def test_a_bad_batch_of_one_process_skips_the_hyperstep_of_all(found):
    one, other = (each["one bad batch"] for each in found)
    assert one == other
    assert one["skipped"] >= 1


def test_processes_may_have_unequal_numbers_of_validation_batches(found):
    assert same(found[0]["uneven"], found[1]["uneven"])


def test_a_resumed_run_is_the_uninterrupted_one(found):
    for each in found:
        whole, again = each["resumed"]["whole"], each["resumed"]["again"]
        assert torch.equal(whole["weights"], again["weights"])
        assert whole["values"] == again["values"]


@pytest.mark.parametrize("case", ["failing", "failing at the end"])
def test_a_failure_of_one_process_is_an_error_in_all(found, case):
    assert found[1][case][0] == "KeyError"
    kind, sentence = found[0][case]
    assert kind == "AnotherProcessFailed"
    assert "failed in another" in sentence


def test_processes_that_train_apart_are_refused(found):
    for each in found:
        assert "wrap the model in DistributedDataParallel" in each["without wrapper"][1]


def test_what_cannot_be_right_is_refused_in_a_sentence(found):
    for each in found:
        said = each["refusals"]
        assert "TimeBudget goes by the time" in said["time"][1]
        assert "SyncBatchNorm" in said["batch norm"][1]
        assert "half_of" in said["hook"][1]


def test_the_death_of_one_process_ends_the_other_within_seconds(folder):
    assert float((folder / "seconds").read_text()) < 60


def test_a_tuner_that_does_not_average_is_found_out(found):
    alone, twin = exact(0, 1), found[0]["twin without mean"]
    first = zip(twin["hypergradients"][0], alone["hypergradients"][0], strict=True)
    assert all(a != pytest.approx(b, rel=1e-3) for a, b in first)


def test_a_mean_leaves_what_it_was_given(monkeypatch):
    class Done:
        def wait(self):
            return None

    def all_reduce(t, async_op):
        t.mul_(2)
        return Done()

    processes = Processes(nn.Linear(1, 1))
    processes.count = 2
    monkeypatch.setattr(processes, "_agree", lambda: None)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    one = torch.ones(3)
    given = {"a": one, "b": one, "c": torch.ones(()).expand(2), "d": torch.ones(2).half()}
    found = processes.mean(given)
    for name, t in found.items():
        assert torch.equal(t, torch.ones_like(given[name]))
        assert t.dtype == given[name].dtype
        assert t.data_ptr() != given[name].data_ptr()


def test_a_backward_that_fails_leaves_the_next_hyper_step_alone():
    model, received = nn.Linear(2, 1), ReceivedGradient(reduced=True)
    params = dict(model.named_parameters())

    def backward(fails):
        received.watch(model, params)
        model.zero_grad()
        x = torch.ones(1, 2, requires_grad=True)
        x.register_hook(lambda g: 1 / 0 if fails else None)
        model(x).sum().backward()

    with pytest.raises(ZeroDivisionError):
        backward(True)
    backward(False)
    grads = {name: p.grad for name, p in params.items()}
    assert received.jacobian(grads, lambda names: 1.0) is None
    assert received.passes == 1
