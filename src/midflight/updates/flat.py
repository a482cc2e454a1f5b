"""Tensors as they lie in memory: what is transposed, as a batched product's gradient is, is not copied."""

from torch import Tensor


class Flat:
    """Tensors of one shape as (rows, rest), in the order in which one of them lies in memory.

    Args:
        like: that one.
        rows: 1, or as many as the first dimension is long.
    """

    def __init__(self, like: Tensor, rows: int) -> None:
        self._rows = rows
        self._order = _as_it_lies(like, kept=int(rows > 1))
        self._shape = [like.shape[d] for d in self._order]
        self._back = sorted(range(like.ndim), key=self._order.__getitem__)

    def of(self, tensor: Tensor) -> Tensor:
        """Of shape (rows, rest); a view where the tensor lies alike and without gaps."""
        return tensor.permute(self._order).reshape(self._rows, -1)

    def back(self, flat: Tensor) -> Tensor:
        """The inverse of `of`."""
        return flat.view(self._shape).permute(self._back)


def lies_whole(tensor: Tensor) -> bool:
    """Whether its entries fill a part of memory without gaps, in whatever order."""
    return tensor.permute(_as_it_lies(tensor)).is_contiguous()


def _as_it_lies(tensor: Tensor, kept: int = 0) -> list[int]:
    """Its dimensions, the slowest first; the first `kept` stay."""
    return [*range(kept), *sorted(range(kept, tensor.ndim), key=tensor.stride, reverse=True)]
