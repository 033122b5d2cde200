"""The calls of the authors' AutoAttack, run by fastadv's attacks."""

from pathlib import Path

import numpy as np
import torch

from .. import evaluate
from ..attacks import checks, suite
from ..data.dataset import ImageSet
from ..engine.query import ask, evaluating
from ..evaluate import report, validity
from ..evaluate.record import digest, open_examples
from ..runs.config import PRECISIONS
from ..runs.config import device as usable
from . import arguments

# {name in AutoAttack: field of our attack}, and {attack: the attribute that has its settings}
FIELDS = {
    "n_iter": "steps",
    "n_restarts": "restarts",
    "n_queries": "queries",
    "n_target_classes": "target_classes",
    "eot_iter": "eot_iter",
}
OWNERS = {
    "apgd-ce": "apgd",
    "apgd-dlr": "apgd",
    "apgd-t": "apgd_targeted",
    "fab": "fab",
    "fab-t": "fab",
    "square": "square",
}
VERSIONS = {"standard": "aa", "plus": "aa-plus", "rand": "aa-rand"}


class _Settings:
    """What users set of one of AutoAttack's attacks: whole numbers, and no other names than those
    it was made with."""

    def __init__(self, **values):
        vars(self).update(values)

    def __setattr__(self, name, value):
        if name not in vars(self):
            raise AttributeError(
                f"{name} is not known here, must be one of {', '.join(vars(self))}"
            )
        vars(self)[name] = checks.whole(name, value, 1)

    def fields(self):
        return {FIELDS[name]: value for name, value in vars(self).items()}


