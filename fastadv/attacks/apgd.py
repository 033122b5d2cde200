"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, algorithm 1): no step size to choose."""

from dataclasses import dataclass, field

import torch

from .. import ops
from ..engine.query import ask
from ..ops._reference import per_sample
from . import checks, l1
from .iterates import ByValue, better, gradient, likeliest_others, where
from .pgd import OBJECTIVES
from .targets import OBJECTIVES as TARGETED
from .targets import check_target, classes, reached

MOMENTUM = 0.75  # the weight of the step, against that of the last move
LOSSES = ("ce", "dlr", "targeted")


@dataclass(eq=False)
class APGD(ByValue):
    """Maximises a loss within a ball by steps with momentum. A step has length 2 eps at first, and
    is halved for each sample whose loss has stopped rising.

    eps: in units of x (8/255, not 8), or one radius per sample, a tensor [B] or [B, 1, ...]: then
    every batch has B images. steps: gradient steps of one round. loss: "ce", "dlr", or "targeted",
    the targeted DLR towards each of the `target_classes` (at most C - 1) likeliest other classes at
    x. restarts: the number of rounds, for "targeted" of each target class; a sample that a round
    breaks takes no part in the next ones. norm: "linf", "l2" or "l1" (see `ascend_l1`). lo, hi: the
    box of valid images. rho: a sample's step is halved if no more than this share of its steps
    raised the loss; not of l1. eot_iter: passes per iterate, over whose randomness the gradient and
    the loss are averaged (Athalye et al. 2018, arXiv 1707.07397); a point counts as misclassified
    if most of its passes are. They are passes one by one, as a network may draw its random numbers
    once per batch: copies in one batch would share them.
    bad_gradients: of the last call, a tensor on x's device: how many (sample, iterate) pairs had a
    gradient with NaN or infinity in it; these elements do not move.
    Raises ValueError on a radius in the wrong unit and other values that make no sense, TypeError
    on values of the wrong kind.

    Differences from the authors' code: starts are uniform in the ball, not on its surface; the
    first step counts as a rise against the start, as in the paper, not against 0; of the
    misclassified iterates the one of highest loss is returned, not the last; with eot_iter loss and
    outcome are those of all passes, not of the last one.
    """

    eps: float | torch.Tensor = 8 / 255
    steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    target_classes: int = 9
    norm: str = "linf"
    lo: float = 0.0
    hi: float = 1.0
    rho: float = 0.75
    eot_iter: int = 1
    bad_gradients: torch.Tensor | int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self):
        checks.check_budget(self, per_sample=True)
        checks.one_of("loss", self.loss, LOSSES)
        for name in ("steps", "restarts", "target_classes", "eot_iter"):
            setattr(self, name, checks.whole(name, getattr(self, name), 1))
        if not 0 <= checks.number("rho", self.rho) <= 1:
            raise ValueError(f"rho is {self.rho}, must be in [0, 1]")

    @torch.inference_mode(False)
    def __call__(self, model, x, y, *, target=None, index=None):
        """x_adv for `model`: per sample the misclassified point of highest loss, else the point of
        highest loss. A sample that is misclassified at x stays there.

        x: float32 or float64 [B, ...] in [lo, hi]; y: integers [B]. index: int64 [B] dataset ids
        that decide each sample's random starts. The model maps x, in the dtype of its parameters,
        to logits [B, C] (C >= 3 for "dlr", 4 for "targeted") or to what has them; it runs in eval
        mode, its modes are put back and its parameters' `.grad` stays untouched. x_adv has x's
        dtype. Raises ValueError or TypeError naming the argument.

        target: of a targeted attack, as of `PGD.__call__`: the class which then stands for
        "misclassified" above. The loss "ce" is then that to the target, negated; "dlr" and
        "targeted" are both the targeted DLR towards it.
        """
        y, index = checks.check_call(self, model, x, y, index)
        target = check_target(target, y, x)
        self.bad_gradients = torch.zeros((), dtype=torch.int64, device=x.device)
        if not x.numel():
            return x.detach().clone()
        with checks.under_attack(model, x, y) as logits:
            aim = None if target is None else classes(target, logits, y, index)
            return self._rounds(model, x.detach(), y, logits, index, aim)

    def _rounds(self, model, x, y, logits, index, aim):
        """All restarts and target classes, each on the samples that are robust so far. aim: the one
        target class of each sample, int64 [B], in a targeted attack."""
        towards = aim is not None or self.loss == "targeted"

        def inner(x_adv, y, target):
            logits = ask(model, x_adv)
            if towards:
                loss = TARGETED["dlr" if self.loss == "targeted" else self.loss](logits, y, target)
            else:
                loss = OBJECTIVES[self.loss](logits, y)
            return loss, reached(logits, y, None if aim is None else target)

        targets = (y if aim is None else aim)[:, None]
        if self.loss == "targeted" and aim is None:
            targets = likeliest_others(logits, y, self.target_classes)
        x_adv, wrong = x.clone(), self._voted(reached(logits, y, aim), model, x, y, aim)
        loss = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        seed, radii = torch.randint(2**63 - 1, (), device="cpu"), checks.radii(self.eps, x)
        for counter in range(targets.shape[1] * self.restarts):
            rows = (~wrong).nonzero()[:, 0]  # the one host sync of a round
            if not len(rows):
                break
            target = targets[rows, counter // self.restarts]
            eps = checks.rows_of(radii, rows)
            start = self._start(x[rows], eps, seed, index[rows], counter)
            ascend = self.ascend_l1 if self.norm == "l1" else self.ascend
            new = ascend(inner, x[rows], y[rows], target, start=start, eps=eps)
            old = x_adv[rows], loss[rows], wrong[rows]
            x_adv[rows], loss[rows], wrong[rows] = where(better(new[1:], old[1:]), new, old)
        return x_adv

    @torch.no_grad()
    def _voted(self, wrong, model, x, y, aim):
        """Which samples most passes misclassify, one of which gave `wrong`."""
        votes = wrong.long()
        for _ in range(self.eot_iter - 1):
            votes += reached(ask(model, x), y, aim)
        return 2 * votes > self.eot_iter

    def _start(self, x, eps, seed, index, restart):
        keys = {"seed": seed, "index": index, "restart": restart}
        if self.norm == "l1":  # which `ascend_l1` projects, as the authors' code does: it is sparse
            return ops.random_start(x, eps, "gaussian", sigma=1.0, **keys)
        return ops.random_start(x, eps, norm=self.norm, lo=self.lo, hi=self.hi, **keys)

    @torch.no_grad()
    def ascend(self, inner, x, *targets, start, eps=None):
        """One round of linf or l2, without host syncs. Returns (x_adv, loss [B], wrong [B]) of each
        sample's best iterate.

        inner(x_adv, *targets) -> (loss [B], wrong [B] bool), sample by sample; targets are [B, ...]
        and constant. A step overwrites the x_adv that inner was given. start: the x_adv to begin
        from, in ball and box. eps: the radii of these samples, if they are not the attack's own.
        Modes are left to the caller.
        """
        eps = checks.radii(self.eps if eps is None else eps, x)
        x_adv, x_old, x_best, x_found = (start.clone() for _ in range(4))
        grad_best, bad = torch.zeros_like(x_adv), x.new_zeros((), dtype=torch.int64)
        step_size = 2 * eps + x.new_zeros(len(x))
        # The highest loss so far, and what it was at the last checkpoint.
        best = checked = torch.full_like(step_size, -torch.inf)
        before, rises = -best, torch.zeros_like(best)  # the start itself is no rise
        halved = torch.ones_like(best, dtype=torch.bool)
        never = ~halved
        found, periods = (best, never), checkpoints(self.steps)
        for i in range(self.steps + 1):
            grad, *new = self._gradient(inner, x_adv, *targets)
            loss, restart = new[0], never
            better_found, better_best = better(new, found), loss > best
            found = where(better_found, new, found)
            best = torch.where(better_best, loss, best)
            rises += loss > before
            before = loss
            if i in periods:
                stuck = ~halved & (best <= checked)
                restart = halved = (rises <= self.rho * periods[i]) | stuck
                step_size = torch.where(halved, step_size / 2, step_size)
                rises, checked = torch.zeros_like(rises), best
            ops.apgd_step_(
                *(x_adv, x_old, x_best, grad_best, x_found, bad, grad, x),
                step_size,
                better_best=better_best,
                better_found=better_found,
                restart=restart,
                weight=MOMENTUM if i else 1.0,
                eps=eps,
                norm=self.norm,
                lo=self.lo,
                hi=self.hi,
            )
        self.bad_gradients = self.bad_gradients + bad
        return x_found, *found

    def _gradient(self, inner, x_adv, *targets):
        """`iterates.gradient`, averaged over eot_iter passes."""
        if self.eot_iter == 1:
            return gradient(inner, x_adv, *targets)
        grad = loss = votes = 0
        for _ in range(self.eot_iter):
            new_grad, new_loss, wrong = gradient(inner, x_adv, *targets)
            grad, loss, votes = grad + new_grad, loss + new_loss, votes + wrong.long()
        return grad / self.eot_iter, loss / self.eot_iter, 2 * votes > self.eot_iter

    @torch.no_grad()
    def ascend_l1(self, inner, x, *targets, start, eps=None):
        """One round of l1 (Croce & Hein 2021, arXiv 2103.01208): in balls of radius 3 eps and 2 eps
        for 30 % of the steps each, then in that of eps, each from the point of highest loss in the
        one before. Arguments and result are those of `ascend`; start: any point in the box."""
        eps = checks.radii(self.eps if eps is None else eps, x)
        x_adv, large = start, 3 * self.steps // 10
        for times, steps in ((3, large), (2, large), (1, self.steps - 2 * large)):
            x_adv = l1.project(x_adv, x, times * eps, self.lo, self.hi)
            x_adv, found = self._climb_l1(inner, x, targets, x_adv, times * eps, steps)
        return found

    def _climb_l1(self, inner, x, targets, x_adv, eps, steps):
        """(the iterate of highest loss, (x_adv, loss, wrong) of the best one) of steps in one ball,
        2103.01208, algorithm 1.

        A step follows the signs of the largest elements of the gradient, 2/3 as many as the best
        iterate so far has changed. At each checkpoint, 4 % of the steps, step sizes begin anew at
        eps, and the search at the best iterate, where this has become sparser; elsewhere they
        shrink, to eps / 10 at the least.
        """
        longest = eps + x.new_zeros(len(x))
        step_size, changed = longest, (x_adv != x).flatten(1).sum(1)
        found = best = None
        for i in range(steps + 1):
            grad, loss, wrong = self._gradient(inner, x_adv, *targets)
            finite = grad.isfinite()
            self.bad_gradients = self.bad_gradients + (~finite.flatten(1).all(1)).sum()
            now = x_adv, torch.where(finite, grad, 0.0), loss
            new = x_adv, loss, wrong
            found = where(better(new[1:], found[1:]), new, found) if found else new
            best = where(loss > best[2], now, best) if best else now
            if i and i % max(4 * steps // 100, 1) == 0:
                before, changed = changed, (best[0] != x).flatten(1).sum(1)
                sparser = changed < 0.95 * before
                shorter = torch.maximum(step_size / 1.5, longest / 10)
                step_size = torch.where(sparser, longest, shorter)
                now = where(sparser, best, now)
            step = per_sample(step_size, x) * l1.direction(now[1], (2 * changed + 2) // 3)
            x_adv = l1.project(now[0] + step, x, eps, self.lo, self.hi)
        return best[0], found


def checkpoints(steps):
    """{steps done: steps since the last checkpoint}: the first after 22 % of the steps, then each
    3 % sooner than the one before, at the least 6 %."""
    period, least, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    done, periods = period, {}
    while done <= steps:
        periods[done] = period
        period = max(period - shorter, least)
        done += period
    return periods
