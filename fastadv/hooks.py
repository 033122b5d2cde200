"""Whether something waits for a module to run, so that nothing may compute in its stead."""

from torch.nn.modules import module as registry

KINDS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def hooked(module):
    """Whether a hook of its own or of all modules, or another forward, runs with this module."""
    own = any(getattr(module, kind) for kind in KINDS)
    return own or "forward" in vars(module) or any(getattr(registry, "_global" + k) for k in KINDS)
