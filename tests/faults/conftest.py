"""Everything here is compared with an oracle to the last digits, so it runs in float64."""

import pytest
import torch


@pytest.fixture
def double():
    """float64 for the length of a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
