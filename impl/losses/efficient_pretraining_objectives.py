"""Pre-training objectives for Transformer encoders without a neural generator: MLM, SLM, RTS, C-RTS, and ELECTRA beside them.

Source: Di Liello, Gabburo, Moschitti, "Efficient pre-training objectives for Transformers", 2021, arXiv 2104.09694. Of a
sequence x some 15 % of the positions are selected and their tokens replaced; what is put there and what is asked differs:

    MLM      [MASK] put in                        -log p(x_t) over the selected positions
    SLM      another token, at random             -log p(x_t) over the selected positions, or over all of them
    RTS      another token, at random             was x_t replaced?, binary cross-entropy over all positions
    C-RTS    a token from a cluster that fooled the model before, the question of RTS
    ELECTRA  a small MLM's guess                  its MLM loss + 50 times the question of RTS (Clark et al., 2020, 2003.10555)

How C-RTS samples follows the authors' released code (lucadiliello/transformers-framework): a matrix counts, for every pair of
clusters, how often a substitution went unnoticed less how often it was detected; a target cluster is drawn from the softmax of
beta times that row, scaled to [0, 1], and then a token of that cluster, uniformly. Two differences: a substitute is never the
token itself, so that the selected positions are those replaced, and pairs that occur twice in a batch count twice.

Tokens are integers of any shape (...); `selected`, `replaced` and `counted` are bool of their shape. Padding and special tokens
are what `select_positions` and `counted` leave out.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Step",
    "cluster_tokens",
    "cluster_weights",
    "crts_step",
    "detection_loss",
    "electra_step",
    "mask_tokens",
    "mlm_step",
    "random_tokens",
    "rts_step",
    "sampled_tokens",
    "select_positions",
    "slm_step",
    "token_loss",
    "updated_counts",
]

Model = Callable[[Tensor], Tensor]


class Step(NamedTuple):
    """One training step: the loss, a scalar; the tokens that the (last) model saw; what it made of them, without a gradient."""

    loss: Tensor
    inputs: Tensor
    scores: Tensor


def select_positions(
    tokens: Tensor, rate: float = 0.15, *, keep: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Positions to corrupt, each with probability `rate` by itself: bool, shape of `tokens`.

    Args:
        tokens: integers (...).
        rate: in [0, 1].
        keep: bool (...), False where a token must stay (padding, special tokens); None: none must.
        generator: of the tokens' device.

    Raises:
        ValueError: a rate outside [0, 1], tokens that are no integers, a mask that does not fit.
    """
    _check_tokens(tokens)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is in [0, 1], got {rate}")
    chosen = torch.rand(tokens.shape, generator=generator, device=tokens.device) < rate
    return chosen if keep is None else chosen & _checked_mask("keep", keep, tokens.shape)


