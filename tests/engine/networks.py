"""The networks of the engine's tests, and how they are compared with torch."""

import torch
import torch.nn.functional as F
from torch import nn

from fastadv import freeze, models
from fastadv.engine.folded import Folded
from fastadv.engine.lower import lower
from fastadv.engine.trunk import Trunk


class Plain(nn.Module):
    """What the networks of `models` do not have: bias, no BatchNorm, odd kernels and sizes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 33, (5, 2), stride=(2, 3), padding=(3, 1), dilation=(1, 2)),
            nn.ReLU6(),
            nn.Conv2d(33, 7, 3, padding=2, dilation=2, bias=False),
            nn.Identity(),
            nn.BatchNorm2d(7, affine=False),
            nn.SiLU(),
            nn.Conv2d(7, 7, 2, groups=7),
            nn.ReLU(),
            nn.Dropout(),
            nn.AvgPool2d((2, 1), stride=1),
            nn.AdaptiveAvgPool2d((3, 2)),
        )
        self.classifier = nn.Linear(7 * 6, 4)

    def forward(self, x):
        x = self.body(F.pad((x - 0.5) / 0.25 * 2, (1, 0, 2, 0)))
        return self.classifier(torch.flatten(x, 1))


class Sums(nn.Module):
    """Residuals of every kind: of sums, of activations, of what was convolved before."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        a = self.stem(x)
        b = F.relu(self.norms[0](a))
        c = self.convs[1](b) + self.convs[0](b)  # the later operand takes the earlier one
        d = self.norms[1](c)  # read without an activation
        e = torch.relu(self.norms[2](self.convs[2](d)).add(c))
        f = e + self.convs[3](e)
        return self.fc(self.convs[4](f).mean((2, 3)))


class Shared(nn.Module):
    """One result added twice, an activation that is only added, a pooling that is convolved and
    returned, and sums of what began with different tensors."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        a = self.stem(x)
        b = self.convs[0](F.relu(self.norm(a))) + a
        c = self.convs[1](b) + a
        d = F.relu(self.convs[2](c)) + self.convs[3](c)
        e = F.avg_pool2d(self.convs[4](F.elu(d)), 2)
        f = self.convs[5](e) + F.avg_pool2d(c, 2)
        return self.fc(torch.cat((f.mean((2, 3)), e.mean((2, 3))), 1))


class Gated(nn.Module):
    """What torch computes between segments: an unknown activation, a gate, slices, views, groups,
    concatenation, max pooling, GroupNorm in place; several classifiers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (40, 40, 48))
        self.gate = nn.Sequential(nn.Conv2d(40, 8, 1), nn.ReLU(), nn.Conv2d(8, 40, 1))
        self.depthwise = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.grouped = nn.Conv2d(40, 8, 3, padding=1, groups=4)
        self.group_norm, self.relu = nn.GroupNorm(2, 8), nn.ReLU(inplace=True)
        self.last = nn.Conv2d(48, 33, 3, stride=2, padding=1)
        self.classifier = nn.Sequential(nn.Linear(33 * 4, 9), nn.GELU(), nn.Linear(9, 4))

    def forward(self, x):
        x = F.leaky_relu(self.norms[0](self.stem(x)), 0.1)
        y = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        y = self.norms[1](self.depthwise(y))
        x = F.max_pool2d(y, 2) + x[:, :, ::2, 1::2]
        x = x.view(x.size(0), 4, 10, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2)
        x = torch.cat((x, self.relu(self.group_norm(self.grouped(x)))), 1)
        x = self.last(F.relu(self.norms[2](x)))
        return self.classifier(x.view(x.size(0), -1))


NETWORKS = {
    "resnet18": lambda: models.get("resnet18", width=20),
    "preact_resnet18": lambda: models.get("preact_resnet18", width=9),
    "mobilenet_v2": lambda: models.get("mobilenet_v2", width=6),
    "wrn": lambda: models.get("wrn10_2"),
    "wrn_silu": lambda: models.get("wrn10_1_silu"),
    "dm_wrn": lambda: models.get("dm_wrn10_1"),
    "digits_net": lambda: models.get("digits_net", in_channels=3),
    "normalized": lambda: models.Normalized(
        models.get("digits_net", in_channels=3),
        torch.tensor([0.4, 0.5, 0.6]),
        torch.full((3,), 0.2),
    ),
    "plain": Plain,
    "sums": Sums,
    "shared": Shared,
    "gated": Gated,
    "resnet20": lambda: models.get("resnet20"),
}


def network(name):
    """A network whose BatchNorms have seen images and are not neutral."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for _ in range(2):
        net.train()(torch.rand(16, 3, 8, 8))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return net.eval()


def results(model, x, weight):
    """(logits, gradient of their weighted sum)."""
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    (grad,) = torch.autograd.grad((logits * weight).sum(), x)
    return logits.detach(), grad


def twin(net, dtype=torch.float32, executor=Trunk):
    """A Frozen whose trunk computes in `dtype` on any machine."""
    frozen = freeze(net, dtype)
    vars(frozen)["trunk"], head = lower(frozen.net, dtype, executor)
    frozen._head = [head]
    return frozen


def folded(net, dtype=torch.float32):
    """A Frozen with the executor of other devices than this one."""
    return twin(net, dtype, Folded)


def error(found, expected):
    return (found.double() - expected).norm() / expected.norm()


class Undecided(nn.Conv2d):
    """A convolution that nobody can trace."""

    def forward(self, x):
        return super().forward(x) if x.sum() < float("inf") else x


class Branching(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.other = kind, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "python" and x.sum() > 0:
            return x
        if self.kind == "strides":
            x = x + x.stride(1) % 2
        return self.other(x).mean((2, 3))
