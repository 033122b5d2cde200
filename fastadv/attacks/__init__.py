"""Attacks: the inner maximisation of training and the adversary of evaluation."""

from .apgd import APGD
from .pgd import FGSM, PGD
from .square import Square

__all__ = ["APGD", "FGSM", "PGD", "Square"]
