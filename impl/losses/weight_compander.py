"""Weight compander (Cakaj, Mehnert, Yang, 2023, arXiv 2306.16993): weights through a saturating function that is steep at zero.

    w = Psi(v) = a arctan(v / b),        dw/dv = a b / (b^2 + v^2)

The network computes with w, training moves v, and decay pulls v. No weight exceeds a pi / 2; near zero, where the slope is a / b,
small weights are moved away faster than large ones. a and b can be learned. Of the paper the abstract and the beginning could be
read: the form of Psi, the start v = Psi^-1(w), which leaves the network as it was, and that logarithms of a and b are learned are
reconstructed.

    compand_weights(layer, slope=1.5)                     # in place: layer.weight is now companded
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["WeightCompander", "compand", "compand_weights", "expand", "near_zero_share", "participation"]


def compand(v: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """w = a arctan(v / b), elementwise.

    Args:
        v: parameters, any shape, floating point.
        a, b: scale of the weights and of the parameters, above 0; numbers or tensors that broadcast with v.

    Returns:
        Weights of the shape that v, a and b broadcast to, below a pi / 2 in size; differentiable in v, a and b.

    Raises:
        ValueError: v not floating point, a or b not above 0.
    """
    _check(v, a, b)
    return a * torch.atan(v / b)


def expand(w: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """v = b tan(w / a), the inverse of `compand`.

    Arguments as in `compand`; ValueError also for a weight that is not below a pi / 2 in size.
    """
    _check(w, a, b)
    if not (w.abs() < a * (math.pi / 2)).all():
        raise ValueError(f"no parameter is companded to a weight of a pi / 2 or more; the largest is {w.abs().max():.4g}")
    return b * torch.tan(w / a)


class WeightCompander(nn.Module):
    """Parametrization of a tensor by `compand`, for `torch.nn.utils.parametrize.register_parametrization`.

    Args:
        a, b: as in `compand`, numbers; where learned, the start.
        learned: a and b are trained, as their logarithms `log_a` and `log_b`.

    Raises:
        ValueError: a or b not above 0 or not finite.
    """

    def __init__(self, a: float, b: float, *, learned: bool = False):
        super().__init__()
        if not (0 < a < math.inf and 0 < b < math.inf):
            raise ValueError(f"a and b are numbers above 0, got {a} and {b}")
        for name, value in (("log_a", a), ("log_b", b)):
            logarithm = torch.tensor(math.log(value))
            if learned:
                self.register_parameter(name, nn.Parameter(logarithm))
            else:
                self.register_buffer(name, logarithm)

    def forward(self, v: Tensor) -> Tensor:
        return compand(v, self.log_a.exp().to(v.dtype), self.log_b.exp().to(v.dtype))

    def right_inverse(self, w: Tensor) -> Tensor:
        return expand(w, self.log_a.exp().to(w.dtype), self.log_b.exp().to(w.dtype))


def compand_weights(
    module: nn.Module, name: str = "weight", *, reach: float = 1.5, slope: float = 1.5, learned: bool = False
) -> nn.Module:
    """Compands a tensor of a module in place, with a = reach * its root mean square and b = a / slope; its values stay.

    Args:
        module: such as nn.Linear or nn.Conv2d.
        name: of the tensor.
        reach: a in root mean squares; weights end at reach * pi / 2 of them.
        slope: of Psi at zero, a / b.
        learned: as in `WeightCompander`.

    Returns:
        The module.

    Raises:
        ValueError: reach or slope not above 0, weights that are all zero, or one beyond the reach.
    """
    weight = getattr(module, name)
    size = weight.detach().double().square().mean().sqrt().item()
    if not (0 < reach < math.inf and 0 < slope < math.inf and size > 0):
        raise ValueError(f"needs reach, slope and weights other than 0, got {reach}, {slope} and weights of size {size}")
    largest = weight.detach().abs().max().item() / size
    if largest >= reach * math.pi / 2:
        raise ValueError(f"the largest weight is {largest:.3g} root mean squares: take a reach above {largest * 2 / math.pi:.3g}")
    compander = WeightCompander(reach * size, reach * size / slope, learned=learned).to(weight.device)
    parametrize.register_parametrization(module, name, compander)
    return module


def participation(w: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Share of the weights that take part, (sum w^2)^2 / (n sum w^4) over `dim` (None: all): 1 where all have one size.

    1 / n where a single weight is not zero, 1/3 of many normal ones, 5/9 of uniform ones; NaN where all are zero.
    """
    squares = w.square()
    return squares.mean(dim).square() / squares.square().mean(dim)


def near_zero_share(w: Tensor, dim: int | tuple[int, ...] | None = None, *, within: float = 0.1) -> Tensor:
    """Share of the weights below `within` root mean squares in size, over `dim` (None: all), in the dtype of w."""
    size = w.square().mean(dim, keepdim=True).sqrt()
    return (w.abs() < within * size).to(w.dtype).mean(dim)


def _check(values: Tensor, a: float | Tensor, b: float | Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(f"weights are floating point, got {values.dtype}")
    for name, value in (("a", a), ("b", b)):
        if not (torch.as_tensor(value) > 0).all():
            raise ValueError(f"{name} is above 0, got {value}")
