"""Square (Andriushchenko et al. 2020, arXiv 1912.00049): random search by squares, no gradients."""

import functools
import math
from dataclasses import dataclass

import torch

from .. import ops
from ..engine.query import ask
from . import checks, l1
from .iterates import where
from .targets import OBJECTIVES, check_target, classes, reached

HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries
BLOCK = 16  # queries between two looks at which samples are broken
TILES = 5  # of the l2 start, along either side


@dataclass
class Square:
    """Maximises the margin max_{c != y} z_c - z_y within a ball: it changes one square window after
    the other and keeps a change that raises the margin. It is a black-box attack, which sees the
    logits alone.

    eps: in units of x (8/255, not 8). queries: windows tried in one search, after its start.
    p_init: the share of the pixels that a window covers at first; halved after HALVED_AT queries,
    as in AutoAttack, whatever `queries` is (the paper stretches the schedule to it).
    restarts: the number of searches; a sample that one breaks takes no part in the next. norm:
    "linf" (algorithm 2), "l2" (algorithm 3) or "l1" (Croce & Hein 2021, arXiv 2103.01208: as l2,
    but bumps fall off by 1 / k^4, lengths are in l1, and what a window has changed is projected
    into ball and box). lo, hi: the box of valid images.
    Raises ValueError on a radius in the wrong unit and other values that make no sense, TypeError
    on values of the wrong kind.

    As in the authors' code, from which the published numbers are, and other than in the paper, a
    window smaller than the image never reaches its last row or column, and both halves of an l2
    window have the same norm. Differences from that code: each sample draws windows of its own; the
    l2 and l1 starts have 5 x 5 tiles for any size of image.
    """

    eps: float = 8 / 255
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    norm: str = "linf"
    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self):
        checks.check_budget(self)
        for name in ("queries", "restarts"):
            setattr(self, name, checks.whole(name, getattr(self, name), 1))
        if not 0 < checks.number("p_init", self.p_init) <= 1:
            raise ValueError(f"p_init is {self.p_init}, must be in (0, 1]")

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, model, x, y, *, target=None, index=None):
        """x_adv for `model`: per sample the misclassified point found, else the point of the
        highest margin seen. A sample that is misclassified at x stays there.

        x: float32 or float64 [B, C, H, W] in [lo, hi]; y: integers [B]. index: int64 [B] dataset
        ids that, with torch's CPU generator, decide each sample's random numbers, whatever its
        batch. The model maps x, in the dtype of its parameters, to logits or to what has them; it
        runs in eval mode and its modes are put back. x_adv has x's dtype. Raises ValueError or
        TypeError naming the argument.

        target: of a targeted attack, as of `PGD.__call__`: the class which then stands for
        "misclassified" above. In place of the margin it maximises the cross-entropy to the target,
        negated, as in the authors' code.
        """
        y, index = checks.check_call(self, model, x, y, index)
        target = check_target(target, y, x)
        if x.dim() != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}, must be [B, C, H, W]")
        if not x.numel():
            return x.detach().clone()
        with checks.under_attack(model, x, y) as logits:
            aimed = target is not None
            aim = classes(target, logits, y, index) if aimed else y
            query = functools.partial(_query, model, aimed)
            return self._restarts(query, x.detach(), aim, _judged(logits, aimed, aim), index)

    def _restarts(self, query, x, aim, at_x, index):
        """All searches. query(x_adv, aim) -> (loss [B], wrong [B]); aim: the labels or targets,
        int64 [B]; at_x: what query gives at x."""
        x_adv, loss, wrong = x.clone(), *at_x
        seed = torch.randint(2**63 - 1, (), device="cpu")
        for restart in range(self.restarts):
            rows = (~wrong).nonzero()[:, 0]
            if not len(rows):
                break
            draws = {"seed": seed, "restart": restart}
            new = self._search(query, x[rows], aim[rows], index[rows], draws)
            old = x_adv[rows], loss[rows], wrong[rows]
            kept = where(new[2] | (new[1] > old[1]), new, old)
            x_adv[rows], loss[rows], wrong[rows] = kept
        return x_adv

    def _search(self, query, x, aim, index, draws):
        """(x_adv, loss [B], wrong [B]) of one search, in which broken samples are left alone."""
        x_adv = self._start(x, index, draws)
        found = x_adv, *query(x_adv, aim)
        sides = self._sides(*x.shape[2:])
        etas = {} if self.norm == "linf" else {s: _eta(s, x, self.norm) for s in set(sides)}
        count = x.shape[1] + (2 if self.norm == "linf" else 5)  # random numbers of a query
        for block, first in enumerate(range(0, self.queries, BLOCK)):
            rows = (~found[2]).nonzero()[:, 0]  # the one host sync of a block
            if not len(rows):
                break
            now = sides[first : first + BLOCK]
            u = _uniform(x, index[rows], len(now) * count, step=1 + block, **draws)
            windows = self._windows(x[rows], u.view(len(rows), len(now), count), now, etas)
            part = self._block(query, x[rows], aim[rows], [f[rows] for f in found], windows)
            for whole, new in zip(found, part, strict=True):
                whole[rows] = new
        return found

    def _block(self, query, x, aim, found, windows):
        """`found` after a query of each window; no host syncs."""
        x_adv, loss, wrong = found
        move = self._move_linf if self.norm == "linf" else self._move_bump
        for window in windows:
            x_new = move(x_adv, x, *window)
            new_loss, new_wrong = query(x_new, aim)
            better = ~wrong & (new_wrong | (new_loss > loss))
            new = x_new, new_loss, new_wrong
            x_adv, loss, wrong = where(better, new, (x_adv, loss, wrong))
        return x_adv, loss, wrong

    def _sides(self, height, width):
        """The side of each query's window, in pixels: the window has the share p of the image, and
        p is halved on schedule. For l2 and l1 a side is odd and at least 3; none is longer than the
        image's."""
        sides = []
        for query in range(self.queries):
            halved = sum(query > mark for mark in HALVED_AT)
            side = round(math.sqrt(self.p_init / 2**halved * height * width))
            side = max(side, 1) if self.norm == "linf" else max(side, 3) | 1
            sides.append(min(side, height, width))
        return sides

    def _start(self, x, index, draws):
        """The x_adv to begin from: for linf stripes of +-eps, one pixel wide, else tiles of eta and
        -eta."""
        channels, height, width = x.shape[1:]
        if self.norm == "linf":
            sign = _uniform(x, index, channels * width, step=0, **draws) >= 0.5
            low, high = self._faces(x)
            return torch.where(sign.view(-1, channels, 1, width), high, low)
        side = max(min(height, width) // TILES, 1)
        grid = min(TILES, height), min(TILES, width)
        tiles = grid[0] * grid[1]
        u = _uniform(x, index, tiles * (1 + channels), step=0, **draws)
        turned, sign = u[:, :tiles].view(-1, *grid), u[:, tiles:].view(-1, channels, *grid)
        eta = _eta(side, x, self.norm)[(turned >= 0.5).long(), :side, :side]
        delta = _sign(sign, x)[..., None, None] * eta[:, None]  # [B, C, *grid, side, side]
        delta = delta.transpose(3, 4).reshape(len(x), channels, grid[0] * side, grid[1] * side)
        start = torch.zeros_like(x)
        top, left = (height - grid[0] * side) // 2, (width - grid[1] * side) // 2
        start[:, :, top : top + delta.shape[2], left : left + delta.shape[3]] = delta
        return self._into_ball(start, x)

    def _windows(self, x, u, sides, etas):
        """Yields the arguments of a move after x_adv and x, for each query of a block.

        u: [B, Q, K] in [0, 1): row and column of the window; for l2 and l1 those of a second one
        and whether eta is turned; the channels' signs. sides: [Q].
        """
        side = torch.tensor(sides).to(x.device, non_blocking=True)
        places = [_local(u[..., i], side, x.shape[2 + i]) for i in (0, 1)]
        if self.norm == "linf":
            low, high = self._faces(x)
            up = u[..., 2:, None, None] >= 0.5
            for q in range(len(sides)):
                yield _window(*places, q), torch.where(up[:, q], high, low)
            return
        places2 = [_local(u[..., 2 + i], side, x.shape[2 + i]) for i in (0, 1)]
        turned, sign = (u[..., 4] >= 0.5).long(), _sign(u[..., 5:, None, None], x)
        for q, s in enumerate(sides):
            rows, columns = places[0][:, q, :, None], places[1][:, q, None, :]
            bump = sign[:, q] * etas[s][turned[:, q, None, None], rows, columns][:, None]
            yield _window(*places, q), _window(*places2, q), bump

    def _move_linf(self, x_adv, x, window, face):
        """Algorithm 2: +-2 eps in the window, projected, which ends at a face of ball and box.

        window: bool [B, 1, H, W]; face: [B, C, H, W], the greatest point of ball and box in the
        channels that go up, the least in the others.
        """
        return torch.where(window, face, x_adv)

    def _move_bump(self, x_adv, x, window, window2, bump):
        """Algorithm 3: the window gets its own direction plus bump's, and as its length what both
        windows had and what is left of eps; window2 gets 0. l1, as in the authors' code: each
        channel of the window gets C times what it had and its share of what is left.

        window, window2: bool [B, 1, H, W]; bump: [B, C, H, W], +-eta in the window, else 0.
        """
        delta, p = x_adv - x, checks.ORDERS[self.norm]
        unused = (self.eps**p - self._length(delta, (1, 2, 3)) ** p).clamp(min=0)
        old = delta * window
        new = bump + _over(old, self._length(old))
        available = self._length(delta * (window | window2)) ** p + unused / x.shape[1]
        length = available.sqrt() if self.norm == "l2" else available * x.shape[1]
        moved = _over(new, self._length(new)) * length
        return self._into_ball(torch.where(window, moved, delta * ~window2), x)

    def _faces(self, x):
        """The least and the greatest point of ball and box."""
        return (x - self.eps).clamp(min=self.lo), (x + self.eps).clamp(max=self.hi)

    def _into_ball(self, delta, x):
        """x plus delta: for l2 at length eps, clipped to the box, for l1 projected into both."""
        if self.norm == "l1":
            return l1.project(x + delta, x, self.eps, self.lo, self.hi)
        delta = _over(delta, self._length(delta, (1, 2, 3))) * self.eps
        return (x + delta).clamp(self.lo, self.hi)

    def _length(self, delta, dims=(2, 3)):
        """The norm of delta over these dimensions, which are kept."""
        return torch.linalg.vector_norm(delta, checks.ORDERS[self.norm], dim=dims, keepdim=True)


def _query(model, targeted, x_adv, aim):
    """(loss [B], wrong [B]) of one query; aim: int64 [B], the targets or else the labels."""
    return _judged(ask(model, x_adv), targeted, aim)


def _judged(logits, targeted, aim):
    if targeted:
        return OBJECTIVES["ce"](logits, None, aim), reached(logits, None, aim)
    return ops.margin(logits, aim), reached(logits, aim, None)


def _uniform(x, index, count, **counter):
    """Random numbers [B, count] in [0, 1), multiples of 2^-24, which depend on the sample's index
    and on the counter (seed, restart and step) alone."""
    middle = torch.full((len(index), count), 0.5, device=x.device)
    return ops.random_start(middle, 0.5, index=index, **counter)


def _sign(u, x):
    """+-1 in the dtype of x, by random numbers in [0, 1)."""
    return torch.where(u >= 0.5, 1.0, -1.0).to(x.dtype)


def _local(u, sides, size):
    """int64 [B, Q, size]: each pixel's place within an interval, -1 for pixels outside it. The
    interval has length sides [Q], and u [B, Q] in [0, 1) decides where it begins; it never reaches
    the last of the `size` pixels unless it has all of them."""
    starts = (size - sides).clamp(min=1)
    place = torch.arange(size, device=u.device) - (u * starts).long()[..., None]
    return torch.where(place < sides[:, None], place, -1).clamp(min=-1)


def _window(rows, columns, query):
    """bool [B, 1, H, W] from the places of `_local`."""
    return (rows[:, query, None, :, None] >= 0) & (columns[:, query, None, None, :] >= 0)


def _eta(side, x, norm):
    """[2, side + 1, side + 1]: eta and its transpose, of norm 1, with a row and a column of zeros.

    Equation 2: half of eta is a bump, the other half one upside down. A bump falls off from its
    centre with the distance d along rows or columns, as the sum of 1 / k^2 (l1: 1 / k^4) over
    d < k <= n + 1.
    """
    order, power = checks.ORDERS[norm], {"l2": 2, "l1": 4}[norm]
    pixels = torch.arange(side, device=x.device)
    n = side // 2
    falls = (
        (1 / torch.arange(1, n + 2, device=x.device).double() ** power).flip(0).cumsum(0).flip(0)
    )

    def bump(rows):
        down, right = (pixels[:rows] - rows // 2).abs(), (pixels - n).abs()
        values = falls[torch.maximum(down[:, None], right)]
        return values / torch.linalg.vector_norm(values, order)

    eta = torch.cat([bump(n), -bump(side - n)])
    eta = torch.nn.functional.pad(eta / torch.linalg.vector_norm(eta, order), (0, 1, 0, 1))
    return torch.stack([eta, eta.T]).to(x.dtype)


def _over(delta, length):
    """delta / length, and 0 where the length is 0."""
    return torch.where(length > 0, delta / length, 0.0)
