"""ConCISE: Confidence-guided Compression in Step-by-step Efficient Reasoning (Qiao et al. 2025, arXiv 2505.04881).

The chains come from a tiny trained transformer that solves three steps of modular arithmetic, errs, and tries again. It learned
to recheck from its own sampled errors, whatever phrase stood before; the phrase of confidence (SURE) and a neutral one (WELL)
are equally long and equally frequent in what it learned from.
"""

import copy
import functools

import numpy as np
import torch

from paperclaims.fixtures.models import arithmetic_reasoner as toy
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, paired_difference
from paperclaims.impl.reasoning.concise_reasoning import early_stop, preference_pairs, simpo_loss

PROBLEMS, TRAINING, HELD_OUT, BLOCKS, TAU = 16_000, 1_200, 5_000, 20, 0.7
FIRST_MODEL = 300  # those before served to choose the set-up
EXPLORATORY = "exploratory: its rule was chosen while looking at seeds 0 to 10"
DIFFERS = f"a two-layer transformer on modular arithmetic instead of 7B models on mathematics; {EXPLORATORY}"


@functools.cache
def recorded(seed, inject=None):
    """The problems and the model's chains about them, cut at 24 tokens."""
    model, rng = toy.load(FIRST_MODEL + seed), np.random.default_rng([seed, PROBLEMS])
    parts = [toy.problems(rng, PROBLEMS // 4) for _ in range(4)]
    chains = [toy.sample(model, part, int(rng.integers(2**32)), limit=24, inject=inject) for part in parts]
    return toy.Problems(*map(np.concatenate, zip(*parts, strict=True))), toy.Chains(
        *map(np.concatenate, zip(*chains, strict=True))
    )


def percent(values):
    """Blocks of problems: the mean in percent, (BLOCKS,)."""
    return 100 * np.reshape(values, (BLOCKS, -1)).mean(1)


def outcome(given, chains, stop):
    """Tokens (with the two that force the answer) and correctness of each chain, stopped after thought `stop` or its last."""
    row, at = np.arange(len(stop)), np.minimum(stop, np.maximum(chains.thoughts - 1, 0))
    return chains.cost[row, at] + 2, chains.forced[row, at].argmax(-1) == given.answer


@claim(
    "The model's confidence says when to stop: Early Stopping beats stopping as often at each answer without looking.",
    scale="mechanism",
    control="the confidences that decide are permuted across problems (mean of four permutations)",
    differs=DIFFERS + "; confidence: probability of the likeliest answer; tau: the level that 70 % of the first answers exceed",
)
def test_early_stopping_knows_when(arm, rng, evidence, pytestconfig):
    given, chains = recorded(pytestconfig.option.seed)
    confidence = torch.tensor(chains.forced.max(-1))
    looking, blind = np.arange(PROBLEMS), [rng.permutation(PROBLEMS) for _ in range(20)]

    def stopped(tau, order):
        candidate = torch.arange(confidence.shape[1]) < torch.tensor(chains.thoughts[order])[:, None]
        return outcome(given, chains, early_stop(confidence[order], candidate, tau).numpy())

    def within(budget):
        finished = ((chains.cost > 0) & (chains.cost + 2 <= budget)).sum(1)
        return outcome(given, chains, np.maximum(finished - 1, 0))

    first = confidence[chains.thoughts > 0, 0]
    tau = float(first.quantile(0.3))
    tokens, right = np.mean([stopped(tau, order) for order in (blind[:4] if arm.control else [looking])], axis=0)
    blindly = np.mean([stopped(tau, order)[1] for order in blind[4:]], axis=0)
    gain = paired_difference(percent(right), percent(blindly))
    evidence.require("accuracy beyond blind stops", gain, above=0.75, unit="points")
    spent, budgeted = next(run for run in map(within, range(1, 27)) if run[0].mean() >= tokens.mean())
    evidence.record("accuracy beyond a token budget", paired_difference(percent(right), percent(budgeted)), "points")
    evidence.record("mean tokens with Early Stopping", tokens.mean())
    evidence.record("mean tokens with the budget", spent.mean())
    evidence.record("tau", tau)
    taus = [float(first.quantile(q)) for q in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)]
    swept = {
        "Early Stopping": [stopped(tau, looking) for tau in taus],
        "blind stops": [stopped(tau, blind[0]) for tau in taus],
        "token budget": [within(budget) for budget in range(7, 15)],
    }
    for series, runs in swept.items():
        x, y = ([float(run[i].mean()) for run in runs] for i in (0, 1))
        evidence.curve("Accuracy by tokens", x, y, series=series, x_label="mean tokens", y_label="accuracy")


@claim(
    "A phrase of confidence before each move makes the model recheck its steps less often, at nearly unchanged accuracy.",
    scale="mechanism",
    control="a neutral phrase, as long and as frequent in training, is injected instead",
    differs=DIFFERS + "; accuracy of the answer after the first thought",
    control_breaks="rechecks, against the model's own",
)
def test_confidence_injection_reduces_reflection(arm, evidence, pytestconfig):
    given, own = recorded(pytestconfig.option.seed)
    _, injected = recorded(pytestconfig.option.seed, toy.WELL if arm.control else toy.SURE)

    def rechecks(chains):
        """Per value written in the first thought, in blocks."""
        first = np.arange(1, chains.tokens.shape[1]) <= chains.cost[:, :1]
        count = [((chains.tokens[:, 1:] == toy.RECHECK) & first).sum(1), ((chains.tokens[:, 1:] < toy.MODULUS) & first).sum(1)]
        redone, values = (np.reshape(each, (BLOCKS, -1)).sum(1) for each in count)
        return redone / values

    ratio = mean_interval(rechecks(injected) / rechecks(own))
    evidence.require("rechecks, against the model's own", ratio, below=0.7)
    first = np.zeros(PROBLEMS, dtype=np.int64)
    lost = paired_difference(percent(outcome(given, own, first)[1]), percent(outcome(given, injected, first)[1]))
    evidence.require("accuracy lost", lost, below=4, unit="points")


@functools.cache
def problems_from(seed, n):
    return toy.problems(np.random.default_rng(seed), n)


@functools.cache
def concise(number, given_from, seed, tau, phrase):
    """Chains written with the phrase injected and stopped at confidence tau: rows of tokens and places, and which are right."""
    given = problems_from(given_from, TRAINING)
    chains = toy.sample(toy.load(number), given, seed, limit=64, inject=phrase)
    candidate = torch.arange(chains.answers.shape[1]) < torch.tensor(chains.thoughts)[:, None]
    stop = early_stop(torch.tensor(chains.forced.max(-1)), candidate, tau).numpy()
    tokens, places, right = [], [], []
    for row, (i, thoughts) in enumerate(zip(stop, chains.thoughts, strict=True)):
        whole = i >= thoughts
        answer = chains.final[row] if whole else chains.forced[row, i].argmax()
        cut = chains.length[row] + 1 if whole else chains.cost[row, i] + 1
        close = ([], []) if whole else ([toy.END, answer], [toy.DONE, toy.DONE])
        tokens.append([*chains.tokens[row, :cut].tolist(), *close[0]])
        places.append([*chains.places[row, :cut].tolist(), *close[1]])
        right.append(answer == given.answer[row] and toy.END in tokens[-1])
    return tokens, places, right


@functools.cache
def whole_chains(number, given_from, seed):
    return toy.sample(toy.load(number), problems_from(given_from, HELD_OUT), seed, limit=64)


def padded(rows, fill):
    return torch.tensor([[*row, *[fill] * (max(map(len, rows)) - len(row))] for row in rows])


@not_reproduced("chains shrink to 0.4 to 0.8 of their length and accuracy falls by 2 to 12 points: never both in bounds")
@claim(
    "SimPO on its own ConCISE chains makes the model write chains of at most 0.6 of their length at nearly unchanged accuracy.",
    scale="mechanism",
    control="tau above 1 (never confident) and the neutral phrase instead of the one of confidence; as many chains and steps",
    differs=DIFFERS
    + "; first answers are right in 62 %, whole chains in 69 %; tau 0.7; learning rate among 5e-5 to 1e-3 on other models",
    control_breaks="length, against before",
    paper_value="length cut by up to about 50 % under SimPO at high accuracy",
)
def test_simpo_shortens_the_chains(arm, evidence, seeds, pytestconfig):
    number, (train, own, short, held_out, test, batches) = FIRST_MODEL + pytestconfig.option.seed, seeds(6)
    given, fresh = problems_from(train, TRAINING), problems_from(held_out, HELD_OUT)
    original = concise(number, train, own, 1.0, None)
    shorter = concise(number, train, short, 1.0 if arm.control else TAU, toy.WELL if arm.control else toy.SURE)
    chosen = np.array([row for row, _, _ in preference_pairs(shorter[0], original[0], shorter[2], original[2])])
    tuned, rng = copy.deepcopy(toy.load(number)).requires_grad_(True), np.random.default_rng(batches)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(30):
        batch = rng.choice(chosen, 48)
        operations = torch.tensor(given.operations[batch])
        scores = []
        for tokens, places, _ in (shorter, original):
            tokens = padded([tokens[row] for row in batch], toy.PAD)
            found = toy.log_probabilities(tuned, operations, tokens, padded([places[row] for row in batch], 0))
            scores.append((found, tokens[:, 1:] != toy.PAD))
        loss = simpo_loss(*(found.sum(1) for found, _ in scores), *(written.sum(1) for _, written in scores))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after = whole_chains(number, held_out, test), toy.sample(tuned.requires_grad_(False), fresh, test, limit=64)
    evidence.require("length, against before", mean_interval(percent(after.length) / percent(before.length)), below=0.6)
    right = (percent(chains.final == fresh.answer) for chains in (before, after))
    evidence.require("accuracy lost", paired_difference(*right), below=3, unit="points")
    evidence.record("accuracy before", 100 * (before.final == fresh.answer).mean(), "%")
    evidence.record("tokens before", before.length.mean())
    evidence.record("tokens after", after.length.mean())
    evidence.record("pairs", len(chosen))
