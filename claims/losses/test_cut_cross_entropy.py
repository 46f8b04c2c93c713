"""Cut Your Losses in Large-Vocabulary Language Models (Wijmans et al., 2024): the loss without the logits."""

import functools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.text import king_james
from paperclaims.fixtures.measurement import fake_mode, interleaved, peak_bytes_cpu, peak_bytes_cuda, peak_bytes_fake
from paperclaims.fixtures.models import smollm2
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
        _, lse, pull = body.forward(e, c, targets, None, options, launch=no_launch)
        weights, scale = torch.ones(len(e)), torch.ones(())
        chunk = WORDS if arm.control else None
        return body.backward(
            e, c, targets, None, lse, pull, weights, scale, (True, True, False), options, launch=no_launch, chunk=chunk
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
    differs="512 tokens, 16,384 words, 64 dimensions, float32",
    control="the tile of logits is all tokens by all words",
    control_breaks=("memory, computed again", "memory, formed in the forward pass"),
    paper_value="28 GB to 1 GB (abstract)",
)
def test_memory_on_a_cpu(arm, rng, evidence):
    (e, c), targets = random_problem(rng, 512, 16_384, 64)

    def peak(loss):
        e.grad = c.grad = None
        return peak_bytes_cpu(lambda: loss(e, c, targets).backward())

    ours = partial(linear_cross_entropy, tile=(512, 16_384) if arm.control else None)
    full = peak(uncapped_logits)
    evidence.require("memory, computed again", peak(partial(ours, gradients="backward")) / full, below=1 / 8)
    evidence.require("memory, formed in the forward pass", peak(partial(ours, gradients="forward")) / full, below=1 / 8)
    evidence.record("memory from full logits", full / MIB, "MiB")


