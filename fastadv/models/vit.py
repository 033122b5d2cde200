"""A small vision transformer (Dosovitskiy et al., arXiv:2010.11929) for 32x32 images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError

PATCH, HEADS, DEPTH = 4, 3, 6
GRID = 8  # patches along a side of a 32x32 image


class ViT(nn.Module):
    """[B, in_channels, H, W] images in [0, 1] -> [B, num_classes] logits; no normalisation inside.

    4x4 patches, learned positions, 6 pre-norm blocks of 3 heads and `width` channels (192, as in
    DeiT-Ti), and the mean of all tokens instead of a class token. Other sizes than 32x32 resample
    the table of positions (section 3.2 of the paper). Raises UsageError unless `width` is a
    multiple of 3, H and W multiples of 4.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 192):
        if width < 1 or width % HEADS:
            raise UsageError(
                f"width is {width}, must be a multiple of {HEADS}, the number of heads"
            )
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, GRID, GRID))
        self.blocks = nn.Sequential(*(_block(width) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % PATCH or x.shape[3] % PATCH:
            raise UsageError(f"images are {list(x.shape[2:])}, must be multiples of {PATCH} pixels")
        tokens, positions = self.patches(x), self.positions
        if tokens.shape[2:] != positions.shape[2:]:
            positions = F.interpolate(positions, tokens.shape[2:], mode="bilinear")
        tokens = self.blocks((tokens + positions).flatten(2).transpose(1, 2))
        return self.head(self.norm(tokens).mean(1))


def _block(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
