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
from paperclaims.kernels.losses.cut_cross_entropy_torch import Gradients, Options, inverse, scale_, vocabulary_order

PROGRAMS = 512  # of the loss kernel, about four for each multiprocessor of a large GPU


def forward(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, options: Options, launch: Launch = start_kernel
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every token, each (n,), float32; an ignored token's loss is 0."""
    _check(e, options, launch)
    (n, d), v = e.shape, len(c)
    targets, bias = _dense(targets), _dense(bias)
    blocks_n, blocks_v = triton.cdiv(n, options.tile_tokens), triton.cdiv(v, options.tile_words)
    parts = max(1, min(blocks_v, PROGRAMS // max(blocks_n, 1)))
    words = triton.cdiv(blocks_v, parts) * options.tile_words
    parts = triton.cdiv(v, words)
    partial = e.new_empty((parts, n), dtype=torch.float32)
    total = torch.empty_like(partial) if options.label_smoothing else None
    target_logit = e.new_zeros(n, dtype=torch.float32)
    launch(
        _loss_kernel,
        (blocks_n * parts,),
        *(e, c, bias, targets, partial, target_logit, total, n, v, d, words, *e.stride(), *c.stride(), options.softcap),
        **_tile_constants(e, bias, options),
        SMOOTH=options.label_smoothing > 0,
    )
    lse = partial.logsumexp(0)
    loss = lse - (1 - options.label_smoothing) * target_logit
    if total is not None:
        loss -= options.label_smoothing / v * total.sum(0)
    return loss.masked_fill_(targets == options.ignore_index, 0), lse


def backward(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    weights: Tensor,
    scale: Tensor,
    needs: Sequence[bool],
    options: Options,
    launch: Launch = start_kernel,
    chunk: int | None = None,
) -> Gradients:
    """Gradients of `scale * (weights * loss).sum()`, every tile of logits computed again from `lse` (n,).

    Args:
        weights: one a token, (n,), at most 1 in size, 0 where ignored.
        scale: scalar.
        needs: which of the gradients by e, c and bias to form.
        chunk: words whose gradients of logits are held at once; None: by `chunk_words`.
    """
    _check(e, options, launch)
    (n, d), v = e.shape, len(c)
    targets, bias, lse, weights = (_dense(x) for x in (targets, bias, lse, weights))
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
            *(e, classifier, bias if bias is None or order is not None else bias[start:], place, lse, weights, g, flags, index),
            *(n, width, d, start, *e.stride(), *c.stride(), g.stride(0), blocks_v),
            *(options.softcap, options.label_smoothing, options.label_smoothing / v, options.filter_eps),
            **_tile_constants(e, bias, options),
            FILTER=filtered,
            INDEXED=order is not None,
        )
        if needs[1]:
            out = dc[start:] if order is None else dc
            skip = flags.T if filtered and options.filter_c else None
            _product(g.T[:width], e, out, None, skip, index, None, scale, options, launch)
        if needs[0]:
            skip = flags if filtered and options.filter_e else None
            _product(g[:, :width], classifier, de, lost, skip, None, index, None, options, launch)
        if needs[2]:
            dbias[rows] = (g[:, :width].sum(0, dtype=torch.float32) * scale).to(dbias.dtype)
    return Gradients(scale_(de, scale).to(e.dtype) if needs[0] else None, dc, dbias)


def chunk_words(n: int, v: int, d: int, itemsize: int, accumulate: str) -> int:
    """Words whose gradients of logits are held at once, for n tokens, v words and d dimensions of `itemsize` bytes.

    With what the running sum of the embeddings' gradient needs beyond its result, they take at most 4.5% of the gradients'
    own bytes, 9.5% where the sum is float32 and the inputs are not, but at least 1024 words.
    """
    wide = accumulate == "fp32" and itemsize < 4
    running = n * d * (4 if wide else itemsize if accumulate == "compensated" else 0)
    room = (n + v) * d * itemsize * (0.095 if wide else 0.045) - running
    return max(1024, int(room / max(n * itemsize, 1)) // 128 * 128)


def _product(a, b, out, lost, flags, row_index, inner_index, scale, options: Options, launch: Launch) -> None:
    """out[row_index] = scale * a @ b[inner_index]; without a scale, out += a @ b[inner_index].

    `flags` (blocks of rows, blocks of the inner dimension): blocks of `a` that are 0 there are skipped; None: none is.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    half, add = a.element_size() < 4, scale is None
    tile_rows, tile_inner = (options.tile_tokens, options.tile_words)[:: 1 if add else -1]
    block_columns = _block(columns, 128 if half else 64)
    launch(
        _product_kernel,
        (triton.cdiv(rows, tile_rows) * triton.cdiv(columns, block_columns),),
        *(a, b, out, lost, flags, row_index, inner_index, scale, rows, inner, columns),
        *(*a.stride(), *b.stride(), *out.stride(), *((0, 0) if flags is None else flags.stride())),
        ADD=add,
        COMPENSATED=lost is not None,
        FILTER=flags is not None,
        ROW_INDEXED=row_index is not None,
        INNER_INDEXED=inner_index is not None,
        TILE_INNER=tile_inner,
        BLOCK_R=tile_rows,
        BLOCK_K=min(tile_inner, 64 if half else 32),
        BLOCK_C=block_columns,
        **_machine(a),
    )


def _check(e: Tensor, options: Options, launch: Launch) -> None:
    if e.dtype == torch.float64:
        raise ValueError("backend='triton' takes 16-bit and float32 inputs, got float64: use backend='torch'")
    if e.dtype == torch.bfloat16 and launch is start_kernel and not e.is_cuda:
        raise ValueError("the interpreter has no bfloat16 products: use float32 or float16, or backend='torch'")
    for size in (options.tile_tokens, options.tile_words):
        if size < 16 or size & (size - 1):
            raise ValueError(f"tiles of the Triton body are powers of two from 16 on, got {size}")


def _dense(vector: Tensor | None) -> Tensor | None:
    """A vector as the kernels read it: its entries side by side."""
    return None if vector is None else vector.contiguous()


def _tile_constants(e: Tensor, bias: Tensor | None, options: Options) -> dict:
    return {
        "HAS_BIAS": bias is not None,
        "HAS_CAP": options.softcap > 0,
        "BLOCK_N": options.tile_tokens,
        "BLOCK_V": options.tile_words,
        "BLOCK_D": _block(e.shape[1], 64 if e.element_size() < 4 else 32),
        **_machine(e),
    }


def _machine(tensor: Tensor) -> dict:
    half = tensor.element_size() < 4
    exact = half or not torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "ieee" if exact else "tf32", "num_warps": 8 if half else 4, "num_stages": 3 if half else 2}


def _block(length: int, most: int) -> int:
    return min(max(triton.next_power_of_2(length), 16), most)


@triton.jit
def _logits(
    E, C, Bias, n, v, in_n, in_v, D, e_n, e_d, c_v, c_d, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Capped logits of the rows n of E and v of C, float32."""
    d = tl.arange(0, BLOCK_D)
    e_rows = E + n.to(tl.int64)[:, None] * e_n
    c_rows = C + v.to(tl.int64)[None, :] * c_v
    tile = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + d < D
        x = tl.load(e_rows + (start + d)[None, :] * e_d, mask=in_n[:, None] & inside[None, :], other=0.0)
        w = tl.load(c_rows + (start + d)[:, None] * c_d, mask=inside[:, None] & in_v[None, :], other=0.0)
        tile = tl.dot(x, w, tile, input_precision=PRECISION)
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
        new = tl.maximum(most, tl.max(tile, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(tile - shift[:, None]), 1)
        most = new
        logit = tl.sum(tl.where(target[:, None] == v[None, :], tile, 0.0), 1)
        tl.store(TargetLogit + n, logit, mask=in_n & (target >= start) & (target < start + BLOCK_V))
    tl.store(Partial + part.to(tl.int64) * N + n, most + tl.log(total), mask=in_n)
    if SMOOTH:
        tl.store(Total + part.to(tl.int64) * N + n, plain, mask=in_n)


@triton.jit
def _gradient_kernel(
    E, C, Bias, Place, Lse, Weights, G, Flags, Index, N, W, D, start, e_n, e_d, c_v, c_d, g_n, flags_n,
    softcap, smoothing, uniform, filter_eps,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, FILTER: tl.constexpr, INDEXED: tl.constexpr,
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
    g = tl.exp(tile - lse[:, None]) - uniform
    g -= tl.where(place[:, None] == (start + j)[None, :], 1 - smoothing, 0.0)
    inside = in_n[:, None] & in_v[None, :]
    if FILTER:
        most = tl.max(tl.max(tl.where(inside & (weight != 0)[:, None], tl.abs(g), 0.0), 1), 0)
        tl.store(Flags + pid_n * flags_n + pid_v, (most >= filter_eps).to(tl.int32))
    if HAS_CAP:
        slope = tile / softcap
        g *= 1 - slope * slope
    g *= weight[:, None]
    tl.store(G + n.to(tl.int64)[:, None] * g_n + j[None, :], g.to(G.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
    A, B, Out, Lost, Flags, RowIndex, InnerIndex, Scale, R, K, D, a_r, a_k, b_k, b_d, o_r, o_d, f_r, f_k,
    ADD: tl.constexpr, COMPENSATED: tl.constexpr, FILTER: tl.constexpr, ROW_INDEXED: tl.constexpr,
    INNER_INDEXED: tl.constexpr, TILE_INNER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of a product over all of its inner dimension, added to the output or scaled and written."""
    blocks = tl.cdiv(R, BLOCK_R)
    pid_r, pid_d = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    d = pid_d * BLOCK_C + tl.arange(0, BLOCK_C)
    in_r, in_d = r < R, d < D
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if FILTER:
            if tl.load(Flags + pid_r * f_r + (start // TILE_INNER) * f_k) != 0:
                total = _product_step(
                    A, B, InnerIndex, total, r, d, start, in_r, in_d, K, a_r, a_k, b_k, b_d, INNER_INDEXED, BLOCK_K, PRECISION
                )  # fmt: skip
        else:
            total = _product_step(
                A, B, InnerIndex, total, r, d, start, in_r, in_d, K, a_r, a_k, b_k, b_d, INNER_INDEXED, BLOCK_K, PRECISION
            )  # fmt: skip
    rows = tl.load(RowIndex + r, mask=in_r, other=0) if ROW_INDEXED else r
    place = rows.to(tl.int64)[:, None] * o_r + d[None, :] * o_d
    inside = in_r[:, None] & in_d[None, :]
    if ADD:
        before = tl.load(Out + place, mask=inside, other=0.0).to(tl.float32)
        if COMPENSATED:
            total -= tl.load(Lost + place, mask=inside, other=0.0).to(tl.float32)
        after = (before + total).to(Out.dtype.element_ty)
        if COMPENSATED:
            tl.store(Lost + place, ((after.to(tl.float32) - before) - total).to(Lost.dtype.element_ty), mask=inside)
    else:
        after = (total * tl.load(Scale)).to(Out.dtype.element_ty)
    tl.store(Out + place, after, mask=inside)


@triton.jit
def _product_step(
    A, B, InnerIndex, total, r, d, start, in_r, in_d, K, a_r, a_k, b_k, b_d,
    INNER_INDEXED: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = start + tl.arange(0, BLOCK_K)
    in_k = k < K
    rows = tl.load(InnerIndex + k, mask=in_k, other=0) if INNER_INDEXED else k
    a = tl.load(A + r.to(tl.int64)[:, None] * a_r + k.to(tl.int64)[None, :] * a_k, mask=in_r[:, None] & in_k[None, :], other=0.0)
    b = tl.load(B + rows.to(tl.int64)[:, None] * b_k + d[None, :] * b_d, mask=in_k[:, None] & in_d[None, :], other=0.0)
    return tl.dot(a, b, total, input_precision=PRECISION)