@claim(
    "Without its filter the block algorithm is exact: loss and gradients differ from those of the full logits by no more than "
    "rounding can explain.",
    scale="reduced",
    differs="64 tokens of the King James Bible through SmolLM2-135M (49,152 words), on a CPU",
    control="blocks of the gradient are left out where |softmax - target| < 0.5 all over them",
    control_breaks="error of the gradients over the rounding bound",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exactness(arm, dtype, rng, evidence):
    number = int(rng.integers(2**31))
    states, classifier, words = language_model(number)
    e, c, targets = states[:2].flatten(0, 1).to(dtype), classifier.to(dtype), words[:2].flatten()
    loss, *gradients = gradients_of(e, c, targets, filter_eps=0.5 if arm.control else None, tile=(32, 256), gradients="backward")
    (true_loss, *true), (loss_bound, *bounds) = full_and_rounding(number)
    rounding = (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps) / 2  # ours, and that of the full logits in float64
    evidence.require("error of the loss over the rounding bound", abs(loss - true_loss) / (rounding * loss_bound), below=1)
    errors = [(ours - exact).norm().item() for ours, exact in zip(gradients, true, strict=True)]
    over = max(error / (rounding * bound) for error, bound in zip(errors, bounds, strict=True))
    evidence.require("error of the gradients over the rounding bound", over, below=1)
    evidence.record("relative error of the loss", abs(loss - true_loss) / true_loss)
    for name, error, exact in zip(("dE", "dC"), errors, true, strict=True):
        evidence.record(f"relative error of {name}", error / exact.norm().item())


@claim(
    "A trained model's softmax is sparse: fewer than 200 words a token reach 2^-12, and they hold over nine tenths of the "
    "probability.",
    scale="reduced",
    differs="SmolLM2-135M (49,152 words) over 16 passages of 32 tokens of the King James Bible, not Gemma 2 (2B) over Alpaca",
    control="an untrained classifier, normal with standard deviation 0.02",
    control_breaks="probability in them",
    paper_value="under 0.02 % of 256,000 words, about 50 (section 4.3)",
)
def test_softmax_is_sparse(arm, rng, evidence):
    count, held = [], []
    number = int(rng.integers(2**31))
    states, c, _ = language_model(number)
    c = untrained_classifier(number) if arm.control else c
    for e in states:
        softmax = (e @ c.T).softmax(1)
        count.append(entries_above(e, c).double().mean().item())
        held.append(torch.where(softmax >= EPS, softmax, 0).sum(1).mean().item())
    evidence.require("words a token with a softmax of at least 2^-12", mean_interval(count), below=200)
    evidence.require("probability in them", mean_interval(held), above=0.9)


@claim(
    "What gradient filtering leaves out is at most a hundredth of the gradient that is not the labels'.",
    scale="reduced",
    differs="SmolLM2-135M over 128 tokens of the King James Bible, bfloat16 values in float32 arithmetic, blocks of 128 x 256",
    control="an untrained classifier, whose probabilities nearly all are below the filter's threshold and yet make this part",
    control_breaks=("error of dE over its part not from the labels", "error of dC over its part not from the labels"),
)
def test_filtered_gradient(arm, rng, evidence):
    number = int(rng.integers(2**31))
    states, classifier, words = language_model(number)
    classifier = untrained_classifier(number) if arm.control else classifier
    e, c, targets = states[:4].flatten(0, 1).bfloat16().float(), classifier.bfloat16().float(), words[:4].flatten()
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
    differs="SmolLM2-135M over 16 passages of 32 tokens of the King James Bible, blocks of 32 x 256",
    control="a random order of the vocabulary",
)
def test_vocabulary_sorting(arm, rng, evidence):
    states, c, words = language_model(int(rng.integers(2**31)))
    e, generator = states.flatten(0, 1), torch.Generator().manual_seed(int(rng.integers(2**31)))
    order = torch.randperm(len(c), generator=generator) if arm.control else vocabulary_order(e, c, None)
    kept = kept_blocks(e, c, words.flatten(), tile=(32, 256), order=order)
    share = median_interval(100 * kept.double().mean(1), resolution=1e-9)
    evidence.require("blocks kept, median passage", share, below=95, unit="%")
    larger = kept.unflatten(0, (4, 4)).any(1)
    evidence.record("blocks of 128 x 256 kept", 100 * larger.double().mean().item(), "%")


@claim(
    "Fine-tuning with filtered gradients reaches the training loss of fine-tuning with exact ones.",
    scale="reduced",
    differs="SmolLM2-135M's classifier for its first 4,096 words and a linear map before it, eight times three steps of Adam on "
    "some 50 tokens of the King James Bible, blocks of 16 words; not whole models with billions of parameters over Alpaca",
    control="the filter's threshold is 1/2, far above the precision, not 2^-12",
    control_breaks="loss beyond the exact one's",
    paper_value="nearly indistinguishable curves (figure of the fine-tuning runs)",
)
def test_convergence(arm, rng, evidence):
    eps, beyond, skipped = 0.5 if arm.control else EPS, [], []
    c, runs = exactly_tuned(int(rng.integers(2**31)))
    for e, targets, exact in runs:
        filtered = fine_tuned(e, c, targets, partial(linear_cross_entropy, filter_eps=eps, sort_vocabulary=True, tile=(64, 16)))
        beyond.append(filtered - exact)
        kept = kept_blocks(e, c, targets, eps, tile=(64, 16), order=vocabulary_order(e, c, None))
        skipped.append(100 * (1 - kept.double().mean().item()))
    evidence.require("loss beyond the exact one's", mean_interval(beyond), below=0.005, unit="nats")
    evidence.require("blocks skipped at the start", mean_interval(skipped), above=1, unit="%")


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


