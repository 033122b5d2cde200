"""Any op, dtype and layout, differentiated in any way people know: right or refused, never else.

A call is drawn, run, and compared with plain torch in float64. What may be refused is written down
in `may_refuse`: a refusal that it does not know fails, as a wrong number does.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastadv import losses, ops
from fastadv.testing import laid_out

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "permuted", "offset", "strided", "expanded", "empty")
PATTERNS = (
    "forward",
    "first order",
    "retain_graph",
    "create_graph",
    "func.grad",
    "vmap",
    "jvp",
    "autocast",
    "inference_mode",
    "compiled",
)
# Relative to the largest value: of results in this dtype, and of those that rounded gradients make.
ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
STEP = {"eps": 0.1, "step_size": 0.03}


def labels(z):
    return torch.arange(len(z)) * 3 % max(z.shape[1], 1)


def runner_up(z, y):
    return z.scatter(1, y[:, None], -math.inf).max(1).values


def margin(z):
    y = labels(z)
    return runner_up(z, y) - z.gather(1, y[:, None])[:, 0]


def dlr(z):
    top = z.sort(1, descending=True).values
    return margin(z) / (top[:, 0] - top[:, 2] + 1e-12)


def mart_bce(z):
    y, q = labels(z), z.softmax(1)
    rest = 1.0001 - runner_up(q, y) + 1e-12
    return -z.log_softmax(1).gather(1, y[:, None])[:, 0] - rest.log()


def kl(s, t):
    terms = F.kl_div(
        (s / 3).log_softmax(1), (t / 3).log_softmax(1), reduction="none", log_target=True
    )
    return terms.sum(1)


def pairs(adv, clean):
    """What `losses.ikl` is, over all pairs of classes."""
    weight = torch.linspace(0, 1, adv.shape[1]).to(adv)
    soft = -(clean.detach().softmax(1) * adv.log_softmax(1)).sum() / max(len(adv), 1)
    d = clean - adv
    squares = (weight * weight[:, None] * (d[:, :, None] - d[:, None]).square()).sum()
    return 4 * soft + 5 * squares / (max(len(adv), 1) * weight.sum().square())


def ikl(adv, clean):
    weight = torch.linspace(0, 1, adv.shape[1]).expand(adv.shape)
    return losses.ikl(adv, clean, weight)


def cross_entropy(z):
    return F.cross_entropy(z, labels(z), label_smoothing=0.1, reduction="none")


def pgd_step(x_adv, grad, x):
    moved = x_adv + STEP["step_size"] * grad.sign()
    return (x + (moved - x).clamp(-STEP["eps"], STEP["eps"])).clamp(0, 1)


def batch_norm(x, residual):
    return F.batch_norm(x, None, None, training=True) + residual


NORMS = {dtype: nn.BatchNorm2d(3).to(dtype) for dtype in (torch.float32, torch.float64)}


def fused_batch_norm(x, residual):
    norm = NORMS[torch.promote_types(x.dtype, torch.float32)]
    return ops.batch_norm(norm, x, residual=residual)  # a ReLU's slope near 0 is rounding's


def in_place_step(x_adv, grad, x):
    """As somebody's loop has it: the step overwrites a copy."""
    return ops.pgd_step_(x_adv.detach().clone(), grad, x, **STEP)


# {name: (ours, the same in plain torch, how many tensors it takes, whether they are images)}
CALLS = {
    "kl": (lambda s, t: losses.kl(s, t, 3.0, "none"), kl, 2, False),
    "kl, mean": (losses.kl, lambda s, t: kl(3 * s, 3 * t).sum() / max(len(s), 1), 2, False),
    "ikl": (ikl, pairs, 2, False),
    "cross_entropy": (
        lambda z: losses.cross_entropy(z, labels(z), 0.1, "none"),
        cross_entropy,
        1,
        False,
    ),
    "cross_entropy, mean": (
        lambda z: losses.cross_entropy(z, labels(z), 0.1),
        lambda z: cross_entropy(z).sum() / max(len(z), 1),
        1,
        False,
    ),
    "entropy": (
        losses.entropy,
        lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1),
        1,
        False,
    ),
    "margin": (lambda z: losses.margin(z, labels(z)), margin, 1, False),
    "dlr": (lambda z: losses.dlr(z, labels(z)), dlr, 1, False),
    "mart_bce": (lambda z: losses.mart_bce(z, labels(z), "none"), mart_bce, 1, False),
    "mse": (
        lambda s, t: losses.feature(s, t, "mse", "none"),
        lambda s, t: (s - t).flatten(1).square().sum(1) / max(s[0:1].numel(), s.shape[1:].numel()),
        2,
        True,
    ),
    "l2": (
        lambda s, t: losses.feature(s, t, "l2", "none"),
        lambda s, t: (s - t).flatten(1).norm(dim=1),
        2,
        True,
    ),
    "cosine": (
        lambda s, t: losses.feature(s, t, "cosine", "none"),
        lambda s, t: 1 - F.cosine_similarity(s.flatten(1), t.flatten(1)),
        2,
        True,
    ),
    "batch_norm": (fused_batch_norm, batch_norm, 2, True),
    "pgd_step": (lambda *v: ops.pgd_step(*v, **STEP), pgd_step, 3, True),
    "pgd_step_": (in_place_step, pgd_step, 3, True),
}
NO_GRADIENT = ("pgd_step", "pgd_step_")