class AutoAttack:
    """The authors' AutoAttack of Croce & Hein 2020 (arXiv 2003.01690; for L1 2103.01208), version
    "standard", "plus", "rand" (for networks whose forward pass is random), or "custom" with
    `attacks_to_run` of apgd-ce, apgd-dlr, apgd-t, fab, fab-t and square.

    Of its attributes these may be set before a run, as in the authors' code: attacks_to_run;
    apgd.n_restarts, .n_iter and .eot_iter; those of apgd_targeted, and its n_target_classes;
    fab.n_restarts (fab-t always makes one start), .n_iter and .n_target_classes;
    square.n_queries and .n_restarts. Others are refused by an AttributeError.
    model: a module or a function from images in [0, 1] to logits. precision: "fp32" or "bf16" of
    the search; what counts is the model itself, in the dtype of its own parameters, either way.
    Raises ValueError for versions and arguments that fastadv does not know.

    Differences from the authors' code: APGD in L1 always shrinks its ball in three stages, which
    there the versions plus, rand and custom do not.
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
        arguments.only(is_tf_model=(is_tf_model, False))
        checks.one_of("version", version, (*VERSIONS, "custom"))
        if version != "custom" and attacks_to_run:
            raise ValueError(f"attacks_to_run is {attacks_to_run}, must be for version 'custom'")
        checks.one_of("precision", precision, PRECISIONS)
        self.model = arguments.module(model)
        self.eps, self.norm, self.seed, self.precision = (
            eps,
            arguments.norm(norm),
            arguments.seed(seed),
            precision,
        )
        self.verbose, self.log_path = verbose, log_path
        self.device = None if device is None else usable(device)
        self.apgd = _Settings(n_restarts=5, n_iter=100, eot_iter=1)
        self.apgd_targeted = _Settings(n_restarts=1, n_iter=100, eot_iter=1, n_target_classes=9)
        self.fab = _Settings(n_restarts=5, n_iter=100, n_target_classes=9)
        self.square = _Settings(n_queries=5000, n_restarts=1)
        self.attacks_to_run = checks.listed("attacks_to_run", attacks_to_run, "names")
        if version != "custom":
            self.set_version(version)
        self._stages()  # says now what is wrong with them

    def set_version(self, version="standard"):
        """Sets attacks and settings to those of a version, "standard", "plus" or "rand"."""
        checks.one_of("version", version, VERSIONS)
        self.attacks_to_run = list(suite.CASCADES[VERSIONS[version]])
        self.apgd.n_restarts, self.fab.n_restarts = 5, 5
        self.apgd.eot_iter = 20 if version == "rand" else 1
        self.apgd_targeted.n_target_classes = 9
        if version == "rand":
            self.apgd.n_restarts = 1
        if version == "standard":
            self.fab.n_restarts = 1
            self.apgd.n_restarts = 5 if self.norm == "l1" else 1
            self.apgd_targeted.n_target_classes = 5 if self.norm == "l1" else 9

    def _stages(self):
        names = checks.listed("attacks_to_run", self.attacks_to_run, "names")
        return suite.cascade({name: self._fields(name) for name in names}, self.eps, self.norm)

    def _fields(self, name):
        """The fields of an attack that the settings decide."""
        if name not in OWNERS:
            return {}
        fixed = {"fab": {"target_classes": None}, "fab-t": {"restarts": 1}}.get(name, {})
        return getattr(self, OWNERS[name]).fields() | fixed

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        """x_adv [N, ...] as x_orig: of each image the example that breaks it, else x itself; with
        return_labels also the classes that the model gives them. x_orig: float32 or float64 in
        [0, 1]; y_orig: integers [N]. bs: images at a time. state_path: a folder, which is made if
        it is not there: a run that was stopped goes on from it, with the examples found before; a
        seed of None is 0 then. A model without weights of its own, as a function, has nothing by
        which such a state is known to be its own: for it state_path is refused by a ValueError.
        Attacks that need more classes than there are are left out with a warning. Raises ValueError
        for the state of another network, other images, other attacks or another seed."""
        checks.whole("bs", bs, 1)
        checks.check_images(x_orig, 0.0, 1.0)
        y_orig = checks.as_labels(y_orig, x_orig)
        if not self.attacks_to_run:
            raise ValueError("attacks_to_run is [], must name the attacks of version 'custom'")
        if state_path is not None:
            self._check_state(Path(state_path))
        device = self.device or x_orig.device
        first = x_orig[:bs].to(device), y_orig[:bs].to(device)
        model, stages, warnings = validity.probe(self.model, *first, self._stages())
        split = ImageSet(x_orig, y_orig, torch.arange(len(y_orig)))
        seed = self.seed
        if seed is None:  # of a run that may go on it must be the same again
            seed = torch.randint(2**31, ()).item() if state_path is None else 0
        record = self._record(x_orig.detach().cpu(), y_orig, stages, seed, state_path)
        where = {"batch_size": bs, "device": device}
        evaluate.run(
            model, split, stages, precision=self.precision, seed=seed, record=record, **where
        )
        self._tell(report.describe(record, stages))
        for warning in warnings + validity.review(record, stages):
            self._tell(f"warning: {warning}")
        x_adv = torch.from_numpy(np.array(record.examples)).to(x_orig.device)
        return (x_adv, self._labels(x_adv, bs, device)) if return_labels else x_adv

    def _check_state(self, folder):
        if folder.is_file():
            raise ValueError(f"state_path is {folder}, a file, must be a folder")
        if not self.model.state_dict():
            raise ValueError(
                f"state_path is {folder}, must be None for a model without weights of its own: "
                "give a torch module, not a function"
            )

    def _record(self, x, y, stages, seed, state_path):
        """The Record to fill: what the folder state_path has, if anything."""
        if state_path is None:
            return evaluate.Record(len(x), examples=x.numpy().copy())
        folder = Path(state_path)
        key = {
            "attacks": [f"{stage.name}: {stage.attack}" for stage in stages],
            "precision": self.precision,
            "seed": seed,
            "images": digest((x, y)),
            "weights": digest(self.model.state_dict().values()),
        }
        record = evaluate.Record(len(x), key, folder)
        record.examples = open_examples(folder / "adversarial.npy", x, bool(record.verdicts))
        return record

    @torch.no_grad()
    def clean_accuracy(self, x_orig, y_orig, bs=250):
        """The share in [0, 1] of the images x_orig [N, ...] that the model classifies as y_orig."""
        labels = self._labels(x_orig, bs, self.device or x_orig.device)
        return (labels == y_orig).double().mean().item()

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
