"""Cut Cross-Entropy: the loss of a large-vocabulary language model without the matrix of logits.

Source: Wijmans, Huval, Hertzberg, Koltun, Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", 2024,
arXiv 2411.09009. In the paper's symbols, for embeddings E_i, classifier rows C_v and targets x_i:

    loss_i = log sum_v exp(C_v . E_i) - C_{x_i} . E_i                     section 4.1 and 4.2, by blocks of v
    S_iv = exp(C_v . E_i - LSE_i),  G = S - onehot(x)                     section 4.3
    dE = G C,  dC = G^T E, a block left out where |G| < eps = 2^-12 all over it (gradient filtering)

`LinearCrossEntropy` and `linear_cross_entropy` are for use: the fused operator. `cut_cross_entropy` is the same loss in plain
differentiable operations, for `torch.func` and for reading; the other functions look at what the filter rests on.
"""

import torch
from torch import Tensor, nn

from paperclaims.kernels.losses.cut_cross_entropy import linear_cross_entropy
from paperclaims.kernels.losses.cut_cross_entropy_torch import vocabulary_order

__all__ = [
    "PRESETS",
    "LinearCrossEntropy",
    "cut_cross_entropy",
    "entries_above",
    "indexed_logits",
    "kept_blocks",
    "linear_cross_entropy",
    "linear_log_sum_exp",
    "vocabulary_order",
]

EPS = 2.0**-12  # the smallest summand that a bfloat16 number near 1 could still show, with room: the paper's threshold

# The paper's variants: Table 1 and section 5 (Kahan summation; FullC: no filter on the classifier's gradient, for pre-training).
PRESETS = {
    "exact": {"filter_eps": None},
    "cce": {"filter_eps": "auto", "sort_vocabulary": True, "accumulate": "input"},
    "cce_kahan": {"filter_eps": "auto", "sort_vocabulary": True, "accumulate": "compensated"},
    "cce_kahan_full_c": {"filter_eps": "auto", "sort_vocabulary": True, "accumulate": "compensated", "filter_c": False},
}


class LinearCrossEntropy(nn.Module):
    """Classifier head and loss in one: weight (vocabulary, dimensions), optional bias; returns the loss of embeddings.

    Args:
        dimensions, vocabulary: sizes of the head.
        bias: whether it has one.
        preset: one of PRESETS, the paper's variants; "exact" filters nothing.
        settings: further arguments of `linear_cross_entropy`, which win over the preset's.
    """

    def __init__(self, dimensions: int, vocabulary: int, *, bias: bool = False, preset: str = "exact", **settings):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset is one of {', '.join(PRESETS)}, got {preset!r}")
        head = nn.Linear(dimensions, vocabulary, bias=bias)
        self.weight, self.bias = head.weight, head.bias
        self.settings = PRESETS[preset] | settings

    def forward(self, e: Tensor, targets: Tensor) -> Tensor:
        """Loss of embeddings (..., dimensions) and targets (...)."""
        return linear_cross_entropy(e, self.weight, targets, bias=self.bias, **self.settings)


def cut_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, *, block: int = 1024) -> Tensor:
    """Loss of every token, (n,), by blocks of words, for any derivative or transform of PyTorch; autograd keeps the blocks.

    Args:
        e: embeddings, (n, d).
        c: classifier, (v, d).
        targets: words, (n,), int64.
        block: words of a block.

    Raises:
        ValueError: shapes that do not fit, a target outside [0, v), a block below 1.
    """
    return linear_log_sum_exp(e, c, block=block) - indexed_logits(e, c, targets)


def indexed_logits(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """C_{x_i} . E_i, the logit of every token's own target, (n,) (section 4.1, the indexed matrix product)."""
    _check(e, c)
    if targets.shape != e.shape[:1]:
        raise ValueError(f"targets are {tuple(e.shape[:1])}, got {tuple(targets.shape)}")
    if len(targets) and not (targets.min() >= 0 and targets.max() < len(c)):
        raise ValueError(f"targets are in [0, {len(c)}), got {targets.min().item()} to {targets.max().item()}")
    return (e * c[targets]).sum(1)


def linear_log_sum_exp(e: Tensor, c: Tensor, *, block: int = 1024) -> Tensor:
    """log sum_v exp(C_v . E_i), (n,), merging one block of words after the other (section 4.2)."""
    _check(e, c)
    if block < 1:
        raise ValueError(f"block is at least 1, got {block}")
    first, *rest = c.split(block)
    lse = (e @ first.T).logsumexp(1)
    for words in rest:
        lse = torch.logaddexp(lse, (e @ words.T).logsumexp(1))
    return lse


def entries_above(e: Tensor, c: Tensor, eps: float = EPS, *, block: int = 1024) -> Tensor:
    """Number of words whose softmax is at least `eps`, for every token, (n,), int64 (section 4.3, Figure 3)."""
    lse = linear_log_sum_exp(e, c, block=block)
    return sum(((e @ words.T - lse[:, None]).exp() >= eps).sum(1) for words in c.split(block))


def kept_blocks(
    e: Tensor, c: Tensor, targets: Tensor, eps: float = EPS, *, tile: tuple[int, int] = (128, 256), order: Tensor | None = None
) -> Tensor:
    """Which blocks of G = S - onehot the filter keeps: bool, (blocks of tokens, blocks of words).

    Args:
        e, c, targets: (n, d), (v, d), (n,).
        eps: a block is kept where |G| >= eps for any of its tokens and words.
        tile: tokens and words of a block.
        order: the vocabulary's order, (v,), a permutation; None: as it is.
    """
    if min(tile) < 1:
        raise ValueError(f"tile is at least (1, 1), got {tile}")
    lse = linear_log_sum_exp(e, c)
    order = torch.arange(len(c), device=c.device) if order is None else order
    columns = []
    for words in order.split(tile[1]):
        g = (e @ c[words].T - lse[:, None]).exp() - (targets[:, None] == words).to(e.dtype)
        columns.append(torch.stack([(rows.abs() >= eps).any() for rows in g.split(tile[0])]))
    return torch.stack(columns, 1)


def _check(e: Tensor, c: Tensor) -> None:
    if e.ndim != 2 or c.ndim != 2 or e.shape[1] != c.shape[1] or len(c) == 0:
        raise ValueError(f"e is (n, d) and c is (v, d) with v >= 1, got {tuple(e.shape)} and {tuple(c.shape)}")
