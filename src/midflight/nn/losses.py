r"""Compute losses whose options are hyperparameters.

    loss_i = a_i sum_c q~_ic t_ic,    t_ic = -w_c (1 - p_ic)^gamma log p_ic,    p_i = softmax(logits_i / T)
    q~ = (1 - eps) q + eps / classes

q are the targets, eps is label smoothing (Szegedy et al. 2016, sec. 7), gamma the focal exponent (Lin et al.
2017, Eq. 4), T the temperature, w are class weights and a example weights. A weighted sum of losses needs no
function: write `space["a"] * loss_a + space["b"] * loss_b`.
"""

import torch
from torch import Tensor

from midflight.nn.magnitude import Magnitude, default_floor, drawn, value_of
from midflight.space import Hyperparameter

Option = Hyperparameter | Tensor | float


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: Option = 0.0,
    focal_gamma: Option = 0.0,
    temperature: Option = 1.0,
    class_weight: Option | None = None,
    example_weight: Option | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the cross entropy, twice differentiable in all options and the logits.

    Equals `torch.nn.functional.cross_entropy` for the options that both have. The loss and its derivatives
    are finite at any finite logits, even where p rounds to 1 and gamma < 1.

    Args:
        logits: (N, K), or (N, K, ...) with one prediction per place, as in segmentation.
        target: class indices, (N, ...), or probabilities of the classes, shaped like logits.
        label_smoothing: in [0, 1], shape () or the target's; default range 0 to 0.5.
        focal_gamma: at least 0, shape (); with smoothed targets each class has its own weight (1 - p)^gamma;
            default range 0 to 5.
        temperature: positive, shape (); default range 0.2 to 5 on a log scale.
        class_weight: (K,); default range 0.1 to 10 on a log scale.
        example_weight: one for each of the N examples, or for each place, shaped like the target. For one
            weight per training example, take `Float(0, 1, shape=(n,))` and pass `space["w"][ids]`, where
            ids are the examples of the batch.
        reduction: "mean", "sum" or "none". As in torch, the mean with class indices divides by the sum of
            w_(y_i), so only the ratios of class weights matter. It does not divide by the sum of example
            weights, because they would then compete. Sign steps would lower half of the good ones
            (measured with 30 % of labels flipped; weights that reached 0 stayed there).

    Returns:
        a scalar, or one loss per target with reduction="none".

    Raises:
        ValueError: the reduction is none of the three.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", but got {reduction!r}.')
    # a class masked by a logit of -inf adds 0 to the loss, but 0 * inf would be nan
    log_p = (logits / value_of(temperature)).log_softmax(1).clamp(min=torch.finfo(logits.dtype).min)
    terms, size = -log_p, torch.ones_like(log_p[:, 0])
    if not _is_number(focal_gamma, 0):
        terms = terms * (value_of(focal_gamma) * _log_of_the_rest(log_p)).exp()
    if class_weight is not None:
        w = torch.as_tensor(value_of(class_weight), device=logits.device)
        terms = terms * w.reshape(-1, *[1] * (logits.ndim - 2))
        size = size if target.is_floating_point() else w[target]
    if target.is_floating_point():
        losses = (target * terms).sum(1)
    else:
        losses = terms.gather(1, target[:, None]).squeeze(1)
    if not _is_number(label_smoothing, 0):
        eps = value_of(label_smoothing)
        losses = (1 - eps) * losses + eps * terms.mean(1)
    if example_weight is not None:
        a = torch.as_tensor(value_of(example_weight), device=logits.device)
        a = a.reshape(a.shape + (1,) * (losses.ndim - a.ndim))
        losses = a * losses

    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / size.sum()


def mixup(x: Tensor, y: Tensor, strength: Magnitude) -> tuple[Tensor, Tensor]:
    """Mix the inputs and targets of each example with those of another example of the batch.

        (1 - s u / 2) (x, y) + (s u / 2) (x, y)[permuted],   u uniform in [0, 1], one per example

    The strength s = 0 mixes nothing. s = 1 is the mixup with Beta(1, 1) of Zhang et al. 2018, up to the order
    of the two. The share s u / 2 is differentiable in s at fixed u. alpha of Beta(alpha, alpha) would be a
    poor hyperparameter. The share of a rejection sampler jumps, and small alpha gives mostly 0 or 1.

    Args:
        x: (N, ...), floating point.
        y: (N, K), probabilities of the classes (one-hot, for example) or other real targets.
        strength: s in [0, 1], a hyperparameter of shape () or a number; default range 0 to 1.

    Returns:
        x and y mixed, with unchanged shapes.

    Raises:
        ValueError: y holds class indices.
    """
    if not y.is_floating_point():
        raise ValueError(
            f"mixup needs floating-point targets, but y is {y.dtype}; pass F.one_hot(y, classes).to(x.dtype)."
        )
    order = torch.randperm(len(x), device=x.device)
    share = (
        drawn(strength, default_floor(strength), x) * torch.rand(len(x), dtype=x.dtype, device=x.device) / 2
    )
    of_x, of_y = (share.reshape(-1, *[1] * (t.ndim - 1)).to(t.dtype) for t in (x, y))
    return x + of_x * (x[order] - x), y + of_y * (y[order] - y)


def _log_of_the_rest(log_p: Tensor) -> Tensor:
    """Return log(1 - p) over dimension 1, without cancellation where p rounds to 1.

    The most likely class gets the logsumexp of the others. Those have p <= 1/2, where log1p is accurate.
    """
    top = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, log_p.argmax(1, keepdim=True), True)
    others = log_p.masked_fill(top, torch.finfo(log_p.dtype).min)
    return torch.where(top, others.logsumexp(1, keepdim=True), torch.log1p(-others.exp()))


def _is_number(option: object, number: float) -> bool:
    return isinstance(option, int | float) and option == number
