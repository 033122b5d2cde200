"""The comparator and the guards must fail when they should: a test of the tests."""

import pytest
import torch

from fastadv.ops import _native
from fastadv.testing import assert_close, guarded_memory


@pytest.fixture
def values():
    exact = torch.linspace(-3, 3, 101, dtype=torch.float64)
    return exact.float(), exact


def test_accepts_the_rounded_truth(values):
    got, exact = values
    assert_close("op", got, exact, got)


def test_fails_on_one_wrong_element(values):
    got, exact = values
    wrong = got.clone()
    wrong[37] += 1e-4
    with pytest.raises(AssertionError, match="1 of 101 elements differ, .* index 37"):
        assert_close("op", wrong, exact, got)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fails_on_nan_and_infinity(values, value):
    got, exact = values
    wrong = got.clone()
    wrong[5] = value
    with pytest.raises(AssertionError, match="1 of 101"):
        assert_close("op", wrong, exact, got)
    with pytest.raises(AssertionError, match="1 of 101"):
        assert_close("op", got, wrong.double(), got)


def test_fails_on_shape_dtype_and_integers(values):
    got, exact = values
    with pytest.raises(AssertionError, match="shape"):
        assert_close("op", got[:-1], exact, got)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_close("op", got.bfloat16(), exact, got)
    with pytest.raises(AssertionError, match="integers"):
        assert_close("op", torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 3]))


def test_guards_see_a_write_outside():
    def overrun():
        with guarded_memory():
            out = _native.empty_like(torch.empty(10))
            out.as_strided((11,), (1,), out.storage_offset())[10] = 0

    with pytest.raises(AssertionError, match="past the end"):
        overrun()
    with guarded_memory():
        assert _native.empty((3,), torch.empty(1)).isnan().all()
