"""Cut Your Losses in Large-Vocabulary Language Models (Wijmans et al., 2024): the loss without the logits."""

import functools
import re
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.text import king_james
from paperclaims.fixtures.measurement import fake_mode, interleaved, peak_bytes_cpu, peak_bytes_cuda, peak_bytes_fake
from paperclaims.fixtures.models.smollm2 import classifier_problem
from paperclaims.fixtures.optional import need
from paperclaims.fixtures.protocol import claim
from paperclaims.fixtures.statistics import mean_interval, median_interval
from paperclaims.impl.losses.cut_cross_entropy import EPS, entries_above, kept_blocks, linear_cross_entropy, vocabulary_order
from paperclaims.kernels.losses import cut_cross_entropy_torch as torch_body
from paperclaims.kernels.losses.cut_cross_entropy import Options, default_tile

MIB = 2**20
TOKENS, WORDS, DIMENSIONS, SOFTCAP = 8192, 256_000, 2304, 30.0  # Gemma 2 (2B), the batch of the paper's Table 1


def full_logits(e, c, targets):
    """The paper's baseline: 16-bit logits, capped, then the loss in float32."""
    logits = e @ c.T
    logits = torch.tanh(logits / SOFTCAP) * SOFTCAP
    return F.cross_entropy(logits.float(), targets)


def gemma(requires_grad=False):
    e, c = (torch.empty(n, DIMENSIONS, dtype=torch.bfloat16, requires_grad=requires_grad) for n in (TOKENS, WORDS))
    return e, c, torch.empty(TOKENS, dtype=torch.int64)


def no_launch(kernel, grid, *arguments, **constants):
    """Stands in for the start of a kernel, which allocates nothing."""


@claim(
    "The loss of 8,192 tokens over 256,000 words allocates about a megabyte beyond its inputs in Triton, and at most 64 MB in "
    "plain PyTorch, not the 24 GB of the full logits.",
    scale="paper",
    control="the tile of logits is all tokens by all words and lies in memory",
    control_breaks="memory of the loss",
    paper_value="24 GB to 1 MB (abstract)",
)
@pytest.mark.parametrize(("body", "limit"), [("triton", 2), ("torch", 64)])
def test_loss_memory(arm, body, limit, evidence):
    with fake_mode():
        tile = (TOKENS, WORDS) if arm.control else default_tile(TOKENS, WORDS, DIMENSIONS, 2, False, False, body)
        options = Options(softcap=SOFTCAP, tile_tokens=tile[0], tile_words=tile[1])
        forward = torch_body.forward
        if body == "triton" and not arm.control:
            need("triton", extra="triton")
            from paperclaims.kernels.losses import cut_cross_entropy_triton

            forward = partial(cut_cross_entropy_triton.forward, launch=no_launch)
        inputs, leaves = gemma(), gemma(requires_grad=True)
        ours = peak_bytes_fake(lambda: forward(*inputs, None, options))
        full = peak_bytes_fake(lambda: full_logits(*leaves))
    evidence.require("memory of the loss", ours / MIB, below=limit, unit="MiB")
    evidence.require("memory of the loss from full logits", full / MIB, between=(23_900, 24_100), unit="MiB")


