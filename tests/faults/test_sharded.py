"""Two processes with a part of every weight each (`fully_shard`): equal to one process with the whole model."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import distributed, nn
from two_processes import (
    PROCESSES,
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
    some_steps,
    tuned,
)

import midflight as mf
from midflight.hypergrad.problem import Step
from midflight.tuner.distributed import Processes
from midflight.tuner.sharded import Parts

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed.")
FEW = 5


class Scale(nn.Module):
    """One number, of which the second process has no part."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x


class SteadyNoise(nn.Module):
    """Adds the same numbers to each example, while training."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x):
        z = torch.randn(x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(4))
        return x + self.level * z if self.training else x


class SteadyDropout(mf.nn.Dropout):
    """Drops the same features at each call, at a constant rate other than its own."""

    def _drawn_at(self, rate):
        return torch.full_like(rate, 0.3)

    def forward(self, x):
        draws = torch.rand(x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand_like", lambda x, **_: draws.expand(x.shape))
            return super().forward(x)


class Sharded(Run):
    """A loop on a model of which each process has a part."""

    how = {}

    def more(self):
        return {"noise": mf.Float(0.0, 1.0, init=0.4), "dropout": mf.Float(0.05, 0.8, logit=True, init=0.5)}

    def build(self, layers):
        noise, dropout = SteadyNoise(self.space["noise"]), SteadyDropout(self.space["dropout"])
        inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), dropout, *layers, Scale())
        return nn.Sequential(noise, inner, nn.Linear(8, 3)).double()

    def wrap(self, net):
        from torch.distributed.fsdp import fully_shard

        fully_shard(net[1], **self.how)
        return fully_shard(net, **self.how)

    @contextmanager
    def unsynced(self):
        self.net.set_requires_gradient_sync(False)
        yield
        self.net.set_requires_gradient_sync(True)

    def penalty(self, logits):
        return logits.square().mean()

    def result(self):
        received = self.tuner._hyperstep.received
        return {"passes": received.passes, "carried": received.carried, **super().result()}

    def weights(self):
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.net.parameters()]
        return torch.cat([p.detach().flatten() for p in whole])


class Kept(Sharded):
    """Weights stay gathered after forward passes, and after all backward passes of a step but the last."""

    how = {"reshard_after_forward": False}

    @contextmanager
    def unsynced(self):
        self.net.set_reshard_after_backward(False)
        with super().unsynced():
            yield
        self.net.set_reshard_after_backward(True)


class Compiled(Sharded):
    def wrap(self, net):
        return torch.compile(super().wrap(net), backend="eager")


class CompiledInPlace(Sharded):
    def wrap(self, net):
        super().wrap(net).compile(backend="eager")
        return net


EXACT = {
    "plain": partial(exact, kind=Sharded, steps=FEW),
    "clipped": partial(exact, kind=Sharded, steps=FEW, clip=0.05),
    "accumulated": partial(exact, kind=Sharded, steps=FEW, passes=2, quiet=False),
    "accumulated without sync": partial(exact, kind=Sharded, steps=FEW, passes=2),
    "accumulated, clipped": partial(exact, kind=Sharded, steps=FEW, passes=2, clip=0.05),
    "kept": partial(exact, kind=Kept, steps=FEW),
    "kept, accumulated": partial(exact, kind=Kept, steps=FEW, passes=2),
    "compiled": partial(exact, kind=Compiled, steps=FEW),
    "compiled in place, accumulated": partial(exact, kind=CompiledInPlace, steps=FEW, passes=2),
}
CASES = {
    **EXACT,
    "tuned": partial(tuned, kind=Sharded),
    "diverging": partial(diverging, kind=Sharded, steps=30),
    "one bad batch": partial(one_bad_batch, kind=Sharded),
    "resumed": partial(resumed, kind=Sharded),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("sharded"), CASES, partial(some_steps, kind=Sharded))


@pytest.fixture(scope="module")
def found(folder):
    return both(folder)


@pytest.mark.parametrize("case", [*EXACT, "tuned"])
def test_processes_stay_equal_to_the_bit(found, case):
    assert same(found[0][case], found[1][case])


@pytest.mark.parametrize("case", EXACT)
def test_hypergradients_are_those_of_one_process_with_the_whole_model(found, case):
    alone, together = CASES[case](0, 1), found[0][case]
    assert len(together["hypergradients"]) == len(alone["hypergradients"]) >= FEW - 1
    for a, b in zip(together["hypergradients"], alone["hypergradients"], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)  # a mixed partial by differences
    torch.testing.assert_close(together["weights"], alone["weights"], rtol=1e-12, atol=1e-12)
    assert together["finished"] == pytest.approx(alone["finished"], rel=1e-12)


def test_a_tuned_run_is_that_of_one_process_with_the_whole_model(found):
    alone = CASES["tuned"](0, 1)
    assert found[0]["tuned"]["values"] == pytest.approx(alone["values"], rel=1e-6)
    assert found[0]["tuned"]["values"]["lr"] != pytest.approx(1e-2, rel=0.05)


def test_a_run_that_diverges_goes_back_in_all_processes(found):
    one, other = (each["diverging"] for each in found)
    alone = CASES["diverging"](0, 1)
    assert one["restored"] == other["restored"] == alone["restored"] >= 1
    assert same(one, other)
    assert bool(one["weights"].isfinite().all())


def test_a_bad_batch_of_one_process_costs_the_look_of_all(found):
    one, other = (each["one bad batch"] for each in found)
    assert one == other
    assert one["skipped"] >= 1


def test_a_resumed_run_is_the_uninterrupted_one(found):
    for each in found:
        whole, again = each["resumed"]["whole"], each["resumed"]["again"]
        assert torch.equal(whole["weights"], again["weights"])
        assert whole["values"] == again["values"]


def test_the_death_of_one_process_ends_the_other_within_seconds(folder):
    assert float((folder / "seconds").read_text()) < 60
    assert (folder / "sentence").read_text()
