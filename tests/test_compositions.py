"""Losses inside what people build of them: gradients of gradients, torch.func, autocast."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadv import losses

G = torch.Generator().manual_seed(0)
TEACHER = torch.randn(6, 10, generator=G)
Y = torch.randint(10, (6,), generator=G)
WEIGHT = torch.rand(6, 10, generator=G, dtype=torch.float64)
FEATURES = torch.randn(6, 10, generator=G)


def mart_bce(z):
    q = z.softmax(1)
    other = q.scatter(1, Y[:, None], -1).max(1).values
    return (-q.gather(1, Y[:, None])[:, 0].log() - (1.0001 - other + 1e-12).log()).mean()


def dlr(z):
    top = z.sort(1, descending=True).values
    other = z.scatter(1, Y[:, None], -torch.inf).max(1).values
    return ((other - z.gather(1, Y[:, None])[:, 0]) / (top[:, 0] - top[:, 2] + 1e-12)).sum()


def kl(z):
    log_q = (TEACHER.to(z) / 2).log_softmax(1)
    return F.kl_div((z / 2).log_softmax(1), log_q, reduction="batchmean", log_target=True)


def pairs(adv, clean):
    """What `losses.ikl` is, over all pairs of classes."""
    soft = -(clean.detach().softmax(1) * adv.log_softmax(1)).sum(1).mean()
    gaps = (clean - adv)[:, :, None] - (clean - adv)[:, None]
    return 4 * soft + 5 * (WEIGHT[:, :, None] * WEIGHT[:, None] * gaps.square()).sum() / (
        WEIGHT.sum(1).square().sum()
    )


# {loss: (ours, the same in torch's own functions)}, both of logits [6, 10].
LOSSES = {
    "kl": (lambda z: losses.kl(z, TEACHER.to(z), 2.0), kl),
    "kl, to its teacher": (
        lambda z: losses.kl(TEACHER.to(z), z, 2.0),
        lambda z: (
            F.kl_div((TEACHER.to(z) / 2).log_softmax(1), (z / 2).softmax(1), reduction="sum") / 6
        ),
    ),
    "cross_entropy": (lambda z: losses.cross_entropy(z, Y), lambda z: F.cross_entropy(z, Y)),
    "cross_entropy, smoothed": (
        lambda z: losses.cross_entropy(z, Y, 0.1),
        lambda z: F.cross_entropy(z, Y, label_smoothing=0.1),
    ),
    "cross_entropy, soft": (
        lambda z: losses.cross_entropy(z, TEACHER.softmax(1).to(z)),
        lambda z: F.cross_entropy(z, TEACHER.softmax(1).to(z)),
    ),
    "entropy": (
        lambda z: losses.entropy(z, reduction="mean"),
        lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
    ),
    "ikl": (
        lambda z: losses.ikl(z, 0.5 * z.flip(1), WEIGHT),
        lambda z: pairs(z, 0.5 * z.flip(1)),
    ),
    "mart_bce": (lambda z: losses.mart_bce(z, Y), mart_bce),
    "dlr": (lambda z: losses.dlr(z, Y, "sum"), dlr),
    "mse": (
        lambda z: losses.feature(z, FEATURES.to(z)),
        lambda z: (z - FEATURES.to(z)).square().mean(1).mean(),
    ),
    "l2": (
        lambda z: losses.feature(z, FEATURES.to(z), "l2"),
        lambda z: (z - FEATURES.to(z)).norm(dim=1).mean(),
    ),
    "cosine": (
        lambda z: losses.feature(z, FEATURES.to(z), "cosine"),
        lambda z: (1 - F.cosine_similarity(z, FEATURES.to(z))).mean(),
    ),
}
each = pytest.mark.parametrize("name", LOSSES)


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 10)).to(dtype)


def penalised(loss, dtype):
    """Gradients of the parameters of ||d loss / d input||^2: input-gradient regularisation."""
    model, x = network(dtype), torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x)), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), list(model.parameters()))


@each
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_gradient_regularisation(name, dtype, rtol):
    ours, theirs = LOSSES[name]
    for got, wanted in zip(penalised(ours, dtype), penalised(theirs, torch.float64), strict=True):
        assert (got - wanted).abs().max() <= rtol * wanted.abs().max()


@each
def test_one_step_of_maml(name):
    """Through a gradient step of the parameters, and through two."""

    def after(loss):
        weight = network(torch.float64)[2].weight.detach().requires_grad_()
        x, moved = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)).double(), weight
        for _ in range(2):
            (step,) = torch.autograd.grad(loss(x @ moved.T), moved, create_graph=True)
            moved = moved - 0.3 * step
        return torch.autograd.grad(loss(x @ moved.T), weight)[0]

    got, wanted = map(after, LOSSES[name])
    assert (got - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@each
def test_create_graph_gives_the_first_order_gradient(name):
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss = LOSSES[name][0](z)
    (plain,) = torch.autograd.grad(loss, z, retain_graph=True)
    (kept,) = torch.autograd.grad(loss, z, create_graph=True)
    torch.testing.assert_close(kept, plain, rtol=2e-5, atol=1e-7)


@each
def test_torch_func(name):
    """Gradients, per-sample gradients of a network's parameters, Hessians; without a warning."""
    ours, theirs = LOSSES[name]
    model = network(torch.float64)
    parameters = dict(model.named_parameters())
    x = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(4)).double()

    def objective(loss):
        return lambda p, x: loss(torch.func.functional_call(model, p, x))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        got = torch.vmap(torch.func.grad(objective(ours)), (None, 0))(parameters, x)
        z = torch.randn(6, 10, generator=torch.Generator().manual_seed(5)).double()
        hessian = torch.func.hessian(ours)(z)
    for key, wanted in torch.func.grad(objective(theirs))(parameters, x[1]).items():
        torch.testing.assert_close(got[key][1], wanted)
    torch.testing.assert_close(hessian, torch.func.hessian(theirs)(z))


