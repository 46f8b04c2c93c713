"""ConCISE: Confidence-guided Compression in Step-by-step Efficient Reasoning (Qiao et al. 2025, arXiv 2505.04881).

The chains come from a tiny trained transformer that solves three steps of modular arithmetic, errs, and tries again. It learned
to recheck values that it believes less, whatever phrase stood behind them; the phrase of confidence (SURE, behind values that it
believes) and a neutral one (WELL) are equally long and equally frequent in what it learned from.
"""

import copy
import functools

import numpy as np
import torch

from paperclaims.fixtures.models import arithmetic_reasoner as toy
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, paired_difference
from paperclaims.impl.reasoning.concise_reasoning import early_stop, preference_pairs, simpo_loss

PROBLEMS, TRAINING, HELD_OUT, BLOCKS, TAU = 24_000, 1_200, 4_000, 20, 0.5
FIRST_MODEL = 1000
NEARLY_UNCHANGED = 1.0  # points of accuracy
DIFFERS = "a two-layer transformer on modular arithmetic instead of 7B models on mathematics; intervals over one model's problems"


@functools.cache
def written(seed, n, inject=None, limit=64, most=None):
    """n problems, and what the model writes about them of its own or with a phrase injected."""
    rng = np.random.default_rng([seed, n])
    given, draws = toy.problems(rng, n), rng.integers(2**32, size=2).tolist()
    return given, toy.sample(
        toy.load(FIRST_MODEL + seed), given, draws[inject is not None], limit=limit, most=most, inject=inject
    )


def percent(values):
    """Blocks of problems: the mean in percent, (BLOCKS,)."""
    return 100 * np.reshape(values, (BLOCKS, -1)).mean(1)


def stops(confidence, thoughts, tau):
    """The thought behind which each chain stops early, (n,), from the confidence behind every one, (n, A)."""
    candidate = torch.arange(confidence.shape[1]) < torch.tensor(thoughts)[:, None]
    return early_stop(torch.tensor(confidence), candidate, tau).numpy()


def moves(tokens):
    """Tokens behind the start of chains (n, T), without the phrases, (n,)."""
    return np.isin(tokens[:, 1:], (toy.SURE, toy.WELL, toy.PAD), invert=True).sum(1)


def closed(given, chains, tau):
    """Tokens and places of chains that end at confidence tau or by themselves, and which of them end with the right answer."""
    stop, row = stops(chains.forced.max(-1), chains.thoughts, tau), np.arange(len(given.start))
    tokens, right = toy.ended(given, chains, stop)
    kept = np.arange(chains.tokens.shape[1]) < (tokens - 1)[:, None]
    text, places = np.where(kept, chains.tokens, toy.PAD), np.where(kept, chains.places, 0)
    text, places = (np.pad(rows, ((0, 0), (0, 2)), constant_values=fill) for rows, fill in ((text, toy.PAD), (places, 0)))
    text[row, tokens - 1] = toy.END
    text[row, tokens] = chains.forced[row, np.minimum(stop, chains.thoughts - 1)].argmax(-1)
    places[row, tokens - 1] = places[row, tokens] = toy.DONE
    return text, places, right & ((stop < chains.thoughts) | (chains.tokens == toy.END).any(1))


