"""Two processes with a part of every weight each (`fully_shard`): equal to one with the whole model."""

import os
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_processes import (
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
from midflight.hypergrad.problem import Step
from midflight.tuner.distributed import Processes
from midflight.tuner.sharded import Parts

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed.")
FEW = 3


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


class Halving(torch.optim.Optimizer):
    """Momentum that halves at each step; an optimiser without a rule."""

    def __init__(self, weights, lr, weight_decay):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(0.5).add_(p.grad).add_(p, alpha=group["weight_decay"])
                p.sub_(group["lr"] * m)


class Sharded(Run):
    """A loop on a model of which each process has a part."""

    how: ClassVar = {}

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


class Replicated(Sharded):
    """The same loop with DistributedDataParallel."""

    wrap, unsynced, weights = Run.wrap, Run.unsynced, Run.weights


class Kept(Sharded):
    """Weights stay gathered after forward passes, and after all backward passes of a step but the last."""

    how: ClassVar = {"reshard_after_forward": False}

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


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=False)


class Deep(Sharded):
    def build(self, layers):
        return super().build([Checkpointed()])


class Merging(nn.Linear):
    """Writes to its weight in eval mode, as a LoRA layer does."""

    def __init__(self):
        super().__init__(8, 8)
        self.more = nn.Parameter(torch.full((8, 8), 0.1))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.weight.add_(-self.more if mode else self.more)
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) if self.merged else super().forward(x) + nn.functional.linear(x, self.more)


class Merged(Sharded):
    def build(self, layers):
        return super().build([Merging()])


class WithoutGraph(Sharded):
    """The loss takes the value of l2 out of the graph."""

    def penalty(self, logits):
        return super().penalty(logits) * float(self.space["l2"]) / self.space["l2"].value


class OnWeights(Sharded):
    """The loss reads the weights themselves: whole tensors in one process, `DTensor`s in several."""

    def penalty(self, logits):
        squares = [w.square().sum() for w in self.net[1].parameters() if w.ndim > 1]
        return sum(s.full_tensor() if hasattr(s, "full_tensor") else s for s in squares)


class Normalised(Sharded):
    def build(self, layers):
        return super().build([nn.BatchNorm1d(8)])


class NormalisedWhole(Normalised):
    """The same with a whole model in each process, and running statistics of its own."""

    def wrap(self, net):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DistributedDataParallel(net, broadcast_buffers=False)


class Float(Sharded):
    def wrap(self, net):
        return super().wrap(net.float())

    def loss_fn(self, model, batch):
        return super().loss_fn(lambda x: model(x.float()).double(), batch)

    def valid_loss_fn(self, model, batch):
        return super().valid_loss_fn(lambda x: model(x.float()).double(), batch)


class Half(Float):
    def wrap(self, net):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.how = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
        return super().wrap(net)


def uneven(rank, count):
    """One process has more validation batches than the other."""
    run, ends = Sharded(rank, count, **STILL), 16 if count == 1 else 0
    x, y = run.t2
    batches = [(x[:ends], y[:ends]), (x[ends:], y[ends:]), (x[-4:], y[-4:])] if count == 1 else [run.t2]
    run.attach(run.valid_loss_fn, batches + [(x[-4:], y[-4:])] * (rank == 1), schedule=1, **STILL)
    return run.steps(1).result()


def without_zeroing(rank, count):
    """Gradients of two steps add up."""
    run = Sharded(rank, count, **STILL)
    for k in range(FEW):
        if k % 2 == 0:
            run.optimizer.zero_grad()
        run.loss_fn(run.model, run.t1).backward()
        run.optimizer.step()
    return run.result()


def changed(rank, count, change):
    """The loop changes gradients between backward and step."""
    run = Sharded(rank, count, **STILL)
    for _ in range(FEW):
        run.optimizer.zero_grad()
        run.loss_fn(run.model, run.t1).backward()
        change(list(run.model.parameters()))
        run.optimizer.step()
    return run.result()


