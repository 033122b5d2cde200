"""An evaluation shared out over processes: each attacks its part of every batch."""

from dataclasses import asdict

import torch

from ..runs import parallel
from .record import UNKNOWN, Cost


class Shares:
    """The processes of a `parallel.group()`, where an evaluation is `shared` by them; else this
    one alone. What they find is put together after each batch, so that all hold the same record."""

    def __init__(self, shared):
        self.rank, self.world = (parallel.rank(), parallel.world()) if shared else (0, 1)

    def of(self, rows):
        """The part of a batch that this process attacks; it may be empty."""
        return rows[self.rank :: self.world]

    def together(self, part, count):
        """What all processes have found for a batch of `count` rows; part: what this one has."""
        if self.world == 1:
            return part
        whole = torch.zeros(count, *part.shape[1:], dtype=part.dtype)
        whole[self.rank :: self.world] = part
        return parallel.total(whole)  # the others have zeros there

    def cost(self, cost):
        """The cost of a batch over all processes: what they did in sum, and how long the slowest
        took."""
        if self.world == 1:
            return cost
        values = torch.tensor([*asdict(cost).values()], dtype=torch.float64)
        sums, most = parallel.total(values).tolist(), (-parallel.least(-values)).tolist()
        names = enumerate(asdict(cost))
        longest = ("seconds", "largest")
        return Cost(**{name: most[i] if name in longest else int(sums[i]) for i, name in names})

    def begun(self, verdicts):
        """Takes over what the first process knows already, from its file."""
        if self.world > 1:
            known = verdicts if self.rank == 0 else torch.full_like(verdicts, UNKNOWN)
            verdicts.copy_(parallel.total(known))

    def keeps(self, record):
        """Whether the first process keeps examples."""
        kept = record.examples is not None
        return kept if self.world == 1 else bool(parallel.total(torch.tensor(int(kept))))
