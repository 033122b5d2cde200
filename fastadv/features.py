"""Features by name: what the modules of a network return, and what its classifier reads."""

from torch import nn


def forward_features(model, x, names):
    """(logits [B, C], {name: features [B, ...]}) of one forward pass, gradients included.

    names: "penultimate" is the input of the network's last nn.Linear, "logits" its output; any
    other name is a submodule's, such as "layer4", and means what it returns. Halves come as
    float32. With several calls of one module in a pass, the last counts.
    Raises ValueError for a name that the network does not have.
    """
    net, found, hooks = unwrapped(model), {}, []
    try:
        for name in names:
            if name != "logits":
                hooks.append(_record(net, name, found))
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    found["logits"] = logits
    return logits, {name: _single(found[name]) for name in names}


def unwrapped(model):
    """The network inside twins and normalisation, whose only child is `net`."""
    while [name for name, _ in model.named_children()] == ["net"]:
        model = model.net
    return model


def _record(net, name, found):
    """The hook that puts the features of this name into `found`."""
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


def _single(features):
    return features.float() if features.itemsize < 4 else features
