"""FAB, the fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044)."""

import math
from dataclasses import dataclass, field

import torch

from .. import ops
from ..engine.query import ask
from ..ops._reference import per_sample
from . import checks, l1
from .iterates import gradient_to, likeliest_others, where

ALPHA_MAX = 0.1  # the most that an iterate is drawn towards x
ETA = 1.05  # how far beyond the hyperplane a step goes
BETA = 0.9  # what is left of the distance to x after an adversarial iterate
NEWTON_STEPS = 12


@dataclass
class FAB:
    """Looks for the adversarial point nearest to x. A step goes to the hyperplane on which the
    linearised model is undecided between label and target class, and is drawn towards x; after an
    adversarial iterate the search goes back towards x.

    eps: in units of x (8/255, not 8); a point farther from x does not count as found. steps:
    iterations of one round. restarts: rounds for each of the `target_classes` (at most C - 1)
    likeliest other classes at x; the first begins at x itself, the others at random points within
    eps / 2. A sample that a round breaks within eps takes no part in the next ones. With None for
    target_classes no class is chosen in advance, as in the paper: each step goes to the nearest of
    the hyperplanes of all classes, which takes a backward pass for each class. norm: "linf", "l2"
    or "l1". lo, hi: the box of valid images.
    bad_gradients: of the last call, a tensor on x's device: how many (sample, iterate) pairs had a
    gradient with NaN or infinity in it; these elements do not move.
    Raises ValueError on a radius in the wrong unit and other values that make no sense, TypeError
    on values of the wrong kind.

    The defaults are those of AutoAttack's FAB-T; like its code, and other than the paper, there is
    no final search along the line to x. Differences from that code: random starts are uniform in
    the ball, not on its surface; the hyperplane's offset is never computed, as it cancels.
    """

    eps: float = 8 / 255
    steps: int = 100
    restarts: int = 1
    target_classes: int | None = 9
    norm: str = "linf"
    lo: float = 0.0
    hi: float = 1.0
    bad_gradients: torch.Tensor | int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self):
        checks.check_budget(self)
        for name in ("lo", "hi"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, must be finite")
        for name in ("steps", "restarts", "target_classes"):
            if name != "target_classes" or self.target_classes is not None:
                setattr(self, name, checks.whole(name, getattr(self, name), 1))

    @torch.inference_mode(False)
    def __call__(self, model, x, y, *, index=None):
        """x_adv for `model`: per sample the nearest misclassified point found, where it lies within
        eps, else x itself. A sample that is misclassified at x stays there.

        x: float32 or float64 [B, ...] in [lo, hi]; y: integers [B]. index: int64 [B] dataset ids
        that decide each sample's random starts. The model maps x, in the dtype of its parameters,
        to logits [B, C], C >= 2, or to what has them; it runs in eval mode, its modes are put back
        and its parameters' `.grad` stays untouched. x_adv has x's dtype. Raises ValueError or
        TypeError naming the argument.
        """
        y, index = checks.check_call(self, model, x, y, index)
        self.bad_gradients = torch.zeros((), dtype=torch.int64, device=x.device)
        if not x.numel():
            return x.detach().clone()
        with checks.under_attack(model, x, y) as logits:
            return self._rounds(model, x.detach(), y, logits, index)

    def _rounds(self, model, x, y, logits, index):
        """All target classes and restarts, each on the samples that are robust so far."""

        def inner(x_adv, y, target):
            logits = ask(model, x_adv)
            if self.target_classes is None:  # to all classes, the label as if it were far away
                differences = logits - logits.gather(1, y[:, None])
                return differences.scatter(1, y[:, None], torch.inf), logits.argmax(1) != y
            of_target, of_label = (logits.gather(1, c[:, None])[:, 0] for c in (target, y))
            return of_target - of_label, logits.argmax(1) != y

        targets = y[:, None]
        if self.target_classes is not None:
            targets = likeliest_others(logits, y, self.target_classes)
        x_adv, wrong = x.clone(), logits.argmax(1) != y
        seed = torch.randint(2**63 - 1, (), device="cpu")
        for counter in range(targets.shape[1] * self.restarts):
            rows = (~wrong).nonzero()[:, 0]  # the one host sync of a round
            if not len(rows):
                break
            target = targets[rows, counter // self.restarts]
            start = x[rows]
            if counter % self.restarts:
                start = self._start(start, seed, index[rows], counter)
            found, length = self.approach(inner, x[rows], y[rows], target, start=start)
            wrong[rows] = length <= self.eps
            x_adv[rows] = torch.where(per_sample(wrong[rows], x), found, x[rows])
        return x_adv

    def _start(self, x, seed, index, restart):
        keys = {"seed": seed, "index": index, "restart": restart, "lo": self.lo, "hi": self.hi}
        if self.norm == "l1":
            return l1.random_start(x, self.eps / 2, **keys)
        return ops.random_start(x, self.eps / 2, norm=self.norm, **keys)

    @torch.no_grad()
    def approach(self, inner, x, *targets, start):
        """One round, without host syncs, which is algorithm 1 of the paper: (each sample's wrong
        iterate nearest to x, its distance [B]), x and infinity for samples without a wrong iterate.

        inner(x_adv, *targets) -> (difference [B], or [B, T] to several classes, wrong [B] bool),
        sample by sample: the difference is 0 on the boundary, and positive where the model prefers
        the target. targets are [B, ...] and constant. start: the x_adv to begin from, in the box.
        Modes are left to the caller.
        """
        x_adv, nearest = start, x
        least = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        for _ in range(self.steps):
            grad, difference = self._nearest_plane(inner, x_adv, *targets)
            x_adv = self._step(x_adv, x, grad, difference)
            wrong = inner(x_adv, *targets)[1]
            length = self._length(x_adv - x)
            better = wrong & (length < least)
            nearest = torch.where(per_sample(better, x), x_adv, nearest)
            least = torch.where(better, length, least)
            x_adv = torch.where(per_sample(wrong, x), x + BETA * (x_adv - x), x_adv)
        return nearest, least

    def _nearest_plane(self, inner, x_adv, *targets):
        """(gradient, difference) of the class whose hyperplane is nearest: the distance
        to it is the difference over the dual norm of the gradient."""
        leaf = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            columns = inner(leaf, *targets)[0].reshape(len(leaf), -1).unbind(1)
        dual, nearest, bad = {"linf": 1, "l2": 2, "l1": math.inf}[self.norm], None, False
        for column in columns:
            with torch.enable_grad():
                grad = gradient_to(leaf, column, again=True)
            finite = grad.isfinite()
            bad = bad | ~finite.flatten(1).all(1)
            grad, difference = torch.where(finite, grad, 0.0), column.detach()
            slope = torch.linalg.vector_norm(grad.flatten(1), dual, dim=1).clamp(min=1e-12)
            new = grad, difference, difference.abs() / slope
            nearest = where(new[2] < nearest[2], new, nearest) if nearest else new
        self.bad_gradients = self.bad_gradients + bad.sum()
        return nearest[:2]

    def _step(self, x_adv, x, grad, difference):
        """P((1 - alpha) (x_adv + eta d) + alpha (x + eta d_x)): d and d_x lead to the hyperplane
        where the linearised difference is 0, alpha is the share of d in their lengths, P is into
        the box."""
        points, w = torch.stack((x_adv, x)).flatten(2), grad.flatten(1)
        difference = difference.to(x.dtype)
        at_x = difference + (w * (points[1] - points[0])).sum(1)
        d = to_hyperplane(points, w, torch.stack((difference, at_x)), self.norm, self.lo, self.hi)
        length = self._length(d, axes=2).clamp(min=1e-8)
        alpha = (length[0] / length.sum(0)).clamp(max=ALPHA_MAX).to(x.dtype)
        ends = points + ETA * d
        return torch.lerp(*ends, alpha[:, None]).clamp(self.lo, self.hi).view_as(x)

    def _length(self, v, axes=1):
        """The norm of v over all but its first axes, in float64."""
        order = checks.ORDERS[self.norm]
        return torch.linalg.vector_norm(v.flatten(axes), order, dim=axes, dtype=torch.float64)


def to_hyperplane(v, w, value, norm, lo, hi):
    """The d of least norm with w . d = -value and v + d in the box. If there is none, the d with
    v + d in the box that brings w . d nearest to -value.

    v: [..., N] in [lo, hi]; w: broadcastable to it; value: [...]. norm: "linf", "l2" or "l1".
    For l1 elements go to the wall one after the other, those of largest |w| first. For the others
    d is t sign(w) or t w, cut at the walls of the box, so that |w . d| is a concave, increasing,
    piecewise linear function of t. Newton's method rises from t = 0 to the root, and has reached it
    after the first step that passes no wall; the paper sorts the walls instead. In attacks 6 steps
    were enough for linf and 11 for l2 (2 and 4 as a rule); with fewer than are needed d ends short
    of the hyperplane.
    """
    largest = w.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    w = w / largest * -value.sign()[..., None]  # 0 where the value is NaN
    room = torch.where(w > 0, hi - v, v - lo)
    if norm == "l1":
        return _one_by_one(w, room, value.abs()[..., None] / largest).clamp(lo - v, hi - v)
    direction = w.sign() if norm == "linf" else w
    wall = room / direction.abs()  # the t at which each element meets its own
    reach, slope = room * w.abs(), direction * w
    goal = value.abs()[..., None] / largest
    t = torch.zeros_like(goal)
    for _ in range(NEWTON_STEPS):
        free = wall > t
        rest = goal - (reach * ~free).sum(-1, keepdim=True)
        root = rest / (slope * free).sum(-1, keepdim=True)  # infinite if nothing is free
        t = torch.where(root > t, root, t).clamp(max=torch.finfo(t.dtype).max)
    return (t * direction).clamp(lo - v, hi - v)


def _one_by_one(w, room, goal):
    """The d [..., N] of least l1 norm with w . d = goal [..., 1] and |d| <= room."""
    order = w.abs().argsort(dim=-1, descending=True, stable=True)
    reach = (room * w.abs()).gather(-1, order)
    before = reach.cumsum(-1, dtype=torch.float64) - reach  # what others have reached by its turn
    share = torch.where(reach > 0, (goal - before) / reach, 0.0).clamp(0, 1).to(reach.dtype)
    return torch.zeros_like(reach).scatter(-1, order, share) * room * w.sign()
