"""What torch tells and does by names that are private to it, here and nowhere else in fastadv."""

import torch
from torch.nn.modules import module as registry
from torch.utils._python_dispatch import _get_current_dispatch_mode

KINDS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def hooked(module):
    """Whether a hook of its own or of all modules, or another forward, runs with this module."""
    own = any(getattr(module, kind) for kind in KINDS)
    own = own or "forward" in module.__dict__  # not vars(), which torch 2.8 does not compile
    return own or any(getattr(registry, "_global" + kind) for kind in KINDS)


def transformed():
    """Whether a torch.func transform or a forward-mode derivative is under way: they follow torch's
    own operators alone."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._functorch.peek_interpreter_stack() is not None


def batched(grad):
    """Whether a gradient stands for many, as in torch.autograd.grad with is_grads_batched."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def observed():
    """Whether a TorchDispatchMode is active, which sees torch's own operators alone."""
    return _get_current_dispatch_mode() is not None


def copy_all(targets, sources):
    """Copies each source to its target, in one call for all."""
    torch._foreach_copy_(targets, sources)


def uncompiled(module):
    """The module that torch.compile wrapped; any other is itself."""
    return getattr(module, "_orig_mod", module)
