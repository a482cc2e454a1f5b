"""What the C library does with memory that torch frees on the CPU."""

import torch


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of freed memory for the next who asks, instead of 8 MB or less.

    A hyper-step takes and frees a few arrays of the size of the weights. Given back to the system, they
    are asked for again page by page, at 2 microseconds a page. glibc keeps twice the largest block that
    was ever mapped by itself and freed, if that is below 32 MB (mallopt(3), M_TRIM_THRESHOLD): so one is
    freed here, untouched. Other C libraries are not affected.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