@not_reproduced(
    "chains shrink to 0.7 to 0.9 of their length only, and accuracy mostly falls: what they drop, rechecks of doubtful "
    "values, helps by construction in this toy"
)
@claim(
    "SimPO on its own ConCISE chains makes the model write chains of at most 0.6 of their length at nearly unchanged accuracy.",
    scale="mechanism",
    control="tau of 1 (never confident) and the neutral phrase instead of the one of confidence; as many problems and steps",
    differs=DIFFERS
    + "; whole chains are right in about 87 %, first answers in 5 points less; a phrase is as long as a step, so the length "
    "leaves phrases out; of learning rates 5e-5 to 1e-3, 30 or 60 steps and tau 0.5 or 0.9, no choice did it on another model",
    control_breaks="length, against before",
    paper_value="length cut by up to about 50 % under SimPO at high accuracy",
)
def test_simpo_shortens_the_chains(arm, rng, evidence, pytestconfig):
    seed, phrase, tau = pytestconfig.option.seed, *((toy.WELL, 1.0) if arm.control else (toy.SURE, TAU))
    given, chains = written(seed, TRAINING)
    original, concise = closed(given, chains, 1.0), closed(*written(seed, TRAINING, phrase), tau)
    pairs = np.array([row for row, _, _ in preference_pairs(concise[0], original[0], concise[2], original[2])])
    tuned = copy.deepcopy(toy.load(FIRST_MODEL + seed)).requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=3e-4, weight_decay=0.0)
    for _ in range(30):
        batch = rng.choice(pairs, 48)
        scores, lengths = [], []
        for text, places, _ in (concise, original):
            tokens = torch.tensor(text[batch])
            found = toy.log_probabilities(tuned, torch.tensor(given.operations[batch]), tokens, torch.tensor(places[batch]))
            scores.append(found.sum(1))
            lengths.append((tokens[:, 1:] != toy.PAD).sum(1))
        loss = simpo_loss(*scores, *lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh, before = written(seed, HELD_OUT)
    after = toy.sample(tuned.requires_grad_(False), fresh, int(rng.integers(2**32)))
    evidence.require(
        "length, against before", mean_interval(percent(moves(after.tokens)) / percent(moves(before.tokens))), below=0.6
    )
    right = [toy.ended(fresh, chains, chains.thoughts)[1] for chains in (before, after)]
    lost = paired_difference(*map(percent, right))
    evidence.require("accuracy lost", lost, below=NEARLY_UNCHANGED, unit="points")
    evidence.record("accuracy before", 100 * right[0].mean(), "%")
    evidence.record("moves before", moves(before.tokens).mean())
    evidence.record("moves after", moves(after.tokens).mean())
    for name, (text, _, _) in (("concise", concise), ("original", original)):
        evidence.record(f"moves of the {name} chains of the pairs", moves(text[pairs]).mean())
    evidence.record("pairs", len(pairs))


@not_reproduced("useful rechecks go with the useless ones: accuracy falls by 3 to 12 points")
@claim(
    "A phrase of confidence before each move makes the model recheck its steps less often, at nearly unchanged accuracy.",
    scale="mechanism",
    control="a neutral phrase, as long and as frequent in training, is injected instead",
    differs=DIFFERS
    + "; accuracy of the answer after the first thought; in the chains it learned from, a phrase said nothing about a recheck "
    "that the value's probability did not; a recheck draws a doubtful value anew, so that rechecks help by construction",
    control_breaks="rechecks, against the model's own",
)
def test_confidence_injection_reduces_reflection(arm, evidence, pytestconfig):
    given, plain = written(pytestconfig.option.seed, PROBLEMS)
    _, spoken = written(pytestconfig.option.seed, PROBLEMS, toy.WELL if arm.control else toy.SURE, limit=24, most=1)

    def rechecks(chains):
        """Per value written in the first thought, in blocks."""
        first = np.arange(1, chains.tokens.shape[1]) <= chains.cost[:, :1]
        count = [((chains.tokens[:, 1:] == toy.RECHECK) & first).sum(1), ((chains.tokens[:, 1:] < toy.MODULUS) & first).sum(1)]
        redone, values = (np.reshape(each, (BLOCKS, -1)).sum(1) for each in count)
        return redone / values

    ratio = mean_interval(rechecks(spoken) / rechecks(plain))
    evidence.require("rechecks, against the model's own", ratio, below=0.9)
    first = np.zeros(PROBLEMS, dtype=np.int64)
    lost = paired_difference(*(percent(toy.ended(given, chains, first)[1]) for chains in (plain, spoken)))
    evidence.require("accuracy lost", lost, below=NEARLY_UNCHANGED, unit="points")
    right = toy.facts()[given.start, given.operations[:, 0]]
    for name, chains, at in (("own", plain, 2), ("injected", spoken, 3)):
        redone, good = chains.tokens[:, at] == toy.RECHECK, chains.tokens[:, 1] == right
        counted = ~np.isin(chains.tokens[:, at], (toy.SURE, toy.WELL))
        evidence.record(f"rechecks of right first values, {name}", 100 * redone[good & counted].mean(), "%")
        evidence.record(f"rechecks of wrong first values, {name}", 100 * redone[~good & counted].mean(), "%")


@claim(
    "The model's confidence says when to stop: Early Stopping beats stopping as often at each answer without looking.",
    scale="mechanism",
    control="the confidences that decide are permuted across problems (mean of four permutations)",
    differs=DIFFERS + "; confidence: probability of the likeliest answer; tau: the level that 70 % of the first answers "
    "exceed; against whole chains it loses some 2 points",
)
def test_early_stopping_knows_when(arm, rng, evidence, pytestconfig):
    given, chains = written(pytestconfig.option.seed, PROBLEMS)
    confidence = chains.forced.max(-1)
    looking, blind = np.arange(PROBLEMS), [rng.permutation(PROBLEMS) for _ in range(12)]

    def stopped(tau, *orders):
        runs = [toy.ended(given, chains, stops(confidence[order], chains.thoughts[order], tau)) for order in orders]
        return np.mean(runs, axis=0)

    def within(budget):
        return toy.ended(given, chains, toy.budget_stop(chains, budget))

    tau = float(np.quantile(confidence[:, 0], 0.3))
    tokens, right = stopped(tau, *(blind[:4] if arm.control else [looking]))
    blindly = stopped(tau, *blind[4:])
    gain = paired_difference(percent(right), percent(blindly[1]))
    evidence.require("accuracy beyond blind stops", gain, above=0.5, unit="points")
    whole_tokens, whole_right = toy.ended(given, chains, chains.thoughts)
    spent, budgeted = next(run for run in map(within, range(1, 64)) if run[0].mean() >= tokens.mean())
    evidence.record("accuracy beyond a token budget", paired_difference(percent(right), percent(budgeted)), "points")
    evidence.record("accuracy lost, against whole chains", paired_difference(percent(whole_right), percent(right)), "points")
    evidence.record("tokens saved, against whole chains", 100 - 100 * tokens.mean() / whole_tokens.mean(), "%")
    evidence.record("mean tokens with Early Stopping", tokens.mean())
    evidence.record("mean tokens with blind stops", blindly[0].mean())
    evidence.record("mean tokens with the budget", spent.mean())
    evidence.record("tau", tau)
    taus = [float(np.quantile(confidence[:, 0], q)) for q in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)]
    swept = {
        "Early Stopping": [stopped(tau, looking) for tau in taus],
        "blind stops": [stopped(tau, blind[0]) for tau in taus],
        "token budget": [within(budget) for budget in range(7, 19)],
    }
    for series, runs in swept.items():
        x, y = ([float(run[i].mean()) for run in runs] for i in (0, 1))
        evidence.curve("Accuracy by tokens", x, y, series=series, x_label="mean tokens", y_label="accuracy")
