"""One query, a forward pass and its input gradient, of networks in many styles; `--suite networks`.

    python benchmarks/run.py --suite networks [--only vgg16_bn]

"published" is the network as it is, "channels_last" and "bf16 autocast" are what a user writes in a
few lines: in channels_last with frozen parameters, the latter under torch.autocast. A lesser
processor is played by FASTADV_CPU_ISA, with ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY for torch.
Autocast is left out on processors without products of bfloat16, where one query takes minutes.

Not a pytest-benchmark module: a call takes seconds.
"""

import copy

import styles
import torch
import torch.nn.functional as F
from timing import Case, without_bfloat16

from fastadv import freeze, models

NHWC = torch.channels_last
ZOO = ("resnet18", "preact_resnet18", "mobilenet_v2", "resnet20", "vit_tiny")
OWN = ("vgg16_bn", "densenet_bc_40", "mnist_cnn", "group_norm_resnet", "shufflenet")
# (network, batch, size of its images)
NETWORKS = [(name, 64, 32) for name in (*ZOO, *OWN)]
NETWORKS += [("wrn28_10", 16, 32), ("efficientnet_b0", 32, 32), ("convnext_tiny", 16, 64)]
NETWORKS += [("resnet50", 4, 224)]


def network(name, size):
    """A network in eval mode whose BatchNorm statistics have seen a few random images."""
    model = getattr(styles, name)() if hasattr(styles, name) else models.get(name)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, 3, size, size))
    return model.eval()


def query(model, x, y):
    """A function that returns the logits of x and the gradient of their cross-entropy to x."""

    def call():
        v = x.detach().requires_grad_()
        logits = model(v)
        return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y), v)[0]

    return call


def case(name, batch, size):
    torch.manual_seed(0)
    model, x = network(name, size), torch.rand(batch, 3, size, size)
    y, nhwc = torch.arange(batch) % 10, x.contiguous(memory_format=NHWC)
    plain = copy.deepcopy(model).to(memory_format=NHWC).requires_grad_(False)

    def autocast(v):
        with torch.autocast(v.device.type, torch.bfloat16):
            return plain(v).float()

    providers = {
        "published": query(model, x, y),
        "channels_last": query(plain, nhwc, y),
        "bf16 autocast": query(autocast, nhwc, y),
        "fastadv_fp32": query(freeze(plain), nhwc, y),
        "fastadv_bf16": query(freeze(plain, torch.bfloat16), nhwc, y),
    }

    left_out = without_bfloat16(x.device)
    if left_out:
        del providers["bf16 autocast"]

    def gate():
        found = {key: call() for key, call in providers.items()}
        (logits, gradient), (ours, our_gradient) = found["published"], found["fastadv_fp32"]
        assert (ours - logits).norm() <= 1e-4 * logits.norm()
        assert (our_gradient.sign() == gradient.sign()).float().mean() > 0.999
        for key in found.keys() & {"bf16 autocast", "fastadv_bf16"}:
            assert (found[key][0] - logits).norm() <= 0.1 * logits.norm(), key

    shape = f"{name}, {batch}x3x{size}x{size}"
    return Case("query", shape, providers, gate, images=batch, left_out=left_out, calls=0)


def cases():
    for name, batch, size in NETWORKS:
        yield case(name, batch, size)
