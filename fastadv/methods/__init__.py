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
from .igdm import IGDM
from .ikl import IKL
from .mart import MART
from .mtard import MTARD
from .natural import Natural
from .rslad import RSLAD
from .saad import SAAD
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
    "saad": SAAD,
    "ikl": IKL,
}
WRAPPERS = {"vfd": VFD, "igdm": IGDM}  # what stands before a method's name, in this order
OWN = {}  # the methods that users have registered

COMMON = ("attack", "attack_bn", "milestones", "epochs")  # options of every method
POSITIVE = ("temperature",)
SHARES = ("adv_weight", "alpha", "clean_weight", "label_smoothing")  # of 1


def parts(name):
    """(the names of the wrappers, outermost first; the base's) of a name such as "vfd+igdm+rslad".
    Raises UsageError for wrappers that are none, or in another order."""
    *wrappers, base = name.split("+")
    if wrappers != [wrapper for wrapper in WRAPPERS if wrapper in wrappers]:
        raise UsageError(f"method is {name!r}, must be NAME, vfd+NAME, igdm+NAME or vfd+igdm+NAME")
    return wrappers, base


def named(name):
    """The class of a method, the base's for "vfd+base".

    Raises UsageError that lists the names when there is no such method.
    """
    wrappers, base = parts(name)
    if "igdm" in wrappers and base == "saad":
        raise UsageError(f"method is {name!r}, but saad has the term of igdm itself")
    if base in OWN:
        return OWN[base]
    if ":" in base:
        raise not_registered("method", base)
    if base not in METHODS:
        listed = f"{', '.join(METHODS)}, vfd+NAME, igdm+NAME or vfd+igdm+NAME"
        raise UsageError(f"method is {name!r}, must be one of {listed}")
    return METHODS[base]


def register(name, method):
    """Makes `method`, a class derived from Method, one that `get`, Config and the command line know
    by this name, and behind "vfd+" and "igdm+". A second class of the same name replaces the first.

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
    """The method of this name, such as "rslad", "vfd+rslad" or "vfd+igdm+rslad"; options are its
    constructor's, as in get("rslad", adv_weight=5/6), and those of the wrappers before it. Raises
    UsageError for an unknown name or option, and for a value unlike the option's default."""
    base = named(name)
    wrappers = {WRAPPERS[part]: options(WRAPPERS[part]) for part in parts(name)[0]}
    known = options(base)
    for own in wrappers.values():
        known |= own
    for key, value in given.items():
        if key not in COMMON and key not in known:
            listed = ", ".join(f"{option}={default}" for option, default in known.items())
            raise UsageError(f"method {name} has no option {key}; it has {listed or 'none'}")
        if key in known:
            _check(name, key, value, known[key])
    taken = {option for own in wrappers.values() for option in own}
    method = base(**{k: v for k, v in given.items() if k not in taken})
    for wrapper, own in reversed(wrappers.items()):
        method = wrapper(method, **{k: v for k, v in given.items() if k in own})
    return method


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
        share = option in SHARES and default <= 1  # of the same name, ikl has a weight
        most, kind = (1, "in [0, 1]") if share else (math.inf, "of at least 0")
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
    "IGDM",
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
