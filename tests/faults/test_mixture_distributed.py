"""A mixture in two processes: the hypergradients of one process with both batches, and batches of its own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.utils.data import TensorDataset
from two_processes import ROWS, T1, Run, both, exact, in_two_processes, own, same

import midflight as mf
from midflight.mixture import Drawn

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed.")

SOURCE = torch.arange(ROWS) % 3
CHANCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)[SOURCE]


class Mixed(Run):
    """Tunes a mixture alone. One process takes the mean over the batches of both."""

    def attach(self, valid_loss_fn, valid_loader=None, **arguments):
        if self.tuner is None:
            self.mixture = mf.Mixture(3, init=[3, 2, 1])
            self.space = mf.Space(mixture=self.mixture, dtype=torch.float64)
            self.t1 = own((*T1, SOURCE, CHANCE), self.rank, self.count)
        super().attach(valid_loss_fn, valid_loader, **arguments)

    def loss_fn(self, model, batch):
        halves = zip(*(part.chunk(2 if self.count == 1 else 1) for part in batch), strict=True)
        losses = [self.mixture.loss(self.losses(model, x, y), Drawn(s, c)) for x, y, s, c in halves]
        return torch.stack(losses).mean()

    def losses(self, model, x, y):
        return F.cross_entropy(model(x), y, reduction="none")


class Unaware(Mixed):
    """A wrong twin: each process counts the weights of the sources twice."""

    def loss_fn(self, model, batch):
        x, y, s, c = batch
        return self.mixture.loss(self.losses(model, x, y), Drawn(s, c / self.count))


def shares(rank, count):
    return Mixed(rank, count, total_steps=12).steps().result()


def drawn(rank, count):
    """Return the first passes of a loader; all processes have the same seed."""
    torch.manual_seed(3)
    data = [TensorDataset(torch.arange(40) + 100 * k) for k in range(3)]
    loader = mf.Mixture(3).loader(data, 4)
    return {"length": len(loader), "examples": [x.tolist() for _ in range(2) for x, _ in loader]}


CASES = {
    "plain": partial(exact, kind=Mixed),
    "clipped": partial(exact, kind=Mixed, clip=0.05),
    "unaware": partial(exact, kind=Unaware),
    "tuned": shares,
    "drawn": drawn,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return both(in_two_processes(tmp_path_factory.mktemp("mixture"), CASES))


@pytest.mark.parametrize("case", ["plain", "clipped", "tuned"])
def test_processes_with_a_mixture_stay_equal_to_the_bit(found, case):
    assert same(found[0][case], found[1][case])


@pytest.mark.parametrize(("case", "twin"), [("plain", "plain"), ("clipped", "clipped"), ("unaware", "plain")])
def test_hypergradients_of_a_mixture_are_those_of_one_process_with_both_batches(found, case, twin):
    alone, together = CASES[twin](0, 1)["hypergradients"], found[0][case]["hypergradients"]
    assert len(alone) == len(together) > 9
    right = [a == pytest.approx(b, rel=1e-5) for a, b in zip(together, alone, strict=True)]  # a difference
    assert all(right) is (case == twin)


def test_a_tuned_mixture_is_that_of_one_process_with_both_batches(found):
    alone, together = CASES["tuned"](0, 1)["values"]["mixture"], found[0]["tuned"]["values"]["mixture"]
    assert together == pytest.approx(alone, rel=1e-4)
    assert together != pytest.approx([1 / 2, 1 / 3, 1 / 6], rel=0.05)


def test_each_process_draws_examples_of_its_own_also_with_the_same_seed(found):
    one, other = (each["drawn"] for each in found)
    assert one["length"] == other["length"] == 15
    assert len(one["examples"]) == 30
    assert one["examples"] != other["examples"]
