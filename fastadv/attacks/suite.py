"""The attacks of an evaluation by name, and the suites of attacks that papers report."""

import difflib
import re
from dataclasses import dataclass, replace

import torch

from ..engine.frozen import refresh
from ..engine.query import ask, evaluating
from .apgd import APGD
from .checks import check_radius, listed, number
from .cw import CW
from .ddn import DDN
from .deepfool import DeepFool
from .fab import FAB
from .fmn import FMN
from .pgd import FGSM, PGD
from .square import Square

# {name: (eps, norm) -> (attack, loss of a PGD or None)}. The papers' step sizes are for eps = 8/255
# and scale with it here. Papers call PGD-20 at 2/255 PGD_SAT, and at 0.003 PGD_TRADES; cw is the CW
# objective (kappa 50) under 30 steps from x itself. APGD, FAB and Square are those of AutoAttack's
# standard version, which has other counts for l1, except that APGD is shorter in "quick".
ATTACKS = {
    "clean": lambda eps, norm: (PGD(eps, eps / 4, 0, "zero", norm=norm), "ce"),
    "fgsm": lambda eps, norm: (FGSM(eps, norm), "ce"),
    "pgd20": lambda eps, norm: (PGD(eps, eps / 4, 20, norm=norm), "ce"),
    "pgd20_003": lambda eps, norm: (PGD(eps, eps * 0.003 * 255 / 8, 20, norm=norm), "ce"),
    "cw": lambda eps, norm: (PGD(eps, eps / 4, 30, "zero", norm=norm), "cw"),
    "apgd-ce": lambda eps, norm: (APGD(eps, restarts=5 if norm == "l1" else 1, norm=norm), None),
    "apgd-dlr": lambda eps, norm: (
        APGD(eps, restarts=5 if norm == "l1" else 1, loss="dlr", norm=norm),
        None,
    ),
    "apgd-t": lambda eps, norm: (
        APGD(eps, loss="targeted", target_classes=5 if norm == "l1" else 9, norm=norm),
        None,
    ),
    "fab": lambda eps, norm: (FAB(eps, restarts=5, target_classes=None, norm=norm), None),
    "fab-t": lambda eps, norm: (FAB(eps, norm=norm), None),
    "square": lambda eps, norm: (Square(eps, norm=norm), None),
    "apgd-ce-20": lambda eps, norm: (APGD(eps, 20, norm=norm), None),
    "apgd-t-20": lambda eps, norm: (
        APGD(eps, 20, loss="targeted", target_classes=3, norm=norm),
        None,
    ),
}
# {name: norm -> attack} of the attacks that look for the nearest adversarial point.
MINIMAL = {
    "deepfool": lambda norm: DeepFool(norm=norm),
    "cw-l2": lambda norm: CW(norm=norm),
    "ddn": lambda norm: DDN(norm=norm),
    "fmn": lambda norm: FMN(norm=norm),
}
PGD_NAME = re.compile(r"pgd(?:-(ce|margin|dlr|kl))?-(\d+)(?:-(\d+))?")
TRANSFER = "transfer-"
CORRUPTED = "corruptions:"  # begins the names of the stages of `evaluate.corruption_stages`
PAPER = ("clean", "fgsm", "pgd20", "pgd20_003", "cw")
# Suites whose attacks go one after the other, each on what the ones before left robust: {attack:
# the fields in which it is not that of ATTACKS}. The three of AutoAttack are its versions.
CASCADES = {
    "aa": {"apgd-ce": {}, "apgd-t": {}, "fab-t": {}, "square": {}},
    "aa-plus": {
        "apgd-ce": {"restarts": 5},
        "apgd-dlr": {"restarts": 5},
        "fab": {},
        "square": {},
        "apgd-t": {"target_classes": 9},
        "fab-t": {},
    },
    "aa-rand": {
        "apgd-ce": {"restarts": 1, "eot_iter": 20},
        "apgd-dlr": {"restarts": 1, "eot_iter": 20},
    },
    "quick": {"apgd-ce-20": {}, "apgd-t-20": {}},
}
ALIASES = {"autoattack": "aa", "autoattack-standard": "aa"}
SUITES = ("paper", *CASCADES, *ALIASES)
CLASSES = {"dlr": 3, "targeted": 4}  # the least number of classes for these losses


