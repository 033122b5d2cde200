"""Code of a user's own, which a command line names as module:name.

Only a command line, whose user trusts the code, has it imported. Runs and checkpoints keep its name
as a record: reading them imports nothing, and they are refused until their user names it again.
"""

import importlib

from ..errors import UsageError


def bring_in(flag, text, register):
    """Imports `text`, "module:name", and registers what it finds under this text.

    The module is one that `python -m` would find: in the current folder, or installed. flag: where
    the text was given, for messages. register: of methods, models or data. Raises UsageError for
    text of another form, where there is no such module or name, and for what does not register;
    what the module itself raises passes through.
    """
    module, _, name = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not (module and name) or module.startswith("."):  # which is relative to no package here
        kind = "Class" if "method" in flag else "function"
        raise UsageError(f"{flag} is {text!r}, must be module:{kind}")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{flag} is {text!r}: {error}") from error
    if not hasattr(found, name):
        raise UsageError(f"{flag} is {text!r}: module {module!r} has no attribute {name!r}")
    try:
        register(text, getattr(found, name))
    except TypeError as error:
        raise UsageError(f"{flag} is {text!r}: {error}") from error


def check_new(name, known):
    """Raises UsageError unless `name` may be registered beside the `known` names of fastadv."""
    if not isinstance(name, str) or not name or "+" in name:
        raise UsageError(f"name is {name!r}, must be text without a +")
    if name in known:
        raise UsageError(f"name is {name!r}, which fastadv has already")


def not_registered(what, name):
    """The UsageError for a name "module:name", of a run's record, that nobody has registered now.
    what: "method", "model" or "data set"."""
    flags = {
        "method": f"--method-from {name}",
        "model": f"--student-from {name}, or --teacher-from {name} where it is a teacher's",
        "data set": f"--data-from {name}",
    }
    return UsageError(
        f"{what} {name!r} is code of a user's own, which a run's record does not import: name it "
        f"again, {flags[what]}"
    )
