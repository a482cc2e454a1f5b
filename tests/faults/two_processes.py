"""Runs of two processes that train one model. Each case also runs in one process, with the joined batch."""

import math
import os
import time
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from loops import Still
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import midflight as mf

STEPS, ROWS = 12, 32
PROCESSES = 2
STILL = {"horizon": "step", "hyper_optimizer": Still}


def table(seed):
    x = torch.randn(ROWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


T1, T2 = table(1), table(2)


def own(data, rank, count):
    """Return the rows of one process."""
    share = slice(rank * ROWS // count, (rank + 1) * ROWS // count)
    return tuple(part[share] for part in data)


def network(*layers):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *layers, nn.Linear(8, 3)).double()


class Run:
    """A loop on one process's share of the data; a case overrides what it changes."""

    def __init__(
        self, rank, count, *, layers=(), wrap=True, lr=1e-2, make=torch.optim.AdamW, seed=0, **arguments
    ):
        torch.manual_seed(seed)
        self.rank, self.count = rank, count
        self.space = mf.Space(
            lr=mf.Float(1e-6, 1e2, log=True, init=lr),
            weight_decay=mf.Float(1e-5, 1e-1, log=True, init=1e-3),
            l2=mf.Float(1e-5, 1e-1, log=True, init=1e-3),
            smoothing=mf.Float(0.0, 0.5, init=0.1),
            **self.more(),
            dtype=torch.float64,
        )
        self.net, self.wrapped = self.build(layers), wrap and count > 1
        self.model = self.wrap(self.net) if self.wrapped else self.net
        self.optimizer = make(self.model.parameters(), lr=lr, weight_decay=1e-3)
        self.t1, self.t2 = own(T1, rank, count), own(T2, rank, count)
        self.tuner = None
        self.attach(self.valid_loss_fn, **{"schedule": 1, **arguments})

    def more(self):
        """Return further hyperparameters, name -> spec."""
        return {}

    def build(self, layers):
        return network(*layers)

    def wrap(self, net):
        """Return the model that several processes train."""
        return DistributedDataParallel(net)

    def unsynced(self):
        """Let backward passes inside not average gradients over the processes."""
        return self.model.no_sync()

    def attach(self, valid_loss_fn, valid_loader=None, **arguments):
        if self.tuner is not None:
            self.tuner.detach()
        self.tuner = mf.Tuner(
            self.model, self.optimizer, self.space, self.loss_fn, [self.t1], valid_loader or [self.t2],
            valid_loss_fn=valid_loss_fn, **arguments,
        )  # fmt: skip

    def penalty(self, logits):
        return sum(w.square().sum() for w in self.net.parameters())

    def loss_fn(self, model, batch):
        x, y = batch
        logits = model(x)
        log_p = logits.log_softmax(1)
        s = self.space["smoothing"].value
        return (1 - s) * F.nll_loss(log_p, y) - s * log_p.mean() + self.space["l2"] * self.penalty(logits)

    def valid_loss_fn(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def steps(self, n=STEPS, clip=None, passes=1, quiet=True):
        for _ in range(n):
            self.optimizer.zero_grad()
            for k, micro in enumerate(zip(*(part.chunk(passes) for part in self.t1), strict=True)):
                with self.unsynced() if quiet and self.wrapped and k + 1 < passes else nullcontext():
                    (self.loss_fn(self.model, micro) / passes).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
        return self

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])

    def result(self):
        finished = self.tuner.finish()
        return {
            "weights": self.weights(),
            "values": self.space.as_dict(),
            "hypergradients": [
                torch.cat([g.flatten() for g in row]).tolist()
                for row in getattr(self.tuner.hyper_optimizer, "given", [])
            ],
            "log": {k: v for k, v in self.tuner.log().items() if v == v},
            "finished": finished,
        }


def exact(rank, count, kind=Run, steps=STEPS, **how):
    return kind(rank, count, **STILL).steps(steps, **how).result()


def tuned(rank, count, kind=Run, layers=(), **how):
    return kind(rank, count, layers=[make() for make in layers], total_steps=STEPS).steps(**how).result()


def diverging(rank, count, kind=Run, steps=60):
    run = kind(rank, count, lr=50.0, make=partial(torch.optim.SGD, momentum=0.9), total_steps=steps)
    run.steps(steps)
    return {"restored": run.tuner.log()["restored"], **run.result()}


def one_bad_batch(rank, count, kind=Run):
    """Some validation losses of one process are NaN."""
    run, calls = kind(rank, count, **STILL), []

    def valid_loss_fn(model, batch):
        calls.append(1)
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss * math.nan if rank == 1 and len(calls) % 8 == 0 else loss

    run.attach(valid_loss_fn, schedule=1, horizon="step")
    run.steps()
    return {"skipped": run.tuner.log()["skipped"], "values": run.space.as_dict()}


def resumed(rank, count, kind=Run):
    first = kind(rank, count, total_steps=STEPS).steps(5)
    state = [first.model.state_dict(), first.optimizer.state_dict(), first.tuner.state_dict()]
    torch.save(state, path := f"{os.environ['HERE']}/{rank}.pt")
    first.steps(STEPS - 5)
    again = kind(rank, count, total_steps=STEPS, seed=7)
    model, optimizer, tuner = torch.load(path, weights_only=kind is Run)
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.tuner.load_state_dict(tuner)
    again.steps(STEPS - 5)
    return {"whole": first.result(), "again": again.result()}


def said(action):
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def work(rank, folder, cases, last):
    """Compute all cases in one process. Then both do `last`, and one of them is killed in mid-run."""
    torch.set_num_threads(1)
    os.environ["HERE"] = str(folder)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES
    )
    found = {}
    for name, case in cases.items():
        torch.manual_seed(rank)
        found[name] = case(rank, PROCESSES)
    torch.save(found, folder / f"found{rank}.pt")
    distributed.barrier()
    if rank == 1:
        last(rank, PROCESSES, 3)
        os._exit(9)
    began = time.monotonic()
    sentence = said(partial(last, rank, PROCESSES, STEPS))
    (folder / "seconds").write_text(str(time.monotonic() - began))
    (folder / "sentence").write_text(" ".join(sentence))


def some_steps(rank, count, steps, kind=Run):
    kind(rank, count, **STILL).steps(steps)


def in_two_processes(folder, cases, last=some_steps, limit=120):
    """Return the folder with what both processes found within `limit` seconds: case -> result."""
    context = torch.multiprocessing.spawn(work, (folder, cases, last), PROCESSES, join=False)
    until = time.monotonic() + limit
    for process in context.processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
    assert (folder / "seconds").exists(), "a process waited for another, or failed"
    return folder


def both(folder):
    """Return what each process found: case -> result."""
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def same(one, other):
    return torch.equal(one["weights"], other["weights"]) and all(
        one[key] == other[key] for key in ("values", "hypergradients", "finished", "log")
    )
