"""AutoAugment, RandAugment and TrivialAugment as tables: which operations, and how strong.

A policy turns uniform numbers into layers. A layer gives every image one operation of
`image_ops.OPERATIONS` and its magnitude, which grows with the strength, 0 to 1:

    magnitude = base + sign strength span        sign: -1 or 1, equally likely; 1 for unsigned ones

Bases and spans are the ranges in AutoAugment's appendix (Cubuk et al. 2019), for TrivialAugment its
Wide space (Mueller and Hutter 2021). Factors of brightness, color, contrast and sharpness mirror
about 1, so that strength 0 changes nothing, as in torchvision; the first code of AutoAugment and of
RandAugment rises from 0.1 to 1.9 instead.
"""

import torch
from torch import Tensor

from .image_ops import OPERATIONS

_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
_POOL = len(OPERATIONS) - 1  # RandAugment and TrivialAugment draw from all but the last, invert

# The level outside the image when pixels move: AutoAugment's code fills with CIFAR's mean colour,
# which 128 is near, and RandAugment's with 128; TrivialAugment's leaves it black.
FILL = {"autoaugment": 128, "randaugment": 128, "trivialaugment": 0}

# The 25 sub-policies for CIFAR-10 in AutoAugment's appendix, each two of (operation, probability,
# level 0 to 9); operations without a magnitude have level 0.
AUTOAUGMENT_CIFAR10 = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def ranges(policy: str, height: int, width: int) -> Tensor:
    """float64 [operations, 3]: base, span, and 1 where the sign is drawn. Units: image_ops.

    Translations reach 150/331 of the side as in AutoAugment, and 32 pixels, at most the side, in
    TrivialAugment; so they fit an image of any size.
    """
    if policy == "trivialaugment":
        shear, degrees, factor, bits = 0.99, 135, 0.99, 6
        down, right = min(32, height), min(32, width)
    else:
        shear, degrees, factor, bits = 0.3, 30, 0.9, 4
        down, right = 150 / 331 * height, 150 / 331 * width
    table = {
        "shear_x": (0, shear, 1),
        "shear_y": (0, shear, 1),
        "translate_x": (0, right, 1),
        "translate_y": (0, down, 1),
        "rotate": (0, degrees, 1),
        "brightness": (1, factor, 1),
        "color": (1, factor, 1),
        "contrast": (1, factor, 1),
        "sharpness": (1, factor, 1),
        "posterize": (8, -bits, 0),
        "solarize": (256, -256, 0),
    }
    rows = [table.get(name, (0, 0, 0)) for name in OPERATIONS]
    return torch.tensor(rows, dtype=torch.float64)


def layers(
    policy: str, u: Tensor, height: int, width: int, n: int, m: float
) -> list[tuple[Tensor, Tensor]]:
    """The policy's layers, first to last: operation int64 [B] and magnitude float64 [B].

    u: float64 [B, draws(policy, n)], uniform in [0, 1), on the CPU. n and m are RandAugment's.
    """
    if policy == "autoaugment":
        chosen = _autoaugment(u)
    elif policy == "randaugment":
        chosen = [(_pick(u[:, 2 * k]), u.new_tensor(m / 30), u[:, 2 * k + 1]) for k in range(n)]
    elif policy == "trivialaugment":
        chosen = [(_pick(u[:, 0]), (u[:, 1] * 31).floor() / 30, u[:, 2])]
    else:
        return []
    table = ranges(policy, height, width)
    found = []
    for op, strength, toss in chosen:
        base, span, signed = table[op].unbind(1)
        sign = torch.where((signed == 1) & (toss < 0.5), -1.0, 1.0)
        found.append((op, base + sign * strength * span))
    return found


def draws(policy: str, n: int) -> int:
    """How many uniform numbers `layers` takes per image."""
    return {"none": 0, "autoaugment": 5, "randaugment": 2 * n, "trivialaugment": 3}[policy]


def _autoaugment(u):
    """One sub-policy per image; each of its two operations applies with its own probability."""
    rows = [[(_NUMBER[op], p, level) for op, p, level in pair] for pair in AUTOAUGMENT_CIFAR10]
    table = torch.tensor(rows, dtype=torch.float64)[(u[:, 0] * len(rows)).long()]
    for k in range(2):
        op, probability, level = table[:, k].unbind(1)
        applied = u[:, 1 + 2 * k] < probability
        yield torch.where(applied, op.long(), _NUMBER["identity"]), level / 9, u[:, 2 + 2 * k]


def _pick(u):
    return (u * _POOL).long()
