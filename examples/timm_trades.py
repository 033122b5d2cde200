"""TRADES with fastadv on a network of timm (which needs torchvision).

timm's networks take normalised images. Attacks work on images in [0, 1], so that the normalisation
becomes the model's first layer.
"""

import digits
import timm
import torch
import trades

from fastadv import models


def network(name="resnet18"):
    net = timm.create_model(name, num_classes=10, in_chans=1)
    return models.Normalized(net, mean=(0.31,), std=(0.37,))


if __name__ == "__main__":
    torch.manual_seed(0)
    digits.report(trades.train(network(), epochs=3))
