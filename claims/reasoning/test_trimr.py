"""TrimR: Verifier-based Training-Free Thinking Compression for Efficient Test-Time Scaling (Lin et al. 2025, arXiv 2505.17155).

The chains come from a tiny trained transformer that solves three steps of modular arithmetic, errs, and tries again. The habit
with which it goes on after an answer it has seen twice is set so that the first right answer comes after 30-50 % of the tokens,
as the paper reports of its models; what is then saved follows from that, what accuracy does is up to the model.
"""

import functools
from statistics import NormalDist

import numpy as np
import torch

from paperclaims.fixtures.models import arithmetic_reasoner as toy
from paperclaims.fixtures.protocol import claim
from paperclaims.fixtures.statistics import mean_interval, paired_difference
from paperclaims.impl.reasoning.trimr import REPETITION, Trimmer, overthinking_stop, split_thoughts, stopping_law

PROBLEMS, BLOCKS, ERROR, LARGEST_DROP = 10_000, 20, 0.05, 1.7
FIRST_MODEL = 300  # those before served to choose the set-up
EXPLORATORY = "exploratory: its rule was chosen while looking at seeds 0 to 10"
DIFFERS = "a two-layer transformer on modular arithmetic instead of 32B models on MATH500, AIME and GPQA; verifier errs in 5 %"
DIFFERS += f"; {EXPLORATORY}"
PAPER = "runtime cut by up to 70 %, accuracy down by at most 1.7 points"


