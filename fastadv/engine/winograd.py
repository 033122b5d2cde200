"""Which layers Winograd's algorithm computes: 3 x 3 convolutions of stride 1, with a quarter of the
products (Lavin & Gray 2016, "Fast algorithms for convolutional neural networks"), in float32. Those
of a twin in bfloat16 too where its products would cost half as much, as by AVX512-BF16; by AMX they
cost a sixteenth.

csrc/cpu/winograd.inl has the algorithm, F(4 x 4, 3 x 3). FASTADV_WINOGRAD = 0 turns it off.
"""

import os

import torch

from ..ops import _native

ON = os.environ.get("FASTADV_WINOGRAD", "1")
if ON not in ("0", "1"):
    raise ValueError(f"FASTADV_WINOGRAD is {ON!r}, must be one of 0 (off) and 1 (on)")

SIDE = 4  # of a tile of outputs
PRODUCTS = 36  # for a tile
# How many times as many products by the sum over taps, above which the transforms are paid for.
PAYS = {torch.float32: 1.5, torch.bfloat16: 3.0}


def takes_bfloat16():
    """Whether that holds for twins in bfloat16, on this CPU."""
    return _native.isa() == "avx512_bf16"


def takes(layer, dtype):
    """Whether a layer of a trunk in this dtype is a convolution that can be computed so."""
    if ON == "0" or layer.conv is None or layer.depthwise or layer.source is None:
        return False
    if dtype == torch.bfloat16 and not takes_bfloat16():
        return False
    return layer.geometry[:3] == ((3, 3), (1, 1), (1, 1))


def pays(layer, dtype, pairs, output):
    """Whether that is faster for an output of this (height, width), for which the sum over taps
    would take so many products of blocks. On small outputs tiles are mostly border."""
    tiles = -(-output[0] // SIDE) * -(-output[1] // SIDE)
    return takes(layer, dtype) and pairs >= PAYS[dtype] * PRODUCTS * tiles
