import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_rows import labelled

from fastadv import ops
from fastadv.ops import _library
from fastadv.ops.margin import reference
from fastadv.testing import OpCase, check_op, check_values, isas, unchecked, using_isa

HALVES = (torch.bfloat16, torch.float16)
ISAS = isas()


def plain(logits, y):
    other = logits.scatter(1, y[:, None], -math.inf).max(dim=1).values
    return other - logits.gather(1, y[:, None])[:, 0]


def make(batch, classes, dtype=torch.float32, grad=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, classes, generator=g)).to(dtype)
    y = torch.randint(classes, (batch,), generator=g)
    return OpCase(
        "margin",
        (logits, y, grad),
        public=lambda z: ops.margin(z, y),
        plain=lambda z: plain(z, y),
        inputs=(0,),
    )


def by_hand(row, y):
    """(loss, gradient) of one row by the words of the docstring."""
    zero = [0.0] * len(row)
    if not 0 <= y < len(row):
        return math.nan, zero
    rank = [math.nan if c == y else (math.inf if math.isnan(z) else z) for c, z in enumerate(row)]
    others = [c for c in range(len(row)) if c != y]
    nans = [c for c in others if math.isnan(row[c])]
    best = nans[0] if nans else max(others, key=lambda c: (rank[c], -c), default=None)
    if best is None or row[best] == -math.inf:
        return -math.inf - row[y], zero
    zero[best], zero[y] = 1.0, -1.0
    return row[best] - row[y], zero


@pytest.mark.parametrize("classes", [10, 100])
def test_op(classes):
    check_op(make(9, classes))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("classes", [2, 7, 10, 15, 16, 17, 31, 32, 33, 100, 1000])
def test_sizes(classes, dtype):
    layouts = ("contiguous", "permuted", "offset", "strided")
    check_values(make(5, classes, dtype), layouts)
    check_values(make(1, classes, dtype, grad=False), ("contiguous",))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_large_row(dtype):
    check_values(make(2, 70001, dtype), ("contiguous",))


@pytest.mark.parametrize("batch", [0, 1, 7, 16, 17, 1000, 5000])
def test_batches(batch):
    check_values(make(batch, 10), ("contiguous", "permuted"))


def test_float64_runs_as_reference_and_halves_are_exact():
    logits, y, _ = make(6, 10).args
    assert torch.equal(ops.margin(logits.double(), y), plain(logits.double(), y))
    for dtype in HALVES:
        half = logits.to(dtype)
        assert torch.equal(ops.margin(half, y), plain(half.float(), y))


def test_opcheck_of_a_grad_requiring_input():
    logits, y, _ = make(4, 10).args
    torch.library.opcheck(torch.ops.fastadv.margin.default, (logits.requires_grad_(), y, True))
    torch.library.opcheck(torch.ops.fastadv.margin.default, (logits.detach(), y, False))


VALUES = st.sampled_from([-math.inf, -1.0, 0.0, 1.0, 2.0, math.inf, math.nan])


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40).flatmap(lambda c: st.lists(VALUES, min_size=c, max_size=c)),
    y=st.integers(-2, 41),
    dtype=st.sampled_from([torch.float32, *HALVES]),
)
def test_ties_nan_infinities_and_labels_out_of_range(rows, y, dtype):
    """Kernel and reference are the definition, bit for bit, at every special value."""
    loss, gradient = by_hand(rows, y)
    logits, label = torch.tensor([rows], dtype=dtype), torch.tensor([y])
    for isa in ISAS:
        with using_isa(isa):
            outputs = unchecked("margin", logits, label)
        for got in (outputs, reference(logits, label, True)):
            torch.testing.assert_close(got[0].item(), loss, rtol=0, atol=0, equal_nan=True)
            assert got[1][0].tolist() == gradient


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 6), classes=st.integers(2, 70), seed=st.integers(0, 999))
def test_properties(batch, classes, seed):
    logits, y, _ = make(batch, classes, seed=seed).args
    logits.requires_grad_()
    loss = ops.margin(logits, y)
    assert torch.equal(loss > 0, logits.argmax(dim=1) != y)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(gradient, torch.autograd.grad(plain(logits, y).sum(), logits)[0])
    assert (gradient.sum(dim=1) == 0).all()
    torch.testing.assert_close(ops.margin(logits + 5, y), loss, rtol=0, atol=1e-5)
    assert torch.equal(ops.margin(4 * logits, y), 4 * loss)


def test_labels_far_out_of_range_read_nothing():
    logits, y = torch.randn(4, 10), torch.tensor([2**62, -(2**62), 2**32 + 3, 3])
    loss, gradient = unchecked("margin", logits, y)
    assert loss.isnan().tolist() == [True, True, True, False]
    assert not gradient[:3].any()
    assert gradient[3].any()


@pytest.mark.skipif(_library.backend() == "triton", reason="the CPU's ops look at labels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_out_of_range_are_refused(dtype):
    logits = torch.randn(4, 10, dtype=dtype)
    for label in (-1, 10, -100, 2**62):
        match = rf"y has label {label} at row 2, must be in \[0, 9\]"
        with pytest.raises(ValueError, match=match):
            ops.margin(logits, torch.tensor([0, 9, label, 3]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_type(dtype):
    logits, y, _ = make(4, 10).args
    assert torch.equal(ops.margin(logits, y.to(dtype)), ops.margin(logits, y))


def test_graph_can_be_kept_and_needs_no_gradient():
    logits, y, _ = make(3, 10).args
    assert not ops.margin(logits, y).requires_grad
    logits.requires_grad_()
    loss = ops.margin(logits, y).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert not ops.margin(logits, y).requires_grad


def test_bad_arguments_name_themselves():
    logits, y, _ = make(4, 10).args

    def fails(error, match, logits=logits, y=y):
        with pytest.raises(error, match=match):
            ops.margin(logits, y)

    fails(ValueError, r"logits has shape \(10,\), must be \[B, C\]", logits=logits[0])
    fails(ValueError, r"logits has shape \(4, 0\), must be .* C >= 1", logits=logits[:, :0])
    fails(TypeError, r"logits is torch.int64", logits=logits.long())
    fails(TypeError, r"y is torch.float32, must be integers", y=y.float())
    fails(TypeError, r"y is torch.bool, must be integers", y=y.bool())
    fails(TypeError, r"y is a list, must be a tensor", y=y.tolist())
    fails(TypeError, r"logits is a tuple, must be a tensor", logits=(logits,))
    fails(ValueError, r"y has shape \(3,\), must be \(4,\)", y=y[:3])
    fails(ValueError, r"y is on meta, must be on cpu", y=y.to("meta"))


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_sizes[16-dtype1]",
    "test_sizes[17-dtype0]",
    "test_a_large_row[dtype0]",
    "test_labels_far_out_of_range_read_nothing",
)
REGISTERS = {"margin_kernel": 64}
COMPILED = labelled("margin_kernel")
