"""The softmax_kl kernels by themselves; run by test_triton_interpret.py under the interpreter."""

import math

import pytest
import torch

from fastadv.kernels.softmax_kl import WIDEST_TILE, softmax_kl
from fastadv.testing import assert_close, guarded_memory

ALL = (True, True, True)


def plain(student, teacher, weight, temperature, reduction):
    """(loss, gradients) by the formulas, in the dtype given; rounded to the inputs' by `same`."""
    log_p = (student / temperature).log_softmax(1)
    log_q = (teacher / temperature).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    kl = torch.where(q == 0, 0, q * (log_q - log_p)).sum(1)
    batch, classes = student.shape
    factor = {"none": 1, "sum": 1, "batchmean": 1 / batch, "mean": 1 / (batch * classes)}[reduction]
    weight = torch.ones_like(kl) if weight is None else weight
    rows = weight * kl * factor
    scale = weight[:, None] * factor / temperature
    to_teacher = torch.where(q == 0, 0, q * (log_q - log_p - kl[:, None]))
    loss = rows if reduction == "none" else rows.sum()
    return loss, (p - q) * scale, to_teacher * scale, kl * factor


def logits(batch, classes, dtype=torch.float32, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, batch, classes, generator=g)).to(dtype)
    return student, teacher, torch.rand(batch, generator=g)


def check(student, teacher, weight, temperature=1.0, reduction="none"):
    exact = plain(student.double(), teacher.double(), None if weight is None else weight.double(),
                  temperature, reduction)  # fmt: skip
    same = plain(student.float(), teacher.float(), weight, temperature, reduction)
    with guarded_memory():
        got = softmax_kl(student, teacher, weight, temperature, reduction, *ALL)
    for i, dtype in enumerate((torch.float32, student.dtype, teacher.dtype, torch.float32)):
        assert_close(f"softmax_kl[{i}]", got[i], exact[i], same[i].to(dtype))


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 16, 17, 100, 1000, WIDEST_TILE, 4097, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(classes, dtype):
    student, teacher, weight = logits(67 if classes < WIDEST_TILE else 17, classes, dtype)
    check(student, teacher, weight, temperature=3.0)
    check(student, teacher, None)


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 31, 32, 33, 130])
@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean"])
def test_batches_and_reductions(batch, reduction):
    check(*logits(batch, 10), temperature=2.0, reduction=reduction)


@pytest.mark.parametrize("classes", [10, WIDEST_TILE + 900])
def test_gradients_not_asked_for_are_empty(classes):
    student, teacher, weight = logits(3, classes)
    loss, *full = softmax_kl(student, teacher, weight, 1.0, "none", *ALL)
    for i in range(3):
        asked = [i == j for j in range(3)]
        alone, *gradients = softmax_kl(student, teacher, weight, 1.0, "none", *asked)
        assert torch.equal(alone, loss)
        for j in range(3):
            assert torch.equal(gradients[j], full[j]) if asked[j] else gradients[j].shape == (0,)


@pytest.mark.parametrize("classes", [10, WIDEST_TILE + 900])
def test_layouts_change_nothing(classes):
    student, teacher, weight = logits(5, classes)
    expected = softmax_kl(student, teacher, weight, 1.0, "none", *ALL)
    wide = torch.full((5, 2 * classes + 3), math.nan)
    sliced = wide[:, 3 : classes + 3].copy_(student)
    columns = teacher.t().contiguous().t()
    weights = torch.stack([weight, weight], 1)[:, 0]
    got = softmax_kl(sliced, columns, weights, 1.0, "none", *ALL)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("classes", [12, WIDEST_TILE + 900])
def test_masked_classes_count_nothing(classes):
    student, teacher, weight = logits(3, classes)
    teacher[:, classes // 2 :] = -math.inf
    check(student, teacher, weight)
    student[:, classes // 2 :] = -math.inf
    check(student, teacher, weight)
    check(student.flip(1), teacher.flip(1), weight)  # a whole first block is masked


@pytest.mark.parametrize("classes", [10, WIDEST_TILE + 900])
@pytest.mark.parametrize("scale", [1e6, 1e30])
def test_large_logits_do_not_overflow(classes, scale):
    student, teacher, weight = logits(5, classes, scale=scale)
    check(student, teacher, weight)


@pytest.mark.parametrize("classes", [10, WIDEST_TILE + 900])
def test_nan_stays_in_its_row(classes):
    student, teacher, weight = logits(4, classes)
    clean = softmax_kl(student, teacher, weight, 1.0, "none", *ALL)
    student[1, 3] = teacher[2, 5] = math.nan
    dirty = softmax_kl(student, teacher, weight, 1.0, "none", *ALL)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[[0, 3]], b[[0, 3]])
    assert all(values[1:3].isnan().all() for values in dirty)


def test_empty_batch():
    loss, *gradients = softmax_kl(*logits(0, 10), 1.0, "sum", *ALL)
    assert loss == 0
    assert [g.shape for g in gradients] == [(0, 10), (0, 10), (0,)]
