"""Attacks: the inner maximisation of training and the adversary of evaluation."""

from .pgd import FGSM, PGD

__all__ = ["FGSM", "PGD"]