@claim(
    "Loss and gradients together take little more than the gradients themselves, about 1.2 GB, not the 28 GB of the full logits.",
    scale="paper",
    control="the gradients of the logits are held for all words at once",
    control_breaks="memory over the gradients' own",
    paper_value="28 GB to 1 GB (abstract)",
)
@pytest.mark.parametrize(("accumulate", "limit"), [("input", 1.05), ("compensated", 1.05), ("fp32", 1.10)])
def test_gradient_memory(arm, accumulate, limit, evidence):
    need("triton", extra="triton")
    from paperclaims.kernels.losses import cut_cross_entropy_triton as body

    tokens, words = default_tile(TOKENS, WORDS, DIMENSIONS, 2, False, True, "triton")
    options = Options(softcap=SOFTCAP, filter_eps=EPS, accumulate=accumulate, tile_tokens=tokens, tile_words=words)

    def step(e, c, targets):
        _, lse = body.forward(e, c, targets, None, options, launch=no_launch)
        weights, scale = torch.ones(len(e)), torch.ones(())
        chunk = WORDS if arm.control else None
        return body.backward(
            e, c, targets, None, lse, weights, scale, (True, True, False), options, launch=no_launch, chunk=chunk
        )  # fmt: skip

    with fake_mode():
        inputs, leaves = gemma(), gemma(requires_grad=True)
        ours = peak_bytes_fake(lambda: step(*inputs))
        full = peak_bytes_fake(lambda: full_logits(*leaves).backward())
        gradients = sum(x.nbytes for x in inputs[:2])
    evidence.require("memory over the gradients' own", ours / gradients, below=limit)
    evidence.require("memory from full logits", full / MIB, between=(27_900, 28_100), unit="MiB")
    evidence.record("memory", ours / MIB, "MiB")
    evidence.record("the gradients' own", gradients / MIB, "MiB")


@claim(
    "On a real CPU too, loss and gradients take at most an eighth of the memory of the full logits.",
    scale="reduced",
    differs="1,024 tokens, 16,384 words, 128 dimensions, float32",
    control="the tile of logits is all tokens by all words",
    control_breaks=("memory, computed again", "memory, formed in the forward pass"),
    paper_value="28 GB to 1 GB (abstract)",
)
def test_memory_on_a_cpu(arm, rng, evidence):
    (e, c), targets = random_problem(rng, 1024, 16_384, 128)

    def peak(loss):
        e.grad = c.grad = None
        return peak_bytes_cpu(lambda: loss(e, c, targets).backward())

    ours = partial(linear_cross_entropy, tile=(1024, 16_384) if arm.control else None)
    full = peak(lambda e, c, targets: F.cross_entropy(e @ c.T, targets))
    evidence.require("memory, computed again", peak(partial(ours, gradients="backward")) / full, below=1 / 8)
    evidence.require("memory, formed in the forward pass", peak(partial(ours, gradients="forward")) / full, below=1 / 8)
    evidence.record("memory from full logits", full / MIB, "MiB")


@claim(
    "Without its filter the block algorithm is exact: loss and gradients equal those from the full logits.",
    scale="reduced",
    differs="256 tokens of the King James Bible through SmolLM2-135M (49,152 words), float32 on a CPU; random weights beside it",
    control="blocks of the gradient are left out where |softmax - target| < 0.5 all over them",
    control_breaks="relative error of the gradients",
)
@pytest.mark.parametrize("weights", ["trained", "random"])
def test_exactness(arm, weights, rng, evidence):
    e, c, targets = language_model(rng, 256, trained=weights == "trained")
    x, w = e.double().requires_grad_(), c.double().requires_grad_()
    true = F.cross_entropy(x @ w.T, targets)
    true.backward()
    settings = {"tile": (128, 256), "gradients": "backward"}
    loss, de, dc = gradients_of(e, c, targets, filter_eps=0.5 if arm.control else None, **settings)
    evidence.require("relative error of the loss", abs(loss - true.item()) / true.item(), below=1e-4)
    error = max(relative_error(de.double(), x.grad), relative_error(dc.double(), w.grad))
    evidence.require("relative error of the gradients", error, below=1e-4)


@claim(
    "A trained model's softmax is sparse: fewer than 200 words a token reach 2^-12, and they hold over nine tenths of the "
    "probability.",
    scale="reduced",
    differs="SmolLM2-135M (49,152 words) over 512 tokens of the King James Bible, not Gemma 2 (2B) over Alpaca",
    control="an untrained classifier, normal with standard deviation 0.02",
    control_breaks="probability in them",
    paper_value="under 0.02 % of 256,000 words, about 50 (section 4.3)",
)
def test_softmax_is_sparse(arm, rng, evidence):
    count, held = [], []
    e, c, _ = language_model(rng, 512, trained=not arm.control)
    for tokens in e.split(64):
        softmax = (tokens @ c.T).softmax(1)
        count.append(entries_above(tokens, c).double().mean().item())
        held.append(torch.where(softmax >= EPS, softmax, 0).sum(1).mean().item())
    evidence.require("words a token with a softmax of at least 2^-12", mean_interval(count), below=200)
    evidence.require("probability in them", mean_interval(held), above=0.9)


