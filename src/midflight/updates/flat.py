"""Flatten tensors in memory order, so that a transposed tensor is not copied."""

from torch import Tensor


class Flat:
    """Map tensors of one shape to shape (rows, rest), in the memory order of one of them.

    Args:
        like: the tensor that gives the memory order.
        rows: 1, or the length of the first dimension.
    """

    def __init__(self, like: Tensor, rows: int) -> None:
        self._rows = rows
        self._order = _as_it_lies(like, kept=int(rows > 1))
        self._shape = [like.shape[d] for d in self._order]
        self._back = sorted(range(like.ndim), key=self._order.__getitem__)

    def of(self, tensor: Tensor) -> Tensor:
        """Reshape to (rows, rest); a view if the tensor has the memory order of `like` and no gaps."""
        return tensor.permute(self._order).reshape(self._rows, -1)

    def back(self, flat: Tensor) -> Tensor:
        """Undo `of`."""
        return flat.view(self._shape).permute(self._back)


def lies_whole(tensor: Tensor) -> bool:
    """Return whether the entries fill memory without gaps, in any order."""
    return tensor.permute(_as_it_lies(tensor)).is_contiguous()


def _as_it_lies(tensor: Tensor, kept: int = 0) -> list[int]:
    """Return the dimensions by decreasing stride; the first `kept` stay in place."""
    return [*range(kept), *sorted(range(kept, tensor.ndim), key=tensor.stride, reverse=True)]
