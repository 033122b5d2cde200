"""Arguments of other packages: those that fastadv knows, and models that may be functions."""

from torch import nn

from ..attacks import checks

NORMS = {"Linf": "linf", "L2": "l2", "L1": "l1"}


def norm(name):
    """fastadv's name of a norm. Raises ValueError for a norm that it does not know."""
    if name not in tuple(NORMS):
        raise ValueError(f"norm is {name!r}, must be 'Linf', 'L2' or 'L1'")
    return NORMS[name]


def seed(value):
    """A seed as an int, or None. Raises TypeError or ValueError for others."""
    return None if value is None else checks.whole("seed", value, 0)


def only(**arguments):
    """Refuses values other than the (value, only one) that are known."""
    for name, (value, known) in arguments.items():
        if value != known:
            raise ValueError(f"{name} is {value!r}, must be {known!r}: fastadv knows no other")


class Function(nn.Module):
    """A function of images as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def module(model):
    """A model as a module in the mode that it has; a function is one in eval mode. Raises TypeError
    for what is neither."""
    if not callable(model):
        given = checks.described(model)
        raise TypeError(f"model is {given}, must be a torch.nn.Module or a function of images")
    return model if isinstance(model, nn.Module) else Function(model).eval()
