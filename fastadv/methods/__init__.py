"""Training methods by name. Each file reads as its paper's two equations."""

from .at import AT
from .base import Batch, Method, Nets
from .natural import Natural
from .rslad import RSLAD
from .trades import TRADES

METHODS = {"natural": Natural, "at": AT, "trades": TRADES, "rslad": RSLAD}


def get(name, **options):
    """The method of this name; options are its constructor's, e.g. get("rslad", adv_weight=5/6).

    Raises ValueError that lists the names when there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, must be one of {', '.join(METHODS)}")
    return METHODS[name](**options)


__all__ = ["AT", "METHODS", "RSLAD", "TRADES", "Batch", "Method", "Natural", "Nets", "get"]
