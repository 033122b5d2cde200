"""Shared by the ops that make a loss [B] of logits [B, C]: checks, memory and registration."""

import torch

from ._library import FLOATS, define, expect, gradients_from_forward
from ._native import CPU, DTYPES, contiguous, empty, run

# The dtypes of labels in data sets; kernels take int64.
INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


def check_logits(logits, least=1, name="logits"):
    """[B, C] of a floating point type with C >= least."""
    if logits.dim() != 2 or logits.shape[1] < least:
        shape = tuple(logits.shape)
        raise ValueError(f"{name} has shape {shape}, must be [B, C] with C >= {least}")
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name} is {logits.dtype}, must be one of {FLOATS}")


def wide(tensor):
    """Halves as float32, others as they are."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def row_strided(tensor):
    """With unit stride along classes; a slice of a wider tensor is taken as it is."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def int64_labels(y):
    """Labels of any integer dtype as int64; others as they are, for the op's check to refuse."""
    return y.long() if y.dtype in INTEGERS else y


def check_int64_labels(y, logits, name="y"):
    """int64 [B]."""
    if y.dtype != torch.int64:
        raise TypeError(f"{name} is {y.dtype}, must be integers")
    expect(name, y, like=logits, shape=logits.shape[:1])


def check_range(y, classes, name="y", ignored=None):
    """Raises ValueError unless all of y [B] on the CPU are in [0, classes), or `ignored`."""
    wrong = (y < 0) | (y >= classes)
    if ignored is not None:
        wrong &= y != ignored
    if wrong.any():
        row = int(wrong.nonzero()[0])
        also = "" if ignored is None else f", or ignore_index ({ignored})"
        raise ValueError(
            f"{name} has label {int(y[row])} at row {row}, must be in [0, {classes - 1}]{also}"
        )


kernels = {}  # {op: the call of its native kernel, which counts wrong labels but raises nothing}


def _never(*args):
    return False


def define_loss(
    name, arguments, *, check, reference, kernel, triton, check_values=None, reduced=_never
):
    """Registers and returns the op `name(Tensor logits, <arguments>, bool grad)`, which gives the
    loss and, where grad is true, its gradient.

    check, reference and triton: as for `define`. kernel(loss, gradient, logits, ...): the native
    kernel, given contiguous tensors and the memory of `outputs`; it returns how many labels are
    wrong, if any. check_values: raises on wrong values, such as labels out of range. It runs on
    CPUs alone, since on a GPU it would wait for the device, and after a native kernel only where
    that has found wrong labels. reduced: says of the arguments after the logits whether the loss is
    one number.
    """
    kernels[name] = kernel

    def checked(logits, *args):
        if check_values and logits.is_cpu:
            check_values(logits, *args)
        return reference(logits, *args)

    def native(logits, *args):
        if logits.dtype == torch.float64:
            return checked(logits, *args)
        loss, gradient = outputs(logits, args[-1], reduced(*args))
        dense = (v.contiguous() if isinstance(v, torch.Tensor) else v for v in args[:-1])
        if kernel(loss, gradient, logits.contiguous(), *dense):
            check_values(logits, *args)
        return loss, gradient

    def fake(logits, *args):
        check(logits, *args)
        return outputs(logits, args[-1], reduced(*args))

    op = define(
        f"{name}(Tensor logits, {arguments}, bool grad) -> (Tensor, Tensor)",
        check=check,
        reference=checked,
        native=native,
        triton=triton,
        fake=fake,
        decomposition=reference,
    )
    gradients_from_forward(op, (0,))
    return op


def define_labelled(name, *, least, reference, triton):
    """`define_loss` for an op of logits [B, C >= least] and labels y [B]."""

    def check(logits, y, grad):
        check_logits(logits, least)
        check_int64_labels(y, logits)

    def check_values(logits, y, grad):
        check_range(y, logits.shape[1])

    def kernel(loss, gradient, logits, y):  # Labelled in csrc/labelled.h
        return run(
            name,
            CPU,
            *addresses(loss, gradient, logits),
            *contiguous(CPU, torch.int64, y=y),
            *logits.shape,
            DTYPES[logits.dtype],
        )

    return define_loss(
        name,
        "Tensor y",
        check=check,
        reference=reference,
        kernel=kernel,
        triton=triton,
        check_values=check_values,
    )


def outputs(logits, grad, reduced=False):
    """Memory for (loss, [B] or, where it is reduced, [], gradient [B, C] or [0])."""
    dtype = loss_dtype(logits.dtype)
    loss = empty(() if reduced else logits.shape[:1], logits, dtype)
    return loss, empty(logits.shape if grad else (0,), logits)


def addresses(loss, gradient, logits):
    """The first members of a kernel's struct, given logits and its `outputs`."""
    return loss.data_ptr(), gradient.data_ptr(), *contiguous(CPU, logits.dtype, logits=logits)


def loss_dtype(dtype):
    """The dtype that losses over logits of `dtype` are computed and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