def may_refuse(name, dtype, layout, pattern, error):
    """Whether this call is one that torch or fastadv refuses by design, and says so."""
    text = str(error)
    if name == "pgd_step_" and pattern == "vmap":
        return True  # what it overwrites lies in no batch
    if name in NO_GRADIENT and dtype in (torch.bfloat16, torch.float16):
        return isinstance(error, TypeError) and "must be torch.float32" in text
    if pattern == "jvp" and layout == "expanded":
        return "more than one element of the written-to tensor" in text  # torch's own
    if name == "batch_norm" and pattern in ("vmap", "jvp", "func.grad"):  # of torch's module
        return "Batch norm got a batched tensor" in text or "call in-place operation" in text
    if name == "batch_norm" and layout == "empty":
        return "Expected more than 1 value per channel" in text or "must be" in text
    if pattern == "compiled":
        return "double backward" in text
    return False


def tensors(name, dtype, layout, seed):
    """The call's inputs; images in [0, 1], logits of ten classes."""
    count, images = CALLS[name][2:]
    g = torch.Generator().manual_seed(seed)
    batch = 0 if layout == "empty" else 5
    shape = (batch, 3, 4, 4) if images else (batch, 10)
    found = []
    for _ in range(count):
        values = torch.rand(shape, generator=g) if images else 3 * torch.randn(shape, generator=g)
        if layout == "expanded" and found:
            values = values[:1].expand(shape)  # what is constant over the batch
            found.append(values.to(dtype)[:1].expand(shape))
            continue
        found.append(laid_out(values.to(dtype), layout))
    return found


def weighted(output):
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum()


def differentiated(function, inputs, pattern):
    """What `pattern` makes of a call, as a list of tensors."""
    if pattern == "forward":
        return [function(*inputs)]
    if pattern == "inference_mode":
        with torch.inference_mode():
            return [function(*(t.clone(memory_format=torch.preserve_format) for t in inputs))]
    if pattern == "vmap":
        return [torch.vmap(function)(*(torch.stack([t, t * 0.5]) for t in inputs))]
    if pattern == "jvp":
        return list(torch.func.jvp(function, tuple(inputs), tuple(t * 0.5 for t in inputs)))
    if pattern == "func.grad":
        every = tuple(range(len(inputs)))
        return list(torch.func.grad(lambda *v: weighted(function(*v)), every)(*inputs))
    if pattern == "compiled":
        torch.compiler.reset()
        function = torch.compile(function, backend="aot_eager")
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=pattern == "autocast"):
        loss = weighted(function(*leaves))
    if not loss.requires_grad:
        return [loss]
    twice = pattern == "create_graph"
    gradients = torch.autograd.grad(
        loss, leaves, create_graph=twice, retain_graph=twice or pattern == "retain_graph"
    )
    if pattern == "retain_graph":
        again = torch.autograd.grad(loss, leaves)
        assert all(map(torch.equal, gradients, again)), "the second backward pass differs"
    if not twice:
        return list(gradients)
    penalty = sum(weighted(g.square()) for g in gradients)
    if not penalty.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    return list(torch.autograd.grad(penalty, leaves, materialize_grads=True))


def check(name, dtype, layout, pattern, seed):
    ours, theirs, *_ = CALLS[name]
    if name in NO_GRADIENT and pattern not in ("forward", "inference_mode", "vmap"):
        pattern = "forward"
    inputs = tensors(name, dtype, layout, seed)
    plain = "first order" if pattern in ("autocast", "compiled", "retain_graph") else pattern
    # Half the digits of a half are gone before torch's own formula is through: it is asked in fp32.
    narrow = [t.to(torch.promote_types(t.dtype, torch.float32)).contiguous() for t in inputs]
    wanted, same = (
        differentiated(theirs, [t.to(kind) for t in narrow], plain)
        for kind in (torch.float64, narrow[0].dtype)
    )
    try:
        got = differentiated(ours, inputs, pattern)
    except (TypeError, ValueError, RuntimeError) as error:
        if may_refuse(name, dtype, layout, pattern, error):
            return
        raise
    for values in zip(got, wanted, same, strict=True):
        assert_close(*values, ROUNDING[dtype] * (16 if pattern == "create_graph" else 1))


def assert_close(got, exact, same, share):
    """Within this share of the largest value, and four times what torch errs in fp32."""
    assert got.shape == exact.shape
    scale = exact.abs().max().item() if exact.numel() else 0.0
    if scale > torch.finfo(got.dtype).max or not exact.numel():
        return
    bound = share * scale + 4 * (same.double() - exact).abs().max().item() + 1e-13
    error = (got.double() - exact).abs().max().item()
    assert error <= bound, f"differs by {error:.3g}, of values up to {scale:.3g}"


def fuzz(examples):
    """The test over so many drawn calls."""

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(
        name=st.sampled_from(sorted(CALLS)),
        dtype=st.sampled_from(FLOATS),
        layout=st.sampled_from(LAYOUTS),
        pattern=st.sampled_from(PATTERNS),
        seed=st.integers(0, 99),
    )
    def drawn(name, dtype, layout, pattern, seed):
        check(name, dtype, layout, pattern, seed)

    return drawn


@pytest.mark.filterwarnings("ignore:.*deprecated.*", "ignore:.*performance drop.*")
def test_right_or_refused():
    fuzz(200)()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated.*", "ignore:.*performance drop.*")
def test_right_or_refused_in_2000_cases():
    fuzz(2000)()
