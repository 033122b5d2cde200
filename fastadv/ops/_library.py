"""One call per op over `torch.library`, and the choice of the backend behind it.

`FASTADV_BACKEND` = auto | native | triton | cuda | reference. An explicit choice that cannot be
honoured raises at import; auto takes the fastest backend that works here and logs once which it
misses. `python -m fastadv.info` says why.
"""

import functools
import importlib
import logging
import os
from dataclasses import dataclass

import torch

from . import _native
from ._torch import below_autograd, transformed, version

# The backend that `auto` prefers on a GPU for an op that has both; an op not named prefers Triton.
# Provisional, by the cost of a launch: no kernel has been timed on a GPU yet. Calls that CUDA C++
# does not take go to Triton in any case.
ON_GPU = {
    "pgd_step": "cuda",
    "pgd_step_": "cuda",
    "random_start": "cuda",
    "augment": "cuda",
    "softmax_kl": "cuda",
}
BACKENDS = ("auto", "native", "triton", "cuda", "reference")
KL_INSTEAD = ", or use losses.kl on the logits behind it, which is differentiable in both"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes that losses take
_library = torch.library.Library("fastadv", "DEF")
_log = logging.getLogger("fastadv")


@dataclass
class Backends:
    """Which implementation an op runs on each device, and why, as `fastadv.info` prints it."""

    cpu: str
    cuda: str


ops: dict[str, Backends] = {}
plain = {}  # {op: its check and then, in torch's own ops, its decomposition or reference}


@functools.cache
def backend():
    """The validated choice of FASTADV_BACKEND."""
    choice = os.environ.get("FASTADV_BACKEND", "auto")
    if choice not in BACKENDS:
        raise ValueError(f"FASTADV_BACKEND is {choice!r}, must be one of {', '.join(BACKENDS)}")
    if choice == "native" and _native.missing:
        raise RuntimeError(f"FASTADV_BACKEND is native, but {_native.missing}")
    if choice == "triton" and triton_missing():
        raise RuntimeError(f"FASTADV_BACKEND is triton, but {triton_missing()}")
    if choice == "cuda" and _native.cuda_missing():
        raise RuntimeError(f"FASTADV_BACKEND is cuda, but {_native.cuda_missing()}")
    if choice == "auto" and torch.cuda.is_available() and _native.cuda_missing():
        _log.warning("CUDA ops run without CUDA C++: %s", _native.cuda_missing())
    if choice == "auto" and _native.missing:
        _log.warning("CPU ops run as plain torch: %s", _native.missing)
    return choice


