"""Every test starts from the same random state, in one thread."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("any machine", deadline=None)  # a loaded machine is slow, not wrong
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)
