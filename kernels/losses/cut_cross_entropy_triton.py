"""Linear layer and cross-entropy over tiles of the logits, in Triton.

Four kernels. The loss kernel keeps a tile of logits in registers and merges its log-sum-exp into a running one. In the
backward pass, the gradient kernel computes the logits again and writes softmax minus target for one chunk of words; two
products with it give the chunk's rows of the classifier's gradient, written once, and the next summand of the embeddings'.
Every sum has one owner: no locks, no atomics, the same bits in every run. A filtered block is skipped in both products.
Inputs are 16-bit or float32; products accumulate in float32.

The host functions take the function that starts a kernel as an argument, so that the memory they allocate can be counted
where there is no GPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paperclaims.kernels.backend import Launch
from paperclaims.kernels.backend import launch as start_kernel
from paperclaims.kernels.losses.cut_cross_entropy_torch import (
    Gradients,
    Options,
    epilogue,
    inverse,
    push,
    vocabulary_order,
)
from paperclaims.kernels.losses.tiles import scale_
from paperclaims.kernels.losses.tiles_triton import (
    add_log_sum_exp,
    check,
    chunk_words,
    dense,
    dot_tile,
    parts,
    product,
    tile_constants,
)


def forward(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, options: Options, launch: Launch = start_kernel
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, log-sum-exp and `epilogue`'s pull of every token, each (n,), float32; loss and pull of an ignored token are 0."""
    check(e, _tile(options), launch)
    (n, d), v = e.shape, len(c)
    targets, bias = dense(targets), dense(bias)
    blocks_n, number, words = parts(n, v, _tile(options))
    partial = e.new_empty((number, n), dtype=torch.float32)
    total = torch.empty_like(partial) if options.label_smoothing else None
    target_logit = e.new_zeros(n, dtype=torch.float32)
    launch(
        _loss_kernel,
        (blocks_n * number,),
        *(e, c, bias, targets, partial, target_logit, total, n, v, d, words, *e.stride(), *c.stride(), options.softcap),
        **_tile_constants(e, bias, options),
        SMOOTH=options.label_smoothing > 0,
    )
    lse = partial.logsumexp(0)
    loss, pull = epilogue(lse, target_logit, None if total is None else total.sum(0), v, options)
    ignored = targets == options.ignore_index
    return loss.masked_fill_(ignored, 0), lse, None if pull is None else pull.masked_fill_(ignored, 0)


def backward(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    pull: Tensor | None,
    weights: Tensor,
    scale: Tensor,
    needs: Sequence[bool],
    options: Options,
    launch: Launch = start_kernel,
    chunk: int | None = None,
) -> Gradients:
    """Gradients of `scale * (weights * loss).sum()`, every tile of logits computed again from `lse` and `pull` (n,).

    Args:
        weights: one a token, (n,), at most 1 in size, 0 where ignored.
        scale: scalar.
        needs: which of the gradients by e, c and bias to form.
        chunk: words whose gradients of logits are held at once; None: by `chunk_words`.
    """
    check(e, _tile(options), launch)
    (n, d), v = e.shape, len(c)
    targets, bias, lse, pull, weights = (dense(x) for x in (targets, bias, lse, pull, weights))
    factor = push(lse, pull, options) if options.z_loss or pull is not None else None
    chunk = min(chunk or chunk_words(n, v, d, e.element_size(), options.accumulate), v)
    filtered = options.filter_eps > 0
    g = e.new_empty(n, chunk)
    blocks_n, blocks_v = triton.cdiv(n, options.tile_tokens), triton.cdiv(chunk, options.tile_words)
    flags = e.new_empty((blocks_n, blocks_v), dtype=torch.int32) if filtered else None
    order = vocabulary_order(e, c, bias) if options.sort_vocabulary else None
    place = targets if order is None else inverse(order)[targets.clamp(0, v - 1)]
    scale = scale.to(torch.float32)

    de, lost = None, None
    if needs[0]:
        de = torch.zeros(e.shape, dtype=torch.float32 if options.accumulate == "fp32" else e.dtype, device=e.device)
        lost = torch.zeros_like(de) if options.accumulate == "compensated" else None
    dc = torch.empty(c.shape, dtype=c.dtype, device=c.device) if needs[1] else None
    dbias = torch.empty_like(bias) if needs[2] else None

    for start in range(0, v, chunk):
        width = min(chunk, v - start)
        rows = slice(start, start + width) if order is None else order[start : start + width]
        index = None if order is None else rows
        classifier = c[start:] if order is None else c
        launch(
            _gradient_kernel,
            (blocks_n * triton.cdiv(width, options.tile_words),),
            *(e, classifier, bias if bias is None or order is not None else bias[start:], place, lse, factor, pull),
            *(weights, g, flags, index),
            *(n, width, d, start, *e.stride(), *c.stride(), g.stride(0), blocks_v),
            *(options.softcap, options.label_smoothing, options.label_smoothing / v, options.filter_eps),
            **_tile_constants(e, bias, options),
            FILTER=filtered,
            INDEXED=order is not None,
            HAS_PUSH=factor is not None,
            HAS_PULL=pull is not None,
        )
        if needs[1]:
            out = dc[start:] if order is None else dc
            skip = flags.T if filtered and options.filter_c else None
            product(g.T[:width], e, out, None, skip, index, None, scale, _tile(options), launch)
        if needs[0]:
            skip = flags if filtered and options.filter_e else None
            product(g[:, :width], classifier, de, lost, skip, None, index, None, _tile(options), launch)
        if needs[2]:
            dbias[rows] = (g[:, :width].sum(0, dtype=torch.float32) * scale).to(dbias.dtype)
    return Gradients(scale_(de, scale).to(e.dtype) if needs[0] else None, dc, dbias)


