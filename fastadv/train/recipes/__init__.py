"""Published recipes, one JSON file each, by name."""

import json
from importlib import resources

from ...errors import UsageError


def recipes():
    """{name: fields} of the published recipes, the JSON files of this folder.

    Besides the fields of Config each has `source`, what is published and where, and `published`,
    {attack: accuracy in percent} with the `provenance` of these numbers.
    """
    folder = resources.files(__name__)
    files = sorted((p for p in folder.iterdir() if p.name.endswith(".json")), key=lambda p: p.name)
    return {path.name[:-5]: json.loads(path.read_text()) for path in files}


def recipe(name):
    """The fields of Config of a published recipe. Raises ValueError that lists the names."""
    known = recipes()
    if name not in known:
        raise UsageError(f"recipe is {name!r}, must be one of {', '.join(known)}")
    return {k: v for k, v in known[name].items() if k not in ("source", "published")}
