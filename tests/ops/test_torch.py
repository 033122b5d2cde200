"""A version of torch that lacks a private name is refused by that name, by whoever needs it."""

import runpy

import pytest
import torch

from fastadv.ops import _torch


@pytest.mark.parametrize("name", ["_functorch", "_AutoDispatchBelowAutograd"])
def test_a_name_that_ops_need_is_missed_at_import(monkeypatch, name):
    monkeypatch.delattr(torch._C, name)
    with pytest.raises(ImportError, match=rf"has no torch\._C\.{name}, which fastadv needs"):
        runpy.run_path(_torch.__file__)


def test_a_name_that_tests_need_is_missed_by_tests(monkeypatch):
    op = torch.ops.fastadv.dlr.default
    assert _torch.has_autograd(op)
    monkeypatch.delattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
    names = runpy.run_path(_torch.__file__)
    with pytest.raises(ImportError, match="has no torch._C._dispatch_has_kernel_for_dispatch_key"):
        names["has_autograd"](op)
