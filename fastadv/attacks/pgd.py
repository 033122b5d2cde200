"""Projected gradient descent (Madry et al. 2018); FGSM (Goodfellow et al. 2015) is a preset."""

import functools
import math
import warnings
from dataclasses import dataclass, field

import torch

from .. import losses, ops
from ..engine.frozen import refresh
from ..engine.query import ask, evaluating
from . import checks, l1, targets
from .iterates import ByValue, better, gradient_to, where


@dataclass(eq=False)
class PGD(ByValue):
    """Maximises a per-sample objective within a ball around x, by `steps` projected steps.

    eps, step_size: in units of x (8/255, not 8). eps may also be one radius per sample, a tensor
    [B] or [B, 1, ...]: then every batch has B images. init: "uniform" in the ball, clipped to the
    box (Madry); "gaussian" of standard deviation `sigma`, unclipped (TRADES, RSLAD); "zero".
    clip_start: whether the start is clipped to the box, if not as `init` has it (ARD's is not).
    norm: "linf", "l2" or "l1": an l1 step follows the 1 % largest elements of the gradient (SLIDE,
    Tramer & Boneh 2019), and its projection is exact (Croce & Hein 2021), in plain torch. lo, hi:
    the box of valid images. restarts: starts per sample, all in one batch. keep: which iterate of a
    start is returned, "last" (as published) or "best", for which starts are projected too.
    bad_gradients: of the last call, a tensor on x's device: how many (sample, step) pairs had a
    gradient with NaN or infinity in it; NaN elements do not move.
    Raises ValueError on a radius in the wrong unit, TypeError on values of the wrong kind; warns
    when step_size > eps.
    """

    eps: float | torch.Tensor = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    init: str = "uniform"
    sigma: float = 1e-3
    norm: str = "linf"
    lo: float = 0.0
    hi: float = 1.0
    clip_start: bool | None = None
    restarts: int = 1
    keep: str = "last"
    bad_gradients: torch.Tensor | int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self):
        checks.check_budget(self, per_sample=True)
        self.step_size = checks.number("step_size", self.step_size)
        most = checks.largest(self.eps)
        if not 0 <= self.step_size < math.inf or (self.step_size == 0 and most > 0):
            raise ValueError(f"step_size is {self.step_size}, must be positive and finite")
        if self.step_size > most:
            warnings.warn(
                f"step_size {self.step_size:.5g} is larger than eps {most:.5g}: are they swapped?",
                stacklevel=3,
            )
        self.steps = checks.whole("steps", self.steps, 0)
        self.restarts = checks.whole("restarts", self.restarts, 1)
        self.sigma = checks.number("sigma", self.sigma)
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}, must be at least 0 and finite")
        checks.one_of("init", self.init, ("uniform", "gaussian", "zero"))
        checks.one_of("keep", self.keep, ("last", "best"))
        if not isinstance(self.clip_start, (bool, type(None))):
            given = checks.described(self.clip_start)
            raise TypeError(f"clip_start is {given}, must be True, False or None")

    @torch.inference_mode(False)
    def __call__(
        self,
        model,
        x,
        y=None,
        *,
        loss="ce",
        target_logits=None,
        target=None,
        start=None,
        index=None,
    ):
        """x_adv for `model`; the objective is "ce", "margin", "cw" (the margin up to kappa = 50, as
        evaluations have it) or "dlr" (three classes or more) of (logits, y), or "kl" of (logits,
        target_logits).

        x: float32 or float64 [B, ...] in [lo, hi]; y: integers [B]; target_logits: [B, C],
        constant. start: x_adv to begin from instead of `init`. index: int64 [B] dataset ids that
        decide each sample's random start. The model maps x, in the dtype of its parameters, to
        logits or to what has them (see `engine.query.logits_of`); it runs in eval mode, its modes
        are put back and its parameters' `.grad` stays untouched. x_adv has x's dtype. With
        `restarts` or keep="best": per sample the misclassified point of highest objective, else the
        point of highest objective, which takes one more forward pass. Raises ValueError or
        TypeError naming the argument.

        target: of a targeted attack, the class that each sample is to be taken for, which then
        stands for "misclassified" above: integers [B] other than y, or by the logits at x "second"
        (the likeliest class but y) or "least-likely", or "random" by `index`; names take one more
        forward pass. The objective is the loss to the target, negated; with "dlr" it is the
        targeted DLR (four classes or more). y may be None beside integers, except with "dlr".
        """
        label, constant = self._arguments(model, x, y, loss, target_logits, target)
        if self.restarts > 1 and start is not None:
            raise ValueError(f"start is given, must be None with restarts={self.restarts}")
        eps, checked, found = checks.radii(self.eps, x), [], []
        if not x.numel():
            self.bad_gradients = torch.zeros((), dtype=torch.int64, device=x.device)
            return x.detach().clone()
        targeted = target is not None
        objective = targets.OBJECTIVES[loss] if targeted else _untargeted(loss)

        def inner(x_adv, constant, label, last=False):
            logits = ask(model, x_adv)
            if not checked:  # once is enough: later passes are of the same model and shapes
                checks.check_logits(logits, len(x_adv))
                if loss == "kl" and constant.shape != logits.shape:
                    given, shape = tuple(constant.shape), tuple(logits.shape)
                    raise ValueError(f"target_logits has shape {given}, must be {shape}")
                if targeted:
                    checks.check_labels(constant, logits.shape[1], "target")
                checks.check_labels(label, logits.shape[1])
                checked.append(True)
            value = objective(logits, label, constant)
            if self.keep == "best" or last:
                success = targets.reached(logits, label, constant if targeted else None)
                new = x_adv.detach(), value.detach(), success
                found[:] = _best(new, found or new)  # copies, as steps are taken in place
            return value

        refresh(model)
        with evaluating(model):
            if isinstance(constant, str):
                constant = targets.named(constant, model, x, label, index)
            if self.restarts > 1:
                start = self._starts(x, index)
                x, constant, label = (torch.cat([v] * self.restarts) for v in (x, constant, label))
                eps = checks.repeated(eps, self.restarts)
            x_adv = self._ascend(inner, x, constant, label, start=start, index=index, eps=eps)
            if self.restarts == 1 and self.keep == "last":
                return x_adv
            with torch.no_grad():
                inner(x_adv, constant, label, last=True)
        first, *others = zip(*(v.chunk(self.restarts) for v in found), strict=True)
        return functools.reduce(_best, others, first)[0]

    def _arguments(self, model, x, y, loss, target_logits, target):
        """Checks the arguments of a call and returns (label, constant): the label as int64 [B], and
        the constant of the objective, which is the label, target_logits, or a target."""
        checks.one_of("loss", loss, OBJECTIVES)
        if loss == "kl" and target is not None:
            raise ValueError(f"target is {checks.described(target)}, must be None with loss='kl'")
        needed, value = ("target_logits", target_logits) if loss == "kl" else ("y", y)
        if value is None and (target is None or loss == "dlr"):
            raise ValueError(f"{needed} is missing, which loss={loss!r} needs")
        checks.check_model(model)
        checks.check_images(x, self.lo, self.hi)
        if y is not None:
            y = checks.as_labels(y, x)
        if target is not None:
            target = targets.check_target(target, y, x)
            return target if y is None else y, target
        if loss != "kl":
            return y, y
        checks.check_tensor("target_logits", target_logits, like=x)
        if not target_logits.is_floating_point() or target_logits.dim() != 2:
            given = f"{target_logits.dtype} {tuple(target_logits.shape)}"
            raise ValueError(f"target_logits is {given}, must be logits [B, C]")
        return target_logits.argmax(1) if y is None else y, target_logits.detach()

    def ascend(self, inner, x, *targets, **options):
        """x_adv that maximises inner(x_adv, *targets) -> [B] sample by sample; targets are [B, ...]
        and constant.

        start, index: as of a call. eps: the radii of these samples, if they are not the attack's
        own. Training methods are built on this: it checks nothing, and leaves modes and the refresh
        of twins to the caller. Raises ValueError with restarts, or keep="best": an objective alone
        does not tell which iterate is misclassified.
        """
        if self.restarts > 1 or self.keep != "last":
            raise ValueError(
                f"restarts is {self.restarts} and keep {self.keep!r}, must be 1 and 'last' in "
                "training methods and in ascend"
            )
        return self._ascend(inner, x, *targets, **options)

    @torch.inference_mode(False)
    def _ascend(self, inner, x, *targets, start=None, index=None, eps=None):
        checks.check_tensor("x", x)
        eps = checks.radii(self.eps if eps is None else eps, x)
        x_adv = self.start(x, index, eps) if start is None else started(start, x).clone()
        if self.keep == "best" and x.numel():  # it may be what is returned
            self._step_(x_adv, torch.zeros_like(x_adv), x, eps)
        self.bad_gradients = self.climb(inner, x_adv, x, *targets, eps=eps).sum()
        return x_adv

    def climb(self, inner, x_adv, x, *targets, eps=None):
        """Takes all steps from x_adv, in place. Returns int64 [B]: how many of each sample's
        gradients had NaN or infinity in them. eps: as of `ascend`."""
        eps = checks.radii(self.eps if eps is None else eps, x)
        bad = torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
        for _ in range(self.steps if x.numel() else 0):
            grad = input_gradient(inner, x_adv, *targets)
            bad += ~grad.reshape(len(x), -1).sum(1).isfinite()
            self._step_(x_adv, grad, x, eps)
        return bad

    @torch.no_grad()
    def _step_(self, x_adv, grad, x, eps):
        """One step, in place, projected into ball and box."""
        if self.norm == "l1":
            l1.pgd_step_(x_adv, grad, x, eps, self.step_size, self.lo, self.hi)
        else:
            ops.pgd_step_(x_adv, grad, x, eps, self.step_size, self.norm, self.lo, self.hi)

    def start(self, x, index=None, eps=None, **counter):
        """The x_adv to begin from. eps: as of `ascend`; counter: seed and restart of
        `ops.random_start`."""
        clip = self.init == "uniform" if self.clip_start is None else self.clip_start
        index = None if index is None else checks.as_index(index, x)
        eps = checks.radii(self.eps if eps is None else eps, x)
        keys = {"index": index} | ({"lo": self.lo, "hi": self.hi} if clip else {}) | counter
        if self.norm == "l1" and self.init == "uniform":
            return l1.random_start(x, eps, **keys)
        norm = "l2" if self.norm == "l1" else self.norm  # which the others do not depend on
        return ops.random_start(x, eps, self.init, norm, self.sigma, **keys)

    def _starts(self, x, index):
        """The starts of all restarts, [restarts * B, ...]. One seed makes them all, so that a
        sample's starts do not depend on its batch."""
        seed = torch.randint(2**63 - 1, (), device="cpu")
        return torch.cat(
            [self.start(x, index, seed=seed, restart=count) for count in range(self.restarts)]
        )


