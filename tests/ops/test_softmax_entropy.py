import math

import pytest
import torch
from wide_rows import WIDE

from fastadv import ops
from fastadv.ops import _native
from fastadv.ops.softmax_entropy import reference
from fastadv.testing import OpCase, assert_close, check_op, check_values, using_isa

HALVES = (torch.bfloat16, torch.float16)
OFFSETS = (0.0, 1e-5, 0.1)


def plain(logits, temperature, offset):
    log_q = (logits / temperature).log_softmax(dim=1)
    q = log_q.exp()
    return -(q * (log_q if offset == 0 else (q + offset).log())).sum(dim=1)


def make(batch, classes, temperature=1.0, offset=0.0, dtype=torch.float32, grad=True, spread=3.0):
    g = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(batch, classes, generator=g)).to(dtype)
    return OpCase(
        "softmax_entropy",
        (logits, temperature, offset, grad),
        public=lambda z: ops.softmax_entropy(z, temperature, offset),
        plain=lambda z: plain(z, temperature, offset),
        inputs=(0,),
    )


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_op(temperature, offset):
    check_op(make(9, 10, temperature, offset))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("classes", [1, 2, 7, 10, 16, 17, 33, 100, 1000])
def test_sizes(classes, offset, dtype):
    layouts = ("contiguous", "permuted", "offset", "strided")
    check_values(make(20, classes, 0.7, offset, dtype), layouts)
    check_values(make(1, classes, 0.7, offset, dtype, grad=False), ("contiguous",))


@pytest.mark.parametrize("classes", [4097, 9001])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_wider_than_the_stash(classes, offset, dtype):
    check_values(make(3, classes, 2.0, offset, dtype), ("permuted", "offset"))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("batch", [0, 1, 15, 16, 17, 3001])
def test_batches(batch, offset):
    check_values(make(batch, 10, 1.0, offset), ("contiguous",))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("spread", [1e-3, 0.1, 30.0])
def test_flat_and_sharp_rows(spread, offset):
    check_values(make(64, 10, 1.0, offset, spread=spread), ("contiguous",))
    check_values(make(64, 1000, 1.0, offset, spread=spread), ("contiguous",))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("offset", [0.0, 1e-5])
class TestExtremes:
    def check(self, logits, offset):
        exact = reference(logits.double(), 1.0, offset, True)
        same = reference(logits, 1.0, offset, True)
        got = torch.ops.fastadv.softmax_entropy(logits, 1.0, offset, True)
        for name, *parts in zip(("loss", "gradient"), got, exact, same, strict=True):
            assert_close(name, *parts)
        return got

    def test_large_logits_do_not_overflow(self, offset):
        logits = make(6, 17).args[0]
        logits[0, 3], logits[1, 4] = 1e4, -1e4
        logits[2] += 1e4
        logits[3] = 1e6 * logits[3]
        loss, grad = self.check(logits, offset)
        assert loss.isfinite().all()
        assert grad.isfinite().all()

    @pytest.mark.parametrize("classes", [10, 16, 40, 5000])
    def test_masked_classes_count_nothing(self, classes, offset):
        logits = make(4, classes).args[0]
        logits[:, 1::2] = -math.inf
        logits[3, 1:] = -math.inf
        loss, grad = self.check(logits, offset)
        assert not grad[:, 1::2].any()
        assert loss[3].item() == pytest.approx(-math.log(1 + offset), abs=1e-7)
        kept = ops.softmax_entropy(logits[:, ::2], offset=offset)
        torch.testing.assert_close(loss, kept, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("column", [0, 5, 16, 39])
    def test_nan_stays_in_its_row(self, column, offset):
        logits = make(20, 40).args[0]
        clean = torch.ops.fastadv.softmax_entropy(logits, 1.0, offset, True)
        logits[7, column] = math.nan
        others = torch.arange(20) != 7
        for a, b in zip(self.check(logits, offset), clean, strict=True):
            assert torch.equal(a[others], b[others])
            assert a[7].isnan().all()


def test_small_entropies_are_accurate():
    """Of a confident row, 1e-9 and below, which q log q in fp32 loses."""
    logits = torch.tensor([[25.0, 0.0, 0.0], [60.0, 0.0, -5.0]])
    exact = reference(logits.double(), 1.0, 0.0, False)[0]
    for isa in _native.isas():
        with using_isa(isa):
            got = ops.softmax_entropy(logits)
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_opcheck_of_a_grad_requiring_input():
    logits = make(4, 10).args[0]
    assert not ops.softmax_entropy(logits).requires_grad
    logits.requires_grad_()
    torch.library.opcheck(torch.ops.fastadv.softmax_entropy.default, (logits, 2.0, 1e-5, True))


def test_bad_arguments_name_themselves():
    logits = make(4, 10).args[0]

    def fails(error, match, *args):
        with pytest.raises(error, match=match):
            ops.softmax_entropy(*args)

    fails(ValueError, r"logits has shape \(10,\), must be \[B, C\]", logits[0])
    fails(ValueError, r"logits has shape \(4, 0\), must be .* C >= 1", logits[:, :0])
    fails(TypeError, r"logits is torch.int64", logits.long())
    for bad in (0.0, -1.0, math.nan, math.inf):
        fails(ValueError, f"temperature is {bad}, must be positive", logits, bad)
    for bad in (-1e-5, math.nan, math.inf):
        fails(ValueError, f"offset is {bad}, must be at least 0", logits, 1.0, bad)


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_sizes[16-0.0-dtype1]",
    "test_sizes[17-0.1-dtype0]",
    "TestExtremes",
    "test_rows_wider_than_the_stash[dtype1-1e-05-4097]",
    "test_small_entropies_are_accurate",
)
REGISTERS = {"softmax_entropy_kernel": 80}
COMPILED = [
    (f"softmax_entropy_kernel {kind}", (z, 2.0, 0.0 if z.shape[1] > 4096 else 1e-5, True), 0)
    for kind, z in WIDE.items()
]
