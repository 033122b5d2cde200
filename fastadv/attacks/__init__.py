"""Attacks: the inner maximisation of training and the adversary of evaluation."""

from .apgd import APGD
from .fab import FAB
from .graphs import Captured
from .pgd import FGSM, PGD
from .square import Square

__all__ = ["APGD", "FAB", "FGSM", "PGD", "Captured", "Square"]
