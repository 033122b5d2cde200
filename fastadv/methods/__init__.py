"""Training methods by name. Each file reads as its paper's two equations."""

import inspect
import math

from ..errors import UsageError
from ..runs.code import check_new, not_registered
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
OWN = {}  # the methods that users have registered

COMMON = ("attack", "attack_bn", "milestones")  # options of every method
POSITIVE = ("temperature",)
SHARES = ("adv_weight", "alpha", "clean_weight", "label_smoothing")  # of 1


def named(name):
    """The class of a method, the base's for "vfd+base".

    Raises UsageError that lists the names when there is no such method.
    """
    base = name.removeprefix("vfd+")
    if base in OWN:
        return OWN[base]
    if ":" in base:
        raise not_registered("method", base)
    if base not in METHODS:
        raise UsageError(f"method is {name!r}, must be one of {', '.join(METHODS)} or vfd+NAME")
    return METHODS[base]


def register(name, method):
    """Makes `method`, a class derived from Method, one that `get`, Config and the command line know
    by this name, and as "vfd+name". A second class of the same name replaces the first.

    Raises UsageError for a name that fastadv has itself, TypeError for other classes and for one
    whose options have no defaults.
    """
    check_new(name, METHODS)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"method is {method!r}, must be a class derived from methods.Method")
    for option, parameter in inspect.signature(method).parameters.items():
        open_ended = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not open_ended:
            raise TypeError(f"method is {method!r}, whose option {option} must have a default")
    OWN[name] = method


def get(name, **given):
    """The method of this name, or "vfd+name"; options are its constructor's, such as
    get("rslad", adv_weight=5/6); vfd+name takes VFD's and the base's. Raises UsageError for an
    unknown name or option, and for a value unlike the option's default."""
    base, vanilla = named(name), {}
    known = options(base)
    if name.startswith("vfd+"):
        own = options(VFD)
        vanilla = {key: given.pop(key) for key in own.keys() & given.keys()}
        known |= own
    for key, value in (given | vanilla).items():
        if key not in COMMON and key not in known:
            listed = ", ".join(f"{option}={default}" for option, default in known.items())
            raise UsageError(f"method {name} has no option {key}; it has {listed or 'none'}")
        if key in known:
            _check(name, key, value, known[key])
    method = base(**given)
    return VFD(method, **vanilla) if name.startswith("vfd+") else method


def options(cls):
    """{option: default} of a method's own, without those that all methods have."""
    found = {}
    for kind in cls.__mro__:
        if issubclass(kind, Method) and kind is not Method and "__init__" in vars(kind):
            for name, parameter in inspect.signature(kind).parameters.items():
                if parameter.default is not parameter.empty:
                    found.setdefault(name, parameter.default)
    return found


def _are_names(value):
    """Whether it is a name, or names: a tuple, or the list that a config.json makes of one."""
    names = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(name, str) for name in names)


def _check(method, option, value, default):
    """Raises UsageError unless the value is of the default's kind. No number may be negative, none
    of `POSITIVE` 0, and none of `SHARES` above 1."""
    if isinstance(default, bool):
        right, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, (int, float)):
        most, kind = (1, "in [0, 1]") if option in SHARES else (math.inf, "of at least 0")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        right, kind = number and 0 <= value <= most and value < math.inf, f"a number {kind}"
        if option in POSITIVE:
            right, kind = right and value > 0, "a number above 0"
    elif _are_names(default):
        right, kind = _are_names(value), "a name, or names with commas"
    else:
        return  # an option of a user's own, of which no kind is known
    if not right:
        raise UsageError(f"{option} of method {method} is {value!r}, must be {kind}")


__all__ = [
    "METHODS",
    "VFD",
    "Batch",
    "Method",
    "Nets",
    "get",
    "named",
    "register",
    *sorted(cls.__name__ for cls in METHODS.values()),
]
