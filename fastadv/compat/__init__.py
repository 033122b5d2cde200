"""The calls of torchattacks and of AutoAttack, run by fastadv's attacks.

    from fastadv import compat as torchattacks      # instead of import torchattacks
    from fastadv.compat import AutoAttack           # instead of from autoattack import AutoAttack

    x_adv = torchattacks.PGD(model, eps=8/255, alpha=2/255, steps=10)(images, labels)
    x_adv = AutoAttack(model, norm="Linf", eps=8/255).run_standard_evaluation(x, y, bs=250)

Arguments, their order and their defaults are those of torchattacks 3.5 (FGSM, PGD, PGDL2, APGD) and
of the authors' AutoAttack, but for its device: by default that of the images. Models map images in
[0, 1] to logits; their modes are put back. Arguments whose meaning fastadv does not have are
refused by a ValueError, those of the wrong kind by a TypeError.
"""

from .autoattack import AutoAttack
from .torchattacks import APGD, FGSM, PGD, PGDL2

__all__ = ["APGD", "FGSM", "PGD", "PGDL2", "AutoAttack"]
