import pytest
import torch

from fastadv import models


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = models.get("resnet18", width=4)
    net(torch.rand(32, 3, 8, 8))  # BatchNorm statistics of its own
    return net


@pytest.fixture
def batch(model):
    """Six images that the model classifies right."""
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model.eval()(x).argmax(1)


@pytest.fixture
def balanced(model, batch):
    """The images of `batch` in classes of about the same size, with the model's boundaries between
    them; again the model classifies them right."""
    x, _ = batch
    with torch.no_grad():
        model.linear.bias -= model(x).mean(0)
        return x, model(x).argmax(1)
