"""The calls of torchattacks and of AutoAttack, run by fastadv's attacks.

    from fastadv.compat import PGD, AutoAttack      # instead of torchattacks, autoattack

    x_adv = PGD(model, eps=8/255, alpha=2/255, steps=10)(images, labels)
    x_adv = AutoAttack(model, norm="Linf", eps=8/255).run_standard_evaluation(x, y, bs=250)

Arguments, their order and their defaults are those of torchattacks 3.5 (FGSM, PGD, PGDL2, APGD; a
call alone, not its setters) and of the authors' AutoAttack, but for its device: by default that of
the images. Models map images in [0, 1] to logits; their modes are put back. Arguments whose meaning
fastadv does not have are refused by a ValueError, those of the wrong kind by a TypeError.
"""

import torch
from torch import nn

from . import attacks, evaluate
from .attacks import checks, suite
from .data.dataset import ImageSet
from .engine.query import ask, evaluating
from .evaluate import report, validity
from .runs.config import PRECISIONS
from .runs.config import device as usable

NORMS = {"Linf": "linf", "L2": "l2"}


def _norm(norm):
    if norm not in tuple(NORMS):
        raise ValueError(f"norm is {norm!r}, must be 'Linf' or 'L2'")
    return NORMS[norm]


def _seed(seed):
    return None if seed is None else checks.whole("seed", seed, 0)


def _only(**arguments):
    """Refuses values other than the (value, only) that are known."""
    for name, (value, only) in arguments.items():
        if value != only:
            raise ValueError(f"{name} is {value!r}, must be {only!r}: fastadv knows no other")


class _Module(nn.Module):
    """A function of images as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _module(model):
    if not callable(model):
        given = checks.described(model)
        raise TypeError(f"model is {given}, must be a torch.nn.Module or a function of images")
    return model if isinstance(model, nn.Module) else _Module(model).eval()


class _Attack:
    """An attack bound to a model: a call takes images [B, ...] and labels [B] to x_adv."""

    def __init__(self, model, attack, seed=None):
        self.model, self.attack, self.seed = _module(model), attack, _seed(seed)

    def __repr__(self):
        return f"{self.attack}"

    def __call__(self, images, labels):
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.default_generator.manual_seed(self.seed)
            return self.attack(self.model, images, labels)


def FGSM(model, eps=8 / 255):
    """torchattacks.FGSM."""
    return _Attack(model, attacks.FGSM(eps))


def PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=True):
    """torchattacks.PGD: linf."""
    init = "uniform" if random_start else "zero"
    return _Attack(model, attacks.PGD(eps, alpha, steps, init))


def PGDL2(model, eps=1.0, alpha=0.2, steps=10, random_start=True, eps_for_division=1e-10):
    """torchattacks.PGDL2. A zero gradient moves nothing, so eps_for_division has no use."""
    init = "uniform" if random_start else "zero"
    return _Attack(model, attacks.PGD(eps, alpha, steps, init, norm="l2"))


def APGD(
    model,
    norm="Linf",
    eps=8 / 255,
    steps=10,
    n_restarts=1,
    seed=0,
    loss="ce",
    eot_iter=1,
    rho=0.75,
    verbose=False,
):
    """torchattacks.APGD; loss is "ce" or "dlr"."""
    _only(eot_iter=(eot_iter, 1))
    attack = attacks.APGD(eps, steps, n_restarts, loss, norm=_norm(norm), rho=rho)
    return _Attack(model, attack, seed)


class AutoAttack:
    """The authors' AutoAttack of Croce & Hein 2020 (arXiv 2003.01690), version "standard", or
    "custom" with `attacks_to_run` of apgd-ce, apgd-dlr, apgd-t, fab-t and square.

    model: a module or a function from images in [0, 1] to logits. precision: "fp32" or "bf16" of
    the search; what counts is the model itself, in the dtype of its own parameters, either way.
    Raises ValueError for versions and arguments that fastadv does not know.
    """

    def __init__(
        self,
        model,
        norm="Linf",
        eps=0.3,
        seed=None,
        verbose=True,
        attacks_to_run=(),
        version="standard",
        is_tf_model=False,
        device=None,
        log_path=None,
        precision="fp32",
    ):
        _only(is_tf_model=(is_tf_model, False))
        if version not in ("standard", "custom"):
            raise ValueError(f"version is {version!r}, must be 'standard' or 'custom'")
        if version == "standard" and attacks_to_run:
            raise ValueError(f"attacks_to_run is {attacks_to_run}, must be for version 'custom'")
        if isinstance(attacks_to_run, str):
            raise TypeError(f"attacks_to_run is {attacks_to_run!r}, must be a list of names")
        checks.one_of("precision", precision, PRECISIONS)
        self.model = _module(model)
        self.eps, self.norm, self.seed, self.precision = eps, _norm(norm), _seed(seed), precision
        self.verbose, self.log_path = verbose, log_path
        self.device = None if device is None else usable(device)
        self.attacks_to_run = list(
            suite.CASCADES["aa"] if version == "standard" else attacks_to_run
        )
        suite.cascade(self.attacks_to_run, eps, self.norm)  # says now what is wrong with them

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False):
        """x_adv [N, ...] as x_orig: of each image the example that breaks it, else x itself; with
        return_labels also the classes that the model gives them. x_orig: float32 or float64 in
        [0, 1]; y_orig: integers [N]. bs: images at a time. Attacks that need more classes than
        there are are left out with a warning."""
        checks.whole("bs", bs, 1)
        checks.check_images(x_orig, 0.0, 1.0)
        y_orig = checks.as_labels(y_orig, x_orig)
        if not self.attacks_to_run:
            raise ValueError("attacks_to_run is [], must name the attacks of version 'custom'")
        device = self.device or x_orig.device
        stages = suite.cascade(self.attacks_to_run, self.eps, self.norm)
        first = x_orig[:bs].to(device), y_orig[:bs].to(device)
        model, stages, warnings = validity.probe(self.model, *first, stages)
        split = ImageSet(x_orig, y_orig, torch.arange(len(y_orig)))
        record = evaluate.Record(len(split), examples=x_orig.detach().cpu().numpy().copy())
        seed = torch.randint(2**31, ()).item() if self.seed is None else self.seed
        where = {"batch_size": bs, "device": device}
        evaluate.run(
            model, split, stages, precision=self.precision, seed=seed, record=record, **where
        )
        self._tell(report.describe(record, stages))
        for warning in warnings + validity.review(record, stages):
            self._tell(f"warning: {warning}")
        x_adv = torch.from_numpy(record.examples).to(x_orig.device)
        return (x_adv, self._labels(x_adv, bs, device)) if return_labels else x_adv

    def run_standard_evaluation_individual(self, x_orig, y_orig, bs=250, return_labels=False):
        """{attack: what `run_standard_evaluation` returns of this attack by itself}."""
        chosen, found = self.attacks_to_run, {}
        try:
            for name in chosen:
                self.attacks_to_run = [name]
                found[name] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
        finally:
            self.attacks_to_run = chosen
        return found

    @torch.no_grad()
    def _labels(self, x, bs, device):
        with evaluating(self.model):
            parts = [ask(self.model, part.to(device)).argmax(1) for part in x.split(bs)]
        return torch.cat(parts).to(x.device)

    def _tell(self, text):
        if self.verbose:
            print(text)
        if self.log_path:
            with open(self.log_path, "a") as file:
                file.write(text + "\n")
