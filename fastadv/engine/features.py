"""The features of a network by name: the outputs of its modules, and the input of its
classifier."""

import torch
from torch import nn

from ..ops._logits import wide
from .query import ask


def forward_features(model, x, names):
    """(logits [B, C], {name: features [B, ...]}) of one forward pass, gradients included.

    names: "penultimate" is the input of the network's last nn.Linear, "logits" the network's
    output; any other name, such as "layer4", is the output of the submodule of this name, and of
    its last call if there are several. Images are cast to the dtype of the network's parameters;
    features in half precision are returned as float32.
    Raises ValueError for a name that the network does not have, or whose module it does not call,
    and TypeError for a module that does not return a tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, must be a tensor")
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"names is {names!r}, must be a list or tuple of names")
    net, found, hooks = unwrapped(model), {}, []
    try:
        for name in names:
            if name != "logits":
                hooks.append(_hook(net, name, found))
        logits = _single("logits", ask(model, x))
    finally:
        for hook in hooks:
            hook.remove()
    found["logits"] = logits
    for name in names:
        if name not in found:
            raise ValueError(f"layer is {name!r}, which the network does not call")
    return logits, {name: _single(name, found[name]) for name in names}


def unwrapped(model):
    """The network inside its wrappers: a wrapper is a module whose only child is `net`."""
    while [name for name, _ in model.named_children()] == ["net"]:
        model = model.net
    return model


def _hook(net, name, found):
    """The handle of a hook that puts the features of this name into `found`."""
    if name == "penultimate":
        linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError("layer is 'penultimate', but the network has no nn.Linear")
        return linear[-1].register_forward_pre_hook(lambda _, args: found.update({name: args[0]}))
    modules = dict(net.named_modules())
    if name not in modules:
        top = ", ".join(child for child, _ in net.named_children())
        raise ValueError(f"layer is {name!r}, must be penultimate, logits or a module ({top}, ...)")
    return modules[name].register_forward_hook(lambda _, args, out: found.update({name: out}))


def _single(name, features):
    """Features that are one tensor, halves of them as float32; TypeError for others."""
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"layer {name!r} returns a {type(features).__name__}, must be a tensor")
    return wide(features)
