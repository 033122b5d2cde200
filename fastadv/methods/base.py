"""What a training method is made of: the networks, a batch, and the two problems of the paper."""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from ..attacks import PGD
from ..frozen import Frozen, freeze


@dataclass
class Nets:
    """The networks of a method, [0, 1] images -> logits. Teachers are frozen and in eval mode.

    student_twin: the student as attacks in eval mode see it; made from `student` when missing.
    """

    student: nn.Module
    teacher: nn.Module | None = None
    clean_teacher: nn.Module | None = None
    student_twin: Frozen | None = None

    def attacked(self, attack_bn):
        """These nets with the student that the attack queries, twins refreshed."""
        if attack_bn == "train":
            return self
        if self.student_twin is None:
            self.student_twin = freeze(self.student)
        for net in (self.student_twin, self.teacher, self.clean_teacher):
            if isinstance(net, Frozen):
                net.refresh()
        return replace(self, student=self.student_twin)


@dataclass
class Batch:
    """x: float32 [B, C, H, W] in [0, 1]; y: int64 [B]; index, view: ids of image, augmentation."""

    x: torch.Tensor
    y: torch.Tensor
    index: torch.Tensor | None = None
    view: torch.Tensor | None = None
    x_adv: torch.Tensor | None = None
    memo: dict = field(default_factory=dict, repr=False)

    def teacher_logits(self, nets, teacher="teacher", on="x"):
        """Logits of a teacher on "x" or "x_adv": computed once per batch, without gradient."""
        key = teacher, on
        if key not in self.memo:
            net = getattr(nets, teacher)
            if net is None:
                raise ValueError(f"nets.{teacher} is None, must be a network for this method")
            with torch.no_grad():
                self.memo[key] = net(getattr(self, on))
        return self.memo[key]


class Method(nn.Module):
    """A training method: `inner` is maximised over x_adv, `outer` minimised over the student.

    attack: a PGD, by default with the start and sizes of the paper. attack_bn: "eval" attacks the
    frozen twin, "train" the student itself, BatchNorm statistics and all. teachers: which nets the
    method needs besides the student.
    """

    teachers = ()
    init = "gaussian"

    def __init__(self, attack=None, attack_bn="eval"):
        super().__init__()
        if attack_bn not in ("eval", "train"):
            raise ValueError(f"attack_bn is {attack_bn!r}, must be 'eval' or 'train'")
        self.attack = attack or PGD(init=self.init)
        self.attack_bn = attack_bn

    def init_state(self, device):
        """Dynamic weights and temperatures as a dict of tensors; empty for most methods."""
        return {}

    def targets(self, nets, batch, state):
        """The constants of the inner problem, [B, ...] each, computed once per attack."""
        return ()

    def inner(self, nets, x_adv, *targets):
        """The objective that the attack maximises, [B]."""
        raise NotImplementedError

    def outer(self, nets, batch, state):
        """(loss, new state): the loss that the student minimises on batch.x and batch.x_adv."""
        raise NotImplementedError

    def perturb(self, nets, batch, state, start=None):
        """x_adv [B, ...] for this batch."""
        nets = nets.attacked(self.attack_bn)
        targets = self.targets(nets, batch, state)
        inner = partial(self.inner, nets)
        return self.attack.ascend(inner, batch.x, *targets, start=start, index=batch.index)

    def end_epoch(self, state):
        """The state that the next epoch starts with."""
        return state