def _tile_constants(e: Tensor, bias: Tensor | None, options: Options) -> dict:
    return {"HAS_BIAS": bias is not None, "HAS_CAP": options.softcap > 0, **tile_constants(e, _tile(options))}


def _tile(options: Options) -> tuple[int, int]:
    return options.tile_tokens, options.tile_words


@triton.jit
def _logits(
    E, C, Bias, n, v, in_n, in_v, D, e_n, e_d, c_v, c_d, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Capped logits of the rows n of E and v of C, float32."""
    tile = dot_tile(E, C, n, v, in_n, in_v, D, e_n, e_d, c_v, c_d, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION)
    if HAS_BIAS:
        tile += tl.load(Bias + v, mask=in_v, other=0.0).to(tl.float32)[None, :]
    if HAS_CAP:
        tile = softcap * (2 * tl.sigmoid(2 * tile / softcap) - 1)
    return tile


@triton.jit
def _loss_kernel(
    E, C, Bias, Targets, Partial, TargetLogit, Total, N, V, D, words, e_n, e_d, c_v, c_d, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of tokens over one part of the vocabulary, and its targets' logits."""
    blocks = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    target = tl.load(Targets + n, mask=in_n, other=-1)
    most = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    plain = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(part * words, tl.minimum((part + 1) * words, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        in_v = v < V
        tile = _logits(
            E, C, Bias, n, v, in_n, in_v, D, e_n, e_d, c_v, c_d, softcap, HAS_BIAS, HAS_CAP, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION
        )  # fmt: skip
        if SMOOTH:
            plain += tl.sum(tl.where(in_v[None, :], tile, 0.0), 1)
        tile = tl.where(in_v[None, :], tile, float("-inf"))
        most, total = add_log_sum_exp(tile, most, total)
        logit = tl.sum(tl.where(target[:, None] == v[None, :], tile, 0.0), 1)
        tl.store(TargetLogit + n, logit, mask=in_n & (target >= start) & (target < start + BLOCK_V))
    tl.store(Partial + part.to(tl.int64) * N + n, most + tl.log(total), mask=in_n)
    if SMOOTH:
        tl.store(Total + part.to(tl.int64) * N + n, plain, mask=in_n)


@triton.jit
def _gradient_kernel(
    E, C, Bias, Place, Lse, Push, Pull, Weights, G, Flags, Index, N, W, D, start, e_n, e_d, c_v, c_d, g_n, flags_n,
    softcap, smoothing, uniform, filter_eps,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, FILTER: tl.constexpr, INDEXED: tl.constexpr, HAS_PUSH: tl.constexpr, HAS_PULL: tl.constexpr,
):  # fmt: skip
    """Gradient of the weighted loss by a tile of uncapped logits, and whether the filter keeps the tile."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid_n, pid_v = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    j = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    in_n, in_v = n < N, j < W
    v = tl.load(Index + j, mask=in_v, other=0) if INDEXED else j
    tile = _logits(
        E, C, Bias, n, v, in_n, in_v, D, e_n, e_d, c_v, c_d, softcap, HAS_BIAS, HAS_CAP, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION
    )  # fmt: skip
    lse = tl.load(Lse + n, mask=in_n, other=float("inf"))
    place = tl.load(Place + n, mask=in_n, other=-1)
    weight = tl.load(Weights + n, mask=in_n, other=0.0)
    g = tl.exp(tile - lse[:, None])
    if HAS_PUSH:
        g *= tl.load(Push + n, mask=in_n, other=0.0)[:, None]
    g -= uniform
    own = tl.full((BLOCK_N,), 1 - smoothing, dtype=tl.float32)
    if HAS_PULL:
        own += tl.load(Pull + n, mask=in_n, other=0.0)
    g -= tl.where(place[:, None] == (start + j)[None, :], own[:, None], 0.0)
    inside = in_n[:, None] & in_v[None, :]
    if FILTER:
        most = tl.max(tl.max(tl.where(inside & (weight != 0)[:, None], tl.abs(g), 0.0), 1), 0)
        tl.store(Flags + pid_n * flags_n + pid_v, (most >= filter_eps).to(tl.int32))
    if HAS_CAP:
        slope = tile / softcap
        g *= 1 - slope * slope
    g *= weight[:, None]
    tl.store(G + n.to(tl.int64)[:, None] * g_n + j[None, :], g.to(G.dtype.element_ty), mask=inside)
