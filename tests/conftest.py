"""Every test starts from the same random state, in one thread."""

import os
import signal
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of numpy, scikit-learn and child processes

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("any machine", deadline=None)  # a loaded machine is slow, not wrong
hypothesis.settings.load_profile("any machine")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job that a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    without = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
    items[:] = without


@pytest.fixture(autouse=True)
def _reproducible():
    torch.default_generator.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def group_ends():
    """(process group) -> whether no process of it is left within some seconds."""

    def ends(group, seconds=120):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False

    return ends
