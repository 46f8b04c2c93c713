"""ConCISE: confidence-guided compression of reasoning chains (Qiao et al. 2025, arXiv 2505.04881).

A model reflects on a step where its internal confidence is below a threshold (confidence deficit), and goes on after an
answer that it is already sure of (termination delay). ConCISE writes shorter chains of the same model: Confidence Injection
says a confident phrase before each step, Early Stopping probes the confidence after a candidate answer and ends the chain
where it exceeds tau. The correct ones among them are what the model is then fine-tuned on, by SFT or by SimPO (Meng et al.
2024, arXiv 2405.14734, equation 6) against its own long correct chains.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Token = Hashable


class Concise(NamedTuple):
    """A chain that ConCISE wrote: its tokens, phrases injected, and whether Early Stopping ended it."""

    tokens: list[Token]
    injected: int
    stopped: bool


def concise_chain(
    following: Callable[[Sequence[Token]], Token],
    *,
    starts_step: Callable[[Sequence[Token]], bool],
    phrase: Callable[[], Sequence[Token]],
    answered: Callable[[Sequence[Token]], bool],
    confidence: Callable[[Sequence[Token]], float],
    threshold: float,
    close: Sequence[Token],
    concludes: Callable[[Token], bool],
    limit: int,
) -> Concise:
    """Let a model write one chain with Confidence Injection and Early Stopping.

    Args:
        following: the model: the next token of a chain.
        starts_step: whether a new step begins behind this chain.
        phrase: the confident phrase to inject, from a pool; an empty one switches the injection off.
        answered: whether the chain holds a candidate answer.
        confidence: of the model in the answer so far, read by a probe (see `confidence_mass`); asked at the start of a step.
        threshold: tau; the chain stops where the confidence exceeds it, so that no tau of 1 or more ever stops.
        close: the tokens that lead to the final answer, put behind a stopped chain.
        concludes: whether a token ends the chain; it is kept.
        limit: tokens, injected ones included, from which on nothing more is asked for; the last phrase may go beyond it.
    """
    _threshold(threshold)
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    chain, injected = [], 0
    while len(chain) < limit:
        if starts_step(chain):
            if answered(chain) and confidence(chain) > threshold:
                return Concise([*chain, *close], injected, True)
            said = phrase()
            chain.extend(said)
            injected += bool(said)
        chain.append(following(chain))
        if concludes(chain[-1]):
            break
    return Concise(chain, injected, False)


def confidence_mass(logits: Tensor, confident: Tensor) -> Tensor:
    """Confidence that a probe reads: the probability of the confident continuations among all next tokens.

    Args:
        logits: behind the probing prompt, (..., V), floating point.
        confident: ids of the continuations that count as confident, int64 (k,), without repeats.

    Returns:
        Probabilities (...), differentiable.

    Raises:
        ValueError: a NaN among the logits, no ids, or an id twice.
    """
    if logits.isnan().any():
        raise ValueError("logits have a NaN")
    if confident.ndim != 1 or not confident.numel() or confident.unique().numel() != confident.numel():
        raise ValueError("confident holds at least one id, each once")
    return logits.softmax(-1)[..., confident].sum(-1)


def early_stop(confidence: Tensor, candidate: Tensor, threshold: float) -> Tensor:
    """Index of the first candidate answer with confidence above tau in each of many recorded chains; their length where none.

    Args:
        confidence: (..., A), one value after each step or thought.
        candidate: bool (..., A), whether an answer stands there.
        threshold: tau.

    Returns:
        int64 (...), in 0..A.
    """
    _threshold(threshold)
    if confidence.shape != candidate.shape or candidate.dtype != torch.bool:
        raise ValueError("confidence and candidate have one shape, and candidate is boolean")
    if confidence[candidate].isnan().any():
        raise ValueError("a candidate answer has confidence NaN")
    fires = candidate & (confidence > threshold)
    length = torch.tensor(fires.shape[-1], device=fires.device)
    return torch.where(fires.any(-1), fires.long().argmax(-1), length)


def preference_pairs(
    concise: Sequence[Sequence[Token]],
    original: Sequence[Sequence[Token]],
    concise_correct: Sequence[bool],
    original_correct: Sequence[bool],
) -> list[tuple[int, Sequence[Token], Sequence[Token]]]:
    """(problem, y_w, y_l): the concise chain preferred to the original one, where both reach the right answer."""
    if not len(concise) == len(original) == len(concise_correct) == len(original_correct):
        raise ValueError("one concise chain, one original chain and their correctness for every problem")
    rows = zip(concise, original, concise_correct, original_correct, strict=True)
    return [(i, short, long) for i, (short, long, right, also) in enumerate(rows) if right and also]


def sft_loss(log_probabilities: Tensor, written: Tensor) -> Tensor:
    """Mean negative log-probability of the tokens that were written; both (n, T), `written` boolean."""
    if log_probabilities.shape != written.shape or not written.any():
        raise ValueError("log_probabilities and written have one shape, and at least one token was written")
    return -log_probabilities[written].mean()


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """SimPO: -log sigmoid(beta / |y_w| log pi(y_w|x) - beta / |y_l| log pi(y_l|x) - gamma), without a reference model.

    Args:
        chosen, rejected: summed log-probabilities of the preferred and the other response, (n,), floating point, at most 0.
        chosen_lengths, rejected_lengths: their numbers of tokens, (n,), at least 1.
        beta: scale of the length-normalised reward, above 0.
        gamma: target margin of the reward, at least 0.
        reduction: "none" (n,), "mean" or "sum".

    Raises:
        ValueError: shapes that differ, a NaN or a positive log-probability, a length below 1, bad options.

    Source: Meng et al. 2024, equation 6; trl's CPOTrainer with loss_type "simpo", cpo_alpha 0 and simpo_gamma = gamma is the
    same on averaged log-probabilities.
    """
    if not chosen.shape == rejected.shape == chosen_lengths.shape == rejected_lengths.shape:
        raise ValueError("log-probabilities and lengths of both responses have one shape")
    if not (chosen <= 0).all() or not (rejected <= 0).all():
        raise ValueError("log-probabilities are numbers of at most 0")
    if (chosen_lengths < 1).any() or (rejected_lengths < 1).any():
        raise ValueError("a response has at least one token")
    if not beta > 0 or not gamma >= 0:
        raise ValueError(f"beta is above 0 and gamma at least 0, got {beta} and {gamma}")
    margin = beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma
    losses = -F.logsigmoid(margin)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is 'none', 'mean' or 'sum', got {reduction!r}")
    return losses if reduction == "none" else getattr(losses, reduction)()


def _threshold(value: float) -> None:
    if not value >= 0:
        raise ValueError(f"a confidence threshold is at least 0, got {value}")
