"""PGD-10 end to end; `--suite attack` of run.py.

    pip install --no-deps --target build/peers torchattacks    # its dependencies are not needed
    PYTHONPATH=build/peers python benchmarks/run.py --suite attack

"published" is the loop of TRADES and RSLAD, "compiled" the same on torch.compile(model),
"published_bf16" the same under torch.autocast in channels_last, "recipe" that on a frozen network
with its BatchNorm folded (published.recipe); on a GPU "max-autotune" is the compiler's mode.
"conv_fp32" and "conv_bf16" are floors: the time that torch's own convolutions alone take for the
same forward passes and input gradients; "x floor" is a provider's time over its floor. Peak memory
is the memory that one attack adds to a fresh process. With a WideResNet the slowest rivals are left
out, which would take minutes more.

The networks have random weights, and their BatchNorm statistics have seen a few random images.
"equal signs" and "cosine" compare the input gradient in bfloat16 with the published one for these
networks alone: with the full statistics of such images they would amplify all rounding, and a
trained network is another matter.

Not a pytest-benchmark module: a call takes seconds.
"""

import copy
import sys
from functools import partial

import published
import torch
import torch.nn.functional as F
from published import EPS, STEP_SIZE, STEPS
from timing import Case, exact, memory_added, peak_of, without_bfloat16
from torch import nn

from fastadv import freeze, models
from fastadv.attacks import PGD
from fastadv.attacks.graphs import Captured
from fastadv.attacks.pgd import OBJECTIVES, input_gradient
from fastadv.engine import folded

NHWC = torch.channels_last
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FUSED = "fastadv_bf16 graph, bias_relu"
MEASURED = ("published", "fastadv_bf16")  # the providers whose memory is measured


def network(name, **size):
    """A network in eval mode whose BatchNorm statistics have seen five batches of random images."""
    model = models.get(name, **size)
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(8, 3, 32, 32))
    return model.eval()


def images(batch):
    return torch.rand(batch, 3, 32, 32), torch.arange(batch) % 10


def attacks(model, x, y, slow=True):
    """{provider: attack(steps, start) -> x_adv} of all providers that need no other package; slow:
    those too that take minutes with a large network, some of them to compile."""
    low, fast = copy.deepcopy(model).to(memory_format=NHWC), published.recipe(model)
    nhwc = x.contiguous(memory_format=NHWC)

    def autocast(v):
        with torch.autocast(v.device.type, torch.bfloat16):
            return low(v)

    def loop(logits, x=x, **options):
        return partial(published.pgd, lambda v: F.cross_entropy(logits(v), y), x, **options)

    found = {"published": loop(model)}
    if slow:
        found["published_backward"] = loop(model, backward=True)
        found["compiled"] = loop(torch.compile(model))
    found["published_bf16"], found["recipe"] = loop(autocast, nhwc), loop(fast, nhwc)
    for name, dtype in DTYPES.items():
        found[f"fastadv_{name}"] = fastadv(model, x, y, dtype)
    if x.is_cuda:
        twin = frozen(model, torch.bfloat16)
        found["fastadv_bf16 graph"] = captured(twin, x, y)
        found[FUSED] = captured(twin, x, y, fused=True)
        if slow:
            found["max-autotune"] = loop(torch.compile(model, mode="max-autotune"))
            found["fastadv_bf16 graph compiled"] = captured(torch.compile(twin), x, y)
    return found


def frozen(model, dtype):
    """The twin of a copy of the model in channels_last, the memory format of the trainer's
    student."""
    return freeze(copy.deepcopy(model).to(memory_format=NHWC), dtype)


def fastadv(model, x, y, dtype):
    twin = frozen(model, dtype)
    x = x.contiguous(memory_format=NHWC)

    def attack(steps=STEPS, start=None):
        return PGD(EPS, STEP_SIZE, steps, "gaussian")(twin, x, y, start=start)

    return attack


def captured(twin, x, y, fused=False):
    """The attack on a twin by a CUDA graph if it has STEPS steps, and step by step otherwise. The
    graph is captured in the third call. fused: with its ReLUs in ops.bias_relu."""
    graph = Captured(PGD(EPS, STEP_SIZE, STEPS, "gaussian"))
    x = x.contiguous(memory_format=NHWC)

    def attack(steps=STEPS, start=None):
        attack = graph if steps == STEPS else PGD(EPS, STEP_SIZE, steps, "gaussian")
        folded.FUSED_RELU = fused
        try:
            return attack(twin, x, y, start=start)
        finally:
            folded.FUSED_RELU = False

    return attack


