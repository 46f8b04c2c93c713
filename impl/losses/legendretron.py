"""LegendreTron (Lam, Walder, Penev, Nock, 2023, arXiv 2301.11695): a proper multiclass loss learned together with the model.

With C classes scores s live in R^(C-1) and the inverse link psi^-1 maps them to the probabilities of the first C - 1 classes. It
is canonical where psi^-1 = grad F* for a convex F*: then F*(s) - <s, e_y> is a proper loss, with the gradient psi^-1(s) - e_y.

`LegendreLink` is the paper's and its code's: gradients of input-convex networks, one after the other, then softmax+. Every step
is the gradient of a convex function, but their composition need not be one. `MixtureLink` is a simpler link that is, by design.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LegendreLink", "MixtureLink", "canonical_loss", "inverse_link_jacobian", "log_softmax_plus", "logsumexp_plus"]


def logsumexp_plus(z: Tensor) -> Tensor:
    """log(1 + sum_j exp z_j) over the last axis, whose gradient is softmax+."""
    return F.pad(z, (0, 1)).logsumexp(-1)


def log_softmax_plus(z: Tensor) -> Tensor:
    """Log probabilities (..., C) of C classes from z (..., C - 1): the softmax of z and of 0 for the last class."""
    return F.pad(z, (0, 1)).log_softmax(-1)


class ConvexGradient(nn.Module):
    """z -> grad [softplus(w1) ICNN(z) + softplus(w0) |z|^2 / 2], a bijection of R^dim for every value of its parameters.

    Each layer of the input-convex network joins units of a non-negative mixture of the last layer's and a linear map of z with as
    many units of z alone; activations are softplus, and as in the authors' code there are learned scales and shifts.

    Args:
        dim: of z.
        hidden: units of a layer, even.
        depth: layers.
        copies: shape of a stack of independent networks.
        generator, dtype, device: of the random start.
    """

    def __init__(self, dim: int, hidden: int, depth: int, copies: tuple[int, ...], *, generator=None, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}

        def uniform(rows: int, columns: int, fan_in: int) -> nn.Parameter:
            drawn = torch.rand(*copies, rows, columns, generator=generator, **factory)
            return nn.Parameter((2 * drawn - 1) * fan_in**-0.5)

        def zeros(columns: int) -> nn.ParameterList:
            return nn.ParameterList([nn.Parameter(torch.zeros(*copies, 1, columns, **factory)) for _ in range(depth - 1)])

        self.hidden, self.depth = hidden, depth
        self.inputs, self.bias = uniform(dim, depth * hidden, dim), uniform(1, depth * hidden, dim)
        self.mix = nn.ParameterList([uniform(hidden, hidden // 2, hidden) for _ in range(depth - 1)])
        self.shift, self.log_scale = zeros(hidden // 2), zeros(hidden // 2)
        self.last_mix, self.last_input = uniform(hidden, 1, hidden), uniform(dim, 1, dim)
        self.last_log_scale = nn.Parameter(torch.zeros(*copies, 1, 1, **factory))
        self.w1, self.w0 = (nn.Parameter(torch.randn(*copies, 1, 1, generator=generator, **factory)) for _ in range(2))

    def _layers(self, z: Tensor) -> Iterator[Tensor]:
        """Every layer before its activation, (*copies, n, hidden): the mixed half, and the half of z alone."""
        first, *others = (z @ self.inputs + self.bias).chunk(self.depth, -1)
        yield first
        for layer, own in enumerate(others):
            units = F.softplus(first)
            skip, side = own.chunk(2, -1)
            mixed = units @ F.softplus(self.mix[layer]) / self.hidden + skip + self.shift[layer]
            first = torch.cat([mixed * self.log_scale[layer].exp(), side], -1)
            yield first

    def _network(self, z: Tensor, last: Tensor) -> Tensor:
        return F.softplus(last) @ F.softplus(self.last_mix) / self.hidden + z @ self.last_input

    def potential(self, z: Tensor) -> Tensor:
        """The convex function itself, (*copies, n, dim) to (*copies, n)."""
        *_, last = self._layers(z)
        network = self.last_log_scale.exp() * self._network(z, last)
        return (F.softplus(self.w1) * network + F.softplus(self.w0) * z.square().sum(-1, keepdim=True) / 2).squeeze(-1)

    @torch.no_grad()
    def normalise(self, z: Tensor) -> None:
        """Sets scales and shifts so that mixed units have mean 0 and deviation 1 before activation over z (*copies, n, dim)."""
        for layer, (shift, log_scale) in enumerate(zip(self.shift, self.log_scale, strict=True)):
            shift.zero_()
            log_scale.zero_()
            *_, before = itertools.islice(self._layers(z), layer + 2)
            mixed = before[..., : self.hidden // 2]
            shift.copy_(-mixed.mean(-2, keepdim=True))
            log_scale.copy_(-(mixed.std(-2, keepdim=True, correction=0) + 1e-6).log())
        *_, last = self._layers(z)
        self.last_log_scale.copy_(-(self._network(z, last).std(-2, keepdim=True, correction=0) + 1e-6).log())

    def forward(self, z: Tensor) -> Tensor:
        """The gradient by the chain rule, (*copies, n, dim)."""
        layers, slopes = list(self._layers(z)), []
        by_unit = F.softplus(self.last_mix).mT / self.hidden
        for layer in range(self.depth - 1, 0, -1):
            mixed, side = (by_unit * layers[layer].sigmoid()).chunk(2, -1)
            mixed = mixed * self.log_scale[layer - 1].exp()
            slopes.insert(0, torch.cat([mixed, side], -1))
            by_unit = mixed @ F.softplus(self.mix[layer - 1]).mT / self.hidden
        slopes.insert(0, by_unit * layers[0].sigmoid())
        network = torch.cat(slopes, -1) @ self.inputs.mT + self.last_input.mT
        return F.softplus(self.w1) * self.last_log_scale.exp() * network + F.softplus(self.w0) * z


class LegendreLink(nn.Module):
    """The paper's inverse link: scores through gradients of convex functions, then log softmax+.

    Args:
        classes: C, at least 2.
        blocks: number of gradients; with 0 the link is that of multinomial logistic regression.
        hidden: units of a hidden layer, even.
        depth: hidden layers.
        copies: shape of a stack of independent links.
        generator, dtype, device: of the random start.

    Raises:
        ValueError: sizes that are too small, or an odd `hidden`.
    """

    def __init__(
        self,
        classes: int,
        *,
        blocks: int = 2,
        hidden: int = 2,
        depth: int = 4,
        copies: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if classes < 2 or blocks < 0 or hidden < 2 or hidden % 2 or depth < 1:
            raise ValueError(
                "a link needs classes >= 2, blocks >= 0, an even hidden >= 2 and depth >= 1, "
                f"got {classes}, {blocks}, {hidden} and {depth}"
            )
        self.dim, self.copies = classes - 1, tuple(copies)
        factory = {"generator": generator, "dtype": dtype, "device": device}
        self.blocks = nn.ModuleList([ConvexGradient(self.dim, hidden, depth, self.copies, **factory) for _ in range(blocks)])

    def normalise(self, scores: Tensor) -> None:
        """Start scales and shifts from scores (*copies, n, C - 1), as the authors' code does with its first batch."""
        _check_scores(scores, self.dim, self.copies)
        for block in self.blocks:
            block.normalise(scores)
            with torch.no_grad():
                scores = block(scores)

    def forward(self, scores: Tensor) -> Tensor:
        """Log probabilities (*copies, n, C) of scores (*copies, n, C - 1).

        Raises:
            ValueError: scores that are not floating point of that shape.
        """
        _check_scores(scores, self.dim, self.copies)
        for block in self.blocks:
            scores = block(scores)
        return log_softmax_plus(scores)


