"""What Triton operators over tiles of scores share: a tile of products in registers, and products with stored tiles.

Inputs are 16-bit or float32; products accumulate in float32. Host functions take the function that starts a kernel as an
argument, so that the memory they allocate can be counted where there is no GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from paperclaims.kernels.backend import Launch
from paperclaims.kernels.backend import launch as start_kernel

PROGRAMS = 512  # of a kernel that walks over the columns, about four for each multiprocessor of a large GPU


def check(x: Tensor, tile: tuple[int, int], launch: Launch) -> None:
    """ValueError for a dtype or a tile that the Triton body does not take."""
    if x.dtype == torch.float64:
        raise ValueError("backend='triton' takes 16-bit and float32 inputs, got float64: use backend='torch'")
    if x.dtype == torch.bfloat16 and launch is start_kernel and not x.is_cuda:
        raise ValueError("the interpreter has no bfloat16 products: use float32 or float16, or backend='torch'")
    for size in tile:
        if size < 16 or size & (size - 1):
            raise ValueError(f"tiles of the Triton body are powers of two from 16 on, got {size}")


def parts(n: int, v: int, tile: tuple[int, int]) -> tuple[int, int, int]:
    """Blocks of rows, parts into which the columns go so that all programs have work, and columns of a part."""
    blocks_n, blocks_v = triton.cdiv(n, tile[0]), triton.cdiv(v, tile[1])
    number = max(1, min(blocks_v, PROGRAMS // max(blocks_n, 1)))
    columns = max(triton.cdiv(blocks_v, number), 1) * tile[1]
    return blocks_n, triton.cdiv(v, columns), columns


def chunk_words(n: int, v: int, d: int, itemsize: int, accumulate: str) -> int:
    """Words whose gradients of logits are held at once, for n tokens, v words and d dimensions of `itemsize` bytes.

    With what the running sum of the embeddings' gradient needs beyond its result, they take at most 4.5% of the gradients'
    own bytes, 9.5% where the sum is float32 and the inputs are not, but at least 1024 words.
    """
    wide = accumulate == "fp32" and itemsize < 4
    running = n * d * (4 if wide else itemsize if accumulate == "compensated" else 0)
    room = (n + v) * d * itemsize * (0.095 if wide else 0.045) - running
    return max(1024, int(room / max(n * itemsize, 1)) // 128 * 128)


def product(a, b, out, lost, flags, row_index, inner_index, scale, tile: tuple[int, int], launch: Launch) -> None:
    """out[row_index] = scale * a @ b[inner_index]; without a scale, out += a @ b[inner_index].

    `flags` (blocks of rows, blocks of the inner dimension): blocks of `a` that are 0 there are skipped; None: none is.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    half, add = a.element_size() < 4, scale is None
    tile_rows, tile_inner = tile[:: 1 if add else -1]
    block_columns = block(columns, 128 if half else 64)
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
        **machine(a),
    )


def dense(vector: Tensor | None) -> Tensor | None:
    """A vector as the kernels read it: its entries side by side."""
    return None if vector is None else vector.contiguous()


def tile_constants(x: Tensor, tile: tuple[int, int]) -> dict:
    """Blocks of `dot_tile` for the rows of `x`."""
    inner = block(x.shape[1], 64 if x.element_size() < 4 else 32)
    return {"BLOCK_N": tile[0], "BLOCK_V": tile[1], "BLOCK_D": inner, **machine(x)}


def machine(tensor: Tensor) -> dict:
    """Precision of products of a tensor's dtype, and warps and stages."""
    half = tensor.element_size() < 4
    exact = half or not torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "ieee" if exact else "tf32", "num_warps": 8 if half else 4, "num_stages": 3 if half else 2}


def block(length: int, most: int) -> int:
    """Power of two that holds `length`, from 16 to `most`."""
    return min(max(triton.next_power_of_2(length), 16), most)


@triton.jit
def dot_tile(
    E, C, n, v, in_n, in_v, D, e_n, e_d, c_v, c_d,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the rows n of E and v of C, float32."""
    d = tl.arange(0, BLOCK_D)
    e_rows = E + n.to(tl.int64)[:, None] * e_n
    c_rows = C + v.to(tl.int64)[None, :] * c_v
    tile = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + d < D
        place = (start + d).to(tl.int64)
        x = tl.load(e_rows + place[None, :] * e_d, mask=in_n[:, None] & inside[None, :], other=0.0)
        w = tl.load(c_rows + place[:, None] * c_d, mask=inside[:, None] & in_v[None, :], other=0.0)
        tile = tl.dot(x, w, tile, input_precision=PRECISION)
    return tile


@triton.jit
def add_log_sum_exp(tile, most, total):
    """Takes a tile of scores into the running largest score and sum of exp(score - largest) of its rows."""
    new = tl.maximum(most, tl.max(tile, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(most - shift) + tl.sum(tl.exp(tile - shift[:, None]), 1)


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
    b = tl.load(
        B + rows.to(tl.int64)[:, None] * b_k + d.to(tl.int64)[None, :] * b_d, mask=in_k[:, None] & in_d[None, :], other=0.0
    )
    return tl.dot(a, b, total, input_precision=PRECISION)
