"""Models as people have them: what they wrap their logits in, and which dtype they compute in."""

import collections
import copy
import math
import types

import pytest
import torch
from stand_ins import Wrapped
from torch import nn

from fastadv.attacks import APGD, CW, DDN, FAB, FGSM, FMN, PGD, DeepFool, Square
from fastadv.engine.features import forward_features
from fastadv.ops._torch import hooked

EPS = 16 / 255
ATTACKS = {
    "pgd": PGD(EPS, EPS / 4, 4),
    "pgd l2": PGD(0.5, 0.2, 4, norm="l2"),
    "fgsm": FGSM(EPS),
    "restarts": PGD(EPS, EPS / 4, 3, restarts=2),
    "best": PGD(EPS, EPS / 4, 3, keep="best"),
    "apgd": APGD(EPS / 4, 5, 2),
    "apgd-dlr l2": APGD(0.1, 4, loss="dlr", norm="l2"),
    "apgd-t": APGD(EPS / 4, 4, loss="targeted", target_classes=2),
    "fab": FAB(EPS / 4, 4, 2, target_classes=2),
    "fab l2": FAB(0.2, 4, target_classes=2, norm="l2"),
    "square": Square(EPS / 4, 20),
    "square l2": Square(0.1, 20, norm="l2"),
    "deepfool": DeepFool(3, 2),
    "cw": CW(5, 1, 0.5, 100.0),
    "ddn": DDN(4),
    "fmn": FMN(4),
}
HALVES = torch.bfloat16, torch.float16
OUTPUTS = {
    "tuple": lambda z: (z, z[:, :, None]),
    "list": lambda z: [z],
    "dict": lambda z: {"loss": z.sum(), "logits": z},
    "object": lambda z: types.SimpleNamespace(logits=z, hidden_states=(z, z)),
    "named tuple": lambda z: collections.namedtuple("Output", "logits aux")(z, z + 1),
}


class ByHand(nn.Module):
    """A network without parameters to see, which casts its images and its logits itself."""

    def __init__(self, net, dtype):
        super().__init__()
        self.held, self.dtype = [net.eval()], dtype

    def forward(self, x):
        return self.held[0](x.to(self.dtype))


def attack(name, net, x, y):
    torch.manual_seed(7)
    return ATTACKS[name](net, x, y)


@pytest.mark.parametrize("name", ATTACKS)
def test_logits_are_found_in_what_the_model_returns(model, balanced, name):
    expected = attack(name, model, *balanced)
    assert not torch.equal(expected, balanced[0])
    for wrap in OUTPUTS.values():
        assert torch.equal(attack(name, Wrapped(model, wrap), *balanced), expected)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    ("wrap", "given"),
    [
        (lambda z: {"scores": z}, "a dict of 'scores'"),
        (lambda z: (z, z), r"a tuple of \[\d+, 10\], \[\d+, 10\]"),
        (lambda z: None, "a NoneType"),
        (lambda z: z.tolist(), "a list of list"),
    ],
)
def test_what_has_no_logits_is_refused(model, balanced, name, wrap, given):
    with pytest.raises(TypeError, match=f"model returned {given}.*must return logits"):
        attack(name, Wrapped(model, wrap), *balanced)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
@pytest.mark.parametrize("of_x", [torch.float32, torch.float64])
def test_models_and_images_of_any_dtype(model, balanced, name, dtype, of_x):
    """The cast is the attack's: x_adv has x's dtype, ball and box are x's own."""
    x, y = balanced[0].to(of_x), balanced[1]
    model.to(dtype)
    with torch.no_grad():
        y = model(x.to(dtype)).argmax(1)
    x_adv = attack(name, model, x, y)
    assert x_adv.dtype == of_x
    attacked = ATTACKS[name]
    distance = (
        (x_adv.double() - x).flatten(1).norm(math.inf if attacked.norm == "linf" else 2, dim=1)
    )
    if hasattr(attacked, "eps"):
        assert (distance <= attacked.eps * (1 + 1e-6) + 1e-7).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(x_adv, attack(name, ByHand(model, dtype), x, y))
    if hasattr(attacked, "eps") and name not in ("fab", "fab l2"):  # which may find nothing
        assert (distance > 0).all()


