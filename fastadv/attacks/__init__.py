"""Attacks: the inner maximisation of training and the adversary of evaluation."""

from .apgd import APGD
from .fab import FAB
from .pgd import FGSM, PGD

__all__ = ["APGD", "FAB", "FGSM", "PGD"]
