"""Virtual adversarial training (Miyato, Maeda, Koyama, Ishii, 2017, arXiv 1704.03976): a loss that needs no labels.

    D(r, x) = KL(p(y | x) || p(y | x + r))                             p(y | x) held fixed
    r_vadv  = argmax of D(r, x) over |r| <= eps                        Eq. 5
    LDS(x)  = D(r_vadv, x)                                             Eq. 6, averaged over labelled and unlabelled points

D is zero and flat at r = 0, so that D is about r' H r / 2 and r_vadv about eps times the first eigenvector u of H, by power
iteration: from a random unit d, K times d <- H d / |H d|, with H d about the gradient of D at xi d over xi (Eqs. 8 to 12; K = 1).

`predict` gives logits (..., classes) for inputs (..., *event); a sample's output may depend on that sample only: no batch
normalisation, or with its statistics frozen. Perturbations carry no gradient, as in the paper.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "conditional_entropy",
    "kl_from_logits",
    "random_perturbation",
    "virtual_adversarial_loss",
    "virtual_adversarial_perturbation",
]

Predict = Callable[[Tensor], Tensor]


def kl_from_logits(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of two categorical distributions, (..., classes) twice to (...); differentiable in both.

    Raises:
        ValueError: not floating point, or two shapes or dtypes.
    """
    if not logits.is_floating_point() or logits.shape != other.shape or logits.dtype != other.dtype or logits.ndim < 1:
        raise ValueError(
            f"logits share a floating-point dtype and a shape (..., classes), got {logits.dtype} {tuple(logits.shape)} and "
            f"{other.dtype} {tuple(other.shape)}"
        )
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def conditional_entropy(logits: Tensor) -> Tensor:
    """Entropy of p(y | x), (..., classes) to (...): what "VAT + EntMin" also lowers (Eq. 13).

    Raises:
        ValueError: logits not floating point, or without an axis of classes.
    """
    if not logits.is_floating_point() or logits.ndim < 1:
        raise ValueError(f"logits are floating point (..., classes), got {logits.dtype} {tuple(logits.shape)}")
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def random_perturbation(x: Tensor, eps: float, *, event: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Perturbations of norm eps in uniformly random directions, the shape of x: random perturbation training's.

    Args:
        x: inputs, shape (..., *event), floating point.
        eps: norm of a sample's perturbation, at least 0; a number, or a tensor that broadcasts with (..., *ones).
        event: number of axes of a sample: 1 for vectors, 3 for images.
        generator: of the device of x.

    Raises:
        ValueError: x not floating point or without these axes, or an eps below 0.
    """
    _check(x, eps, event)
    return eps * _unit(torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator), event)


def virtual_adversarial_perturbation(
    predict: Predict,
    x: Tensor,
    eps: float,
    *,
    steps: int = 1,
    xi: float | None = None,
    event: int = 1,
    generator: torch.Generator | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """r_vadv by power iteration, of norm eps, without a gradient.

    Its sign is arbitrary: D is the same for r and -r up to third order.

    Args:
        predict: logits (..., classes) of inputs (..., *event).
        x, eps, event, generator: as in `random_perturbation`.
        steps: K, power iterations, each a forward and a backward pass; with 0 the direction is random.
        xi: distance at which the gradient is taken; None: the fourth root of the dtype's precision, 0.02 in float32. The
            paper's 1e-6 is lost in rounding there; take float64 for it.
        logits: of x, where they are at hand.

    Returns:
        Shape of x. A sample whose prediction does not change keeps its random direction.

    Raises:
        ValueError: as in `random_perturbation`, a negative number of steps, or xi not above 0.
    """
    _check(x, eps, event)
    xi = torch.finfo(x.dtype).eps ** 0.25 if xi is None else xi
    if steps < 0 or not 0 < xi < math.inf:
        raise ValueError(f"steps is at least 0 and xi above 0, got {steps} and {xi}")
    x = x.detach()
    with torch.no_grad():
        logits = predict(x) if logits is None else logits.detach()
    d = random_perturbation(x, 1.0, event=event, generator=generator)
    for _ in range(steps):
        r = (xi * d).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(kl_from_logits(logits, predict(x + r)).sum(), r)
        d = _unit(slope, event, d)
    return eps * d


def virtual_adversarial_loss(
    predict: Predict,
    x: Tensor,
    eps: float,
    *,
    steps: int = 1,
    xi: float | None = None,
    event: int = 1,
    generator: torch.Generator | None = None,
    logits: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """LDS of every input, or their mean or sum; its gradient passes through the prediction at x + r_vadv only.

    Arguments as in `virtual_adversarial_perturbation`.

    Returns:
        A scalar, or (...) for "none"; NaN for the mean of nothing.

    Raises:
        ValueError: as there, or another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    with torch.no_grad():
        logits = predict(x) if logits is None else logits.detach()
    settings = {"steps": steps, "xi": xi, "event": event, "generator": generator, "logits": logits}
    r = virtual_adversarial_perturbation(predict, x, eps, **settings)
    losses = kl_from_logits(logits, predict(x.detach() + r))
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _unit(d: Tensor, event: int, otherwise: Tensor | None = None) -> Tensor:
    """Every sample of d over its norm, first over its largest entry, as squares leave the range; `otherwise` where it is 0."""
    axes = tuple(range(-event, 0))
    size = d.abs().amax(axes, keepdim=True)
    some = size > 0
    scaled = d / torch.where(some, size, 1)
    unit = scaled / scaled.square().sum(axes, keepdim=True).sqrt().where(some, 1)
    return unit if otherwise is None else torch.where(some, unit, otherwise)


def _check(x: Tensor, eps: float | Tensor, event: int) -> None:
    if not x.is_floating_point() or not 1 <= event <= x.ndim:
        raise ValueError(f"inputs are floating point (..., *event) with {event} axes a sample, got {x.dtype} {tuple(x.shape)}")
    if not (torch.as_tensor(eps) >= 0).all():
        raise ValueError(f"eps is at least 0, got {eps}")