def mask_tokens(
    tokens: Tensor,
    selected: Tensor,
    mask_id: int,
    *,
    vocabulary: int | None = None,
    masked: float = 1.0,
    randomised: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Tokens with `mask_id` at the selected positions; BERT's rule is masked=0.8, randomised=0.1 (the rest stays as it is).

    Args:
        tokens, selected: integers and bool, (...).
        mask_id: the artificial token.
        vocabulary: number of tokens, at least 2; needed where some are replaced at random (by another token).
        masked, randomised: shares of the selected positions, at least 0, together at most 1.
        generator: of the tokens' device.

    Raises:
        ValueError: shapes, dtypes or shares that do not fit.
    """
    _check_tokens(tokens)
    _checked_mask("selected", selected, tokens.shape)
    if not (masked >= 0 and randomised >= 0 and masked + randomised <= 1) or (randomised and vocabulary is None):
        raise ValueError(f"shares are >= 0, at most 1 together, with a vocabulary for the second; got {masked} and {randomised}")
    lot = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    out = tokens.masked_fill(selected & (lot < masked), mask_id)
    if randomised:
        swapped = selected & (lot >= masked) & (lot < masked + randomised)
        out = torch.where(swapped, random_tokens(tokens, swapped, vocabulary, generator=generator), out)
    return out


def random_tokens(tokens: Tensor, selected: Tensor, vocabulary: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Tokens with any other of the `vocabulary`, uniformly, at the selected positions: SLM and RTS.

    Args:
        tokens, selected: integers in [0, vocabulary) and bool, (...).
        vocabulary: number of tokens, at least 2; special tokens come after it, or the draw would put them in.
        generator: of the tokens' device.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a vocabulary of fewer than 2.
    """
    _check_tokens(tokens)
    _checked_mask("selected", selected, tokens.shape)
    if vocabulary < 2:
        raise ValueError(f"vocabulary is at least 2, or there is no other token; got {vocabulary}")
    other = torch.randint(vocabulary - 1, tokens.shape, generator=generator, device=tokens.device).to(tokens.dtype)
    return torch.where(selected, other + (other >= tokens), tokens)


def cluster_tokens(
    tokens: Tensor, selected: Tensor, clusters: Tensor, weights: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Tokens with another token of a sampled cluster at the selected positions: C-RTS.

    Args:
        tokens, selected: integers in [0, V) and bool, (...).
        clusters: the cluster of every token, int64 (V,), in [0, K).
        weights: of target clusters by source cluster, floating point (K, K), at least 0: `cluster_weights(counts)`; the
            identity stays within a token's own cluster. Rows need not sum to 1.
        generator: of the tokens' device.

    Returns:
        Shape of `tokens`. A token stays where no cluster with a positive weight holds another token.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_tokens(tokens)
    _checked_mask("selected", selected, tokens.shape)
    _check_clusters(clusters, weights)
    order, numbers = clusters.argsort(stable=True), torch.arange(len(weights), device=tokens.device)
    size = torch.bincount(clusters, minlength=len(weights))
    first = size.cumsum(0) - size
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)) - first[clusters]

    own = tokens[selected].long()
    if not len(own):
        return tokens.clone()
    source = clusters[own]
    others = size - (numbers == source.unsqueeze(1)).long()
    chances = weights[source].where(others > 0, 0)
    stays = chances.sum(1) <= 0
    target = torch.multinomial(chances.masked_fill(stays.unsqueeze(1), 1.0), 1, generator=generator).squeeze(1)
    count = others.gather(1, target.unsqueeze(1)).squeeze(1)
    place = (torch.rand(count.shape, generator=generator, device=count.device) * count).long()
    place = torch.minimum(place, (count - 1).clamp(min=0))  # the product may round up to the count
    place = place + ((target == source) & (place >= rank[own]))
    other = order[torch.where(stays, 0, first[target] + place)].where(~stays, own)
    return tokens.masked_scatter(selected, other.to(tokens.dtype))


def cluster_weights(counts: Tensor, beta: float = 2.0) -> Tensor:
    """Chance of every target cluster by source cluster: softmax of beta * (row - min) / (max - min), shape (K, K).

    Args:
        counts: unnoticed less detected substitutions, floating point (K, K), as `updated_counts` keeps them; ones at the start.
        beta: how much the clusters that fool the model are preferred, at most exp(beta) times; 0 for not at all.

    Raises:
        ValueError: counts that are not square or not floating point.
    """
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.is_floating_point():
        raise ValueError(f"counts are floating point (K, K), got {counts.dtype} of {tuple(counts.shape)}")
    low, high = counts.amin(1, keepdim=True), counts.amax(1, keepdim=True)
    return (beta * (counts - low) / torch.where(high > low, high - low, 1)).softmax(1)