def scale(weights):
    for w in weights:
        w.grad.mul_(0.3)


def by(rank, count, make):
    return Sharded(rank, count, make=make, **STILL).steps(FEW).result()


def with_looks(rank, count):
    """The loop evaluates the model, which then stays gathered, and one process reads the tuner's reports."""
    run = Sharded(rank, count, **STILL)
    for _ in range(FEW):
        run.steps(1)
        with torch.no_grad():
            run.model(run.t1[0])
        if rank == 0:
            assert [*run.tuner.report(), repr(run.tuner), *run.tuner.log()]
            run.tuner.state_dict()
    return run.result()


def by_two(rank, count):
    """Two optimisers, each of a part of the model."""

    class Two(Sharded):
        def attach(self, valid_loss_fn, **arguments):
            self.optimizer = [torch.optim.AdamW(self.net[n].parameters(), weight_decay=1e-3) for n in (1, 2)]
            self.tuner = mf.Tuner(
                self.model, self.optimizer, self.space, self.loss_fn, [self.t1], [self.t2],
                valid_loss_fn=valid_loss_fn, **arguments,
            )  # fmt: skip

    run = Two(rank, count, **STILL)
    for _ in range(FEW):
        for optimizer in run.optimizer:
            optimizer.zero_grad()
        run.loss_fn(run.model, run.t1).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
        for optimizer in run.optimizer:
            optimizer.step()
    return run.result()


def with_an_error(rank, count):
    """The first validation loss fails within the model, in all processes, and the loop goes on."""
    run, calls = Sharded(rank, count, **STILL), []

    def valid_loss_fn(model, batch):
        calls.append(1)
        if len(calls) == 1:
            model[1](model[0](batch[0]))
            raise KeyError("no such class")
        return run.valid_loss_fn(model, batch)

    run.attach(valid_loss_fn, schedule=1, **STILL)
    assert said(partial(run.steps, 1))[0] == "KeyError"
    return run.steps(FEW).result()


def refusals(rank, count):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def of(wrap, **arguments):
        kind = type("Refused", (Sharded,), {"wrap": lambda self, net: wrap(net)})
        return said(partial(kind, rank, count, **arguments))

    def divided(net):
        fully_shard(net).set_gradient_divide_factor(1.0)
        return net

    def of_another():
        run = Sharded(rank, count)
        run.tuner.load_state_dict(run.tuner.state_dict() | {"part": [1 - rank, count]})

    others = {
        "space": mf.Space(lr=mf.Float(1e-3, 1e-1)),
        "optimizer": torch.optim.SGD,
        "loss_fn": of,
        "valid_loader": [],
    }
    mesh, line = (
        init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts")),
        init_device_mesh("cpu", (2,)),
    )
    return {
        "copies": of(lambda net: fully_shard(net, mesh=mesh)),
        "tensor parallel": of(lambda net: parallelize_module(net, line, {"2": ColwiseParallel()})),
        "a part of the model": of(lambda net: nn.Sequential(net[0], fully_shard(net[1]), net[2])),
        "sums": of(divided),
        "first": of(FullyShardedDataParallel),
        "estimator": of(fully_shard, estimator="unrolled"),
        "forward mode": of(fully_shard, estimator="forward_over_reverse"),
        "optimiser": of(fully_shard, make=torch.optim.Adafactor),
        "another's state": said(of_another),
        "population": said(partial(mf.Population, 2, lambda space: fully_shard(nn.Linear(6, 3)), **others)),
    }


class FullyShardedDataParallel(nn.Module):
    """A module of this name flattens weights; torch's own needs an accelerator."""

    def __init__(self, net):
        super().__init__()
        self.net = net