@functools.cache
def triton_missing():
    """Why Triton kernels cannot run here, or None. Gated on a live driver, not on the import."""
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        triton = importlib.import_module("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # a broken driver fails in ways of its own
        return f"triton cannot run: {error}"
    return None


def expect_tensors(**values):
    """Raises TypeError naming a value that is no tensor, such as a network's output object."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, must be a tensor")


def expect_constant(name, tensor, instead=KL_INSTEAD):
    """Raises ValueError where a gradient is asked for that a loss does not have."""
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, must be a constant: detach it{instead}")


def expect(name, tensor, *, dtype=None, like=None, shape=None):
    """Raises TypeError or ValueError naming the argument, what it is and what it must be."""
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, must be {dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {like.device}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {tuple(shape)}")


def on_gpu(name, reference, native, triton, cuda, takes):
    """(the function that an op runs on a GPU, its name for `fastadv.info`); see `choose`."""
    if backend() in ("native", "reference"):
        return reference, f"reference (FASTADV_BACKEND={backend()})"
    missing = triton_missing() if triton else "no kernel"
    function, chosen = reference, f"reference ({missing})"
    if not missing:
        kernel, chosen = triton(), "triton"

        def function(*args):
            return (kernel if takes(*args) else reference)(*args)

    wanted = backend() == "cuda" or (backend() == "auto" and ON_GPU.get(name) == "cuda")
    if not (cuda and wanted) or _native.cuda_missing():
        return function, chosen

    def cuda_first(*args):
        return (native if cuda(*args) else function)(*args)

    return cuda_first, f"cuda, else {chosen}"


def not_double(tensor, *args):
    """Whether an op's first tensor is not float64, for which there is the reference alone."""
    return tensor.dtype != torch.float64


def choose(name, reference, *, native=None, triton=None, cuda=None, takes=not_double):
    """(the function that an op runs on CPUs, the one for GPUs); enters both in `ops`.

    `reference` runs anywhere, `native` on CPUs. `triton` imports and returns the op's launcher in
    `fastadv.kernels`, which is for GPUs, and for CPUs under Triton's interpreter when
    FASTADV_BACKEND is triton. `takes` says which calls it takes; the others run the reference.
    `cuda` says which calls CUDA C++ takes, which `native` then runs too.
    """
    gpu, name_on_gpu = on_gpu(name, reference, native, triton, cuda, takes)
    has_gpu = torch.cuda.is_available()
    if gpu is not reference and not has_gpu:
        name_on_gpu = "reference (no CUDA device)"  # Triton's interpreter
    why = f"FASTADV_BACKEND={backend()}" if backend() != "auto" else "fastadv._C is missing"
    cpu, name_on_cpu = reference, f"reference ({why if native else 'no kernel'})"
    if native and backend() in ("auto", "native") and not _native.missing:
        cpu, name_on_cpu = native, "native"
    if gpu is not reference and backend() == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        cpu, name_on_cpu = gpu, "triton (interpreted)"
    ops[name] = Backends(name_on_cpu, name_on_gpu)
    return cpu, gpu if has_gpu else reference


def define(
    schema, *, check, reference, fake, native=None, triton=None, cuda=None, decomposition=None
):
    """Registers an op and returns its overload. All callables take the schema's arguments.

    `check` raises on arguments outside the contract and runs before every implementation;
    `reference` is plain torch; `native`, `triton` and `cuda` are as for `choose`. vmap runs
    `decomposition`, in torch's own ops: the reference, unless that looks at values.
    """
    name = schema.split("(")[0]

    def checked(function):
        def call(*args):
            check(*args)
            return function(*args)

        return call

    _library.define(schema)
    _library.impl(name, checked(reference), "CompositeExplicitAutograd")
    plain[name] = checked(decomposition or reference)
    _library.impl(name, plain[name], "FuncTorchBatchedDecomposition")
    torch.library.register_fake(f"fastadv::{name}", fake, lib=_library)
    chosen = choose(name, reference, native=native, triton=triton, cuda=cuda)
    for key, function in zip(("CPU", "CUDA"), chosen, strict=True):
        if function is not reference:
            _library.impl(name, checked(function), key)
    return getattr(torch.ops.fastadv, name).default


def define_autograd(op, function):
    """Registers `function` as the op's implementation under autograd, at two thirds of the cost of
    torch.library.register_autograd."""
    _library.impl(op._schema.name.split("::")[1], function, "Autograd")


def gradients_from_forward(op, inputs):
    """Autograd for an op that returns (loss, *gradients), the gradients made by the forward pass.

    inputs: the position of each gradient's input among the op's arguments; a gradient that the
    call did not ask for is an empty tensor. loss is 0-dim, or [B] for gradients [B, ...].
    Where the gradient is to be differentiated (create_graph) it is computed anew in torch's own
    ops, the op's decomposition; so is all of a call under torch.func or forward-mode derivatives.
    """
    name = op._schema.name.split("::")[1]
    decomposed = plain[name]
    tensors = [n for n, a in enumerate(op._schema.arguments) if "Tensor" in str(a.type)]

    def versions(constants):
        return [version(constants[n]) for n in tensors if constants[n] is not None]

    class FromForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with below_autograd():
                loss, *gradients = op(*args)
            ctx.wanted = [n for n, i in enumerate(inputs) if ctx.needs_input_grad[i]]
            constants, saved = list(args), []
            for n in ctx.wanted:
                saved += args[inputs[n]], gradients[n]
                constants[inputs[n]] = None
            ctx.save_for_backward(*saved)
            # Constants are held by the node, not saved with the rest: whoever overwrites one, or
            # made it in inference mode, may still go backward once.
            ctx.constants, ctx.versions = constants, versions(constants)
            ctx.mark_non_differentiable(*gradients)
            ctx.set_materialize_grads(False)
            return loss, *gradients

        @staticmethod
        def backward(ctx, grad_loss, *_):
            result = [None] * len(ctx.constants)
            if grad_loss is None:
                return tuple(result)
            saved = ctx.saved_tensors  # once: torch.utils.checkpoint unpacks no tensor twice
            differentiated, gradients = saved[::2], saved[1::2]
            if torch.is_grad_enabled():
                if ctx.versions != versions(ctx.constants):
                    raise RuntimeError(
                        f"an argument of {name} was overwritten since, or made in inference mode, "
                        "where nobody can tell: create_graph=True computes the gradient from it "
                        "again (use torch.no_grad, or clone it)"
                    )
                args = list(ctx.constants)
                for n, tensor in zip(ctx.wanted, differentiated, strict=True):
                    args[inputs[n]] = tensor
                made = decomposed(*args)[1:]
                gradients = [made[n] for n in ctx.wanted]
            for n, gradient in zip(ctx.wanted, gradients, strict=True):
                result[inputs[n]] = _scaled(gradient, grad_loss)
            return tuple(result)

    def autograd(*args):
        if transformed():
            return decomposed(*args)
        if torch.is_grad_enabled() and any(
            args[i] is not None and args[i].requires_grad for i in inputs
        ):
            return FromForward.apply(*args)
        with below_autograd():
            return op(*args)

    define_autograd(op, autograd)


def _scaled(gradient, grad_loss):
    """gradient * grad_loss as one new tensor; never in place, so that retain_graph holds."""
    if grad_loss.dim():  # a 0-dim factor of another dtype leaves the product's as it is
        grad_loss = grad_loss.to(gradient.dtype).reshape(-1, *[1] * (gradient.dim() - 1))
    return gradient * grad_loss
