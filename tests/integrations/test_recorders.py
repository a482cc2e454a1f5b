"""Loggers take `Tuner.log` as it is; what was written is read back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf

DRAWS = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 4, generator=DRAWS), torch.randn(64, 1, generator=DRAWS)


def run(on_hyperstep):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    space = mf.Space(
        lr=mf.Float(1e-3, 1.0, log=True, init=0.05), weight_decay=mf.default_range("weight_decay")
    )
    loss_fn = lambda model, batch: F.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    parts = [(X[:32], Y[:32])], [(X[32:], Y[32:])]
    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, *parts, schedule=4, total_steps=40, on_hyperstep=on_hyperstep
    )
    for _ in range(40):
        optimizer.zero_grad()
        loss_fn(model, (X[:32], Y[:32])).backward()
        optimizer.step()
    tuner.detach()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    seen = {}
    with SummaryWriter(tmp_path) as writer:

        def write(step, numbers):
            seen[step] = numbers
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        run(write)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert len(seen) > 5
    for name in ("value/lr", "option/weight_decay", "valid_loss", "hypergradient/lr"):
        assert {e.step: e.value for e in found.Scalars(name)} == pytest.approx(
            {step: numbers[name] for step, numbers in seen.items()}, rel=1e-6
        )