@functools.cache
def recorded(seed, temperature=1.0, problems=PROBLEMS):
    """The problems, the model's whole chains about them, and whether its answer after each thought (or at the end) is right."""
    model, rng = toy.load(FIRST_MODEL + seed), np.random.default_rng([seed, problems])
    parts = [toy.problems(rng, problems // 4) for _ in range(4)]
    chains = [toy.sample(model, part, int(rng.integers(2**32)), temperature=temperature, limit=64) for part in parts]
    given, chains = (
        kind(*map(np.concatenate, zip(*found, strict=True))) for kind, found in ((toy.Problems, parts), (toy.Chains, chains))
    )
    return given, chains, chains.forced.argmax(-1) == given.answer[:, None], chains.final == given.answer


def verdicts(chains, rng, error):
    """What a verifier that errs with probability `error` says of each thought: has it an answer, is it the one before?"""
    exists = np.arange(chains.answers.shape[1]) < chains.thoughts[:, None]
    answered = exists & (rng.random(exists.shape) >= error)
    latest, equal = np.full(len(exists), -1), np.zeros_like(exists)
    for i in range(exists.shape[1]):
        equal[:, i] = chains.answers[:, i] == latest
        latest = np.where(answered[:, i], chains.answers[:, i], latest)
    return torch.tensor(answered), torch.tensor(equal ^ (rng.random(exists.shape) < error))


def outcome(recording, stop):
    """Tokens (with the two that force the answer) and correctness of each chain, stopped after thought `stop` or left whole."""
    _, chains, forced_right, final_right = recording
    stop, row = np.asarray(stop), np.arange(len(stop))
    stops, at = stop < chains.thoughts, np.minimum(stop, chains.answers.shape[1] - 1)
    tokens = np.where(stops, np.minimum(chains.cost[row, at] + 2, chains.length), chains.length)
    return tokens, np.where(stops, forced_right[row, at], final_right)


def percent(values, whole=None):
    """Blocks of problems: the mean in percent of 1 or of `whole`'s mean, (BLOCKS,)."""
    means = np.reshape(values, (BLOCKS, -1)).mean(1)
    return 100 * means / (1 if whole is None else np.reshape(whole, (BLOCKS, -1)).mean(1))


@claim(
    "Waiting for two thoughts in a row with equivalent answers saves tokens, and pays against stopping at the first answer.",
    scale="mechanism",
    control="no agreement is asked for: the chain stops at its first answer (M_o = 1)",
    differs=DIFFERS,
    control_breaks="accuracy beyond the first answer's",
    paper_value=PAPER,
)
def test_overthinking_stops_at_agreement(arm, rng, evidence, pytestconfig):
    recording = recorded(pytestconfig.option.seed)
    given, chains, _, final_right = recording
    judged = verdicts(chains, rng, ERROR)
    tokens, right = outcome(recording, overthinking_stop(*judged, agreeing=1 if arm.control else 2))
    _, first_right = outcome(recording, overthinking_stop(*judged, agreeing=1))
    evidence.require("tokens saved", mean_interval(100 - percent(tokens, chains.length)), above=30, unit="%")
    gain = paired_difference(percent(right), percent(first_right))
    evidence.require("accuracy beyond the first answer's", gain, above=2, unit="points")
    evidence.record("accuracy lost, against whole chains", paired_difference(percent(final_right), percent(right)), "points")
    first = (chains.answers == given.answer[:, None]).argmax(1)
    found = (chains.answers == given.answer[:, None]).any(1)
    share = chains.cost[np.arange(len(first)), first][found] / chains.length[found]
    evidence.record("share of tokens up to the first right answer", 100 * share.mean(), "%")
    evidence.record("accuracy of the whole chains", 100 * final_right.mean(), "%")
    errors = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4]
    for agreeing in (1, 2, 3):
        swept = [outcome(recording, overthinking_stop(*verdicts(chains, rng, error), agreeing)) for error in errors]
        axes = {"series": f"M_o = {agreeing}", "x_label": "verifier's error rate"}
        lost = [100 * (final_right.mean() - right.mean()) for _, right in swept]
        saved = [100 * (1 - tokens.mean() / chains.length.mean()) for tokens, _ in swept]
        evidence.curve("Accuracy lost", errors, lost, y_label="points", **axes)
        evidence.curve("Tokens saved", errors, saved, y_label="%", **axes)


@claim(
    "What the verifier sees decides when to stop: its stop is more accurate than a token budget of the same mean length.",
    scale="mechanism",
    control="the verifier's verdicts are permuted across problems: it fires as often at every position, but knows nothing",
    differs=DIFFERS,
)
def test_agreement_beats_a_token_budget(arm, rng, evidence, pytestconfig):
    recording = recorded(pytestconfig.option.seed)
    _, chains, _, _ = recording
    answered, equivalent = verdicts(chains, rng, ERROR)
    order = rng.permutation(PROBLEMS) if arm.control else np.arange(PROBLEMS)
    tokens, right = outcome(recording, overthinking_stop(answered[order], equivalent[order]))
    for budget in range(1, int(chains.length.max())):
        within = ((chains.cost > 0) & (chains.cost + 2 <= budget)).sum(1)
        stop = np.where(chains.length <= budget, chains.thoughts, np.maximum(within - 1, 0))
        spent, budgeted = outcome(recording, stop)
        if spent.mean() >= tokens.mean():
            break
    gain = paired_difference(percent(right), percent(budgeted))
    evidence.require("accuracy beyond the budget's", gain, above=1.5, unit="points")
    evidence.record("mean tokens with the verifier", tokens.mean())
    evidence.record("mean tokens with the budget", spent.mean())


@claim(
    "With both rules no accuracy to speak of is lost against whole chains, and chains that keep disagreeing are stopped early.",
    scale="mechanism",
    control="the underthinking rule is switched off; overthinking stops as before",
    differs=DIFFERS + "; divergent means no agreement in the first 5 thoughts",
    control_breaks="tokens saved on divergent chains",
    paper_value=PAPER,
)
def test_underthinking_is_cut_without_loss(arm, rng, evidence, pytestconfig):
    recording = recorded(pytestconfig.option.seed)
    _, chains, _, final_right = recording
    many = 5
    agreed = overthinking_stop(*verdicts(chains, rng, ERROR)).numpy()
    divergent = (agreed >= many) & (chains.thoughts >= many)
    tokens, right = outcome(recording, agreed)
    trimmed, still_right = outcome(recording, agreed if arm.control else np.where(divergent, many - 1, agreed))
    saved = mean_interval(100 - percent(trimmed * divergent, tokens * divergent))
    evidence.require("tokens saved on divergent chains", saved, above=15, unit="%")
    lost = paired_difference(percent(final_right), percent(still_right))
    evidence.require("accuracy lost, against whole chains", lost, below=LARGEST_DROP, unit="points")
    by_rule = paired_difference(percent(right), percent(still_right))
    evidence.require("accuracy lost to the rule", by_rule, below=LARGEST_DROP, unit="points")
    evidence.record("tokens saved in all", 100 - 100 * trimmed.mean() / chains.length.mean(), "%")
    evidence.record("share of divergent chains", 100 * divergent.mean(), "%")
    evidence.record("accuracy on divergent chains, running on", 100 * right[divergent].mean(), "%")
    evidence.record("accuracy on divergent chains, stopped", 100 * still_right[divergent].mean(), "%")


class Silent:
    """A verifier that finds no answer anywhere, so that only repetition can stop a chain."""

    def has_answer(self, thought):
        return False

    def equivalent(self, thought, earlier):
        raise AssertionError("never asked")


@claim(
    "A chain that writes the same block three times over is in a loop; stopping it saves tokens at negligible cost in accuracy.",
    scale="mechanism",
    control="the repetition rule is switched off",
    differs=DIFFERS + "; loops come from greedy decoding, cut at 64 tokens",
    control_breaks="tokens saved",
    paper_value=PAPER,
)
def test_repetition_is_cut_without_loss(arm, evidence, pytestconfig):
    recording = recorded(pytestconfig.option.seed, temperature=0.0, problems=400)
    _, chains, _, final_right = recording
    stop = np.full(400, chains.answers.shape[1])
    for row, chain in enumerate(chains.tokens[:, 1:]):
        trimmer = Trimmer(Silent(), {toy.WAIT}, repeats=None if arm.control else 3, shortest=toy.STEPS + 1)
        written = [token for token in chain.tolist() if token != toy.PAD]
        looped = next((i for i, token in enumerate(written) if trimmer.push(token) == REPETITION), None)
        if looped is not None:
            whole = len(split_thoughts(written[: looped + 1], {toy.WAIT})) - 1
            stop[row] = max(whole - 1, 0)
    tokens, right = outcome(recording, stop)
    evidence.require("tokens saved", mean_interval(100 - percent(tokens, chains.length)), above=30, unit="%")
    evidence.require("accuracy lost", paired_difference(percent(final_right), percent(right)), below=LARGEST_DROP, unit="points")


@claim(
    "The length and the answer at the overthinking stop follow the absorbing-chain law, for M_o = 1..4 and any verifier errors.",
    scale="mechanism",
    control="the law of a verifier without errors",
    differs="not in the paper: answers follow a lazy Markov chain over five values, judged by a verifier with stated errors",
    central=False,
)
def test_stopping_follows_its_law(arm, rng, evidence):
    chains, steps, values = 20_000, 60, 5
    start = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    moves = 0.6 * np.eye(values) + 0.4 * np.array([0.7, 0.12, 0.06, 0.06, 0.06])
    lengths = np.array([3.0, 4.0, 5.0, 6.0, 7.0])
    scores, low = [], 0
    for false_positive in (0.0, 0.05, 0.2):
        for false_negative in (0.0, 0.05, 0.2):
            answers = np.empty((chains, steps), dtype=np.int64)
            for i in range(steps):
                chance = np.broadcast_to(start, (chains, values)) if i == 0 else moves[answers[:, i - 1]]
                answers[:, i] = np.minimum((chance.cumsum(1) < rng.random((chains, 1))).sum(1), values - 1)
            same = np.pad(answers[:, 1:] == answers[:, :-1], ((0, 0), (1, 0)))
            flip = rng.random(same.shape) < np.where(same, false_negative, false_positive)
            for agreeing in (1, 2, 3, 4):
                stop = overthinking_stop(torch.ones(same.shape, dtype=torch.bool), torch.tensor(same ^ flip), agreeing).numpy()
                low = max(low, (stop == steps).sum())
                stop = np.minimum(stop, steps - 1)
                spent = np.take_along_axis(lengths[answers].cumsum(1), stop[:, None], 1)[:, 0]
                first = np.take_along_axis(answers, stop[:, None], 1)[:, 0] == 0
                errors = {} if arm.control else {"false_positive": false_positive, "false_negative": false_negative}
                law = stopping_law(*map(torch.tensor, (start, moves)), agreeing, lengths=torch.tensor(lengths), **errors)
                for seen, expected in ((spent, law.tokens.item()), (first, law.answer[0].item())):
                    scores.append(abs(seen.mean() - expected) / (seen.std() / np.sqrt(chains)))
    evidence.require(
        "largest deviation", max(scores), below=NormalDist().inv_cdf(1 - 0.001 / (2 * len(scores))), unit="standard errors"
    )
    evidence.record("chains that never stopped", low)
