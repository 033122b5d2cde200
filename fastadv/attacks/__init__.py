"""Attacks: the inner maximisation of training and the adversary of evaluation."""

from .apgd import APGD
from .cw import CW
from .ddn import DDN
from .deepfool import DeepFool
from .fab import FAB
from .fmn import FMN
from .graphs import Captured
from .pgd import FGSM, PGD
from .square import Square

__all__ = ["APGD", "CW", "DDN", "FAB", "FGSM", "FMN", "PGD", "Captured", "DeepFool", "Square"]
