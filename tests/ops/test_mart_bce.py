import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_rows import labelled

from fastadv import ops
from fastadv.ops import _library
from fastadv.ops.mart_bce import reference
from fastadv.testing import OpCase, assert_close, check_op, check_values, unchecked

HALVES = (torch.bfloat16, torch.float16)


def plain(logits, y):
    """The equation, with y' from the two likeliest classes."""
    q = logits.softmax(dim=1)
    first, second = q.topk(2).indices.unbind(dim=1)
    other = torch.where(first == y, second, first)
    second_term = (1.0001 - q.gather(1, other[:, None])[:, 0] + 1e-12).log()
    return F.cross_entropy(logits, y, reduction="none") - second_term


def make(batch, classes, dtype=torch.float32, grad=True, spread=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(batch, classes, generator=g)).to(dtype)
    y = torch.randint(classes, (batch,), generator=g)
    y[::2] = logits.argmax(dim=1)[::2]
    return OpCase(
        "mart_bce",
        (logits, y, grad),
        public=lambda z: ops.mart_bce(z, y),
        plain=lambda z: plain(z, y),
        inputs=(0,),
    )


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_op(classes):
    check_op(make(9, classes))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("classes", [2, 3, 7, 10, 16, 17, 33, 100, 1000])
def test_sizes(classes, dtype):
    check_values(make(20, classes, dtype), ("contiguous", "permuted", "offset", "strided"))
    check_values(make(1, classes, dtype, grad=False), ("contiguous",))


@pytest.mark.parametrize("classes", [4097, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_wider_than_the_stash(classes, dtype):
    check_values(make(3, classes, dtype), ("permuted", "offset"))


@pytest.mark.parametrize("batch", [0, 1, 15, 16, 17, 3001])
def test_batches(batch):
    check_values(make(batch, 10), ("contiguous",))


def test_float64_is_the_equation():
    logits, y, _ = make(50, 10).args
    logits = logits.double().requires_grad_()
    values = [f(logits, y) for f in (ops.mart_bce, plain)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), logits)[0] for v in values))


@pytest.mark.usefixtures("isa")
class TestExtremes:
    def check(self, logits, y):
        exact = reference(logits.double(), y, True)
        same = reference(logits, y, True)
        got = torch.ops.fastadv.mart_bce(logits, y, True)
        for name, *parts in zip(("loss", "gradient"), got, exact, same, strict=True):
            assert_close(name, *parts)
        return got

    @pytest.mark.parametrize("spread", [20.0, 1e3, 1e6])
    def test_confident_rows(self, spread):
        """Right or wrong, up to q_{y'} = 1, where the second term is -log(0.0001)."""
        loss, grad = self.check(*make(40, 17, spread=spread).args[:2])
        assert loss.isfinite().all()
        assert grad.isfinite().all()

    @pytest.mark.skipif(
        _library.ops["mart_bce"].cpu.startswith("reference"),
        reason="fp32 torch loses the digits: only the kernels promise more",
    )
    def test_is_accurate_where_the_other_class_is_almost_certain(self):
        """fp32 torch loses 4 of 7 digits of 1.0001 - q_{y'} here; the kernels lose none."""
        logits = torch.tensor([[9.0, 0.0, -1.0], [14.0, 0.5, -1.0], [11.0, 10.9, 3.0]])
        y = torch.tensor([1, 2, 2])
        exact = reference(logits.double(), y, True)
        got = torch.ops.fastadv.mart_bce(logits, y, True)
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)

    def test_masked_classes(self):
        logits, y, _ = make(5, 20).args
        logits[0] = -math.inf
        logits[0, y[0]] = 1.0  # no other class is left
        logits[1, ::2], logits[1, y[1]] = -math.inf, 2.0
        logits[2, y[2]] = -math.inf
        loss, grad = self.check(logits, y)
        assert loss.isinf().tolist() == [False, False, True, False, False]
        assert loss[0].item() == pytest.approx(-math.log(1.0001), abs=1e-7)
        assert not grad[0].any()
        assert grad.isfinite().all()

    @pytest.mark.parametrize("column", [0, 5, 16, 39])
    def test_nan_stays_in_its_row(self, column):
        logits, y, _ = make(20, 40).args
        clean = torch.ops.fastadv.mart_bce(logits, y, True)
        logits[7, column] = math.nan
        others = torch.arange(20) != 7
        for a, b in zip(self.check(logits, y), clean, strict=True):
            assert torch.equal(a[others], b[others])
            assert a[7].isnan().all()

    def test_labels_out_of_range(self):
        logits, y, _ = make(6, 10).args
        y[:5] = torch.tensor([-1, 10, 2**32 + 3, 2**62, -(2**62)])
        loss, grad = unchecked("mart_bce", logits, y)
        assert loss.isnan().tolist() == [True] * 5 + [False]
        assert not grad[:5].any()
        assert grad[5].any()
        if _library.backend() != "triton":  # the CPU's ops look at labels
            with pytest.raises(ValueError, match=r"y has label -1 at row 0, must be in \[0, 9\]"):
                ops.mart_bce(logits, y)
            with pytest.raises(ValueError, match="y has label -1 at row 0"):
                ops.mart_bce(logits.double(), y)

    def test_of_equally_likely_classes_the_first(self):
        logits = torch.zeros(1, 40)
        logits[0, [5, 21, 30]] = 3.0
        for y, other in ((5, 21), (21, 5), (30, 5), (0, 5)):
            _, grad = self.check(logits, torch.tensor([y]))
            grad[0, y] = 0
            assert grad.argmax() == other


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 20), classes=st.integers(2, 40), seed=st.integers(0, 999))
def test_properties(batch, classes, seed):
    logits, y, _ = make(batch, classes, seed=seed).args
    logits = (64 * logits).round() / 64
    loss = ops.mart_bce(logits, y)
    assert (loss >= F.cross_entropy(logits, y, reduction="none") - 2e-4).all()
    torch.testing.assert_close(ops.mart_bce(logits + 50, y), loss)
    grad = torch.ops.fastadv.mart_bce(logits, y, True)[1]
    torch.testing.assert_close(grad.sum(dim=1), torch.zeros(batch), rtol=0, atol=2e-5)


def test_opcheck_of_a_grad_requiring_input():
    logits, y, _ = make(4, 10).args
    assert not ops.mart_bce(logits, y).requires_grad
    torch.library.opcheck(torch.ops.fastadv.mart_bce.default, (logits.requires_grad_(), y, True))


def test_bad_arguments_name_themselves():
    logits, y, _ = make(4, 10).args

    def fails(error, match, logits=logits, y=y):
        with pytest.raises(error, match=match):
            ops.mart_bce(logits, y)

    fails(ValueError, r"logits has shape \(10,\), must be \[B, C\]", logits=logits[0])
    fails(ValueError, r"logits has shape \(4, 1\), must be .* C >= 2", logits=logits[:, :1])
    fails(TypeError, r"logits is torch.int64", logits=logits.long())
    fails(TypeError, r"y is torch.float32, must be integers", y=y.float())
    fails(ValueError, r"y has shape \(3,\), must be \(4,\)", y=y[:3])


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_sizes[16-dtype1]",
    "test_sizes[17-dtype0]",
    "TestExtremes",
    "test_rows_wider_than_the_stash[dtype0-4097]",
)
REGISTERS = {"mart_bce_kernel": 80}
COMPILED = labelled("mart_bce_kernel")
