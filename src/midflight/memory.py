"""What the C library does with memory that torch frees on the CPU."""

from collections.abc import Iterable

import torch
from torch import Tensor


def keep_freed_memory(weights: Iterable[Tensor]) -> None:
    """Let glibc keep up to 62 MB of freed memory for whoever asks next, in the whole process.

    For weights on the CPU; for others nothing is done.

    A hyper-step takes and frees a few arrays of the size of the weights. Given back to the system, they
    are asked for again page by page, at 2 microseconds a page. glibc keeps twice the largest block below
    32 MB that was ever mapped by itself and freed, 128 KB at first (mallopt(3), M_TRIM_THRESHOLD): so one
    is freed here, untouched. Arrays from 32 MB on are given back all the same; other C libraries are not
    affected.
    """
    if any(w.device.type == "cpu" for w in weights):
        torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