class MixtureLink(nn.Module):
    """A canonical link by design: F*(s) = sum_r w_r LogSumExp+(t_r A_r s + b_r) / t_r.

    w lies in the simplex, t_r > 0, A_r >= 0 with row sums below 1. Not the paper's. The probabilities are those of mixtures of
    softmax+ after random relabelling by the rows of A_r; it starts close to one softmax+ of the scores.

    Args:
        classes: C, at least 2.
        components: of the mixture, at least 1.
        generator, dtype, device: of the start, which differs between components by a little noise.

    Raises:
        ValueError: sizes that are too small.
    """

    def __init__(
        self,
        classes: int,
        components: int = 2,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if classes < 2 or components < 1:
            raise ValueError(f"a mixture needs 2 classes and 1 component at least, got {classes} and {components}")
        self.dim, factory = classes - 1, {"dtype": dtype, "device": device}
        near_identity = 8 * torch.eye(self.dim, classes, **factory) + 0.1 * torch.randn(
            components, self.dim, classes, generator=generator, **factory
        )
        self.rows = nn.Parameter(near_identity)
        self.bias = nn.Parameter(torch.zeros(components, self.dim, **factory))
        self.log_t = nn.Parameter(torch.zeros(components, **factory))
        self.log_w = nn.Parameter(torch.zeros(components, **factory))

    def _components(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (R,), rows of A_r with what is left to 1, (R, C - 1, C), and t_r A_r s + b_r, (..., R, C - 1)."""
        _check_scores(scores, self.dim, ())
        rows = self.rows.softmax(-1)
        mapped = torch.einsum("...k,rjk->...rj", scores, rows[..., :-1])
        return self.log_w.softmax(0), rows, self.log_t.exp().unsqueeze(-1) * mapped + self.bias

    def potential(self, scores: Tensor) -> Tensor:
        """F*(s), (..., C - 1) to (...)."""
        weight, _, z = self._components(scores)
        return (weight / self.log_t.exp() * logsumexp_plus(z)).sum(-1)

    def forward(self, scores: Tensor) -> Tensor:
        """Log probabilities (..., C) of scores (..., C - 1): the gradient of F*, and what is left for the last class."""
        weight, rows, z = self._components(scores)
        log_p = log_softmax_plus(z)
        through_rows = log_p[..., :-1, None] + rows.log()
        last = F.pad(log_p[..., -1:], (self.dim, 0), value=-math.inf)
        per_component = torch.cat([through_rows, last.unsqueeze(-2)], -2).logsumexp(-2)
        return (per_component + weight.log().unsqueeze(-1)).logsumexp(-2)


def canonical_loss(link: MixtureLink, scores: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """F*(s) - <s, e_y>, proper: its gradient by the scores is psi^-1(s) - e_y.

    Args:
        link: with a potential F*.
        scores: s, shape (..., C - 1), floating point.
        targets: classes y in [0, C), shape (...), int64; e_y is 0 for the last class.
        reduction: "mean" (NaN of nothing), "sum" or "none".

    Returns:
        A scalar, or shape (...) for "none".

    Raises:
        ValueError: a link without potential, shapes, dtypes or a reduction that do not fit, or a class out of range.
    """
    if not isinstance(link, MixtureLink):
        raise ValueError(f"the canonical loss needs a link with a potential, MixtureLink, got {type(link).__name__}")
    _check_scores(scores, link.dim, ())
    if targets.shape != scores.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are int64 of shape {tuple(scores.shape[:-1])}, got {targets.dtype} {tuple(targets.shape)}")
    if targets.numel() and not (targets.min() >= 0 and targets.max() <= link.dim):
        raise ValueError(f"targets are in [0, {link.dim + 1}), got {targets.min().item()} to {targets.max().item()}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    losses = link.potential(scores) - F.pad(scores, (0, 1)).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def inverse_link_jacobian(link: nn.Module, scores: Tensor) -> Tensor:
    """Derivatives of the first C - 1 probabilities by the scores: (..., C - 1) to (..., C - 1, C - 1), a row a probability.

    Symmetric and positive definite everywhere exactly where the link is canonical.
    """
    with torch.enable_grad():
        scores = scores.detach().requires_grad_()
        probabilities = link(scores).exp()[..., :-1]
        rows = [
            torch.autograd.grad(probabilities[..., k].sum(), scores, retain_graph=True)[0] for k in range(probabilities.shape[-1])
        ]
    return torch.stack(rows, -2)


def _check_scores(scores: Tensor, dim: int, copies: tuple[int, ...]) -> None:
    if not scores.is_floating_point() or scores.ndim < 1 or scores.shape[-1] != dim:
        raise ValueError(f"scores are floating point of shape (..., {dim}), got {scores.dtype} {tuple(scores.shape)}")
    if copies and (scores.ndim < 2 or scores.shape[:-2] != copies):
        raise ValueError(f"scores of {copies} copies are of shape {(*copies, 'n', dim)}, got {tuple(scores.shape)}")
