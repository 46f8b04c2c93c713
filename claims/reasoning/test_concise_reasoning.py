"""ConCISE: Confidence-guided Compression in Step-by-step Efficient Reasoning (Qiao et al. 2025, arXiv 2505.04881).

The chains come from a tiny trained transformer that solves three steps of modular arithmetic, errs, and tries again. It learned
to recheck from its own sampled errors, whatever phrase stood before; the phrase of confidence (SURE) and a neutral one (WELL)
are equally long and equally frequent in what it learned from.
"""

import copy
import functools

import numpy as np
import pytest
import torch

from paperclaims.fixtures.models import arithmetic_reasoner as toy
from paperclaims.fixtures.protocol import claim
from paperclaims.fixtures.statistics import mean_interval, paired_difference
from paperclaims.impl.reasoning.concise_reasoning import early_stop, preference_pairs, sft_loss, simpo_loss

PROBLEMS, BLOCKS, TAU = 16_000, 20, 0.7
FIRST_MODEL = 200  # those before served to choose the set-up
DIFFERS = "a two-layer transformer on modular arithmetic instead of 7B models on mathematics"


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
    "The model's confidence says when to stop: Early Stopping is more accurate than a token budget of the same mean length.",
    scale="mechanism",
    control="confidences are permuted across problems: as many chains stop at each answer, whichever they are",
    differs=DIFFERS
    + "; confidence is the probability of the most probable answer, tau = 0.7 from a grid of 0.5 to 0.9 on other models",
)
def test_early_stopping_beats_a_token_budget(arm, rng, evidence, pytestconfig):
    given, chains = recorded(pytestconfig.option.seed)
    order = rng.permutation(PROBLEMS) if arm.control else np.arange(PROBLEMS)
    candidate = torch.arange(chains.answers.shape[1]) < torch.tensor(chains.thoughts[order])[:, None]
    confidence = torch.tensor(chains.forced.max(-1)[order])

    def compare(tau):
        tokens, right = outcome(given, chains, early_stop(confidence, candidate, tau).numpy())
        for budget in range(1, 27):
            within = ((chains.cost > 0) & (chains.cost + 2 <= budget)).sum(1)
            spent, budgeted = outcome(given, chains, np.maximum(within - 1, 0))
            if spent.mean() >= tokens.mean():
                return tokens, right, spent, budgeted

    tokens, right, spent, budgeted = compare(TAU)
    gain = paired_difference(percent(right), percent(budgeted))
    evidence.require("accuracy beyond the budget's", gain, above=0.5, unit="points")
    evidence.record("mean tokens with Early Stopping", tokens.mean())
    evidence.record("mean tokens with the budget", spent.mean())
    taus = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9]
    swept = [compare(tau) for tau in taus]
    for name, which in (("Early Stopping", 0), ("token budget", 2)):
        x, y = ([float(run[which + i].mean()) for run in swept] for i in (0, 1))
        evidence.curve("Accuracy by tokens, tau from 0.5 to 0.9", x, y, series=name, x_label="mean tokens", y_label="accuracy")


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
    evidence.require("rechecks, against the model's own", ratio, below=0.75)
    first = np.zeros(PROBLEMS, dtype=np.int64)
    lost = paired_difference(percent(outcome(given, own, first)[1]), percent(outcome(given, injected, first)[1]))
    evidence.require("accuracy lost", lost, below=3, unit="points")


def concise(model, given, seed, tau, phrase):
    """Chains written with the phrase injected and stopped at confidence tau: rows of tokens and places, and which are right."""
    chains = toy.sample(model, given, seed, limit=64, inject=phrase)
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


def padded(rows, fill):
    return torch.tensor([[*row, *[fill] * (max(map(len, rows)) - len(row))] for row in rows])


@claim(
    "Fine-tuned on its own ConCISE chains, the model writes chains of at most 0.6 of their length at nearly unchanged accuracy.",
    scale="mechanism",
    control="tau above 1 (never confident) and the neutral phrase instead of the one of confidence; as many chains and steps",
    differs=DIFFERS + "; learning rates from 5e-5 to 1e-3, with SFT at 3e-4 and SimPO at 1e-4 the best on another model",
    control_breaks="length, against before",
    paper_value="length cut by up to about 50 % under SimPO at high accuracy",
)
@pytest.mark.parametrize("objective", ["sft", "simpo"])
def test_fine_tuning_shortens_the_chains(arm, objective, evidence, seeds, pytestconfig):
    model, (problems, own, short, test, batches) = toy.load(FIRST_MODEL + pytestconfig.option.seed), seeds(5)
    rng = np.random.default_rng(problems)
    given, held_out = toy.problems(rng, 1200), toy.problems(rng, 3000)
    original = concise(model, given, own, 1.0, None)
    shorter = concise(model, given, short, 1.0 if arm.control else TAU, toy.WELL if arm.control else toy.SURE)
    chosen = np.array([row for row, _, _ in preference_pairs(shorter[0], original[0], shorter[2], original[2])])
    tuned, rng = copy.deepcopy(model).requires_grad_(True), np.random.default_rng(batches)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=3e-4 if objective == "sft" else 1e-4, weight_decay=0.0)
    for _ in range(40 if objective == "sft" else 30):
        batch = rng.choice(chosen, 48)
        operations = torch.tensor(given.operations[batch])
        scores = []
        for tokens, places, _ in [shorter] if objective == "sft" else [shorter, original]:
            tokens = padded([tokens[row] for row in batch], toy.PAD)
            found = toy.log_probabilities(tuned, operations, tokens, padded([places[row] for row in batch], 0))
            scores.append((found, tokens[:, 1:] != toy.PAD))
        if objective == "sft":
            loss = sft_loss(*scores[0])
        else:
            loss = simpo_loss(*(found.sum(1) for found, _ in scores), *(written.sum(1) for _, written in scores))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after = (toy.sample(who, held_out, test, limit=64) for who in (model, tuned.requires_grad_(False)))
    evidence.require("length, against before", mean_interval(percent(after.length) / percent(before.length)), below=0.6)
    right = (percent(chains.final == held_out.answer) for chains in (before, after))
    evidence.require("accuracy lost", paired_difference(*right), below=3, unit="points")
    evidence.record("accuracy before", 100 * (before.final == held_out.answer).mean(), "%")
    evidence.record("tokens before", before.length.mean())
    evidence.record("tokens after", after.length.mean())
    evidence.record("pairs", len(chosen))
