"""The only file that uses names private to torch. Each that ops or the engine need is looked up at
import, so that a version of torch without it is refused at once and by name."""

import torch
from torch.nn.modules import module as registry
from torch.utils import _python_dispatch

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def private(owner, name):
    """owner.name; ImportError where this torch has no such thing."""
    if not hasattr(owner, name):
        raise ImportError(
            f"torch {torch.__version__} has no {owner.__name__}.{name}, which fastadv needs: use a "
            "version of torch that fastadv is tested with"
        )
    return getattr(owner, name)


_functorch = private(torch._C, "_functorch")
_transforms = private(_functorch, "peek_interpreter_stack")
_is_batched = private(_functorch, "is_legacy_batchedtensor")
_dispatch_mode = private(_python_dispatch, "_get_current_dispatch_mode")
_copy_all = private(torch, "_foreach_copy_")
private(torch.autograd.forward_ad, "_current_level")
private(torch.Tensor, "_version")
for kind in HOOKS:
    private(registry, "_global" + kind)

# torch.compiler.disable, but for when it imports the compiler, which takes as long as to import all
# else of torch: at the first call of the function, not where that is defined.
disable_compiler = private(torch, "_disable_dynamo")

# A context manager within which a call of an op skips autograd.
below_autograd = private(torch._C, "_AutoDispatchBelowAutograd")


def hooked(*modules):
    """Whether a hook of its own or of all modules, or another forward, runs with one of these."""
    if any(getattr(registry, "_global" + kind) for kind in HOOKS):
        return True
    for module in modules:  # HOOKS by name: a twin asks this of all its modules in every call
        if module._forward_hooks or module._forward_pre_hooks:
            return True
        if module._backward_hooks or module._backward_pre_hooks:
            return True
        if "forward" in module.__dict__:  # not vars(), which torch 2.8 does not compile
            return True
    return False


def transformed():
    """Whether a torch.func transform or a forward-mode derivative is under way: they follow torch's
    own operators alone."""
    return torch.autograd.forward_ad._current_level >= 0 or _transforms() is not None


def batched(grad):
    """Whether a gradient stands for many, as in torch.autograd.grad with is_grads_batched."""
    return _is_batched(grad)


def observed():
    """Whether a TorchDispatchMode is active, which sees torch's own operators alone."""
    return _dispatch_mode() is not None


def version(tensor):
    """How often the tensor has been written to; NaN, which equals nothing, for one of inference
    mode, which keeps no count."""
    return float("nan") if tensor.is_inference() else tensor._version


def has_autograd(op):
    """Whether an overload in torch.ops has a kernel of its own for autograd; for `fastadv.testing`,
    without which nobody needs the name."""
    return private(torch._C, "_dispatch_has_kernel_for_dispatch_key")(op.name(), "Autograd")


def copy_all(targets, sources):
    """Copies each source to its target, in one call for all."""
    _copy_all(targets, sources)


def uncompiled(module):
    """The module that torch.compile wrapped; any other is itself."""
    return getattr(module, "_orig_mod", module)