@claim(
    "What gradient filtering leaves out is at most a hundredth of the gradient that is not the labels'.",
    scale="reduced",
    differs="SmolLM2-135M over 512 tokens of the King James Bible, bfloat16 values in float32 arithmetic, blocks of 128 x 256",
    control="an untrained classifier, whose probabilities nearly all are below the filter's threshold and yet make this part",
    control_breaks=("error of dE over its part not from the labels", "error of dC over its part not from the labels"),
)
def test_filtered_gradient(arm, rng, evidence):
    e, c, targets = (
        x.bfloat16().float() if x.is_floating_point() else x for x in language_model(rng, 512, trained=not arm.control)
    )
    settings = {"tile": (128, 256), "sort_vocabulary": True, "gradients": "backward"}
    _, *exact = gradients_of(e, c, targets, **settings)
    _, *filtered = gradients_of(e, c, targets, filter_eps=EPS, **settings)
    labels = -c[targets] / len(e), torch.zeros_like(c).index_add_(0, targets, -e / len(e))
    for name, true, left, from_labels in zip(("dE", "dC"), exact, filtered, labels, strict=True):
        error = (left - true).norm()
        part = error / (true - from_labels).norm()
        evidence.require(f"error of {name} over its part not from the labels", part.item(), below=0.01)
        rounding = (true.bfloat16() - true).norm()
        evidence.record(f"error of {name} over the error of rounding it to bfloat16", (error / rounding).item())


@claim(
    "Sorting the vocabulary by average logit gathers the negligible entries, so that whole blocks can be skipped.",
    scale="reduced",
    differs="SmolLM2-135M over 1,024 tokens of the King James Bible, blocks of 128 x 256",
    control="a random order of the vocabulary",
)
def test_vocabulary_sorting(arm, rng, evidence):
    e, c, targets = language_model(rng, 1024)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    order = torch.randperm(len(c), generator=generator) if arm.control else vocabulary_order(e, c, None)
    skipped = 1 - kept_blocks(e, c, targets, order=order).double().mean(1)
    evidence.require("blocks skipped", mean_interval(100 * skipped, resolution=1e-9), above=5, unit="%")


@claim(
    "Fine-tuning with filtered gradients reaches the loss of fine-tuning with exact ones.",
    scale="reduced",
    differs="an MLP over two words with 4,096 words of the King James Bible, 60 steps from scratch and 30 on other chapters, not "
    "billion-parameter models; median over 8 seeds",
    control="the filter's threshold is 2^-4, far above the precision, not 2^-12",
    paper_value="identical curves (figure of the fine-tuning runs)",
)
def test_convergence(arm, seeds, evidence):
    _, other, unseen = bible_words()
    eps, beyond = 2.0**-4 if arm.control else EPS, []
    for seed in seeds(8):
        start, exact = exactly_trained(seed)
        filtered = train(seed, other, 30, start, tile=(128, 256), filter_eps=eps)
        beyond.append(evaluate(filtered, unseen) - evaluate(exact, unseen))
    places = torch.arange(2, 514)
    kept = kept_blocks(embed(filtered, other, places), filtered[2], other[places], eps)
    evidence.record("blocks skipped at the end", 100 * (1 - kept.double().mean().item()), "%")
    evidence.require("loss beyond the exact one's", median_interval(beyond), below=0.005, unit="nats")


