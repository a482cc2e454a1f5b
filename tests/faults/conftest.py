"""Everything here is compared with an oracle to the last digits, most of it in float64."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds, such as a compilation")


@pytest.fixture
def double():
    """float64 for the length of a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
