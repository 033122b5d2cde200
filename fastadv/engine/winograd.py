"""Which layers Winograd's algorithm computes: 3 x 3 convolutions of stride 1 in float32, with a
quarter of the products (Lavin & Gray 2016, "Fast algorithms for convolutional neural networks").

csrc/cpu/winograd.inl has the algorithm, F(4 x 4, 3 x 3). FASTADV_WINOGRAD = 0 turns it off.
"""

import os

ON = os.environ.get("FASTADV_WINOGRAD", "1")
if ON not in ("0", "1"):
    raise ValueError(f"FASTADV_WINOGRAD is {ON!r}, must be one of 0 (off) and 1 (on)")

SIDE = 4  # of a tile of outputs
PRODUCTS = 36  # for a tile
PAYS = 1.5  # times as many products by the sum over taps, above which the transforms are paid for


def takes(layer):
    """Whether a layer is a convolution that can be computed so."""
    if ON == "0" or layer.conv is None or layer.depthwise or layer.source is None:
        return False
    return layer.geometry[:3] == ((3, 3), (1, 1), (1, 1))


def pays(layer, pairs, output):
    """Whether that is faster for an output of this (height, width), for which the sum over taps
    would take so many products of blocks. On small outputs tiles are mostly border."""
    tiles = -(-output[0] // SIDE) * -(-output[1] // SIDE)
    return takes(layer) and pairs >= PAYS * PRODUCTS * tiles
