import pytest
import torch

from fastadv import models


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = models.get("resnet18", width=4)
    net(torch.rand(32, 3, 8, 8))  # BatchNorm statistics of its own
    return net
