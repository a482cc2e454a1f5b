"""Freed memory is kept, where the C library is glibc."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import midflight as mf
from midflight import memory
from midflight.tuner import population

COUNT_FAULTS = """
import resource, torch
from midflight.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        arrays = [torch.ones(2**20) for _ in range(4)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
keep_freed_memory([torch.zeros(1)])
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not affected")
def test_four_arrays_of_4_mb_are_not_asked_of_the_system_again_and_again():
    environment = {n: x for n, x in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    for _ in range(8):  # by chance something at the top of the heap keeps all below it
        command = [sys.executable, "-c", COUNT_FAULTS]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        before, after = map(int, ran.stdout.split())
        if before > 1000:
            assert after < before / 20
            return
    pytest.skip("nothing is given back here, or in huge pages")


def test_nothing_is_done_for_weights_elsewhere(monkeypatch):
    asked = []
    library = SimpleNamespace(empty=lambda size, **_: asked.append(size), uint8=torch.uint8)
    monkeypatch.setattr(memory, "torch", library)
    memory.keep_freed_memory([torch.zeros(1, device="meta")])
    assert not asked
    memory.keep_freed_memory([torch.zeros(1)])
    assert asked == [31 * 2**20]


def test_a_population_sees_to_it(monkeypatch):
    asked = []
    monkeypatch.setattr(population, "keep_freed_memory", lambda _: asked.append(1))
    space = mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True))
    mf.Population(
        1, lambda _: torch.nn.Linear(2, 1), space, torch.optim.Adam, loss_fn=lambda model, x: model(x).sum(),
        valid_loader=[torch.zeros(1, 2)],
    )  # fmt: skip
    assert asked == [1]