@pytest.mark.serial
@claim(
    "On a GPU, at the paper's shapes, loss and gradients take at most 1.2 times as long as from compiled full logits, "
    "in a tenth of the memory.",
    scale="paper",
    control="the tile has shrunk to 16 x 16, too small to use the processor",
    control_breaks="time over that of the compiled full logits",
    differs="random weights, and no block is filtered out",
    paper_value="134.8 ms against 144.0 ms (the authors' repository, A100)",
    needs="cuda",
)
def test_speed_on_a_gpu(arm, rng, evidence):
    generator = torch.Generator(device="cuda").manual_seed(int(rng.integers(2**31)))
    e = torch.randn(TOKENS, DIMENSIONS, device="cuda", generator=generator).bfloat16().requires_grad_()
    c = (torch.randn(WORDS, DIMENSIONS, device="cuda", generator=generator) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(WORDS, (TOKENS,), device="cuda", generator=generator)
    compiled = torch.compile(full_logits)

    def step(loss):
        e.grad = c.grad = None
        loss(e, c, targets).backward()

    ours = partial(linear_cross_entropy, softcap=SOFTCAP, tile=(16, 16) if arm.control else None)
    variants = {"compiled": partial(step, compiled), "ours": partial(step, ours)}
    times = interleaved(variants, rounds=11, rng=rng)
    evidence.require("time over that of the compiled full logits", times.ratio("ours", "compiled"), below=1.2)
    peaks = {}
    for name, variant in variants.items():
        e.grad = c.grad = None  # or those of the step before would count as held at the start
        peaks[name] = peak_bytes_cuda(variant)
    evidence.require("memory over that of the compiled full logits", peaks["ours"] / peaks["compiled"], below=0.1)
    evidence.record("compiled over itself", times.aa)


def language_model(rng, n, trained=True):
    """Embeddings (n, 576), classifier and next words of n tokens in a row; an untrained classifier instead on demand."""
    problem = classifier_problem(2048)
    start = int(rng.integers(2048 - n + 1))
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    c = problem.classifier if trained else 0.02 * torch.randn(problem.classifier.shape, generator=generator)
    return problem.embeddings[start : start + n], c, problem.labels[start : start + n]


def gradients_of(e, c, targets, **settings):
    e, c = e.clone().requires_grad_(), c.clone().requires_grad_()
    loss = linear_cross_entropy(e, c, targets, **settings)
    loss.backward()
    return loss.item(), e.grad, c.grad


def relative_error(actual, true):
    return ((actual - true).norm() / true.norm()).item()


def random_problem(rng, n, v, d):
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    e, c = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) / d**0.5
    return (e.requires_grad_(), c.requires_grad_()), torch.randint(v, (n,), generator=generator)


@functools.cache
def bible_words():
    """A text of 4,096 different words, another one, and an unseen part of that: int64 (n,) each."""
    words = re.findall(r"[a-z]+|[^\sa-z]", king_james()[:1_000_000].lower())
    number = {word: place for place, (word, _) in enumerate(Counter(words).most_common(4095))}
    text = torch.tensor([number.get(word, 4095) for word in words])
    return text[:100_000], text[110_000:200_000], text[200_000:204_000]


def embed(model, text, places):
    """A two-layer perceptron over the two words before each place, normalised; (n, 32)."""
    before = torch.stack([text[places - 1], text[places - 2]], 1)
    return F.rms_norm(F.gelu(model[0][before].flatten(1) @ model[1]), (32,))


def train(seed, text, steps, start=None, **settings):
    """Word embeddings, hidden layer and classifier after `steps` of Adam, from scratch or from `start`."""
    generator = torch.Generator().manual_seed(seed)
    model = start or [torch.randn(n, 32, generator=generator) * scale for n, scale in ((4096, 0.5), (64, 0.125), (4096, 0.02))]
    model = [weight.clone().requires_grad_() for weight in model]
    rate = 0.02 if start is None else 0.01
    optimizer = torch.optim.Adam(model, lr=rate, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        places = torch.randint(2, len(text), (128,), generator=generator)
        loss = linear_cross_entropy(embed(model, text, places), model[2], text[places], **settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [weight.detach() for weight in model]


@functools.cache
def exactly_trained(seed):
    """The start of both arms' fine-tuning, and their baseline."""
    text, other, _ = bible_words()
    start = train(seed, text, 60)
    return start, train(seed, other, 30, start)


def evaluate(model, text):
    places = torch.arange(2, len(text))
    return linear_cross_entropy(embed(model, text, places), model[2], text[places]).item()