@each
def test_forward_mode_sees_tangents(name):
    """Also of inputs that require no gradient, whose tangent would be lost in silence."""
    z, tangent = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(6)).double()
    derivatives = []
    for loss in LOSSES[name]:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(z, tangent)
            derivatives.append(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent)
    torch.testing.assert_close(*derivatives)


@pytest.mark.parametrize("distance", ["mse", "l2", "cosine"])
def test_second_derivatives_at_features_without_direction(distance):
    """Equal features, and zero ones, have gradient 0; differentiating it again leaves no NaN."""
    student = torch.randn(4, 7, dtype=torch.float64, generator=G)
    teacher = student.clone()
    student[1], teacher[2], teacher[3] = 0, 0, teacher[3] + 1
    student.requires_grad_()
    loss = losses.feature(student, teacher, distance)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), student)
    assert first.isfinite().all()
    assert second.isfinite().all()
    (again,) = torch.autograd.grad(losses.feature(student[3:], teacher[3:], distance), student)
    torch.testing.assert_close(first[3], again[3] / 4)


def test_losses_refuse_what_is_no_tensor():
    z = torch.randn(3, 10)
    for call, name in (
        (lambda v: losses.kl(v, z), "student_logits"),
        (lambda v: losses.kl(z, v), "teacher_logits"),
        (lambda v: losses.ikl(v, z), "adv_logits"),
        (lambda v: losses.ikl(z, v), "clean_logits"),
        (lambda v: losses.ikl(z, z, v), "weight"),
        (lambda v: losses.cross_entropy(v, Y[:3]), "logits"),
        (lambda v: losses.cross_entropy(z, v), "target"),
        (lambda v: losses.margin(v, Y[:3]), "logits"),
        (lambda v: losses.dlr(v, Y[:3]), "logits"),
        (lambda v: losses.dlr_targeted(v, Y[:3], Y[:3]), "logits"),
        (lambda v: losses.mart_bce(v, Y[:3]), "logits"),
        (lambda v: losses.entropy(v), "logits"),
        (lambda v: losses.feature(z, v), "teacher_features"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is a dict, must be a tensor"):
            call({"logits": z})


def test_constants_may_be_overwritten_or_made_in_inference_mode():
    """A teacher's buffer that the next batch is read into; but no second order of stale values."""
    z = torch.randn(6, 10, requires_grad=True)
    with torch.inference_mode():
        teacher = TEACHER.clone()
    expected = torch.autograd.grad(losses.kl(z, TEACHER), z)[0]
    assert torch.equal(torch.autograd.grad(losses.kl(z, teacher), z)[0], expected)
    with pytest.raises(RuntimeError, match="overwritten since, or made in inference mode"):
        torch.autograd.grad(losses.kl(z, teacher), z, create_graph=True)
    buffer = TEACHER.clone()
    loss = losses.kl(z, buffer)
    buffer.zero_()
    assert torch.equal(torch.autograd.grad(loss, z, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="an argument of softmax_kl was overwritten since"):
        torch.autograd.grad(loss, z, create_graph=True)


@each
def test_non_reentrant_checkpoints_unpack_each_tensor_once(name):
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(7)).requires_grad_()
    loss = LOSSES[name][0]
    kept = torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (kept, loss(z))))


def test_probabilities_that_require_grad_are_refused():
    z, q = torch.randn(6, 10), TEACHER.softmax(1).requires_grad_()
    for name, call in (("target", losses.cross_entropy), ("y", losses.mart_bce)):
        with pytest.raises(ValueError, match=f"{name} requires grad, must be a constant"):
            call(z, q)


def test_ignored_rows_and_lone_classes_have_no_gradient_under_torch_func():
    z, y = torch.randn(3, 10), torch.tensor([1, -100, 2])
    z[1] = torch.nan
    gradient = torch.func.grad(lambda z: losses.cross_entropy(z, y))(z)
    assert not gradient[1].any()
    assert gradient[0].any()
    lone = torch.func.grad(lambda z: losses.margin(z, Y[:3] * 0).sum())(z[[0, 2, 2], :1])
    assert not lone.any()
