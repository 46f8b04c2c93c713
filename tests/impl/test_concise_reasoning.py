"""ConCISE: SimPO against its formula in plain floats and against trl, the chain construction against a plain reading."""

import math
from types import SimpleNamespace

import pytest
import torch

from paperclaims.fixtures.optional import need
from paperclaims.impl.reasoning.concise_reasoning import (
    concise_chain,
    confidence_mass,
    early_stop,
    preference_pairs,
    sft_loss,
    simpo_loss,
)


def pairs(n=6):
    generator = torch.Generator().manual_seed(0)
    logps = -50 * torch.rand(2, n, generator=generator, dtype=torch.float64)
    return *logps, *torch.randint(1, 40, (2, n), generator=generator)


def plain(chosen, rejected, chosen_length, rejected_length, beta, gamma):
    margin = beta / chosen_length * chosen - beta / rejected_length * rejected - gamma
    return math.log1p(math.exp(-margin)) if margin > -30 else -margin


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.5, 0.0), (10.0, 3.0)])
def test_simpo_equals_its_formula(beta, gamma):
    rows = pairs()
    expected = [plain(*(float(x) for x in row), beta, gamma) for row in zip(*rows, strict=True)]
    options = {"beta": beta, "gamma": gamma}
    got = simpo_loss(*rows, **options, reduction="none")
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert simpo_loss(*rows, **options).item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert simpo_loss(*rows, **options, reduction="sum").item() == pytest.approx(sum(expected), rel=1e-12)


def test_simpo_defaults_and_extremes():
    one = torch.ones(1, dtype=torch.float64)
    assert simpo_loss(-one, -one, one, one).item() == pytest.approx(math.log1p(math.e), rel=1e-12)
    assert simpo_loss(-3 * one, -5 * one, one, one).item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-12)
    assert simpo_loss(0 * one, -one, one, one, gamma=0.0).item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-12)
    assert simpo_loss(-one, 0 * one, one, one, gamma=0.0).item() == pytest.approx(math.log1p(math.exp(2)), rel=1e-12)
    assert simpo_loss(-1e6 * one, -one, one, one).item() == pytest.approx(2e6 - 2 + 1)


def test_simpo_gradients_equal_finite_differences():
    chosen, rejected, *lengths = pairs()
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, l: simpo_loss(w, l, *lengths, beta=2.5, gamma=0.7, reduction="none"), inputs)


def test_simpo_equals_trl():
    name = "trl.trainer.cpo_trainer"
    trainer = need(name, install="pip install --no-deps trl==0.25.1").CPOTrainer
    chosen, rejected, chosen_length, rejected_length = pairs()
    settings = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=1.4,
        label_smoothing=0.0,
        loss_type="simpo",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    theirs, *_ = trainer.cpo_loss(settings, chosen / chosen_length, rejected / rejected_length)
    ours = simpo_loss(chosen, rejected, chosen_length, rejected_length, beta=2.0, gamma=1.4, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_sft_is_the_mean_over_what_was_written():
    logps = torch.tensor([[-1.0, -2.0, -99.0], [-4.0, -99.0, -99.0]], requires_grad=True)
    written = torch.tensor([[True, True, False], [True, False, False]])
    loss = sft_loss(logps, written)
    assert loss.item() == pytest.approx(7 / 3)
    loss.backward()
    torch.testing.assert_close(logps.grad, -written.float() / 3)


def write(text, threshold=0.5, sure=(), phrase=("sure",), limit=50):
    """A model that writes `text` word by word; a step starts behind `.`, an answer is `=`, `sure` are confident step counts."""
    words = text.split()

    def own(chain):
        return [word for word in chain if word not in phrase]

    return concise_chain(
        lambda chain: words[len(own(chain))],
        starts_step=lambda chain: not chain or chain[-1] == ".",
        phrase=lambda: list(phrase),
        answered=lambda chain: "=" in chain,
        confidence=lambda chain: 0.9 if chain.count(".") in sure else 0.5,
        threshold=threshold,
        close=["so"],
        concludes=lambda token: token == "end",
        limit=limit,
    )


def test_a_phrase_goes_before_each_step_and_a_confident_answer_stops():
    text = "a . b = . c = . end"
    assert write(text) == (["sure", "a", ".", "sure", "b", "=", ".", "sure", "c", "=", ".", "sure", "end"], 4, False)
    assert write(text, sure={2}) == (["sure", "a", ".", "sure", "b", "=", ".", "so"], 2, True)
    assert write(text, sure={1, 3}) == (["sure", "a", ".", "sure", "b", "=", ".", "sure", "c", "=", ".", "so"], 3, True)
    assert write(text, sure={2}, threshold=1.0) == write(text)
    assert write(text, sure={2}, threshold=0.9) == write(text)
    assert write(text, sure={2}, phrase=()) == (["a", ".", "b", "=", ".", "so"], 0, True)
    assert write(text, limit=4) == (["sure", "a", ".", "sure", "b"], 2, False)
    assert write(text, limit=1).tokens == ["sure", "a"]
    assert write("a b c d", phrase=(), limit=3).tokens == ["a", "b", "c"]


def test_confidence_is_the_probability_of_the_confident_tokens():
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64)
    weights = logits.exp()[0]
    expected = (weights[1] + weights[3]) / weights.sum()
    assert confidence_mass(logits, torch.tensor([1, 3])).item() == pytest.approx(expected.item(), rel=1e-12)
    assert confidence_mass(logits, torch.arange(4)).item() == pytest.approx(1.0)
    assert torch.autograd.gradcheck(lambda x: confidence_mass(x, torch.tensor([1, 3])), logits.requires_grad_())


