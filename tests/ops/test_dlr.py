import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_rows import labelled

from fastadv import ops
from fastadv.ops import _library
from fastadv.ops.dlr import reference
from fastadv.testing import OpCase, check_op, check_values, isas, unchecked, using_isa

HALVES = (torch.bfloat16, torch.float16)
ISAS = isas()


def plain(logits, y):
    """The equation, for autograd."""
    ranked = logits.sort(dim=1, descending=True, stable=True).values
    other = logits.scatter(1, y[:, None], -math.inf).max(dim=1).values
    own = logits.gather(1, y[:, None])[:, 0]
    return -(own - other) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def make(batch, classes, dtype=torch.float32, grad=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, classes, generator=g)).to(dtype)
    y = torch.randint(classes, (batch,), generator=g)
    y[::2] = logits.argmax(dim=1)[::2]
    return OpCase(
        "dlr",
        (logits, y, grad),
        public=lambda z: ops.dlr(z, y),
        plain=lambda z: plain(z, y),
        inputs=(0,),
    )


def by_hand(row, y):
    """(loss, gradient) of one row by the words of the docstring, in Python's floats."""
    zero = [0.0] * len(row)
    if not 0 <= y < len(row):
        return math.nan, zero
    nans = [c for c, z in enumerate(row) if math.isnan(z)]
    numbers = [c for c in range(len(row)) if c not in nans]
    order = nans + sorted(numbers, key=lambda c: (-row[c], c))
    other = next(c for c in order if c != y)
    n, d = row[y] - row[other], row[order[0]] - row[order[2]] + 1e-12
    for c, slope in ((y, -1 / d), (other, 1 / d), (order[0], n / d / d), (order[2], -n / d / d)):
        zero[c] += slope
    return -n / d, zero


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_op(classes):
    check_op(make(9, classes))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("classes", [3, 4, 7, 10, 15, 16, 17, 31, 32, 33, 100, 1000])
def test_sizes(classes, dtype):
    check_values(make(20, classes, dtype), ("contiguous", "permuted", "offset", "strided"))
    check_values(make(1, classes, dtype, grad=False), ("contiguous",))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_large_row(dtype):
    check_values(make(2, 70001, dtype), ("contiguous",))


@pytest.mark.parametrize("batch", [0, 1, 17, 5000])
def test_batches(batch):
    check_values(make(batch, 10), ("contiguous", "permuted"))


@pytest.mark.parametrize("order", [range(40), range(39, -1, -1), [7 * c % 40 for c in range(40)]])
def test_every_place_of_the_leaders(order):
    """The three largest in any columns: one lane's, neighbouring lanes', the tail's."""
    ladder = torch.tensor(list(order)).float()
    logits = torch.stack([ladder.roll(shift) for shift in range(40)])
    for y in (logits.argmax(dim=1), logits.argmin(dim=1), torch.arange(40)):
        check_values(OpCase("dlr", (logits, y, True)), ("contiguous",))


def test_of_equal_logits_the_first_wherever_the_peak():
    """A late peak moves the first two of its lane's equals down and drops the third."""
    y = torch.full((70,), 5)
    check_values(OpCase("dlr", (3 * torch.eye(70), y, True)), ("contiguous",))
    _, grad = torch.ops.fastadv.dlr(3 * torch.eye(70)[64:65], y[:1], True)
    moved = grad[0].abs() > 1e-6  # at pi1 the two slopes cancel
    assert moved.nonzero().flatten().tolist() == [1, 5]


def test_leaders_a_block_apart_in_a_wide_row():
    """One after another in the same lane, in any order: a kernel that goes over the row in blocks
    must keep all three."""
    logits = torch.zeros(6, 9000)
    for row, order in zip(logits, itertools.permutations((5, 2053, 4101)), strict=True):
        row[list(order)] = torch.tensor([4.0, 2.0, 1.0])
    y = torch.tensor([5, 2053, 4101, 0, 5, 8999])
    check_values(OpCase("dlr", (logits, y, True)), ("contiguous",))


VALUES = st.sampled_from([-math.inf, -1.0, 0.0, 1.0, 2.0, 2.0, 4.0, math.inf, math.nan])


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(3, 40).flatmap(lambda c: st.lists(VALUES, min_size=c, max_size=c)),
    y=st.integers(-2, 41),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_ties_nan_infinities_and_labels_out_of_range(rows, y, dtype):
    """Kernel and reference are the definition at every special value."""
    loss, gradient = by_hand(rows, y)
    logits, label = torch.tensor([rows], dtype=dtype), torch.tensor([y])
    for isa in ISAS:
        with using_isa(isa):
            outputs = unchecked("dlr", logits, label)
        for got in (outputs, reference(logits, label, True)):
            wanted = torch.tensor([loss]), torch.tensor([gradient], dtype=dtype)
            # Slopes that cancel leave some 1e-12 in fp64, where d = 1 + 1e-12, and 0 in fp32.
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-11, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 6), classes=st.integers(3, 70), seed=st.integers(0, 999))
def test_properties(batch, classes, seed):
    logits, y, _ = make(batch, classes, seed=seed).args
    logits.requires_grad_()
    loss = ops.dlr(logits, y)
    assert torch.equal(loss > 0, logits.argmax(dim=1) != y)
    assert (loss >= -1).all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    size = gradient.abs().max().item()
    assert gradient.sum(dim=1).abs().max() <= 1e-6 * size  # shifts change nothing
    assert (gradient * logits).sum(dim=1).abs().max() <= 1e-5 * size * logits.abs().max()  # scales
    torch.testing.assert_close(ops.dlr(1024 * logits, y), loss)


def test_labels_far_out_of_range_read_nothing():
    logits, y = torch.randn(4, 10), torch.tensor([2**62, -(2**62), 2**32 + 3, 3])
    loss, gradient = unchecked("dlr", logits, y)
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
            ops.dlr(logits, torch.tensor([0, 9, label, 3]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_type(dtype):
    logits, y, _ = make(4, 10).args
    assert torch.equal(ops.dlr(logits, y.to(dtype)), ops.dlr(logits, y))


def test_opcheck_of_a_grad_requiring_input():
    logits, y, _ = make(4, 10).args
    assert not ops.dlr(logits, y).requires_grad
    torch.library.opcheck(torch.ops.fastadv.dlr.default, (logits.requires_grad_(), y, True))


def test_bad_arguments_name_themselves():
    logits, y, _ = make(4, 10).args

    def fails(error, match, logits=logits, y=y):
        with pytest.raises(error, match=match):
            ops.dlr(logits, y)

    fails(ValueError, r"logits has shape \(10,\), must be \[B, C\]", logits=logits[0])
    fails(ValueError, r"logits has shape \(4, 2\), must be .* C >= 3", logits=logits[:, :2])
    fails(TypeError, r"logits is torch.int64", logits=logits.long())
    fails(TypeError, r"y is torch.float32, must be integers", y=y.float())
    fails(TypeError, r"y is torch.bool, must be integers", y=y.bool())
    fails(TypeError, r"y is a list, must be a tensor", y=y.tolist())
    fails(TypeError, r"logits is a tuple, must be a tensor", logits=(logits,))
    fails(ValueError, r"y has shape \(3,\), must be \(4,\)", y=y[:3])


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_sizes[16-dtype1]",
    "test_sizes[17-dtype0]",
    "test_a_large_row[dtype0]",
    "test_leaders_a_block_apart_in_a_wide_row",
    "test_labels_far_out_of_range_read_nothing",
)
REGISTERS = {"dlr_kernel": 88}
COMPILED = labelled("dlr_kernel")
