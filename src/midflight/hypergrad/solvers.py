"""Linear systems (A u = b) for operators that are only known through their products, over named tensors.

Both are held against `torch.linalg.solve`. A is symmetric positive definite for `conjugate_gradient`;
for `neumann` the eigenvalues of I - A lie inside the unit circle.
"""

from collections.abc import Callable

import torch

from midflight._tensors import Tensors, add_scaled, dot

Operator = Callable[[Tensors], Tensors]


def conjugate_gradient(
    operator: Operator, b: Tensors, *, iterations: int, tolerance: float = 1e-12
) -> Tensors:
    """u with A u = b by conjugate gradients (Hestenes & Stiefel 1952).

    Exact after as many iterations as A has distinct eigenvalues, up to rounding.

    Args:
        operator: u -> A u; A symmetric positive definite.
        b: right-hand side, name -> tensor.
        iterations: at most so many products with A.
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
    """The sum of (I - A)^k b for k < terms, which tends to A^-1 b.

    Args:
        operator: u -> (I - A) u, the contraction itself.
        b: right-hand side, name -> tensor.
        terms: of the series; `terms - 1` products.
    """
    total, term = b, b
    for _ in range(terms - 1):
        term = operator(term)
        total = add_scaled(total, term, 1.0)
    return total