@pytest.mark.parametrize("name", ["pgd", "pgd l2", "fgsm", "best", "apgd"])
def test_float64_finds_what_float32_does(model, balanced, name):
    """But for signs that rounding decides, also where only one of model and images is float64."""
    x, y = balanced
    found = attack(name, model, x, y)
    wide = copy.deepcopy(model).double()
    for net, images in ((wide, x.double()), (wide, x), (model, x.double())):
        x_adv = attack(name, net, images, y)
        assert x_adv.dtype == images.dtype
        assert ((x_adv - found).abs() < 1e-4).double().mean() > 0.98


def test_a_start_has_the_dtype_of_x(model, balanced):
    x, y = balanced
    with pytest.raises(TypeError, match=r"start is torch.float32, must be torch.float64"):
        ATTACKS["pgd"](model, x.double(), y, start=x)
    ATTACKS["pgd"](model, x.double(), y, start=x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("of_target", [torch.float32, torch.bfloat16, torch.float64])
def test_kl_holds_logits_and_targets_of_any_dtypes(model, balanced, dtype, of_target):
    x, _ = balanced
    z = (3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(2))).to(of_target)
    x_adv = PGD(EPS, EPS / 4, 3, "zero")(model.to(dtype), x, target_logits=z, loss="kl")

    def divergence(v):
        with torch.no_grad():
            log_p = model(v.to(dtype)).double().log_softmax(1)
        return nn.functional.kl_div(log_p, z.double().softmax(1), reduction="batchmean")

    assert divergence(x_adv) > divergence(x) + 1e-3


@pytest.mark.parametrize("dtype", HALVES)
def test_probabilities_of_halves_are_seen(model, balanced, dtype):
    net = nn.Sequential(model, nn.Softmax(1)).to(dtype)
    with pytest.raises(ValueError, match="model returned probabilities"):
        PGD(EPS, EPS / 4, 1)(net, *balanced)


class Outputs(nn.Module):
    """A network whose blocks return tuples too, and which has a layer that it does not use."""

    def __init__(self, wrap):
        super().__init__()
        self.body, self.pair = nn.Conv2d(3, 4, 3), Wrapped(nn.Flatten(), lambda h: (h, h))
        self.aux, self.linear, self.wrap = nn.Linear(2, 2), nn.Linear(144, 5), wrap

    def forward(self, x):
        return self.wrap(self.linear(self.pair(self.body(x))[0]))


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_features_of_any_model(balanced, wrap, dtype):
    net, (x, _) = Outputs(wrap).to(dtype), balanced
    logits, found = forward_features(net, x, ("body", "penultimate", "logits"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        body = net.body(x.to(dtype))
        expected = {"body": body, "penultimate": body.flatten(1)}
        expected["logits"] = net.linear(body.flatten(1))
    for name, features in found.items():
        assert features.dtype == wide
        assert torch.equal(features, expected[name].to(wide))
    assert logits is found["logits"]
    assert logits.requires_grad


def test_features_name_what_is_wrong(balanced):
    net, (x, _) = Outputs(lambda z: z), balanced
    net.aux, net.linear = net.linear, nn.Sequential(nn.Linear(144, 5), nn.Identity())
    for names, error, match in (
        (("pair",), TypeError, "layer 'pair' returns a tuple, must be a tensor"),
        (("aux",), ValueError, "layer is 'aux', which the network does not call"),
        ("body", TypeError, "names is 'body', must be a list or tuple of names"),
        (("head",), ValueError, "layer is 'head', must be penultimate, logits or a module"),
    ):
        with pytest.raises(error, match=match):
            forward_features(net, x, names)
    with pytest.raises(TypeError, match="model is a function, must be a torch.nn.Module"):
        forward_features(lambda v: v, x, ("logits",))
    with pytest.raises(TypeError, match="x is a list, must be a tensor"):
        forward_features(net, x.tolist(), ("logits",))
    with pytest.raises(TypeError, match="model returned a dict of 'z'.* must return logits"):
        forward_features(Wrapped(net, lambda z: {"z": z}), x, ("body",))


def test_features_leave_no_hook_behind(balanced):
    net, (x, _) = Outputs(lambda z: z), balanced
    forward_features(net, x, ("body", "penultimate"))
    for bad in (("body", "head"), ("body", "pair")):
        with pytest.raises((ValueError, TypeError)):
            forward_features(net, x, bad)
    assert not any(hooked(module) for module in net.modules())
