"""Winograd's F(4 x 4, 3 x 3), by which the engine computes 3 x 3 convolutions of stride 1 in float32
with a quarter of the products (Lavin & Gray 2016, "Fast algorithms for convolutional neural
networks"). csrc/cpu/winograd.inl has the two other transforms, and the points."""

import torch

SIDE = 4  # of the tiles of output that the transform makes
# G: row i is (1, p, p^2) / prod of p - q over the other points q, of p = 0, 3/4, -3/4, 3/2, -3/2; the
# last row is that of infinity.
POINTS = (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)


def at_points(weight):
    """float32 weights [O, I, 9] as [O, I, 36]: U = G g G^T."""
    rows = [[1, p, p * p] for p in POINTS]
    for row, p in zip(rows, POINTS, strict=True):
        for q in POINTS:
            row[:] = [value / (p - q) if q != p else value for value in row]
    g = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    twice = torch.kron(g, g).float()  # [36, 9]
    return weight @ twice.t()


def tiles(size):
    """How many tiles cover an output of this (height, width)."""
    return -(-size[0] // SIDE) * -(-size[1] // SIDE)


def pays(layer, pairs, output):
    """Whether a layer is faster so: `pairs` is how many blocks the sum over taps multiplies."""
    conv = layer.conv
    if conv is None or layer.depthwise or layer.source is None:
        return False
    kernel, stride, dilation, _ = layer.geometry
    fits = (kernel, stride, dilation) == ((3, 3), (1, 1), (1, 1))
    return fits and pairs >= PAYS * 36 * tiles(output)


PAYS = 1.5
