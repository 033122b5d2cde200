"""Arguments of the wrong kind: one sentence that names the argument, from every attack."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastadv.attacks import APGD, CW, DDN, FAB, FGSM, FMN, PGD, DeepFool, Square, suite
from fastadv.attacks.checks import check_budget

EPS = 8 / 255
ATTACKS = {
    "pgd": PGD(EPS, EPS / 4, 2),
    "restarts": PGD(EPS, EPS / 4, 2, restarts=2),
    "apgd": APGD(EPS, 2),
    "fab": FAB(EPS, 2),
    "square": Square(EPS, 3),
    "deepfool": DeepFool(2),
    "cw": CW(2, 1),
    "ddn": DDN(2),
    "fmn": FMN(2),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


@pytest.fixture
def batch(net):
    x = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, net(x).argmax(1)


def same(attack, net, x, y, **options):
    torch.manual_seed(5)
    return attack(net, x, y, **options)


@pytest.mark.parametrize("name", ATTACKS)
def test_images_labels_and_ids_are_named(net, batch, name):
    (x, y), ids = batch, torch.arange(4)
    for (images, labels, index), error, match in (
        ((x.numpy(), y, None), TypeError, "x is a ndarray, must be a tensor"),
        ((x.tolist(), y, None), TypeError, "x is a list, must be a tensor"),
        ((None, y, None), TypeError, "x is None, must be a tensor"),
        ((x.half(), y, None), TypeError, "x is torch.float16, must be torch.float32 or torch.fl"),
        ((torch.rand(()), y, None), ValueError, r"x has shape \(\), must be \[B, ...\]"),
        ((x, y.numpy(), None), TypeError, "y is a ndarray, must be a tensor"),
        ((x, y.tolist(), None), TypeError, "y is a list, must be a tensor"),
        ((x, "0", None), TypeError, "y is '0', must be a tensor"),
        ((x, y.bool(), None), ValueError, r"y is torch.bool \(4,\), must be torch.int64 \(4,\)"),
        ((x, y[:, None], None), ValueError, r"y is torch.int64 \(4, 1\), must be torch.int64 \(4,"),
        (
            (x[0], y[:1], None),
            ValueError,
            r"y is .* for x of shape \(3, 4, 4\), which is taken for",
        ),
        ((x, y * 0 - 1, None), ValueError, r"y has labels from -1 to -1, must be in \[0, 4\]"),
        ((x, y * 0 - 100, None), ValueError, "y has labels from -100 to -100, must be in"),
        ((x, y * 0 + 5, None), ValueError, r"y has labels from 5 to 5, must be in \[0, 4\]"),
        ((x, y, [0, 1, 2, 3]), TypeError, "index is a list, must be a tensor"),
        ((x, y, np.arange(4)), TypeError, "index is a ndarray, must be a tensor"),
        ((x, y, ids.float()), TypeError, "index is torch.float32, must be torch.int64"),
        ((x, y, ids[:3]), ValueError, r"index has shape \(3,\), must be \(4,\)"),
        ((x, y, ids[:, None]), ValueError, r"index has shape \(4, 1\), must be \(4,\)"),
        ((x, y.to("meta"), None), ValueError, "y is on meta, must be on cpu"),
        ((x, y, ids.to("meta")), ValueError, "index is on meta, must be on cpu"),
    ):
        with pytest.raises(error, match=match):
            ATTACKS[name](net, images, labels, index=index)


@pytest.mark.parametrize("name", ATTACKS)
def test_models_are_named(net, batch, name):
    x, y = batch

    class Numbered(nn.Module):
        def forward(self, v):
            return net(v).long()

    for model, error, match in (
        (None, TypeError, "model is None, must be a torch.nn.Module"),
        ("resnet18", TypeError, "model is 'resnet18', must be a torch.nn.Module"),
        (net.forward, TypeError, "model is a method, must be a torch.nn.Module"),
        (Numbered(), TypeError, "model returned torch.int64, must return logits in floating point"),
        (nn.Sequential(net, nn.Unflatten(1, (5, 1))), ValueError, r"returned shape \(\d, 5, 1\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), ValueError, r"logits has shape \(\d, 1\)"),
    ):
        with pytest.raises(error, match=match):
            ATTACKS[name](model, x, y * 0)


@pytest.mark.parametrize("name", [n for n in ATTACKS if n != "square"])
def test_a_model_without_a_gradient_is_named(net, batch, name):
    class Opaque(nn.Module):
        def forward(self, v):
            return net(v.detach())

    class Apart(nn.Module):
        """With a gradient, but none to the images."""

        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(5))

        def forward(self, v):
            return net(v.detach()) + self.bias

    for model in (Opaque(), Apart()):
        with pytest.raises(
            RuntimeError, match="model has no gradient to its images, .*Square need"
        ):
            ATTACKS[name](model, *batch)
        assert Square(EPS, 3)(model, *batch).shape == batch[0].shape


@pytest.mark.parametrize("name", ATTACKS)
def test_labels_and_ids_of_any_integer_type(net, batch, name):
    (x, y), ids = batch, torch.arange(90, 94)
    expected = same(ATTACKS[name], net, x, y, index=ids)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        assert torch.equal(same(ATTACKS[name], net, x, y.to(dtype), index=ids), expected)
        assert torch.equal(same(ATTACKS[name], net, x, y, index=ids.to(dtype)), expected)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 3, 0, 4)])
def test_nothing_to_attack_is_given_back(net, name, shape):
    """Without a call of the model, which may not take it; `bad_gradients` is of this call."""
    attack, x = ATTACKS[name], torch.rand(shape)
    attack.bad_gradients = torch.tensor(7)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    x_adv = attack(net, x, torch.zeros(len(x), dtype=torch.int64))
    assert x_adv.shape == shape
    assert x_adv is not x
    assert not calls
    assert name == "square" or attack.bad_gradients == 0


COUNTS = {
    PGD: ("steps", "restarts"),
    APGD: ("steps", "restarts", "target_classes"),
    FAB: ("steps", "restarts", "target_classes"),
    Square: ("queries", "restarts"),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_counts_are_whole(kind):
    for name in COUNTS[kind]:
        for value, given in (
            (2.5, "2.5"),
            (2.0, "2.0"),
            (True, "True"),
            ("3", "'3'"),
            (None, "None"),
            ([3], "a list"),
            (torch.tensor(3), r"a tensor \[\]"),
        ):
            if (kind, name, value) == (FAB, "target_classes", None):  # FAB's untargeted form
                continue
            with pytest.raises(TypeError, match=f"{name} is {given}, must be a whole number"):
                kind(**{name: value})
        with pytest.raises(ValueError, match=f"{name} is -1, must be at least"):
            kind(**{name: -1})
        assert kind(**{name: np.int64(2)}) == kind(**{name: 2})


NUMBERS = {
    PGD: ("eps", "step_size", "sigma", "lo", "hi"),
    APGD: ("eps", "rho", "lo", "hi"),
    FAB: ("eps", "lo", "hi"),
    Square: ("eps", "p_init", "lo", "hi"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_numbers(kind):
    for name in NUMBERS[kind]:
        for value, given in (
            ("8/255", "'8/255'"),
            (None, "None"),
            ([0.1], "a list"),
            (True, "True"),
            (1j, "1j"),
            (np.ones(2), "a ndarray"),
        ):
            with pytest.raises(TypeError, match=f"{name} is {given}, must be a number"):
                kind(**{name: value})
        told = f"{name} is nan, must be" if name != "hi" else "lo is 0.0, must be below hi, nan"
        with pytest.raises(ValueError, match=told):
            kind(**{name: math.nan})
    assert kind(eps=np.float32(0.25)) == kind(eps=torch.tensor(0.25)) == kind(eps=0.25)


@pytest.mark.parametrize("kind", NUMBERS)
def test_names_are_names(kind):
    for value, given in (("l0", "'l0'"), (None, "None"), (["linf"], "a list"), (2, "2")):
        with pytest.raises(ValueError, match=f"norm is {given}, must be one of linf, l2, l1"):
            kind(norm=value)
    for name in {PGD: ("init", "keep"), APGD: ("loss",)}.get(kind, ()):
        for value, given in ((None, "None"), (["ce"], "a list"), (nn.MSELoss(), "a MSELoss")):
            with pytest.raises(ValueError, match=f"{name} is {given}, must be one of "):
                kind(**{name: value})


@pytest.mark.parametrize("kind", NUMBERS)
def test_boxes_and_balls_make_sense(kind):
    for options, match in (
        ({"lo": 1.0, "hi": 0.0}, "lo is 1.0, must be below hi, 0.0"),
        ({"lo": 0.5, "hi": 0.5}, "lo is 0.5, must be below hi, 0.5"),
        ({"eps": math.inf, "norm": "l2"}, "eps is inf, must be at least 0 and finite"),
        ({"eps": -1.0, "norm": "l2"}, "eps is -1.0, must be at least 0"),
        ({"eps": 8, "hi": math.inf}, r"eps is 8, must be in \[0, 1.0\] .did you mean 8/255"),
        ({"eps": 1.5}, r"eps is 1.5, must be in \[0, 1.0\]"),
        ({"eps": -0.1}, r"eps is -0.1, must be in \[0, 1.0\]$"),
    ):
        if not (kind is FAB and "hi" in options and options["hi"] == math.inf):
            with pytest.raises(ValueError, match=match):
                kind(**options)
    attack = kind(eps=3, norm="l2", lo=-2, hi=2)
    assert (attack.eps, attack.lo, attack.hi) == (3, -2, 2)
    check_budget(attack)


def test_fab_needs_walls():
    for options, match in (({"hi": math.inf}, "hi is inf"), ({"lo": -math.inf}, "lo is -inf")):
        with pytest.raises(ValueError, match=f"{match}, must be finite"):
            FAB(**options)


def test_steps_of_pgd_have_a_length():
    for step_size in (0.0, -0.1, math.inf):
        with pytest.raises(ValueError, match=f"step_size is {step_size}, must be positive and fin"):
            PGD(0.1, step_size)
    assert PGD(0.0, 0.0).step_size == 0
    with pytest.raises(ValueError, match="sigma is -0.1, must be at least 0 and finite"):
        PGD(sigma=-0.1)
    for clip in ("no", 0, torch.ones(2)):
        with pytest.raises(TypeError, match="clip_start is .*, must be True, False or None"):
            PGD(clip_start=clip)


def test_objectives_of_pgd_are_named(net, batch):
    (x, y), attack = batch, ATTACKS["pgd"]
    z = torch.randn(4, 5)
    for options, error, match in (
        ({"y": y, "loss": ["ce"]}, ValueError, "loss is a list, must be one of ce, margin"),
        (
            {"y": y, "loss": nn.CrossEntropyLoss()},
            ValueError,
            "loss is a CrossEntropyLoss, must be",
        ),
        ({"target_logits": z.tolist()}, TypeError, "target_logits is a list, must be a tensor"),
        ({"target_logits": y}, ValueError, r"target_logits is torch.int64 \(4,\), must be logits"),
        (
            {"target_logits": z[0]},
            ValueError,
            r"target_logits is torch.float32 \(5,\), must be log",
        ),
        ({"target_logits": z[:, :4]}, ValueError, r"target_logits has shape \(4, 4\), must be \(4"),
        ({"target_logits": z[:3]}, ValueError, r"target_logits has shape \(3, 5\), must be \(4, 5"),
        ({"target_logits": z, "y": y[:3]}, ValueError, r"y is torch.int64 \(3,\), must be torch"),
        ({"target_logits": z, "y": y + 5}, ValueError, "y has labels from"),
    ):
        loss = {"loss": "kl"} if "target_logits" in options else {}
        with pytest.raises(error, match=match):
            attack(net, x, **loss | options)
    for start, error, match in (
        (x.tolist(), TypeError, "start is a list, must be a tensor"),
        (x.numpy(), TypeError, "start is a ndarray, must be a tensor"),
        (x[:3], ValueError, r"start has shape \(3, 3, 4, 4\), must be \(4, 3, 4, 4\)"),
        (x.half(), TypeError, "start is torch.float16, must be torch.float32"),
        (x.to("meta"), ValueError, "start is on meta, must be on cpu"),
    ):
        with pytest.raises(error, match=match):
            attack(net, x, y, start=start)


def test_ascend_names_what_it_is_given(net, batch):
    (x, _), attack = batch, ATTACKS["pgd"]

    def inner(v):
        return net(v).sum(1)

    for (objective, images, index), error, match in (
        ((inner, x, [0, 1, 2, 3]), TypeError, "index is a list, must be a tensor"),
        ((inner, x, torch.arange(3)), ValueError, r"index has shape \(3,\), must be \(4,\)"),
        ((inner, x.numpy(), None), TypeError, "x is a ndarray, must be a tensor"),
        (
            (lambda v: 3.0, x, None),
            TypeError,
            r"inner returned a float, must return a tensor \[B\]",
        ),
        ((lambda v: inner(v).detach(), x, None), RuntimeError, "no gradient to its images"),
    ):
        with pytest.raises(error, match=match):
            attack.ascend(objective, images, index=index)
    torch.manual_seed(5)
    expected = attack.ascend(inner, x, index=torch.arange(4))
    torch.manual_seed(5)
    assert torch.equal(attack.ascend(inner, x, index=torch.arange(4).int()), expected)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: suite.single("pgd-0", 0.1), ValueError, "attack is 'pgd-0': steps is 0, must be"),
        (lambda: suite.single("pgd-dlr-0-3", 0.1), ValueError, "attack is 'pgd-dlr-0-3': steps is"),
        (lambda: suite.single("pgd-10-0", 0.1), ValueError, "attack is 'pgd-10-0': restarts is 0"),
        (lambda: suite.stages("transfer-pgd-0", 0.1), ValueError, "attack is 'pgd-0': steps is 0"),
        (lambda: suite.single(None, 0.1), TypeError, "attack is None, must be a name"),
        (lambda: suite.stages([PGD()], 0.1), TypeError, "attack is PGD.*, must be a name"),
        (lambda: suite.stages([["aa"]], 0.1), TypeError, r"attack is \['aa'\], must be a name"),
        (lambda: suite.stages(None, 0.1), TypeError, "names is None, must be a list of attacks"),
        (lambda: suite.cascade("square", 0.1), TypeError, "names is 'square', must be a list of"),
        (lambda: suite.stages("aa", "8/255"), TypeError, "eps is '8/255', must be a number"),
        (
            lambda: suite.stages("aa", torch.rand(3)),
            TypeError,
            r"eps is a tensor \[3\], must be a n",
        ),
        (
            lambda: suite.stages("aa", 0.1, "l0"),
            ValueError,
            "norm is 'l0', must be one of linf, l2, l1",
        ),
        (
            lambda: suite.stages("aa", 0.1, None),
            ValueError,
            "norm is None, must be one of linf, l2, l1",
        ),
        (lambda: suite.stages("aa", 0), ValueError, r"eps is 0.0, must be in \(0, 1.0\]$"),
        (
            lambda: suite.stages("aa", 8),
            ValueError,
            r"eps is 8.0, must be in \(0, 1.0\] .did you me",
        ),
        (
            lambda: suite.stages("aa", 0, "l2"),
            ValueError,
            "eps is 0.0, must be positive and finite",
        ),
        (lambda: FGSM("8/255"), TypeError, "eps is '8/255', must be a number"),
    ],
)
def test_suites_name_what_they_are_given(make, error, match):
    with pytest.raises(error, match=match):
        make()