def torchattacks_pgd(model, x, y):
    """(provider, attack, None), or (None, None, why it is missing); its start is uniform."""
    try:
        import torchattacks
    except ImportError as error:
        return None, None, f"torchattacks: {error}"

    def attack(steps=STEPS, start=None):
        return torchattacks.PGD(model, EPS, STEP_SIZE, steps)(x, y)

    return f"torchattacks {torchattacks.__version__}", attack, None


def convolutions(model, x, dtype):
    """A function that runs every nn.Conv2d of the model STEPS times, forward and backward to the
    input, on channels_last tensors of its shapes in dtype. Layers of one shape share their
    input."""
    layers, blank = [], {}

    def tensor(shape):
        if shape not in blank:
            blank[shape] = torch.randn(shape).to(dtype, memory_format=NHWC)
        return blank[shape]

    def note(conv, args, out):
        weight = conv.weight.detach().to(dtype, memory_format=NHWC)
        options = conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
        layers.append((tensor(args[0].shape), weight, tensor(out.shape), options))

    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(note) for conv in convs]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def call():
        for _ in range(STEPS):
            for v, weight, _, options in layers:
                torch.ops.aten.convolution(v, weight, None, *options)
            for v, weight, gradient, options in reversed(layers):
                torch.ops.aten.convolution_backward(
                    gradient, v, weight, [0], *options, [True, False, False]
                )

    return call


def agreement(model, x, y):
    """{provider: how well fastadv's input gradient agrees with the published one}: the share of
    equal signs, and the cosine as a mean over images."""
    theirs = input_gradient(lambda v: F.cross_entropy(model(v), y, reduction="none"), x)
    found = {}
    for name, dtype in DTYPES.items():
        twin = frozen(model, dtype)
        ours = input_gradient(lambda v, twin=twin: OBJECTIVES["ce"](twin(v), y), x)
        signs = (ours.sign() == theirs.sign()).float().mean()
        cosine = F.cosine_similarity(ours.flatten(1), theirs.flatten(1)).mean()
        found[f"fastadv_{name}"] = {
            "equal signs": round(float(signs), 5),
            "cosine": round(float(cosine), 5),
        }
    return found


def peak(name, provider, **options):
    """`peak_of` one attack of two steps on the CPU."""
    return peak_of(__file__, name, provider, *(f"{key}={v}" for key, v in options.items()))


def growth(name, provider, batch=64, **size):
    """The MB that `peak` reports, measured in a process of its own. The memory of the network is
    not counted."""
    attack = attacks(models.get(name, **size).eval(), *images(batch))[provider]
    return memory_added(lambda: attack(steps=2))


def case(name, batch=64, rivals=True, samples=5, memory=True, **size):
    """rivals: with the slowest of them and torchattacks. memory: with peak memory. size: options of
    `models.get`."""
    torch.manual_seed(0)
    model, (x, y) = network(name, **size), images(batch)
    providers, left_out = attacks(model, x, y, slow=rivals), []
    if rivals:
        peer, torchattacks, missing = torchattacks_pgd(model, x, y)
        providers |= {peer: torchattacks} if peer else {}
        left_out += [missing] if missing else []
    else:
        left_out.append("torchattacks and what is compiled: too slow")
    floors = {f"conv_{key}": convolutions(model, x, dtype) for key, dtype in DTYPES.items()}
    if low := without_bfloat16(x.device):
        del providers["published_bf16"], providers["recipe"], floors["conv_bf16"]
        left_out.append(low)
    providers |= floors
    with exact():
        agreed = agreement(model, x, y)

    def gate():
        start = x + 0.001 * torch.randn_like(x)
        first = {
            key: attack(steps=1, start=start)
            for key, attack in providers.items()
            if key not in floors
        }
        assert (first["fastadv_fp32"] == first["published"]).float().mean() >= 0.999
        assert agreed["fastadv_bf16"]["cosine"] > 0.9, agreed
        for name in floors.keys() & providers.keys():
            providers[name]()

    def facts():
        if not memory or x.is_cuda:
            return agreed
        measured = {provider: peak(name, provider, batch=batch, **size) for provider in MEASURED}
        return {key: agreed.get(key, {}) | measured.get(key, {}) for key in agreed | measured}

    return Case(
        "PGD-10",
        f"{name}, {batch}x3x32x32",
        providers,
        gate,
        images=batch,
        floors={
            key: f"conv_{name}"
            for name in DTYPES
            for key in providers
            if key.startswith(f"fastadv_{name}") and f"conv_{name}" in floors
        },
        facts=facts,
        left_out="; ".join(left_out) or None,
        calls=0,
        samples=samples,
    )


def cases():
    yield case("resnet18")
    yield case("mobilenet_v2")
    yield case("wrn28_10", rivals=False, samples=3)


if __name__ == "__main__":
    name, provider, *options = sys.argv[1:]
    print(growth(name, provider, **{key: int(v) for key, v in (o.split("=") for o in options)}))