def twin(rank, count, owner, name, other, **how):
    """A tuner of which one method is another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, other)
        return exact(rank, count, kind=Sharded, steps=FEW, **how)


chain = Step.chain


def averaged(step, pairs):
    return chain(replace(step, shards=1), pairs)


def alone(parts, number):
    return number


def of_own(parts, norms):
    return list(norms)


def found_here(processes, found, like):
    return dict(found)


EXACT = {
    "replicas": partial(exact, kind=Replicated, passes=2, clip=0.05),
    "plain": partial(exact, kind=Sharded, steps=FEW),
    "clipped": partial(exact, kind=Sharded, steps=FEW, clip=0.05),
    "accumulated": partial(exact, kind=Sharded, steps=FEW, passes=2, quiet=False),
    "accumulated without sync": partial(exact, kind=Sharded, steps=FEW, passes=2),
    "accumulated, clipped": partial(exact, kind=Sharded, steps=FEW, passes=2, clip=0.05),
    "not zeroed": without_zeroing,
    "clipped by value": partial(changed, change=partial(nn.utils.clip_grad_value_, clip_value=0.02)),
    "scaled": partial(changed, change=scale),
    "kept": partial(exact, kind=Kept, steps=FEW),
    "kept, accumulated": partial(exact, kind=Kept, steps=FEW, passes=2),
    "compiled": partial(exact, kind=Compiled, steps=FEW),
    "compiled in place": partial(exact, kind=CompiledInPlace, steps=FEW),
    "checkpoints": partial(exact, kind=Deep, steps=FEW),
    "without graph": partial(exact, kind=WithoutGraph, steps=FEW),
    "penalty on weights": partial(exact, kind=OnWeights, steps=FEW),
    "momentum": partial(by, make=partial(torch.optim.SGD, momentum=0.9)),
    "an optimiser of one's own": partial(by, make=Halving),
    "two optimisers": by_two,
    "weights merged in eval mode": partial(exact, kind=Merged, steps=FEW),
    "looks": with_looks,
    "an error": with_an_error,
}
CASES = {
    **EXACT,
    "tuned": partial(tuned, kind=Sharded),
    "diverging": partial(diverging, kind=Sharded, steps=30),
    "one bad batch": partial(one_bad_batch, kind=Sharded),
    "resumed": partial(resumed, kind=Sharded),
    "uneven": uneven,
    "batch norm": partial(exact, kind=Normalised, steps=FEW),
    "batch norm, whole": partial(exact, kind=NormalisedWhole, steps=FEW),
    "float32": partial(exact, kind=Float, steps=8),
    "bfloat16": partial(exact, kind=Half, steps=8),
    "refusals": refusals,
    "twin that averages over parts": partial(twin, owner=Step, name="chain", other=averaged),
    "twin that clips by one part": partial(twin, owner=Parts, name="sum", other=alone, clip=0.05),
    "twin with norms of one part": partial(twin, owner=Parts, name="norms", other=of_own, clip=0.05),
    "twin without mean": partial(twin, owner=Processes, name="mean_where_present", other=found_here),
}


def failing(rank, count, steps):
    """The validation loss fails in one process, which then ends."""
    run, calls = Sharded(rank, count, **STILL), []

    def valid_loss_fn(model, batch):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise KeyError("no such class")
        return run.valid_loss_fn(model, batch)

    run.attach(valid_loss_fn, schedule=1, **STILL)
    Path(f"{os.environ['HERE']}/said{rank}").write_text(" ".join(said(partial(run.steps, steps))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("sharded"), CASES, failing, limit=300)


@pytest.fixture(scope="module")
def found(folder):
    return both(folder)


@pytest.mark.parametrize("case", [*EXACT, "tuned", "batch norm", "bfloat16"])
def test_processes_stay_equal_to_the_bit(found, case):
    assert same(found[0][case], found[1][case])


def require_equal(together, alone):
    assert len(together["hypergradients"]) == len(alone["hypergradients"]) >= FEW - 1
    for a, b in zip(together["hypergradients"], alone["hypergradients"], strict=True):
        assert a[:2] == pytest.approx(b[:2], rel=1e-8)  # options of the optimiser
        assert a == pytest.approx(b, rel=2e-6, abs=1e-9)  # a mixed partial by differences
    torch.testing.assert_close(together["weights"], alone["weights"], rtol=1e-12, atol=1e-12)
    assert together["finished"] == pytest.approx(alone["finished"], rel=1e-12)


@pytest.mark.parametrize("case", EXACT)
def test_hypergradients_are_those_of_one_process_with_the_whole_model(found, case):
    alone, together = CASES[case](0, 1), found[0][case]
    require_equal(together, alone)
    assert (together["passes"], together["carried"]) == (alone["passes"], alone["carried"])


def test_running_statistics_are_differentiated_as_with_whole_models(found):
    require_equal(found[0]["batch norm"], found[0]["batch norm, whole"])


def test_half_precision_is_right_on_average(found):
    half, whole = (
        torch.tensor(found[0][case]["hypergradients"])[1:].mean(0) for case in ("bfloat16", "float32")
    )
    assert half.tolist() == pytest.approx(whole.tolist(), rel=0.15)


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


def test_processes_may_have_unequal_numbers_of_validation_batches(found):
    finished = CASES["uneven"](0, 1)["finished"]  # the mean over the examples of all batches
    for each in found:
        assert each["uneven"]["finished"] == pytest.approx(finished, rel=1e-12)


def test_a_bad_batch_of_one_process_skips_the_hyperstep_of_all(found):
    one, other = (each["one bad batch"] for each in found)
    assert one == other
    assert one["skipped"] >= 1


def test_a_resumed_run_is_the_uninterrupted_one(found):
    for each in found:
        whole, again = each["resumed"]["whole"], each["resumed"]["again"]
        assert torch.equal(whole["weights"], again["weights"])
        assert whole["values"] == again["values"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("copies", "use a mesh of one dimension"),
        ("tensor parallel", "but 1.0.weight was not split by it"),
        ("a part of the model", "but 2.weight was not split by it"),
        ("sums", "must be the mean over the processes"),
        ("first", "FullyShardedDataParallel flattens them"),
        ("estimator", "must work on parts of weights"),
        ("forward mode", "must work on parts of weights"),
        ("optimiser", "Adafactor reads whole weights"),
        ("another's state", "the saved tuner had part"),
        ("population", "members must be whole models"),
    ],
)
def test_what_cannot_be_right_is_refused_in_a_sentence(found, case, words):
    for each in found:
        assert words in each["refusals"][case][1]


def test_one_process_may_shard_its_model(tmp_path):
    class One(Sharded):
        def build(self, layers):
            return self.wrap(super().build(layers))

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        require_equal(exact(0, 1, kind=One, steps=FEW, clip=0.05), CASES["clipped"](0, 1))
    finally:
        distributed.destroy_process_group()


def test_an_error_in_one_process_is_its_own_and_ends_the_other_within_seconds(folder):
    assert (folder / "said1").read_text() == "KeyError 'no such class'"
    assert (folder / "said0").read_text()
    assert float((folder / "seconds").read_text()) < 60


@pytest.mark.parametrize(
    ("case", "right", "wrong"),
    [
        ("twin that averages over parts", "plain", slice(0, 2)),
        ("twin that clips by one part", "clipped", slice(2, None)),
        ("twin without mean", "plain", slice(0, None)),
    ],
)
def test_wrong_twins_are_found_out(found, case, right, wrong):
    alone, twin = CASES[right](0, 1)["hypergradients"][1], found[0][case]["hypergradients"][1]
    assert all(a != pytest.approx(b, rel=1e-4) for a, b in zip(twin[wrong], alone[wrong], strict=True))


def test_a_tuner_with_norms_of_one_part_is_found_out(found):
    """It sees clipping to another norm at each step, and so leaves out all hyper-steps."""
    assert not found[0]["twin with norms of one part"]["hypergradients"]
    assert len(found[0]["clipped"]["hypergradients"]) == FEW - 1
