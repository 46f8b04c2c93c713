"""TrimR: Verifier-based Training-Free Thinking Compression for Efficient Test-Time Scaling (Lin et al. 2025, arXiv 2505.17155).

The chains come from a tiny trained transformer that solves three steps of modular arithmetic, errs, and tries again. It learned
to go on after a thought with probability 0.7 whatever it had answered before, so that the first right answer comes after about
40 % of the tokens (30-50 % in the paper). How much a stop saves follows from that; what accuracy does is up to the model.
"""

import functools
from statistics import NormalDist

import numpy as np
import torch

from paperclaims.fixtures.models import arithmetic_reasoner as toy
from paperclaims.fixtures.protocol import claim
from paperclaims.fixtures.statistics import mean_interval, paired_difference
from paperclaims.impl.reasoning.trimr import overthinking_stop, stopping_law

PROBLEMS, BLOCKS, ERROR, MANY, LARGEST_DROP = 24_000, 20, 0.05, 5, 1.7
FIRST_MODEL = 1000
DIFFERS = "a two-layer transformer on modular arithmetic instead of 32B models on MATH500, AIME and GPQA; verifier errs in 5 %"
DIFFERS += "; intervals over the problems of one model, another seed brings another model"
PAPER = "runtime cut by up to 70 %, accuracy down by at most 1.7 points"


@functools.cache
def recorded(seed):
    """Problems and the model's whole chains about them."""
    rng = np.random.default_rng([seed, PROBLEMS])
    given = toy.problems(rng, PROBLEMS)
    return given, toy.sample(toy.load(FIRST_MODEL + seed), given, int(rng.integers(2**32)), limit=80)


def verdicts(chains, rng, error):
    """What a verifier that errs with probability `error` says of each thought: has it an answer, is it the one before?"""
    exists = np.arange(chains.answers.shape[1]) < chains.thoughts[:, None]
    answered = exists & (rng.random(exists.shape) >= error)
    latest, equal = np.full(len(exists), -1), np.zeros_like(exists)
    for i in range(exists.shape[1]):
        equal[:, i] = chains.answers[:, i] == latest
        latest = np.where(answered[:, i], chains.answers[:, i], latest)
    return torch.tensor(answered), torch.tensor(equal ^ (rng.random(exists.shape) < error))


def shuffled(rng, thoughts):
    """A permutation of the problems that leaves their numbers of thoughts where they are."""
    order = np.arange(len(thoughts))
    for number in np.unique(thoughts):
        rows = np.flatnonzero(thoughts == number)
        order[rows] = rng.permutation(rows)
    return order


def percent(values, whole=None):
    """Blocks of problems: the mean in percent of 1 or of `whole`'s mean, (BLOCKS,)."""
    means = np.reshape(values, (BLOCKS, -1)).mean(1)
    return 100 * means / (1 if whole is None else np.reshape(whole, (BLOCKS, -1)).mean(1))


@claim(
    "Stopping where a small verifier finds two thoughts in a row with equivalent answers saves tokens at negligible loss.",
    scale="mechanism",
    control="no agreement is asked for: the chain stops at its first answer (M_o = 1)",
    differs=DIFFERS,
    control_breaks="accuracy lost, against whole chains",
    paper_value=PAPER,
)
def test_overthinking_stops_at_agreement(arm, rng, evidence, pytestconfig):
    recording = given, chains = recorded(pytestconfig.option.seed)
    stop = overthinking_stop(*verdicts(chains, rng, ERROR), agreeing=1 if arm.control else 2).numpy()
    whole_tokens, whole_right = toy.ended(*recording, chains.thoughts)
    tokens, right = toy.ended(*recording, stop)
    evidence.require("tokens saved", mean_interval(100 - percent(tokens, whole_tokens)), above=30, unit="%")
    lost = paired_difference(percent(whole_right), percent(right))
    evidence.require("accuracy lost, against whole chains", lost, below=LARGEST_DROP, unit="points")
    hits = chains.answers == given.answer[:, None]
    share = chains.cost[np.arange(PROBLEMS), hits.argmax(1)] / whole_tokens
    evidence.record("share of tokens up to the first right answer", 100 * share[hits.any(1)].mean(), "%")
    evidence.record("accuracy of the whole chains", 100 * whole_right.mean(), "%")
    errors = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4]
    for agreeing in (1, 2, 3):
        swept = [toy.ended(*recording, overthinking_stop(*verdicts(chains, rng, error), agreeing).numpy()) for error in errors]
        axes = {"series": f"M_o = {agreeing}", "x_label": "verifier's error rate"}
        lost = [100 * (whole_right.mean() - right.mean()) for _, right in swept]
        saved = [100 * (1 - tokens.mean() / whole_tokens.mean()) for tokens, _ in swept]
        evidence.curve("Accuracy lost", errors, lost, y_label="points", **axes)
        evidence.curve("Tokens saved", errors, saved, y_label="%", **axes)


