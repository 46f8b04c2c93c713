"""TrimR: a small verifier watches a reasoning model's thoughts and stops the redundant ones (Lin et al. 2025, arXiv 2505.17155).

The running chain is split into thoughts at reflection tokens ("Wait", "Alternatively"). A verifier says of each thought
whether it contains an answer, and whether that answer is equivalent to the one before. Three rules stop the chain:

- overthinking: M_o thoughts in a row reach equivalent answers;
- underthinking: no such agreement after many thoughts, or after a share R of the token budget;
- repetition: the chain writes one block of tokens over and over.

A stop is gentle first (a phrase that asks the model to conclude) and forced when the model does not conclude in time.
Everything works on any hashable tokens (words, ids) and with any generator of them; nothing is trained.

The number of agreeing thoughts and the order of the rules are stated here as far as the paper's text could be had; where a
thought without an answer stands between two others, they count as neighbours.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

OVERTHINKING, UNDERTHINKING, REPETITION = "overthinking", "underthinking", "repetition"
Token = Hashable


class Verifier(Protocol):
    """What TrimR asks of its verifier; both questions are yes-or-no."""

    def has_answer(self, thought: Sequence[Token]) -> bool:
        """Does the thought contain a final answer?"""

    def equivalent(self, thought: Sequence[Token], earlier: Sequence[Token]) -> bool:
        """Are the answers of two thoughts, both with one, equivalent?"""


def affirms(yes: Tensor, no: Tensor) -> Tensor:
    """The verifier's decision from the logits (or log-probabilities) of its tokens "yes" and "no": True where yes is larger.

    Args:
        yes, no: floating point, any equal shapes.

    Raises:
        ValueError: shapes that differ, or a NaN.
    """
    if yes.shape != no.shape or yes.isnan().any() or no.isnan().any():
        raise ValueError(f"yes and no need one shape and no NaN, got {tuple(yes.shape)} and {tuple(no.shape)}")
    return yes > no


def split_thoughts(tokens: Sequence[Token], reflections: Collection[Token], minimum: int = 1) -> list[range]:
    """Thoughts of a chain, as consecutive ranges of positions that cover it.

    A reflection token opens a new thought, unless the thought before it would be shorter than `minimum` tokens: then both
    are one. The last thought, still being written, may be shorter.
    """
    _positive("minimum", minimum)
    cuts = [0]
    for position, token in enumerate(tokens):
        if token in reflections and position - cuts[-1] >= minimum:
            cuts.append(position)
    return [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(tokens)], strict=True) if start < stop]


def repeated_block(tokens: Sequence[Token], times: int, shortest: int = 1, longest: int | None = None) -> int:
    """Length of the shortest block that `tokens` ends with `times` copies of; 0 where there is none.

    Args:
        times: at least 2.
        shortest, longest: lengths that count as a repetition (so that "ha ha ha" need not).
    """
    if times < 2:
        raise ValueError(f"a repetition needs at least 2 copies, got times={times}")
    _positive("shortest", shortest)
    end = len(tokens)
    most = end // times if longest is None else min(longest, end // times)
    for block in range(shortest, most + 1):
        if all(tokens[i] == tokens[i - block] for i in range(end - 1, end - 1 - (times - 1) * block, -1)):
            return block
    return 0


@dataclass
class Trimmer:
    """Watches one chain, token by token: `push` returns the rule that stops it, or None.

    Args:
        verifier: decides about thoughts; asked once a thought for an answer, once for equivalence.
        reflections: tokens that open a thought.
        minimum: tokens of a thought below which the next one is merged into it.
        agreeing: M_o, thoughts in a row with equivalent answers that stop the chain; 1 stops at the first answer; None: off.
        many: finished thoughts without agreement that stop the chain; None: off.
        share, budget: R in (0, 1] and the token budget: underthinking also from share * budget tokens on; None: off.
        repeats: copies of one block, at least `shortest` tokens long, that stop the chain; None: off.
    """

    verifier: Verifier
    reflections: Collection[Token]
    minimum: int = 1
    agreeing: int | None = 2
    many: int | None = None
    share: float | None = None
    budget: int | None = None
    repeats: int | None = None
    shortest: int = 1
    tokens: list[Token] = field(default_factory=list, init=False)
    thoughts: int = field(default=0, init=False)
    run: int = field(default=0, init=False)
    _start: int = field(default=0, init=False)
    _answered: list[Token] | None = field(default=None, init=False)

    def __post_init__(self):
        for name in ("minimum", "agreeing", "many", "budget", "shortest"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.repeats is not None and self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, got {self.repeats}")
        if (self.share is None) != (self.budget is None) or (self.share is not None and not 0 < self.share <= 1):
            raise ValueError(f"share, in (0, 1], and budget come together, got {self.share} and {self.budget}")

    def push(self, token: Token) -> str | None:
        """Take the next token; a reflection token finishes the thought before it."""
        found = None
        if token in self.reflections and len(self.tokens) - self._start >= self.minimum:
            found = self.finish()
        self.tokens.append(token)
        if found is None and self.repeats and repeated_block(self.tokens, self.repeats, self.shortest):
            found = REPETITION
        return found

    def finish(self) -> str | None:
        """The thought being written is complete: judge it. `push` calls this; call it where a chain pauses otherwise."""
        thought, self._start = self.tokens[self._start :], len(self.tokens)
        self.thoughts += 1
        if self.verifier.has_answer(thought):
            agrees = self._answered is not None and self.verifier.equivalent(thought, self._answered)
            self.run, self._answered = self.run + 1 if agrees else 1, thought
            if self.agreeing is not None and self.run >= self.agreeing:
                return OVERTHINKING
        late = self.share is not None and len(self.tokens) >= self.share * self.budget
        return UNDERTHINKING if late or (self.many is not None and self.thoughts >= self.many) else None


class Trimmed(NamedTuple):
    """A chain as `trim` left it: its tokens, the rule that stopped it (or None) and whether the stop had to be forced."""

    tokens: list[Token]
    rule: str | None
    forced: bool


def trim(
    following: Callable[[Sequence[Token]], Token],
    trimmer: Trimmer,
    *,
    concludes: Callable[[Token], bool],
    gentle: dict[str, Sequence[Token]],
    force: Sequence[Token],
    grace: int,
    limit: int,
) -> Trimmed:
    """Generate a chain and stop it by TrimR's rules.

    Args:
        following: the model: the next token of a chain.
        concludes: whether a token ends the model's thinking (such as "</think>"); it is kept.
        gentle: for each rule the phrase that asks the model to conclude: the answer agreed on, or the best one so far.
        force: appended where the model has not concluded `grace` tokens after the gentle phrase, or by `limit` tokens.
        limit: most tokens to generate before the stop.
    """
    _positive("limit", limit)
    if grace < 0 or not gentle.keys() >= {OVERTHINKING, UNDERTHINKING, REPETITION}:
        raise ValueError(f"grace is at least 0 and every rule has a gentle phrase, got {grace} and {sorted(gentle)}")
    if trimmer.tokens:
        raise ValueError("a Trimmer watches one chain: make a new one for each")
    chain, rule = [], None
    while len(chain) < limit and rule is None:
        token = following(chain)
        rule = None if concludes(token) else trimmer.push(token)
        # The reflection token that closed the last thought would open a new one: the phrase takes its place.
        if rule is None or rule == REPETITION:
            chain.append(token)
        if concludes(token):
            return Trimmed(chain, None, False)
    chain.extend(gentle[rule] if rule else ())
    for _ in range(grace if rule else 0):
        chain.append(following(chain))
        if concludes(chain[-1]):
            return Trimmed(chain, rule, False)
    return Trimmed([*chain, *force], rule, True)


def overthinking_stop(answered: Tensor, equivalent: Tensor, agreeing: int = 2) -> Tensor:
    """Index of the thought after which the overthinking rule stops each of many recorded chains; their length where never.

    Args:
        answered: bool (..., A), whether thought i has an answer (False beyond a chain's end).
        equivalent: bool (..., A), whether that answer is equivalent to the one of the last answered thought before it; read
            only where there are both.
        agreeing: M_o.

    Returns:
        int64 (...), in 0..A; the same decisions as `Trimmer`.
    """
    _positive("agreeing", agreeing)
    if answered.shape != equivalent.shape or answered.dtype != torch.bool or equivalent.dtype != torch.bool:
        raise ValueError("answered and equivalent are boolean and of one shape")
    run = torch.zeros(answered.shape[:-1], dtype=torch.long, device=answered.device)
    stop = torch.full_like(run, answered.shape[-1])
    for i in range(answered.shape[-1]):
        grown = torch.where(equivalent[..., i], run + 1, 1)
        run = torch.where(answered[..., i], grown, run)
        stop = torch.where(answered[..., i] & (run >= agreeing) & (stop > i), i, stop)
    return stop


class Stopping(NamedTuple):
    """Exact behaviour of the overthinking rule on a Markov chain of answers; scalars, and (m,) for `answer`.

    `thoughts` and `tokens` are expectations up to and including the last thought, `answer` is the distribution of its answer.
    """

    thoughts: Tensor
    tokens: Tensor
    answer: Tensor


def stopping_law(
    start: Tensor, transition: Tensor, agreeing: int, *, false_positive: float = 0.0, false_negative: float = 0.0, lengths: Tensor
) -> Stopping:
    """Expected length and answer where `agreeing` thoughts in a row are judged equivalent, by absorbing-chain linear algebra.

    The answers of successive thoughts follow a Markov chain. The verifier calls two different answers equivalent with
    probability `false_positive` and two equal ones different with probability `false_negative`, independently. The transient
    states are (answer, run of thoughts judged equivalent so far); with Q among them and N = (I - Q)^-1 (Kemeny & Snell 1960,
    theorem 3.2.4) the row start·N holds the expected visits.

    Args:
        start: distribution of the first answer, (m,), floating point.
        transition: row-stochastic (m, m).
        lengths: expected tokens of a thought with each answer, (m,).

    Raises:
        ValueError: not distributions, rates outside [0, 1], or a chain that may never stop.
    """
    _positive("agreeing", agreeing)
    answers = start.shape[0] if start.ndim == 1 else -1
    if transition.shape != (answers, answers) or lengths.shape != (answers,):
        raise ValueError("start (m,), transition (m, m) and lengths (m,) belong together")
    for rows in (start, transition):
        if not (rows >= 0).all() or not torch.allclose(rows.sum(-1), torch.ones_like(rows.sum(-1)), atol=1e-6):
            raise ValueError("start and every row of transition are probabilities that sum to 1")
    if not (0 <= false_positive <= 1 and 0 <= false_negative <= 1):
        raise ValueError(f"error rates lie in [0, 1], got {false_positive} and {false_negative}")
    same = torch.eye(answers, dtype=torch.bool, device=start.device)
    agree = transition * torch.where(same, start.new_tensor(1 - false_negative), start.new_tensor(false_positive))
    states = answers * (agreeing - 1)
    if not states:
        return Stopping(start.sum(), start @ lengths, start.clone())
    inside = start.new_zeros(agreeing - 1, answers, agreeing - 1, answers)
    inside[:, :, 0] = transition - agree
    for run in range(agreeing - 2):
        inside[run, :, run + 1] = agree
    leaves = torch.eye(states, dtype=start.dtype, device=start.device) - inside.reshape(states, states)
    entry = torch.cat([start, start.new_zeros(states - answers)])
    visits, failed = torch.linalg.solve_ex(leaves.T, entry)
    if failed or not visits.isfinite().all():
        raise ValueError("with these probabilities the chain may never stop")
    visits = visits.reshape(agreeing - 1, answers)
    last = visits[-1] @ agree
    return Stopping(visits.sum() + last.sum(), (visits.sum(0) + last) @ lengths, last)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
