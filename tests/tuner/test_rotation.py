"""T1 and T2 that change roles."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf


def test_in_one_round_every_row_is_held_out_once_and_trains_in_all_other_passes():
    rotation = mf.Rotation(23, folds=4)
    held_out, trained = [], []
    for _ in range(4):
        trained += list(rotation.train)
        held_out += list(rotation.valid)
    assert sorted(held_out) == list(range(23))
    assert sorted(trained) == sorted(3 * list(range(23)))


def test_no_row_is_in_both_parts_even_in_a_pass_that_is_under_way():
    rotation = mf.Rotation(20, folds=5)
    data = TensorDataset(torch.arange(20))
    train = DataLoader(data, batch_size=4, sampler=rotation.train)
    valid = DataLoader(data, batch_size=1, sampler=rotation.valid)
    for _ in range(3):
        stale, rows = iter(valid), set()
        if rotation.fold:
            next(stale)
        for (batch,) in train:
            rows |= set(batch.tolist())
        assert not rows & {int(b) for (b,) in stale}
        assert not rows & set(rotation.valid)
        assert set(rotation.seen) == rows


def test_seen_leaves_the_fold_as_it_is():
    rotation = mf.Rotation(20, folds=5)
    list(rotation.train)
    fold = rotation.fold
    assert len(list(rotation.seen)) == len(rotation.seen) == 16
    assert rotation.fold == fold


@pytest.mark.parametrize("folds", [1, 11])
def test_a_number_of_folds_that_cannot_be_is_refused(folds):
    with pytest.raises(ValueError, match="2 <= folds <= 10"):
        mf.Rotation(10, folds=folds)
