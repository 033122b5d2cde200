"""Shared by the kernels over rows: tiles of rows, labels, and an order of the classes.

A program has ROWS rows and goes over them in tiles [ROWS, BLOCK], once for each pass. Where one
tile holds the rows the compiler drops the loops, and all loads but one up to the first store.
"""

import torch
import triton
import triton.language as tl

# Provisional: chosen from the compiled code (128-bit accesses, no spills), not yet timed on a GPU.
WIDEST_TILE = 4096  # classes; wider rows are looped over
TILE = 512  # elements of a tile of several narrow rows
PER_WARP = 256  # elements of a tile per warp: 8 a thread
LOOP = {"ROWS": 1, "BLOCK": 2048, "num_warps": 8}

LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # 10 bits: its product with an integer below 2^14 is exact
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite fp32
ALL = tl.constexpr(tl.PropagateNan.ALL)
LEAST = tl.constexpr(-(2**63))  # below every rank
_LARGEST = tl.constexpr(0x7FFFFFFF)


def tiling(classes):
    """ROWS, BLOCK and num_warps for rows of so many classes."""
    block = triton.next_power_of_2(classes)
    if block > WIDEST_TILE:
        return LOOP
    tile = max(block, TILE)
    return {"ROWS": tile // block, "BLOCK": block, "num_warps": max(4, tile // PER_WARP)}


def launch(kernel, logits, grad, *args):
    """(loss fp32 [B], gradient like logits, or [0]) of logits [B, C], fp32, bf16 or fp16, by
    kernel(loss, gradient or None, logits, *args, B, C, ROWS, BLOCK)."""
    batch, classes = logits.shape
    loss = torch.empty(batch, dtype=torch.float32, device=logits.device)
    shape = logits.shape if grad else 0
    gradient = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    config = tiling(classes)
    with torch.cuda.device_of(logits):
        kernel[(triton.cdiv(batch, config["ROWS"]),)](
            loss,
            gradient if grad else None,
            logits.contiguous(),
            *args,
            batch,
            classes,
            **config,
            enable_fp_fusion=False,
        )
    return loss, gradient


@triton.jit
def clamp(v, low, high):
    """min(max(v, low), high), NaN where any of them is."""
    return tl.minimum(tl.maximum(v, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def rows_of(ROWS: tl.constexpr):
    """The program's rows, int64 [ROWS]."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def tile(row, first, batch, C: tl.constexpr, BLOCK: tl.constexpr):
    """(columns [1, BLOCK] from `first` on, the offsets [ROWS, BLOCK] of these elements of the rows,
    which of them exist)."""
    column = first + tl.arange(0, BLOCK)[None, :]
    return column, row[:, None] * C + column, (row[:, None] < batch) & (column < C)


@triton.jit
def read(logits, at, inside):
    """One tile of logits as fp32, -inf past the end of the rows."""
    return tl.load(logits + at, inside, -float("inf")).to(tl.float32)


@triton.jit
def top_of(logits, row, batch, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of each row, fp32 [ROWS]."""
    top = tl.full([ROWS, BLOCK], -float("inf"), tl.float32)
    for first in tl.range(0, C, BLOCK):
        _, at, inside = tile(row, first, batch, C, BLOCK)
        top = tl.maximum(top, read(logits, at, inside))
    return tl.max(top, 1)


@triton.jit
def online(z, top, total, per_t):
    """The rows' running (max, sum of exp((z - max) / T)) with one more tile; per_t: log2(e) / T. It
    starts at LOWEST, not at -inf: a first tile may hold masked classes alone."""
    higher = tl.maximum(top, tl.max(z, 1))
    total *= tl.exp2((top - higher) * per_t)
    return higher, total + tl.sum(tl.exp2((z - higher[:, None]) * per_t), 1)


@triton.jit
def reciprocal(v):
    """1 / v to the last bit: the approximate division and a Newton step."""
    r = 1.0 / v
    return tl.fma(r, tl.fma(-v, r, 1.0), r)


@triton.jit
def exp(v):
    """e^v for v <= 0, at v = -90 as accurate as near 0: whole powers of 2 are taken off exactly."""
    v = tl.maximum(v, -120.0, propagate_nan=ALL)  # e^-120 is 0, and -inf would leave a NaN
    k = tl.floor(v * LOG2_E + 0.5)
    rest = v - k * LN2_HIGH - k * LN2_LOW
    return tl.exp2(k) * tl.exp2(rest * LOG2_E)


@triton.jit
def product(q, gap):
    """q gap, 0 where q is 0 (the gap is then infinite or NaN for a masked class)."""
    return tl.where(q == 0, 0.0, q * gap)


@triton.jit
def labels_of(y, logits, row, batch, C: tl.constexpr):
    """(labels int32 [ROWS], -1 for one outside [0, C); their logits fp32, then -inf)."""
    label = tl.load(y + row, row < batch, -1)
    valid = (label >= 0) & (label < C)
    own = tl.load(logits + row * C + label, valid, -float("inf")).to(tl.float32)
    return tl.where(valid, label, -1).to(tl.int32), own


@triton.jit
def rank(z, column):
    """int64 in the order of the classes: by logit, of equals the first column above; NaN on top."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # -0 as 0
    order = tl.where(z != z, _LARGEST, bits ^ ((bits >> 31) & _LARGEST))
    return (order.to(tl.int64) << 32) | (column ^ _LARGEST).to(tl.int64)


@triton.jit
def ranked(rank):
    """(logit fp32, column int32) of a rank."""
    order = (rank >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & _LARGEST)
    return bits.to(tl.float32, bitcast=True), rank.to(tl.int32) ^ _LARGEST


@triton.jit
def strongest_other(
    logits, label, row, batch, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """(logit fp32, column int32) [ROWS] of the largest logit of each row but its label's."""
    best = tl.full([ROWS, BLOCK], LEAST, tl.int64)
    for first in tl.range(0, C, BLOCK):
        column, at, inside = tile(row, first, batch, C, BLOCK)
        others = tl.where(column == label[:, None], -float("inf"), read(logits, at, inside))
        best = tl.maximum(best, rank(others, column))
    return ranked(tl.max(best, 1))