@claim(
    "What the verifier sees decides when to stop: its stop is more accurate than a token budget of the same mean length.",
    scale="mechanism",
    control="the verifier's verdicts are permuted across problems: it fires as often after every thought, but knows nothing",
    differs=DIFFERS,
)
def test_agreement_beats_a_token_budget(arm, rng, evidence, pytestconfig):
    recording = _, chains = recorded(pytestconfig.option.seed)
    answered, equivalent = verdicts(chains, rng, ERROR)
    order = shuffled(rng, chains.thoughts) if arm.control else np.arange(PROBLEMS)
    tokens, right = toy.ended(*recording, overthinking_stop(answered[order], equivalent[order]).numpy())
    for budget in range(1, 80):
        spent, budgeted = toy.ended(*recording, toy.budget_stop(chains, budget))
        if spent.mean() >= tokens.mean():
            break
    gain = paired_difference(percent(right), percent(budgeted))
    evidence.require("accuracy beyond the budget's", gain, above=0.5, unit="points")
    evidence.record("mean tokens with the verifier", tokens.mean())
    evidence.record("mean tokens with the budget", spent.mean())


@claim(
    "Chains that keep disagreeing can be stopped early: the underthinking rule saves tokens on them at negligible loss in all.",
    scale="mechanism",
    control="the underthinking rule is switched off; overthinking stops as before",
    differs=DIFFERS + f"; divergent means no agreement in the first {MANY} thoughts: under 2 % of the chains, "
    "whose own accuracy falls by 3 to 6 points, which the loss in all hardly shows",
    central=False,
    control_breaks="tokens saved on divergent chains",
    paper_value=PAPER,
)
def test_underthinking_is_cut_without_loss(arm, rng, evidence, pytestconfig):
    recording = _, chains = recorded(pytestconfig.option.seed)
    agreed = overthinking_stop(*verdicts(chains, rng, ERROR)).numpy()
    divergent = (agreed >= MANY) & (chains.thoughts >= MANY)
    whole_tokens, whole_right = toy.ended(*recording, chains.thoughts)
    tokens, right = toy.ended(*recording, agreed)
    trimmed, still_right = toy.ended(*recording, agreed if arm.control else np.where(divergent, MANY - 1, agreed))
    saved = mean_interval(100 - percent(trimmed * divergent, tokens * divergent))
    evidence.require("tokens saved on divergent chains", saved, above=10, unit="%")
    lost = paired_difference(percent(whole_right), percent(still_right))
    evidence.require("accuracy lost, against whole chains", lost, below=LARGEST_DROP, unit="points")
    evidence.record("accuracy lost to the rule", paired_difference(percent(right), percent(still_right)), "points")
    evidence.record("tokens saved in all", 100 - 100 * trimmed.mean() / whole_tokens.mean(), "%")
    evidence.record("share of divergent chains", 100 * divergent.mean(), "%")
    evidence.record("accuracy on divergent chains, running on", 100 * right[divergent].mean(), "%")
    evidence.record("accuracy on divergent chains, stopped", 100 * still_right[divergent].mean(), "%")


@claim(
    "Length and answer at the overthinking stop follow the absorbing-chain law, for M_o = 1..4 and verifier errors up to 20 %.",
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
    answers = np.empty((chains, steps), dtype=np.int64)
    for i in range(steps):
        chance = np.broadcast_to(start, (chains, values)) if i == 0 else moves[answers[:, i - 1]]
        answers[:, i] = np.minimum((chance.cumsum(1) < rng.random((chains, 1))).sum(1), values - 1)
    same, spent = np.pad(answers[:, 1:] == answers[:, :-1], ((0, 0), (1, 0))), lengths[answers].cumsum(1)
    scores, never = [], 0
    for false_positive in (0.0, 0.05, 0.2):
        for false_negative in (0.0, 0.05, 0.2):
            flip = rng.random(same.shape) < np.where(same, false_negative, false_positive)
            for agreeing in (1, 2, 3, 4):
                stop = overthinking_stop(torch.ones(same.shape, dtype=torch.bool), torch.tensor(same ^ flip), agreeing).numpy()
                never += (stop == steps).sum()
                at = np.minimum(stop, steps - 1)[:, None]
                measured = (np.take_along_axis(spent, at, 1), np.take_along_axis(answers, at, 1) == 0)
                errors = {} if arm.control else {"false_positive": false_positive, "false_negative": false_negative}
                law = stopping_law(*map(torch.tensor, (start, moves)), agreeing, lengths=torch.tensor(lengths), **errors)
                for seen, expected in zip(measured, (law.tokens.item(), law.answer[0].item()), strict=True):
                    scores.append(abs(seen.mean() - expected) / (seen.std() / np.sqrt(chains)))
    bound = NormalDist().inv_cdf(1 - 0.001 / (2 * len(scores)))
    evidence.require("largest deviation", max(scores), below=bound, unit="standard errors")
    evidence.record("chains that never stopped", never)
