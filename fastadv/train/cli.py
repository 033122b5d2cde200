"""The command line of `python -m fastadv.train`: every field of Config is a flag."""

import argparse
import dataclasses
import itertools
import textwrap
from pathlib import Path

from .. import data, methods, models
from ..errors import Parser, UsageError
from ..runs import parallel
from ..runs.code import bring_in
from ..runs.config import PATHS, PLACES, PRECISIONS, Config, number
from .recipes import digits_student, recipe, recipes

# The fields that may name code of a user's own, by a flag such as --student-from.
OWN = {
    "method": methods.register,
    "student": models.register,
    "teacher": models.register,
    "clean_teacher": models.register,
    "data": data.register,
}
# How the help explains these flags: what stands in place of the field's own.
OWN_HELP = dict.fromkeys(OWN, "a network of your own: the function to import, which makes it")
OWN_HELP["method"] = "a method of your own: the class to import"
OWN_HELP["data"] = "a data set of your own: the function to import, which reads it"


def flag(field):
    return "--" + field.replace("_", "-")


PLACE_FLAGS = tuple(map(flag, PLACES))
OWN_FLAGS = tuple(flag(field) + "-from" for field in OWN)
WITH_RUN = (
    f"{', '.join(PLACE_FLAGS)}, for what is otherwise on this machine, and "
    f"{', '.join(OWN_FLAGS)}, which name the run's own code again"
)


def parse(argv, description=None, prog="python -m fastadv.train", resuming="--resume"):
    """(Config, resume) from the command line of `prog`. resuming: how its user calls --resume."""
    given = vars(parser(description, prog).parse_args(argv))
    if given.pop("list_recipes"):
        print(recipe_table())
        raise SystemExit
    resume, name, precision, options = (
        given.pop(k) for k in ("resume", "recipe", "precision", "options")
    )
    own = import_own(given)
    if resume:
        others = {"recipe": name, "precision": precision, "set": options}
        wrong = [field for field in given if field not in PLACES]
        check_beside_run(resuming, map(flag, [*wrong, *(k for k, v in others.items() if v)]))
        config = saved(resume, resuming)
        for field, text in own.items():
            if getattr(config, field) != text:
                raise UsageError(
                    f"{flag(field)}-from is {text!r}, but the {field} of {resume} is "
                    f"{getattr(config, field)!r}"
                )
        return dataclasses.replace(config, out=resume, **given), True
    given |= own
    fields = recipe(name) if name else {}
    if name and given.get("method", fields["method"]) != fields["method"]:
        fields.pop("method_options", None)  # they are the recipe's method's, as are its teachers
        for which in {"teacher", "clean_teacher"} - {*methods.get(given["method"]).teachers}:
            fields.pop(which, None)
    if given.get("data") == "digits":
        if name:
            raise UsageError(
                f"--recipe is {name}, which is not for digits: leave it out, the digits have "
                "settings of their own"
            )
        fields = digits_student(given.get("method", Config.method))
        if given.get("student", fields["student"]) != fields["student"]:
            del fields["student_width"]
    fields |= {
        f"precision_{part}": precision for part in ("attack", "outer", "teacher") if precision
    }
    for option in options:
        if "=" not in option:
            raise UsageError(f"--set is {option!r}, must be NAME=VALUE, such as beta=6")
    pairs = [option.partition("=")[::2] for option in options]
    fields["method_options"] = fields.get("method_options", {}) | {k: value(v) for k, v in pairs}
    config = Config(**(fields | given))
    if config.out is None and parallel.may_restart():
        raise UsageError(
            "--out is missing, must be given with --max-restarts, so that a restart finds the run"
        )
    fresh = f"{config.method}-{config.data}".replace(":", "-")
    config.out = config.out or str(fresh_folder(fresh))
    return config, False


def import_own(given):
    """Brings in the code of a user's own that flags name, and takes these flags out of `given`.
    Returns {field of Config: "module:name"}."""
    own = {field: given.pop(f"{field}_from") for field in OWN if f"{field}_from" in given}
    for field, text in own.items():
        if field in given:
            raise UsageError(f"{flag(field)} and {flag(field)}-from are both given: give one")
        name = text.rpartition("+")[2] if field == "method" else text
        bring_in(f"{flag(field)}-from", name, OWN[field])
    return own


