"""Attacks and training steps as in the code that their authors published: in float32 and eager
mode, in torch's default layout, with parameters that require gradients also during an attack, and
with a teacher that computes the same images again in every epoch."""

import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse

EPS, STEP_SIZE = 8 / 255, 2 / 255
STEPS = int(os.environ.get("ATTACK_STEPS", 10))  # fewer in a dry run


def pgd(objective, x, steps=STEPS, start=None, backward=False):
    """The loop of TRADES and RSLAD: the x_adv that maximises objective(x_adv), a scalar.

    backward: whether the loop calls `loss.backward()`, as robust_overfitting, foolbox and RSLAD's
    own evaluation do: that computes the gradients of all weights and adds them up in `.grad`.
    """
    x_adv = x + 0.001 * torch.randn_like(x) if start is None else start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = objective(x_adv)
        if backward:
            loss.backward()
            gradient = x_adv.grad
        else:
            (gradient,) = torch.autograd.grad(loss, [x_adv])
        x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def recipe(model):
    """What users who need attacks fast do to a network of convolutions first, with torch's own
    tools: parameters that need no gradient, each BatchNorm folded into the convolution before it,
    channels_last; then autocast around the loop. Returns v -> logits, for a network in eval
    mode."""
    fast = fuse(model).requires_grad_(False).to(memory_format=torch.channels_last)

    def logits(v):
        with torch.autocast(v.device.type, torch.bfloat16):
            return fast(v)

    return logits


def torch_alone(model):
    """Makes the networks of fastadv.models run torch's own BatchNorm instead of the fused one, by a
    hook on each, which does nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: None)


def kl(logits, soft, reduction):
    return F.kl_div(logits.log_softmax(1), soft, reduction=reduction)


def rslad(student, teacher, x, **options):
    """(x_adv, loss) of one training step; options: of `pgd`."""
    with torch.no_grad():
        soft = teacher(x).softmax(1)
    student.eval()
    x_adv = pgd(lambda v: kl(student(v), soft, "sum"), x, **options)
    student.train()
    adv, clean = (kl(student(v), soft, "batchmean") for v in (x_adv, x))
    return x_adv, (5 / 6 * adv + 1 / 6 * clean) / 10


def mismatch(student, teacher, x, **options):
    """The x_adv that maximises KL(t(x_adv) || s(x_adv)), the gradient through both networks."""
    student.eval()
    x_adv = pgd(lambda v: kl(student(v), teacher(v).softmax(1), "sum"), x, **options)
    student.train()
    return x_adv


def adaad(student, teacher, x, **options):
    """(x_adv, loss). The clean passes of both networks are computed though their weight is zero."""
    x_adv = mismatch(student, teacher, x, **options)
    clean, adv = student(x), student(x_adv)
    with torch.no_grad():
        soft, soft_adv = (teacher(v).softmax(1) for v in (x, x_adv))
    loss, loss_clean = (kl(z, p, "none").mean() for z, p in ((adv, soft_adv), (clean, soft)))
    return x_adv, 1.0 * loss + 0.0 * loss_clean


def advfunmatch(student, teacher, x, **options):
    """(x_adv, loss). The authors' code was not available: this is the min-max problem of the paper,
    written like the others."""
    x_adv = mismatch(student, teacher, x, **options)
    with torch.no_grad():
        soft = teacher(x_adv).softmax(1)
    return x_adv, kl(student(x_adv), soft, "batchmean")


METHODS = {"rslad": rslad, "adaad": adaad, "advfunmatch": advfunmatch}
