"""Projected gradient descent (Madry et al. 2018); FGSM (Goodfellow et al. 2015) is a preset."""

import functools
from dataclasses import dataclass, field

import torch

from .. import losses, ops
from ..frozen import refresh
from .checks import check_budget, check_images, check_labels, check_logits, evaluating
from .iterates import better, where


@dataclass
class PGD:
    """Maximises a per-sample objective within a ball around x, by `steps` projected steps.

    eps, step_size: in units of x (8/255, not 8). init: "uniform" in the ball, clipped to the box
    (Madry); "gaussian" of standard deviation `sigma`, unclipped (TRADES, RSLAD); "zero".
    clip_start: whether the start is clipped to the box, where other than that (ARD's is not).
    norm: "linf" or "l2". lo, hi: the box of valid images. restarts: starts per sample, all in one
    batch. keep: which iterate of a start is returned, "last" (as published) or "best".
    bad_gradients: of the last call, a tensor on x's device: how many (sample, step) pairs had a
    gradient with NaN or infinity in it; NaN elements do not move.
    Raises ValueError on a radius in the wrong unit; warns when step_size > eps.
    """

    eps: float = 8 / 255
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
        check_budget(self.eps, self.step_size, self.norm, self.lo, self.hi)
        if self.init not in ("uniform", "gaussian", "zero"):
            raise ValueError(f"init is {self.init!r}, must be 'uniform', 'gaussian' or 'zero'")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}, must be at least 0")
        if self.restarts < 1:
            raise ValueError(f"restarts is {self.restarts}, must be at least 1")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep is {self.keep!r}, must be 'last' or 'best'")

    def __call__(self, model, x, y=None, *, loss="ce", target_logits=None, start=None, index=None):
        """x_adv for `model`; the objective is "ce", "margin", "cw" (the margin up to kappa = 50, as
        evaluations have it) or "dlr" (three classes or more) of (logits, y), or "kl" of (logits,
        target_logits).

        x: float32 [B, ...] in [lo, hi]; y: int64 [B]; target_logits: [B, C], constant. start: x_adv
        to begin from instead of `init`. index: int64 [B] dataset ids that decide each sample's
        random start. The model maps x to logits; it runs in eval mode, its modes are put back and
        its parameters' `.grad` stays untouched. With `restarts` or keep="best": per sample the
        misclassified point of highest objective, else the point of highest objective, which takes
        one more forward pass. Raises ValueError or TypeError naming the argument.
        """
        if loss not in OBJECTIVES:
            raise ValueError(f"loss is {loss!r}, must be one of {', '.join(OBJECTIVES)}")
        name, target = ("target_logits", target_logits) if loss == "kl" else ("y", y)
        if target is None:
            raise ValueError(f"{name} is missing, which loss={loss!r} needs")
        check_images(x, self.lo, self.hi)
        if self.restarts > 1 and start is not None:
            raise ValueError(f"start is given, must be None with restarts={self.restarts}")
        target, checked, found = target.detach(), [], []

        def inner(x_adv, target, label, last=False):
            logits = model(x_adv)
            if not checked:  # the first forward pass vouches for the rest
                check_logits(logits, len(x_adv))
                if loss != "kl":
                    check_labels(target, logits.shape)
                checked.append(True)
            value = OBJECTIVES[loss](logits, target)
            if self.keep == "best" or last:
                new = x_adv.detach(), value.detach(), logits.argmax(1) != label
                found[:] = _best(new, found or new)  # copies, as steps are taken in place
            return value

        refresh(model)
        with evaluating(model):
            if self.restarts > 1:
                start = self._starts(x, index)
                x, target = (torch.cat([v] * self.restarts) for v in (x, target))
            label = torch.cat([y if y is not None else target_logits.argmax(1)] * self.restarts)
            x_adv = self.ascend(inner, x, target, label, start=start, index=index)
            if not len(x) or (self.restarts == 1 and self.keep == "last"):
                return x_adv
            with torch.no_grad():
                inner(x_adv, target, label, last=True)
        first, *others = zip(*(v.chunk(self.restarts) for v in found), strict=True)
        return functools.reduce(_best, others, first)[0]

    @torch.inference_mode(False)
    def ascend(self, inner, x, *targets, start=None, index=None):
        """x_adv that maximises inner(x_adv, *targets) -> [B] sample by sample; targets are [B, ...]
        and constant. The building block of training methods: no checks; modes and the refresh of
        twins are the caller's."""
        x_adv = self.start(x, index) if start is None else start.detach().clone()
        if x_adv.shape != x.shape:
            raise ValueError(f"start has shape {tuple(x_adv.shape)}, must be {tuple(x.shape)}")
        self.bad_gradients = self.climb(inner, x_adv, x, *targets).sum()
        return x_adv

    def climb(self, inner, x_adv, x, *targets):
        """The steps from x_adv on, in place; int64 [B], how many of each sample's gradients had NaN
        or infinity in them."""
        bad = torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
        for _ in range(self.steps if x.numel() else 0):
            grad = input_gradient(inner, x_adv, *targets)
            bad += ~grad.reshape(len(x), -1).sum(1).isfinite()
            with torch.no_grad():
                ops.pgd_step_(x_adv, grad, x, self.eps, self.step_size, self.norm, self.lo, self.hi)
        return bad

    def start(self, x, index=None, **counter):
        """x_adv to begin from; counter: of `ops.random_start`."""
        clip = self.init == "uniform" if self.clip_start is None else self.clip_start
        keys = {"index": index} | ({"lo": self.lo, "hi": self.hi} if clip else {}) | counter
        return ops.random_start(x, self.eps, self.init, self.norm, self.sigma, **keys)

    def _starts(self, x, index):
        """[restarts * B, ...]: of one seed, so that a sample's starts are its own in any batch."""
        seed = torch.randint(2**63 - 1, (), device="cpu")
        return torch.cat(
            [self.start(x, index, seed=seed, restart=count) for count in range(self.restarts)]
        )


def FGSM(eps=8 / 255, norm="linf"):
    """One step of full length from x itself."""
    return PGD(eps=eps, step_size=eps, steps=1, init="zero", norm=norm)


def _best(new, old):
    """The better of two (x_adv [B, ...], loss [B], wrong [B]), sample by sample."""
    return where(better(new[1:], old[1:]), new, old)


def input_gradient(inner, x_adv, *targets):
    """d sum(inner(x_adv, *targets)) / d x_adv; no other gradient is computed or touched."""
    leaf = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(inner(leaf, *targets).sum(), leaf)[0]


OBJECTIVES = {
    "ce": lambda logits, y: losses.cross_entropy(logits, y, reduction="none"),
    "margin": lambda logits, y: losses.margin(logits, y),
    "dlr": lambda logits, y: losses.dlr(logits, y),
    "cw": lambda logits, y: losses.margin(logits, y, kappa=50.0),
    "kl": lambda logits, target: losses.kl(logits, target, reduction="none"),
}
