"""Differentiable range-partition entropy (Shihab, Akter, Sharma, 2025, arXiv 2509.03733) and the regularisers made from it.

Points belong softly to anchors, q_ij in proportion to exp(-alpha |x_i - c_j|^2), and the entropy of the mean memberships stands
for that of the hard cells, the range-partition entropy with which instance-optimal geometric algorithms are analysed. With gamma
the least difference, over the points, of second-smallest and smallest squared distance,

    max_j |p_j - p_j^hard| <= (k - 1) exp(-alpha gamma).

(No code was released. The form of `EntropyNet` is ours; of the paper, the objective is.)
"""

import math

import torch
from torch import Tensor, nn

__all__ = [
    "EntropyNet",
    "assignment_bound",
    "attention_entropy",
    "cell_entropy",
    "cell_masses",
    "chamfer_distance",
    "margin",
    "range_entropy",
    "soft_masses",
]


def soft_masses(points: Tensor, anchors: Tensor, alpha: float) -> Tensor:
    """Mean soft membership of the anchors, p_j = (1 / n) sum_i q_ij.

    Args:
        points: x, shape (..., n, d), floating point, n at least 1.
        anchors: c, shape (..., k, d) that broadcasts, the same dtype, k at least 1.
        alpha: sharpness, at least 0.

    Returns:
        Shape (..., k), sums to 1.

    Raises:
        ValueError: shapes, dtypes or an alpha that do not fit.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is a number from 0 on, got {alpha}")
    return (-alpha * _squared_distances(points, anchors)).softmax(-1).mean(-2)


def range_entropy(points: Tensor, anchors: Tensor, alpha: float) -> Tensor:
    """H_diff = -sum_j p_j log p_j of `soft_masses`, in [0, log k], shape (...). Arguments and errors as there."""
    return _entropy(soft_masses(points, anchors, alpha))


def cell_masses(points: Tensor, anchors: Tensor) -> Tensor:
    """Share of the points nearest to each anchor, (..., k): `soft_masses` as alpha grows. A tie goes to the first anchor."""
    distances = _squared_distances(points, anchors)
    return nn.functional.one_hot(distances.argmin(-1), distances.shape[-1]).to(points.dtype).mean(-2)


def cell_entropy(points: Tensor, anchors: Tensor) -> Tensor:
    """Entropy of the hard cells, the range-partition entropy for these anchors, shape (...)."""
    return torch.special.entr(cell_masses(points, anchors)).sum(-1)


def margin(points: Tensor, anchors: Tensor) -> Tensor:
    """gamma: the least difference of second-smallest and smallest squared distance, shape (...). ValueError for one anchor."""
    distances = _squared_distances(points, anchors)
    if distances.shape[-1] < 2:
        raise ValueError("a margin needs two anchors at least")
    nearest = distances.topk(2, -1, largest=False).values
    return (nearest[..., 1] - nearest[..., 0]).amin(-1)


def assignment_bound(alpha: float, gamma: Tensor, k: int) -> Tensor:
    """(k - 1) exp(-alpha gamma): how far a soft mass lies from its hard one at most, shape of gamma; says nothing from 1 on."""
    return (k - 1) * torch.exp(-alpha * gamma)


def chamfer_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance to the nearest point of the other set, both ways added: (..., n, d) and (..., m, d) to (...)."""
    distances = _squared_distances(first, second)
    return distances.amin(-1).mean(-1) + distances.amin(-2).mean(-1)


def attention_entropy(attention: Tensor) -> Tensor:
    """Mean entropy of the rows of attention weights (..., queries, keys), shape (...): the regulariser for attention.

    The same for any order of the keys and of the queries.

    Raises:
        ValueError: not floating point of that shape.
    """
    if attention.ndim < 2 or not attention.is_floating_point():
        raise ValueError(f"attention is floating point (..., queries, keys), got {attention.dtype} {tuple(attention.shape)}")
    return _entropy(attention).mean(-1)


class EntropyNet(nn.Module):
    """Moves points, each on its own, by a small perceptron; trained for weight * range_entropy + Chamfer distance to the input.

    Args:
        dim: of the points.
        hidden: units of the two hidden layers.
        generator: of the random start; the last layer starts at 0, so that at first no point is moved.
    """

    def __init__(self, dim: int, hidden: int = 32, *, generator: torch.Generator | None = None):
        super().__init__()
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden are at least 1, got {dim} and {hidden}")
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
        )
        with torch.no_grad():
            for layer in self.layers[::2]:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / layer.in_features) ** 0.5)
                layer.bias.zero_()
            self.layers[-1].weight.zero_()

    def forward(self, points: Tensor) -> Tensor:
        """Points (..., n, dim) moved, in the same shape."""
        return points + self.layers(points)

    def objective(self, points: Tensor, anchors: Tensor, alpha: float, weight: float) -> Tensor:
        """weight * H_diff(f(X)) + Chamfer(f(X), X), shape (...)."""
        moved = self(points)
        return weight * range_entropy(moved, anchors, alpha) + chamfer_distance(moved, points)


def _entropy(masses: Tensor) -> Tensor:
    """-sum p log p over the last axis; at p = 0 the gradient is large, not infinite, so that softmax's 0 makes 0 of it."""
    return -(masses * masses.clamp(min=torch.finfo(masses.dtype).tiny).log()).sum(-1)


def _squared_distances(points: Tensor, anchors: Tensor) -> Tensor:
    """(..., n, d) and (..., k, d) to (..., n, k), differences first, so that close points keep their digits."""
    shapes = tuple(points.shape), tuple(anchors.shape)
    if min(map(len, shapes)) < 2 or points.shape[-1] != anchors.shape[-1] or 0 in (points.shape[-2], anchors.shape[-2]):
        raise ValueError(f"points are (..., n, d) and anchors (..., k, d), neither empty, got {shapes[0]} and {shapes[1]}")
    if not points.is_floating_point() or points.dtype != anchors.dtype:
        raise ValueError(f"points and anchors share a floating-point dtype, got {points.dtype} and {anchors.dtype}")
    return (points.unsqueeze(-2) - anchors.unsqueeze(-3)).square().sum(-1)
