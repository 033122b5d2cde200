"""The calls of the authors' AutoAttack, run by fastadv's attacks."""

import torch

from .. import evaluate
from ..attacks import checks, suite
from ..data.dataset import ImageSet
from ..engine.query import ask, evaluating
from ..evaluate import report, validity
from ..runs.config import PRECISIONS
from ..runs.config import device as usable
from . import arguments


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
        arguments.only(is_tf_model=(is_tf_model, False))
        if version not in ("standard", "custom"):
            raise ValueError(f"version is {version!r}, must be 'standard' or 'custom'")
        if version == "standard" and attacks_to_run:
            raise ValueError(f"attacks_to_run is {attacks_to_run}, must be for version 'custom'")
        if isinstance(attacks_to_run, str):
            raise TypeError(f"attacks_to_run is {attacks_to_run!r}, must be a list of names")
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
