"""Compare the time of a population with that of a loop over its members, by number and network size.

    python benchmarks/population.py                  # one thread; writes docs/results/population.json
    python benchmarks/population.py --device cuda    # writes population_cuda.json
    python benchmarks/population.py --table          # the stored times

Adam (fused in the loop), batch 100. L2 and input noise are tuned at every 10th step with the horizon
"step". The population uses `compile=True`. Loop and population alternate in turns of 10 steps. The table
shows the median time of a step per member.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tasks import markdown, parser_of
from torch import Tensor, nn

import midflight as mf
from midflight._reporting.machine import machine

RESULTS = Path(__file__).parent.parent / "docs/results"
NETWORKS = {"64-64-64-10": [64, 64, 64, 10], "784-200-200-10": [784, 200, 200, 10]}
MEMBERS, TURNS, TURN, BATCH = [1, 4, 16, 64], 5, 10, 100


def space() -> mf.Space:
    return mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True), noise=mf.Float(0.0, 0.8, init=0.3))


def build(sizes: list[int], space: mf.Space) -> nn.Module:
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(mf.nn.GaussianNoise(space["noise"]), *layers[:-1])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def population(sizes: list[int], n: int, device: str) -> Callable[[], object]:
    """Return a function that takes one step of all members together."""
    batch = torch.rand(n, BATCH, sizes[0], device=device), torch.randint(0, 10, (n, BATCH), device=device)
    pop = mf.Population(
        n, lambda s: build(sizes, s).to(device), space(), torch.optim.Adam, loss_fn=loss,
        valid_loader=[batch], schedule=10, compile=True,
    )  # fmt: skip
    return partial(pop.step, batch)


def loop(sizes: list[int], device: str) -> Callable[[], None]:
    """Return a function that takes one step of one training."""
    own = space()
    batch = torch.rand(BATCH, sizes[0], device=device), torch.randint(0, 10, (BATCH,), device=device)
    model = build(sizes, own).to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    mf.Tuner(model, optimizer, own, loss, [batch], [batch], horizon="step", schedule=10)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    for _ in range(TURN):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / TURN


def main() -> None:
    parser = parser_of(__doc__, workers=False)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    out = RESULTS / ("population.json" if options.device == "cpu" else "population_cuda.json")
    if not options.table:
        measure(options.device, out)
    head = ["network", "members", "loop, ms", "population, ms", "loop / population"]
    cells = [
        [r["network"], r["members"], f"{r['loop_ms']:.2f}", f"{r['population_ms']:.3f}",
         f"{r['loop_ms'] / r['population_ms']:.2f}"]
        for r in json.loads(out.read_text())["rows"]
    ]  # fmt: skip
    print(markdown(head, cells))


def measure(device: str, out: Path) -> None:
    """Store the time of a step per member, for each network and number of members."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found = []
    for name, sizes in NETWORKS.items():
        for n in MEMBERS:
            torch.compiler.reset()  # torch compiles at most eight shapes
            steps = loop(sizes, device), population(sizes, n, device)
            times = np.array([[seconds(s, device) for s in steps] for _ in range(TURNS + 1)][1:]) * 1000
            alone, together = np.median(times, 0) / [1, n]
            found.append({"network": name, "members": n, "loop_ms": alone, "population_ms": together})
            print(found[-1], file=sys.stderr, flush=True)
    out.write_text(json.dumps({"machine": machine(), "device": device, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