def updated_counts(counts: Tensor, clusters: Tensor, tokens: Tensor, inputs: Tensor, detected: Tensor) -> Tensor:
    """Counts after a batch: +1 for every replaced token that the model let pass, -1 for every one that it detected.

    Args:
        counts: floating point (K, K), row: cluster of the original, column: of the substitute.
        clusters: int64 (V,), in [0, K).
        tokens, inputs: originals and what the model saw, integers (...); positions where they agree do not count.
        detected: bool (...), whether the model called a token replaced: `step.scores > 0`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_tokens(tokens)
    _check_clusters(clusters, counts)
    _checked_mask("detected", detected, tokens.shape)
    if inputs.shape != tokens.shape:
        raise ValueError(f"inputs have the tokens' shape {tuple(tokens.shape)}, got {tuple(inputs.shape)}")
    changed = tokens != inputs
    pairs = clusters[tokens[changed].long()], clusters[inputs[changed].long()]
    return counts.index_put(pairs, 1 - 2 * detected[changed].to(counts.dtype), accumulate=True)


def sampled_tokens(tokens: Tensor, selected: Tensor, logits: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Tokens with a draw from softmax(logits) at the selected positions: ELECTRA. The draw may be the token itself.

    Args:
        tokens, selected: integers and bool, (...).
        logits: of the generator model, floating point (..., V).
        generator: random numbers, of the tokens' device.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_logits(logits, tokens)
    _checked_mask("selected", selected, tokens.shape)
    chances = logits.detach()[selected].float().softmax(-1)
    if not len(chances):
        return tokens.clone()
    return tokens.masked_scatter(selected, torch.multinomial(chances, 1, generator=generator).squeeze(1).to(tokens.dtype))


def token_loss(logits: Tensor, tokens: Tensor, counted: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    """-log softmax(logits) of the original tokens: MLM and SLM.

    Args:
        logits: floating point (..., V).
        tokens: the originals, integers (...), in [0, V) where they count.
        counted: bool (...), the positions of the loss; None: all.
        reduction: "mean" over the positions counted (NaN where there is none), "sum", or "none" (0 where not counted).

    Returns:
        Scalar, or (...) for "none", of the logits' dtype.

    Raises:
        ValueError: shapes, dtypes or a reduction that do not fit.
    """
    _check_logits(logits, tokens)
    _check_reduction(reduction)
    targets = tokens.long() if counted is None else tokens.long().where(_checked_mask("counted", counted, tokens.shape), -100)
    rows = logits.reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(rows, targets.flatten(), ignore_index=-100, reduction=reduction)
    return loss.view(tokens.shape) if reduction == "none" else loss


def detection_loss(logits: Tensor, replaced: Tensor, counted: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy of "was this token replaced?": RTS, C-RTS and ELECTRA's discriminator.

    A model that learns nothing reaches the entropy of the share r replaced, -r log r - (1 - r) log (1 - r): 0.423 for 15 %.

    Args:
        logits: floating point (...), above 0 for "replaced".
        replaced: bool (...).
        counted: bool (...), the positions of the loss; None: all.
        reduction: as in `token_loss`.

    Returns:
        Scalar, or (...) for "none", of the logits' dtype; summed in float32 at least.

    Raises:
        ValueError: shapes, dtypes or a reduction that do not fit.
    """
    if not logits.is_floating_point():
        raise ValueError(f"logits are floating point, got {logits.dtype}")
    _check_reduction(reduction)
    _checked_mask("replaced", replaced, logits.shape)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.binary_cross_entropy_with_logits(wide, replaced.to(wide.dtype), reduction="none")
    number = loss.numel()
    if counted is not None:
        _checked_mask("counted", counted, logits.shape)
        loss, number = loss.where(counted, 0), counted.sum()
    if reduction != "none":
        loss = loss.sum() / number if reduction == "mean" else loss.sum()
    return loss.to(logits.dtype)


def mlm_step(model: Model, tokens: Tensor, selected: Tensor, mask_id: int) -> Step:
    """Masked language modelling: `model` scores the whole vocabulary, (...) to (..., V). ValueError as in `token_loss`."""
    return _language_step(model, tokens, mask_tokens(tokens, selected, mask_id), selected)