@dataclass(frozen=True)
class Stage:
    """One attack of an evaluation, and the images that it is for.

    loss: the objective of a PGD, None for other attacks. after: the names of earlier stages; the
    attack is for the images that all of these left robust, and without names for all images.
    transferred: whether the attack follows the gradients of another model. eps: the radius within
    which an image counts as broken, where the attack has none: of those that look for the nearest
    adversarial point, however far; None for others.
    """

    name: str
    attack: object
    loss: str | None = None
    after: tuple = ()
    transferred: bool = False
    eps: float | None = None

    def __call__(self, model, x, y, index):
        """x_adv [B, ...]."""
        if self.loss is None:
            return self.attack(model, x, y, index=index)
        target = {}
        if self.loss == "kl":
            refresh(model)
            with torch.no_grad(), evaluating(model):
                target["target_logits"] = ask(model, x)
        return self.attack(model, x, y, loss=self.loss, index=index, **target)

    def among(self, names):
        """The same stage in an evaluation that has only the stages of these names."""
        return replace(self, after=tuple(name for name in self.after if name in names))

    @property
    def minimal(self):
        """Whether the attack looks for the nearest adversarial point, whose distance is kept."""
        return self.eps is not None

    @property
    def classes(self):
        """The least number of classes that the stage's loss needs."""
        return CLASSES.get(self.loss or getattr(self.attack, "loss", None), 2)

    @property
    def averages(self):
        """Whether the attack averages over the randomness of the model."""
        return getattr(self.attack, "eot_iter", 1) > 1

    @property
    def by_gradient(self):
        """Whether the attack follows the gradient of the model that is evaluated."""
        return not (self.transferred or self.fixed or isinstance(self.attack, Square))

    @property
    def corrupts(self):
        """Whether the images are corrupted, and not attacked within a radius."""
        return self.name.startswith(CORRUPTED)

    @property
    def fixed(self):
        """Whether the images do not depend on a model: they are clean or corrupted."""
        return self.name == "clean" or self.corrupts


def single(name, eps, norm="linf"):
    """The stage of one attack, by name: one of ATTACKS or MINIMAL, "pgd[-LOSS]-STEPS[-RESTARTS]"
    (steps of eps / 4; LOSS is ce, margin, dlr or kl), or either of these that is a PGD after
    "transfer-".
    Raises ValueError for other names and for an eps that is not positive, not finite or above 1 in
    linf, TypeError if the name is no text or eps no number."""
    _check_name(name)
    check_radius(number("eps", eps), norm, zero=False)
    if name.startswith(TRANSFER):
        name_there = name.removeprefix(TRANSFER)
        if name_there in SUITES:
            raise ValueError(f"attack is {name!r}, must be a single attack after {TRANSFER!r}")
        stage = single(name_there, eps, norm)
        if stage.loss is None:  # the others stop where the source is broken
            raise ValueError(f"attack is {name!r}, must be fgsm, cw or a pgd after {TRANSFER!r}")
        return replace(stage, name=name, transferred=True)
    if name in ATTACKS:
        return Stage(name, *ATTACKS[name](eps, norm))
    if name in MINIMAL:
        return Stage(name, MINIMAL[name](norm), eps=number("eps", eps))
    if found := PGD_NAME.fullmatch(name):
        loss, steps, restarts = found.groups()
        for what, count in (("steps", steps), ("restarts", restarts or 1)):
            if not int(count):
                raise ValueError(f"attack is {name!r}: {what} is 0, must be at least 1")
        attack = PGD(eps, eps / 4, int(steps), norm=norm, restarts=int(restarts or 1), keep="best")
        return Stage(name, attack, loss or "ce")
    near = difflib.get_close_matches(name, [*ATTACKS, *MINIMAL, *SUITES], 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    known = [*ATTACKS, *MINIMAL, "pgd[-LOSS]-STEPS[-RESTARTS]", f"{TRANSFER}NAME", *SUITES]
    raise ValueError(f"attack is {name!r}, must be one of {', '.join(known)}{hint}")


def made(stages):
    """The stages as a list. Raises TypeError unless `stages` or `cascade` made them."""
    found = [stages] if isinstance(stages, str) else listed("stages", stages, "stages")
    for stage in found:
        if not isinstance(stage, Stage):
            raise TypeError(f"stages has {stage!r}, must be made by suite.stages(names, eps)")
    return found


def _check_name(name):
    if not isinstance(name, str):
        raise TypeError(f"attack is {name!r}, must be a name")


def cascade(names, eps, norm="linf", prefix=""):
    """The stage "clean", then those of `names`, each for the images that all before it left
    robust. names: a list, or a suite's {attack: the fields in which it is another than by itself}.
    """
    changes = names if isinstance(names, dict) else {}
    found = [single("clean", eps, norm)]
    for name in listed("names", names, "attacks"):
        before = tuple(stage.name for stage in found)
        stage = single(name, eps, norm)
        before = ("clean",) if stage.minimal else before  # all that are right have a distance
        attack = replace(stage.attack, **changes.get(name, {}))
        found.append(replace(stage, name=prefix + name, attack=attack, after=before))
    return found


def stages(names, eps, norm="linf"):
    """The stages of `names` (a list, or text with commas), in order and each once.

    A name may be "paper" for all of PAPER, or one of these: they attack all images, as published.
    It may be a suite of CASCADES, whose stages are then called "suite:attack". Or it may be any
    other attack that `single` knows: that attacks the images that are right in "clean", a stage
    which is added before it.
    Raises ValueError or TypeError naming an unknown attack, eps or norm.
    """
    names = names.split(",") if isinstance(names, str) else names
    found = []
    for name in listed("names", names, "attacks, or text with commas"):
        _check_name(name)
        suite = ALIASES.get(name, name)
        if suite in CASCADES:
            found += cascade(CASCADES[suite], eps, norm, f"{suite}:")
        elif name in (*PAPER, "paper"):
            found += [single(n, eps, norm) for n in (PAPER if name == "paper" else (name,))]
        else:
            found += cascade([name], eps, norm)
    return list({stage.name: stage for stage in found}.values())
