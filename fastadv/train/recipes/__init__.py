"""The settings of runs, as JSON: published recipes by name, and those of the digits."""

import json
from importlib import resources

from ... import methods
from ...errors import UsageError

FOLDER = resources.files(__name__)
DIGITS = json.loads((FOLDER / "digits.json").read_text())


def recipes():
    """{name: fields} of the published recipes.

    Besides the fields of Config each has `source`, what is published and where, and `published`,
    {attack: accuracy in percent} with the `provenance` of these numbers.
    """
    files = sorted((p for p in FOLDER.iterdir() if p.name.endswith(".json")), key=lambda p: p.name)
    found = {path.name[:-5]: json.loads(path.read_text()) for path in files}
    return {name: fields for name, fields in found.items() if "published" in fields}


def recipe(name):
    """The fields of Config of a published recipe. Raises UsageError that lists the names."""
    known = recipes()
    if name not in known:
        raise UsageError(f"--recipe is {name!r}, must be one of {', '.join(known)}")
    return {k: v for k, v in known[name].items() if k not in ("source", "published")}


def digits_teacher(which):
    """The fields of Config of the digits' "teacher" or "clean_teacher"."""
    return DIGITS["all"] | DIGITS[which]


def digits_student(method):
    """The fields of Config of a student of the digits that `method` trains; of vfd+METHOD they are
    METHOD's."""
    _, base = methods.parts(method)
    return by_scale(DIGITS["all"] | DIGITS["student"] | DIGITS["methods"].get(base, {}), method)


def by_scale(fields, method):
    """The fields of Config with this method. The learning rate and weight decay, which suit a batch
    mean of cross-entropy, and the weights of VFD and IGDM follow the scale of its loss."""
    wrappers, _ = methods.parts(method)
    scale = methods.named(method).loss_scale
    weights = {"vfd": ("lambda_adv", "lambda_clean"), "igdm": ("igdm_weight",)}
    terms = {option: scale for wrapper in wrappers for option in weights[wrapper]}
    return fields | {
        "method": method,
        "method_options": fields.get("method_options", {}) | terms,
        "lr": fields["lr"] / scale,
        "weight_decay": fields["weight_decay"] * scale,
    }
