"""What the examples share: scikit-learn's digits, a small network, and how robust a network is."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

EPS, STEP_SIZE, STEPS = 0.15, 0.0375, 10  # linf, of images in [0, 1]


def batches(size=64):
    """Shuffled batches (x [B, 1, 8, 8] in [0, 1], y [B]) of the first 1,200 images."""
    x, y = images()
    for rows in torch.randperm(1200).split(size):
        yield x[rows], y[rows]


def images():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)


def network(width=16):
    """Three convolutions with BatchNorm, and a classifier."""
    layers, channels = [], 1
    for stride in (1, 2, 1):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 10))


def pgd(model, x, y, steps=STEPS):
    """PGD (Madry et al. 2018) in plain torch."""
    x_adv = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]
        x_adv = x_adv.detach() + STEP_SIZE * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def accuracy(model):
    """(clean, under PGD-20) on the other 597 images, in percent."""
    model.eval()
    x, y = (values[1200:] for values in images())
    right = [(model(v).argmax(1) == y).float().mean() for v in (x, pgd(model, x, y, 20))]
    return tuple(round(100 * share.item(), 1) for share in right)


def report(model):
    print("clean {} %, PGD-20 {} %".format(*accuracy(model)))


def robust_teacher(epochs=15):
    """A wide network after PGD-AT."""
    teacher = network(64)
    optimizer = torch.optim.SGD(teacher.parameters(), 0.1, momentum=0.9)
    for _ in range(epochs):
        for x, y in batches():
            teacher.eval()
            x_adv = pgd(teacher, x, y)
            teacher.train()
            optimizer.zero_grad()
            F.cross_entropy(teacher(x_adv), y).backward()
            optimizer.step()
    return teacher.eval()