def check_beside_run(resuming, flags):
    """Raises UsageError for flags that are given beside a run, whose folder `resuming` names."""
    if flags := list(flags):
        raise UsageError(
            f"{resuming} takes the run's own settings: {', '.join(flags)} cannot go with it, only "
            f"{WITH_RUN}"
        )


def saved(folder, resuming):
    """The Config of the run in `folder`, which the flag `resuming` names."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        kind = "a file" if Path(folder).is_file() else "which has no config.json"
        raise FileNotFoundError(f"{resuming} is {folder}, {kind}: must be the folder of a run")
    try:
        return Config.from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is not the record of a run: {error}") from error


def parser(description, prog="python -m fastadv.train"):
    result = Parser(
        prog=prog,
        usage="%(prog)s [FLAGS]",
        description=description,
        epilog=f"methods: {', '.join(methods.METHODS)}; vfd+NAME, igdm+NAME, vfd+igdm+NAME",
    )
    result.add_argument(
        "--recipe",
        metavar="NAME",
        help="the settings of a paper, by a name that --list-recipes prints; flags override them",
    )
    result.add_argument(
        "--list-recipes",
        action="store_true",
        help="print all recipes with their published accuracies, and exit",
    )
    result.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run in this folder, by its own settings; the flags that may go with "
        f"it are {', '.join(PLACE_FLAGS)}, and --...-from for the run's own code",
    )
    result.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="sets --precision-attack, --precision-outer and --precision-teacher at once",
    )
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="options",
        help="an option of the method, such as beta=6, parity=true or layers=layer3,penultimate; "
        "give --set again for another option",
    )
    for field in dataclasses.fields(Config):
        if field.name != "method_options":
            help = field.metadata["help"] + default(field.default)
            if field.type is bool:
                switch = argparse.BooleanOptionalAction
                result.add_argument(
                    flag(field.name), action=switch, default=argparse.SUPPRESS, help=help
                )
                continue
            read, metavar = TYPES.get(field.type, (str, "NAME"))
            result.add_argument(
                flag(field.name),
                type=read,
                default=argparse.SUPPRESS,
                metavar="PATH" if field.name in (*PATHS, "out") else metavar,
                help=help,
            )
        if field.name in OWN:
            kind = "[vfd+][igdm+]module:Class" if field.name == "method" else "module:function"
            result.add_argument(
                flag(field.name) + "-from",
                default=argparse.SUPPRESS,
                metavar=kind,
                help=f"in place of {flag(field.name)}, {OWN_HELP[field.name]}",
            )
    return result


def default(value):
    """How the help shows a field's default: as a flag would have it."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, float):
        value = f"{value:.4g}"
    return "" if value is None else f" (default: {value})"


def typed(convert, kind):
    """`convert` as the type of a flag: where it raises ValueError, the command says that the text
    is not `kind`."""

    def read(text):
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None

    return read


def epochs(text):
    return tuple(int(epoch) for epoch in text.split(",") if epoch)


WHOLE = typed(int, "a whole number")
NUMBER = typed(number, "a number such as 0.031 or 8/255")
# {type of a field: (that of its flag, how the help calls a value)}
TYPES = {
    float: (NUMBER, "X"),
    float | None: (NUMBER, "X"),
    int: (WHOLE, "N"),
    int | None: (WHOLE, "N"),
    tuple[int, ...]: (typed(epochs, "a list of epochs such as 100,150"), "N,N"),
}


def value(text):
    """A method's option as a value: a number, true, false, a tuple of a,list, or a word."""
    if "," in text:
        return tuple(value(part) for part in text.split(",") if part)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return number(text)
    except ValueError:
        return text


def recipe_table():
    """Each recipe with the published clean and AutoAttack accuracy and where they come from."""
    lines = [f"{'recipe':31} clean    AA"]
    for name, fields in recipes().items():
        published = fields["published"]
        clean, aa = (f"{published[k]:5.2f}" if k in published else "    -" for k in ("clean", "aa"))
        lines.append(f"{name:31} {clean} {aa}")
        for text in (fields["source"], f"Numbers: {published['provenance']}."):
            lines.append(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


def fresh_folder(name):
    """The first of runs/name, runs/name-2, ... that does not exist."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in (Path("runs") / n for n in names) if not path.exists())
