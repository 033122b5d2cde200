import pytest
import torch
import torch.nn.functional as F

from fastadv import losses


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 10, generator=g), torch.randn(4, 10, generator=g)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
def test_kl_is_torchs(logits, reduction):
    student, teacher = logits
    log_p, q = F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1)
    expected = F.kl_div(log_p, q, reduction=reduction)
    expected = expected.sum(1) if reduction == "none" else expected
    torch.testing.assert_close(losses.kl(student, teacher, 4.0, reduction), expected)


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean"])
def test_kl_of_an_empty_batch_is_zero(reduction):
    student = torch.zeros(0, 10, requires_grad=True)
    loss = losses.kl(student, torch.zeros(0, 10), reduction=reduction)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].shape == (0, 10)


def test_kl_asks_for_the_gradients_that_autograd_needs(logits):
    student, teacher = logits
    assert not losses.kl(student, teacher).requires_grad
    teacher.requires_grad_()
    losses.kl(student, teacher).backward()
    with torch.no_grad():
        assert not losses.kl(student, teacher).requires_grad
    student.requires_grad_()
    losses.kl(student, teacher.detach()).backward()
    assert student.grad is not None


def test_kl_in_half_precision_survives_a_loss_scale(logits):
    """The gradient of a mean over 2048 x 10 is subnormal in float16 until GradScaler multiplies."""
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = (t.repeat(512, 1).to(dtype) for t in logits)
        student.requires_grad_()
        loss = losses.kl(student, teacher, reduction="mean")
        assert loss.dtype == torch.float32
        (got,) = torch.autograd.grad(2.0**16 * loss, student)
        wide = student.detach().double().requires_grad_()
        exact_loss = losses.kl(wide, teacher.double(), reduction="mean")
        (exact,) = torch.autograd.grad(2.0**16 * exact_loss, wide)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_kl_errors_name_the_argument(logits):
    student, teacher = logits

    def fails(error, match, *args, **options):
        with pytest.raises(error, match=match):
            losses.kl(*(args or (student, teacher)), **options)

    fails(
        ValueError, r"teacher_logits has shape \(4, 9\), must be \(4, 10\)", student, teacher[:, :9]
    )
    fails(ValueError, r"student_logits has shape \(10,\), must be \[B, C\]", student[0], teacher[0])
    fails(
        ValueError, r"student_logits has shape \(4, 0\), .* C > 0", student[:, :0], teacher[:, :0]
    )
    fails(
        TypeError,
        "teacher_logits is torch.float64, must be torch.float32",
        student,
        teacher.double(),
    )
    fails(
        TypeError,
        "student_logits is torch.int64, must be a floating",
        student.long(),
        teacher.long(),
    )
    fails(ValueError, "teacher_logits is on meta, must be on cpu", student, teacher.to("meta"))
    fails(ValueError, "reduction is 'avg', must be in", reduction="avg")
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        fails(ValueError, f"temperature is {temperature}, must be", temperature=temperature)
    fails(ValueError, r"weight has shape \(4, 1\), must be \(4,\)", weight=torch.ones(4, 1))
    double = torch.ones(4).double()
    fails(TypeError, "weight is torch.float64, must be torch.float32", weight=double)