def slm_step(
    model: Model,
    tokens: Tensor,
    selected: Tensor,
    vocabulary: int,
    *,
    counted: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Step:
    """Swapped language modelling: no artificial token. `counted` are the positions of the loss, by default those selected.

    For the loss over the whole output pass `counted=keep`, True wherever there is no padding. ValueError as in `token_loss`.
    """
    inputs = random_tokens(tokens, selected, vocabulary, generator=generator)
    return _language_step(model, tokens, inputs, selected if counted is None else counted)


def rts_step(
    model: Model,
    tokens: Tensor,
    selected: Tensor,
    vocabulary: int,
    *,
    counted: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Step:
    """Random token substitution: `model` gives one logit a position, (...) to (...). ValueError as in `detection_loss`."""
    return _detection_step(model, tokens, random_tokens(tokens, selected, vocabulary, generator=generator), counted)


def crts_step(
    model: Model,
    tokens: Tensor,
    selected: Tensor,
    clusters: Tensor,
    counts: Tensor,
    *,
    beta: float = 2.0,
    counted: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Step, Tensor]:
    """Cluster-based random token substitution: the step of RTS, and the counts for the next one.

    Args:
        model, tokens, selected, counted, generator: as in `rts_step`.
        clusters, counts, beta: as in `cluster_tokens` and `cluster_weights`.

    Raises:
        ValueError: as in `cluster_tokens` and `detection_loss`.
    """
    inputs = cluster_tokens(tokens, selected, clusters, cluster_weights(counts, beta), generator=generator)
    step = _detection_step(model, tokens, inputs, counted)
    return step, updated_counts(counts, clusters, tokens, inputs, step.scores > 0)


def electra_step(
    proposer: Model,
    model: Model,
    tokens: Tensor,
    selected: Tensor,
    mask_id: int,
    *,
    weight: float = 50.0,
    counted: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Step:
    """ELECTRA: L_MLM(proposer) + weight * L_RTD(model). The draw between them passes no gradient.

    Args:
        proposer: ELECTRA's generator, (...) to (..., V).
        model: its discriminator, (...) to (...).
        tokens, selected, mask_id: as in `mlm_step`.
        weight: of the discriminator's loss, 50 in ELECTRA.
        counted: positions of the discriminator's loss; None: all.
        generator: random numbers, of the tokens' device.

    Raises:
        ValueError: as in `token_loss` and `detection_loss`.
    """
    logits = proposer(mask_tokens(tokens, selected, mask_id))
    proposed = token_loss(logits, tokens, selected)
    step = _detection_step(model, tokens, sampled_tokens(tokens, selected, logits, generator=generator), counted)
    return step._replace(loss=proposed + weight * step.loss)


def _language_step(model, tokens, inputs, counted) -> Step:
    logits = model(inputs)
    return Step(token_loss(logits, tokens, counted), inputs, logits.detach())


def _detection_step(model, tokens, inputs, counted) -> Step:
    logits = model(inputs)
    return Step(detection_loss(logits, inputs != tokens, counted), inputs, logits.detach())


def _check_tokens(tokens: Tensor) -> None:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens are integers, got {tokens.dtype}")


def _checked_mask(name: str, mask: Tensor, shape: torch.Size) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"{name} is bool of shape {tuple(shape)}, got {mask.dtype} of {tuple(mask.shape)}")
    return mask


def _check_clusters(clusters: Tensor, matrix: Tensor) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        raise ValueError(f"weights and counts are floating point (K, K), got {matrix.dtype} of {tuple(matrix.shape)}")
    if clusters.ndim != 1 or clusters.dtype != torch.int64:
        raise ValueError(f"clusters are int64 (V,), got {clusters.dtype} of {tuple(clusters.shape)}")


def _check_logits(logits: Tensor, tokens: Tensor) -> None:
    _check_tokens(tokens)
    if logits.shape[:-1] != tokens.shape or logits.ndim != tokens.ndim + 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits are floating point (..., V) for tokens (...), got {logits.dtype} {tuple(logits.shape)} and "
            f"{tuple(tokens.shape)}"
        )


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
