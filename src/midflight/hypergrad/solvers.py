"""Solve A u = b over named tensors, where A is known only by its products with vectors.

`conjugate_gradient` needs a symmetric positive definite A. `neumann` needs the eigenvalues of I - A inside
the unit circle. The tests compare both with `torch.linalg.solve`.
"""

from collections.abc import Callable

import torch

from midflight._tensors import Tensors, add_scaled, dot

Operator = Callable[[Tensors], Tensors]


def conjugate_gradient(
    operator: Operator, b: Tensors, *, iterations: int, tolerance: float = 1e-12
) -> Tensors:
    """Solve A u = b by conjugate gradients (Hestenes & Stiefel 1952).

    Exact after as many iterations as A has distinct eigenvalues, up to rounding.

    Args:
        operator: u -> A u; A symmetric positive definite.
        b: right-hand side, name -> tensor.
        iterations: largest number of products with A.
        tolerance: stop once |b - A u| <= tolerance |b|.
    """
    u = {name: torch.zeros_like(x) for name, x in b.items()}
    residual = {name: x.clone() for name, x in b.items()}
    direction = residual
    squared = start = dot(residual, residual)
    for _ in range(iterations):
        if bool(squared <= tolerance**2 * start):
            break
        product = operator(direction)
        step = squared / dot(direction, product)
        u = add_scaled(u, direction, step)
        residual = add_scaled(residual, product, -step)
        before, squared = squared, dot(residual, residual)
        direction = add_scaled(residual, direction, squared / before)
    return u


def neumann(operator: Operator, b: Tensors, *, terms: int) -> Tensors:
    """Return the sum of (I - A)^k b for k < terms, which tends to A^-1 b.

    Args:
        operator: u -> (I - A) u, a contraction.
        b: right-hand side, name -> tensor.
        terms: number of terms of the series; costs `terms - 1` products.
    """
    total, term = b, b
    for _ in range(terms - 1):
        term = operator(term)
        total = add_scaled(total, term, 1.0)
    return total
