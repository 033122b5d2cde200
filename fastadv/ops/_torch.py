"""Whether something waits for a module to run, so that nothing may compute in its stead."""

import torch
from torch.nn.modules import module as registry

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
