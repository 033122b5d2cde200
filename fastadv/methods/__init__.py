"""Training methods by name. Each file reads as its paper's two equations."""

import inspect

from .absld import ABSLD
from .adaad import AdaAD
from .advfunmatch import AdvFunMatch
from .ard import ARD
from .at import AT
from .base import Batch, Method, Nets
from .bmtard import BMTARD
from .funmatch import FunMatch
from .iad import IAD1, IAD2
from .mart import MART
from .mtard import MTARD
from .natural import Natural
from .rslad import RSLAD
from .trades import TRADES
from .vfd import VFD

METHODS = {
    "natural": Natural,
    "at": AT,
    "trades": TRADES,
    "mart": MART,
    "ard": ARD,
    "iad1": IAD1,
    "iad2": IAD2,
    "rslad": RSLAD,
    "absld": ABSLD,
    "mtard": MTARD,
    "bmtard": BMTARD,
    "adaad": AdaAD,
    "funmatch": FunMatch,
    "advfunmatch": AdvFunMatch,
}


def named(name):
    """The class of a method, the base's for "vfd+base".

    Raises ValueError that lists the names when there is no such method.
    """
    base = name.removeprefix("vfd+")
    if base not in METHODS:
        raise ValueError(f"method is {name!r}, must be one of {', '.join(METHODS)} or vfd+one")
    return METHODS[base]


def get(name, **options):
    """The method of this name, or "vfd+name"; options are its constructor's, such as
    get("rslad", adv_weight=5/6); vfd+name takes VFD's and the base's. Raises ValueError for an
    unknown name or option."""
    base, vanilla = named(name), {}
    if name.startswith("vfd+"):
        own = inspect.signature(VFD).parameters.keys() - {"base"}
        vanilla = {key: options.pop(key) for key in own & options.keys()}
    known = parameters(base)
    if unknown := options.keys() - known:
        raise ValueError(
            f"method {name} has no option {', '.join(sorted(unknown))}; it has {', '.join(known)}"
        )
    method = base(**options)
    return VFD(method, **vanilla) if name.startswith("vfd+") else method


def parameters(cls):
    """The names of a method's options, its base classes' included."""
    names = {}
    for kind in cls.__mro__:
        if issubclass(kind, Method) and "__init__" in vars(kind):
            names |= dict.fromkeys(inspect.signature(kind).parameters)
    return [name for name in names if name != "options"]


__all__ = [
    "METHODS",
    "VFD",
    "Batch",
    "Method",
    "Nets",
    "get",
    "named",
    *sorted(cls.__name__ for cls in METHODS.values()),
]
