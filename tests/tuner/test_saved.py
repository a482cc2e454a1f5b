"""What is saved by name is whole, a copy, and restored."""

from collections import deque

import torch

from midflight.tuner.saved import Saved


class Base(Saved):
    SAVED = ("weights", "_seen")

    def __init__(self):
        self.weights = {"w": torch.zeros(2)}
        self._seen = deque([1, 2])


class Derived(Base):
    SAVED = ("names", "part")

    def __init__(self):
        super().__init__()
        self.names = {"a"}
        self.part = Base()


def test_a_subclass_saves_what_its_base_does_and_more():
    assert set(Derived().state_dict()) == {"weights", "seen", "names", "part"}


def test_a_state_is_a_copy_both_ways():
    one, other = Derived(), Derived()
    one.weights["w"] += 1
    state = one.state_dict()
    one.weights["w"] += 1
    one._seen.append(3)
    one.names.add("b")
    one.part.weights["w"] += 1
    other.load_state_dict(state)
    other.weights["w"] += 5
    for saved in (state, Derived.state_dict(loaded(state))):
        assert saved["weights"]["w"].tolist() == [1, 1]
        assert saved["seen"] == deque([1, 2])
        assert saved["names"] == {"a"}
        assert saved["part"]["weights"]["w"].tolist() == [0, 0]


def loaded(state):
    made = Derived()
    made.load_state_dict(state)
    return made
