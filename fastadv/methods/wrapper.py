"""Methods that add a term to the loss of any other."""

from operator import attrgetter

from torch import nn

from .base import Method

OF_BASE = ("attack", "attack_bn", "milestones", "epochs")  # read and assigned on either side


class Wrapper(Method):
    """A method that adds a term to the outer problem of `base`; the inner problem, state and all
    else are the base's. teacher: the one that the term needs."""

    def __init__(self, base, teacher):
        nn.Module.__init__(self)  # what Method's own would set is the base's
        self.base = base
        self.adversarial, self.loss_scale = base.adversarial, base.loss_scale
        self.capturable = base.capturable
        self.teachers = tuple(dict.fromkeys((*base.teachers, teacher)))

    attack, attack_bn, milestones, epochs = (property(attrgetter(f"base.{n}")) for n in OF_BASE)

    def __setattr__(self, name, value):
        # Here, as nn.Module would take an attack that is a module before a property's setter.
        if name in OF_BASE:
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def prepare(self, nets, x):
        self.base.prepare(nets, x)

    def cacheable(self):
        return self.base.cacheable()

    def init_state(self, device):
        return self.base.init_state(device)

    def end_epoch(self, state):
        return self.base.end_epoch(state)

    def queried(self, nets):
        return self.base.queried(nets)

    def targets(self, nets, batch, state):
        return self.base.targets(nets, batch, state)

    def inner(self, nets, x_adv, *targets):
        return self.base.inner(nets, x_adv, *targets)

    def perturb(self, nets, batch, state, start=None):
        return self.base.perturb(nets, batch, state, start)
