"""Networks in the styles that people use, for bench_networks.py: written for it, with random
weights, and not meant for training."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(into, out, size=3, stride=1, groups=1, act=None, norm=nn.BatchNorm2d):
    """A convolution without bias, a normalisation, and an activation if there is one."""
    layers = [nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=False), norm(out)]
    return nn.Sequential(*layers, *([act()] if act else []))


def classifier(channels, classes=10):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def vgg16_bn():
    layers, into = [], 3
    for out, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append(conv(into, out, act=nn.ReLU))
            into = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, classifier(512))


def mnist_cnn():
    convs = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2))
    linear = (nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(*convs, *linear)


class Dense(nn.Module):
    """A bottleneck layer of DenseNet: its new features are concatenated to the old ones."""

    def __init__(self, into, growth=12):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(into), nn.BatchNorm2d(4 * growth)])
        self.squeeze = nn.Conv2d(into, 4 * growth, 1, bias=False)
        self.grow = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.squeeze(F.relu(self.norms[0](x)))
        return torch.cat([x, self.grow(F.relu(self.norms[1](y)))], 1)


def densenet_bc_40():
    layers, channels = [nn.Conv2d(3, 24, 3, padding=1, bias=False)], 24
    for stage in range(3):
        for _ in range(6):
            layers.append(Dense(channels))
            channels += 12
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if stage < 2:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, classifier(channels))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))"""

    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def bottleneck(into, width, stride):
    body = (conv(into, width, 1, act=nn.ReLU), conv(width, width, 3, stride, act=nn.ReLU))
    shortcut = None if into == 4 * width and stride == 1 else conv(into, 4 * width, 1, stride)
    return Residual(nn.Sequential(*body, conv(width, 4 * width, 1)), shortcut)


def resnet50():
    layers, into = [conv(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)], 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(bottleneck(into, width, stride if i == 0 else 1))
            into = 4 * width
    return nn.Sequential(*layers, classifier(into, 1000))


def group_norm_resnet():
    def norm(channels):
        return nn.GroupNorm(8, channels)

    layers, into = [conv(3, 64, act=nn.ReLU, norm=norm)], 64
    for out, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
        body = conv(into, out, 3, stride, act=nn.ReLU, norm=norm), conv(out, out, norm=norm)
        shortcut = None if into == out else conv(into, out, 1, stride, norm=norm)
        layers.append(Residual(nn.Sequential(*body), shortcut))
        into = out
    return nn.Sequential(*layers, classifier(into))


class ChannelsLastNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """A block of ConvNeXt, its pointwise layers as linear ones."""

    def __init__(self, dim):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.scale = nn.LayerNorm(dim), nn.Parameter(0.1 * torch.ones(dim))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.scale * y).permute(0, 3, 1, 2)


def convnext_tiny():
    layers, into = [nn.Conv2d(3, 96, 4, 4), ChannelsLastNorm(96)], 96
    for out, count in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if out != into:
            layers += [ChannelsLastNorm(into), nn.Conv2d(into, out, 2, 2)]
        layers += [ConvNext(out) for _ in range(count)]
        into = out
    return nn.Sequential(*layers, classifier(into))


class Gated(nn.Module):
    """An inverted bottleneck with squeeze-and-excitation, as of EfficientNet."""

    def __init__(self, into, out, size, stride, expand):
        super().__init__()
        wide = into * expand
        self.expand = conv(into, wide, 1, act=nn.SiLU) if expand > 1 else nn.Identity()
        self.depthwise = conv(wide, wide, size, stride, wide, act=nn.SiLU)
        gate = (nn.Conv2d(wide, into // 4, 1), nn.SiLU(), nn.Conv2d(into // 4, wide, 1))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *gate, nn.Sigmoid())
        self.project, self.add = conv(wide, out, 1), stride == 1 and into == out

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.gate(y))
        return x + y if self.add else y


def efficientnet_b0():
    stages = ((16, 3, 1, 1, 1), (24, 3, 1, 6, 2), (40, 5, 2, 6, 2), (80, 3, 2, 6, 3))
    stages += ((112, 5, 1, 6, 3), (192, 5, 2, 6, 4), (320, 3, 1, 6, 1))
    layers, into = [conv(3, 32, act=nn.SiLU)], 32
    for out, size, stride, expand, count in stages:
        for i in range(count):
            layers.append(Gated(into, out, size, stride if i == 0 else 1, expand))
            into = out
    return nn.Sequential(*layers, conv(into, 1280, 1, act=nn.SiLU), classifier(1280))


class Shuffled(nn.Module):
    """A bottleneck of grouped convolutions with a channel shuffle, as of ShuffleNet."""

    def __init__(self, channels, groups=4):
        super().__init__()
        self.groups, wide = groups, channels // 4
        self.squeeze = conv(channels, wide, 1, groups=groups, act=nn.ReLU)
        self.depthwise = conv(wide, wide, groups=wide)
        self.expand = conv(wide, channels, 1, groups=groups)

    def forward(self, x):
        y = self.squeeze(x)
        b, c, h, w = y.size(0), y.size(1), y.size(2), y.size(3)
        y = y.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return F.relu(x + self.expand(self.depthwise(y)))


def shufflenet():
    layers, into = [], 3
    for out, count in ((128, 3), (256, 7), (512, 3)):
        layers += [conv(into, out, stride=1 if into == 3 else 2, act=nn.ReLU)]
        layers += [Shuffled(out) for _ in range(count)]
        into = out
    return nn.Sequential(*layers, classifier(into))