@functools.cache
def language_model(number):
    """What SmolLM2 makes of 16 passages of the King James Bible, each token with 64 or more before it.

    Embeddings (16, 32, 576), classifier (49152, 576) and the words that follow, (16, 32).
    """
    model, tokenizer = smollm2.load()
    text = king_james()
    starts = np.random.default_rng(number).integers(len(text) - 1000, size=16)
    passages = [text[start : start + 1000].split(" ", 1)[1] for start in starts]
    tokens = torch.tensor([tokenizer(passage).input_ids[:97] for passage in passages])
    states = model.model(tokens[:, :-1]).last_hidden_state
    return states[:, 64:].contiguous(), model.get_input_embeddings().weight, tokens[:, 65:]


@functools.cache
def untrained_classifier(number):
    return 0.02 * torch.randn(49_152, 576, generator=torch.Generator().manual_seed(number))


def gradients_of(e, c, targets, **settings):
    e, c = e.clone().requires_grad_(), c.clone().requires_grad_()
    loss = linear_cross_entropy(e, c, targets, **settings)
    loss.backward()
    return loss.item(), e.grad, c.grad


@functools.cache
def full_and_rounding(number):
    """Loss and gradients of two passages from the full logits in float64, and the most that rounding can add to each.

    The bounds are sizes (norms, for the gradients) for a unit roundoff u of 1, to first order in u: a sum of m products is off
    by at most m u times the sum of their sizes, whatever its order. Of n tokens and v words in d dimensions: a logit sums d
    terms; the log-sum-exp is off by the softmax's average of the logits' errors and by v u for its sum of v exponentials, in
    which the merging of tiles, (|lse| + 4) u for each, and the exponents' own rounding disappear (192 tiles, |lse| < 100);
    an entry of the softmax is off by what its logit and its log-sum-exp are, relative to itself; a gradient sums v terms at most.
    """
    states, classifier, words = language_model(number)
    e, c, targets = states[:2].flatten(0, 1).double(), classifier.double(), words[:2].flatten()
    n, (v, d) = len(e), c.shape
    logits, sizes = e @ c.T, d * (e.abs() @ c.abs().T)
    softmax, loss = logits.softmax(1), F.cross_entropy(logits, targets)
    g = (softmax - F.one_hot(targets, v)) / n
    lse_off = (softmax * sizes).sum(1) + v
    loss_off = (lse_off + sizes.gather(1, targets[:, None])[:, 0]).mean() + n * loss
    g_off = softmax * (sizes + lse_off[:, None]) / n + v * g.abs()
    bounds = loss_off.item(), (g_off @ c.abs()).norm().item(), (g_off.T @ e.abs()).norm().item()
    return (loss.item(), g @ c, g.T @ e), bounds


@functools.cache
def exactly_tuned(number):
    """What both arms of the fine-tuning share: the classifier and, a run, tokens, targets and loss with exact gradients."""
    states, classifier, words = language_model(number)
    e, c, targets = states.flatten(0, 1), classifier[:4096], words.flatten()
    among = (targets < len(c)).nonzero()[:, 0]
    order = among[torch.randperm(len(among), generator=torch.Generator().manual_seed(number))]
    runs = [(e[tokens], targets[tokens]) for tokens in order.tensor_split(8)]
    return c, [(x, t, fine_tuned(x, c, t, uncapped_logits)) for x, t in runs]


def fine_tuned(e, c, targets, loss):
    """Loss on the tokens it was trained on after three steps of Adam on the classifier c and a linear map before it."""
    change, c = torch.zeros(e.shape[1], e.shape[1], requires_grad=True), c.clone().requires_grad_()
    optimizer = torch.optim.Adam([change, c], lr=1e-4, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        loss(e + e @ change, c, targets).backward()
        optimizer.step()
    with torch.no_grad():
        return uncapped_logits(e + e @ change, c, targets).item()


def uncapped_logits(e, c, targets):
    return F.cross_entropy(e @ c.T, targets)


def random_problem(rng, n, v, d):
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    e, c = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) / d**0.5
    return (e.requires_grad_(), c.requires_grad_()), torch.randint(v, (n,), generator=generator)