def FGSM(eps=8 / 255, norm="linf"):
    """One step of full length from x itself. eps: as of a PGD."""
    return PGD(eps=eps, step_size=checks.largest(eps), steps=1, init="zero", norm=norm)


def started(start, x):
    """The start that a caller gave, detached. Raises TypeError or ValueError unless it has the
    shape, dtype and device of x."""
    checks.check_tensor("start", start, like=x)
    if start.shape != x.shape:
        raise ValueError(f"start has shape {tuple(start.shape)}, must be {tuple(x.shape)}")
    if start.dtype != x.dtype:
        raise TypeError(f"start is {start.dtype}, must be {x.dtype}")
    return start.detach()


def _best(new, old):
    """For each sample the better of two iterates, each (x_adv [B, ...], loss [B], wrong [B])."""
    return where(better(new[1:], old[1:]), new, old)


def input_gradient(inner, x_adv, *targets):
    """d sum(inner(x_adv, *targets)) / d x_adv; no other gradient is computed or touched."""
    leaf = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        return gradient_to(leaf, inner(leaf, *targets))


def _untargeted(loss):
    """An objective of OBJECTIVES as one of `targets.OBJECTIVES`."""
    return lambda logits, _, constant: OBJECTIVES[loss](logits, constant)


def widened(*tensors):
    """The tensors, all in the smallest dtype to which torch promotes theirs."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


OBJECTIVES = {
    "ce": lambda logits, y: losses.cross_entropy(logits, y, reduction="none"),
    "margin": lambda logits, y: losses.margin(logits, y),
    "dlr": lambda logits, y: losses.dlr(logits, y),
    "cw": lambda logits, y: losses.margin(logits, y, kappa=50.0),
    "kl": lambda logits, target: losses.kl(*widened(logits, target), reduction="none"),
}