def test_early_stop_takes_the_first_confident_candidate():
    confidence = torch.tensor([[0.9, 0.4, 0.6, 0.9], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.9, 0.1]])
    candidate = torch.tensor([[False, True, True, True], [True] * 4, [True, True, False, True]])
    assert early_stop(confidence, candidate, 0.5).tolist() == [2, 4, 4]
    assert early_stop(confidence, candidate, 0.45).tolist() == [2, 0, 4]
    assert early_stop(confidence, candidate, 0.0).tolist() == [1, 0, 0]
    assert early_stop(confidence, candidate, 1.0).tolist() == [4, 4, 4]
    assert early_stop(confidence[None], candidate[None], 0.5).tolist() == [[2, 4, 4]]
    assert early_stop(torch.tensor([torch.nan, 0.6]), torch.tensor([False, True]), 0.5).item() == 1


def test_pairs_are_those_where_both_chains_are_right():
    found = preference_pairs(["a", "b", "c"], ["A", "B", "C"], [True, True, False], [True, False, True])
    assert found == [(0, "a", "A")]


def test_bad_input_is_refused():
    w, l, wn, ln = pairs()
    one = torch.tensor([1, 0, 0, 0, 0, 0])
    nan = w.clone()
    nan[0] = torch.nan
    yes = torch.ones(2, dtype=torch.bool)
    cases = [
        lambda: simpo_loss(w[:2], l, wn, ln),
        lambda: simpo_loss(w, l[:2], wn, ln),
        lambda: simpo_loss(w, l, wn[:2], ln),
        lambda: simpo_loss(w, l, wn, ln[:2]),
        lambda: simpo_loss(nan, l, wn, ln),
        lambda: simpo_loss(w, nan, wn, ln),
        lambda: simpo_loss(w + 100 * one, l, wn, ln),
        lambda: simpo_loss(w, l + 100 * one, wn, ln),
        lambda: simpo_loss(w, l, wn * (1 - one), ln),
        lambda: simpo_loss(w, l, wn, ln * (1 - one)),
        lambda: simpo_loss(w, l, wn, ln, beta=0.0),
        lambda: simpo_loss(w, l, wn, ln, beta=math.nan),
        lambda: simpo_loss(w, l, wn, ln, gamma=-1.0),
        lambda: simpo_loss(w + 60, l, wn, ln),
        lambda: simpo_loss(w, l, wn, ln, reduction="max"),
        lambda: sft_loss(w, yes),
        lambda: sft_loss(w[:2], ~yes),
        lambda: confidence_mass(nan, torch.tensor([0])),
        lambda: confidence_mass(w, torch.tensor([], dtype=torch.long)),
        lambda: confidence_mass(w, torch.tensor([0, 0])),
        lambda: confidence_mass(w, torch.tensor([[0]])),
        lambda: early_stop(w[:2], yes, -0.1),
        lambda: early_stop(w[:2], yes, math.nan),
        lambda: early_stop(w, yes, 0.5),
        lambda: early_stop(w[:2], yes.long(), 0.5),
        lambda: early_stop(nan[:2], yes, 0.5),
        lambda: preference_pairs(["a"], ["b"], [True], []),
        lambda: preference_pairs(["a"], [], [True], [True]),
        lambda: preference_pairs(["a"], ["b"], [], [True]),
        lambda: write("end", threshold=-1.0),
        lambda: write("end", limit=0),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"\w"):
            case()
