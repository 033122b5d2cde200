"""Networks, losses and files that tests of several parts share."""

import torch
from torch import nn


class Wrapped(nn.Module):
    """A network that returns its logits in something else."""

    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x):
        return self.wrap(self.net(x))


class Calls(nn.Module):
    """A model that notes what it is asked, and in which mode."""

    def __init__(self, net):
        super().__init__()
        self.net, self.inputs, self.modes = net, [], []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.net(x)


def smooth():
    """A float64 network of eight features in [0, 1] and five classes, far from linear."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    for p in net.parameters():
        nn.init.normal_(p, std=2.0)
    return net


class Holes(torch.autograd.Function):
    """The sum of v, with a gradient of our choice."""

    @staticmethod
    def forward(ctx, v, grad):
        ctx.save_for_backward(grad)
        return v.sum(1)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0], None


class Dropper:
    """Pickles into a call that creates the file at `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Player:
    """Stands for `graphs.capture`: a replay runs the function and writes where its first run
    did."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, function):
        self.captures += 1
        returned = function()

        def replay():
            self.replays += 1
            returned.copy_(function())

        return replay, returned

    @property
    def counts(self):
        return self.captures, self.replays
