"""Strong augmentation whose every random choice is a function of (seed, image, view).

Uniform numbers are Philox4x32-10 words (Salmon et al. 2011) divided by 2^32: number c of a stream
is word c % 4 of the counter (c // 4, index mod 2^32, view, stream) under the key `seed` mod 2^64.
Batch, order, epoch and device play no part. One stream draws the image, one its partner, one how
the two are mixed; streams count down from 2^32 - 1, where no restart of an attack comes near.

    crop and flip -> policy -> cutout, in uint8 -> / 255 -> mixed with a partner, in float32
"""

import functools
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from ..ops.random_start import philox
from . import image_ops, policies

IMAGE, PARTNER, MIX = 2**32 - 1, 2**32 - 2, 2**32 - 3
ATTEMPTS, RATIOS = 10, 4096  # of a resized crop: as torchvision's, and as fine as pixels need


@dataclass(frozen=True)
class Augmentation:
    """How an image is cropped, and what changes it after crop and flip. By default nothing does.

    crop: "padded" shifts the zero-padded image by up to Loader's padding. "resized" cuts out a box
    of a share of the area in [crop_scale, 1] and of an aspect ratio in [3/4, 4/3], log-uniform, and
    resizes it to the image's size (Szegedy et al. 2015, as torchvision's RandomResizedCrop).
    policy: "none", "autoaugment" (the CIFAR-10 policy; Cubuk et al. 2019), "randaugment" (Cubuk et
    al. 2020: randaugment_n operations of strength randaugment_m, 0 to 30 as in torchvision) or
    "trivialaugment" (Wide; Mueller and Hutter 2021).
    cutout: side of a square set to level 128, in pixels, even; centred at any pixel and cut off at
    the border (DeVries and Taylor 2017, whose zero is the mean of normalised images). 0: none.
    mixup, cutmix: alpha of Beta(alpha, alpha), of which each image draws its own share; 0: none.
    Mixup (Zhang et al. 2018) keeps the share max(b, 1 - b) of the image, as FunMatch does (Beyer et
    al. 2022). Cutmix (Yun et al. 2019) replaces a box of the share 1 - b by the partner's pixels,
    and the share kept is counted in pixels. With both, each image gets one of them, equally likely.
    The partner is any image of the split, itself included, with an augmentation of its own.
    views_per_image: an image goes through this many views in turn, one per epoch; None: each epoch
    draws one of 2^32.
    Raises UsageError that names the argument at fault.
    """

    policy: str = "none"
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    views_per_image: int | None = None
    randaugment_n: int = 2
    randaugment_m: float = 9
    crop: str = "padded"
    crop_scale: float = 0.08

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            kind, called = (Real, "a number") if one.type is float else (Integral, "a whole number")
            right = isinstance(value, kind) and not isinstance(value, bool)
            if one.type is not str and not (right or value is one.default):
                raise UsageError(f"{one.name} is {value!r}, must be {called}")
        known = ("none", *policies.FILL)
        rules = {
            "crop": (self.crop in ("padded", "resized"), "padded or resized"),
            "crop_scale": (0 < self.crop_scale <= 1, "in (0, 1]"),
            "policy": (self.policy in known, f"one of {', '.join(known)}"),
            "cutout": (self.cutout >= 0 and self.cutout % 2 == 0, "even and at least 0"),
            "mixup": (0 <= self.mixup <= 100, "in [0, 100]"),
            "cutmix": (0 <= self.cutmix <= 100, "in [0, 100]"),
            "views_per_image": (
                self.views_per_image is None or 1 <= self.views_per_image <= 2**32,
                "None or in [1, 2^32]",
            ),
            "randaugment_n": (self.randaugment_n >= 1, "at least 1"),
            "randaugment_m": (0 <= self.randaugment_m <= 30, "in [0, 30]"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}, must be {rule}")

    @property
    def plain(self) -> bool:
        """Whether there is nothing but shift and flip, whose views `encode_view` numbers."""
        off = self.policy == "none" and self.crop == "padded" and not (self.cutout or self.mixes)
        return off and self.views_per_image is None

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and so labels soft."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def views(self) -> int:
        """How many views an image has; meaningless when `plain`."""
        return self.views_per_image or 2**32


class Key(NamedTuple):
    """All that a batch of views depends on: the seed, and the ids of image and view, `index` and
    `view`, int64 [B] in [0, 2^32), on the CPU."""

    seed: int
    index: Tensor
    view: Tensor

    def uniforms(self, stream: int, count: int) -> Tensor:
        """float64 [B, count] in [0, 1)."""
        block = torch.arange(-(-count // 4))
        sample = self.index[:, None] & 0xFFFFFFFF
        words = philox(self.seed, block, sample, self.view[:, None], stream)
        return torch.stack(words, dim=-1).flatten(1)[:, :count].double() * 2.0**-32


def augment_images(
    images: Tensor, key: Key, stream: int, settings: Augmentation, padding: int, flips: int
) -> Tensor:
    """Crop, flip, policy and cutout of images uint8 [B, C, H, W], B of them for B keys."""
    n, (height, width) = settings.randaugment_n, images.shape[2:]
    resized, end = settings.crop == "resized", 5 + policies.draws(settings.policy, n)
    u = key.uniforms(stream, end + 2 * ATTEMPTS * resized)
    flip = u[:, 2] * flips >= 1
    if resized:
        box = draw_box(u[:, :2], u[:, end:], settings.crop_scale, height, width)
        images = image_ops.resized_crop(images, *box, flip)
    else:
        dy, dx = (u[:, :2] * (2 * padding + 1)).long().unbind(1)
        images = image_ops.crop_flip(images, dy, dx, flip, padding)
    fill = policies.FILL.get(settings.policy, 0)
    for layer in policies.layers(
        settings.policy, u[:, 5:end], height, width, n, settings.randaugment_m
    ):
        images = image_ops.transform(images, *layer, fill)
    if settings.cutout:
        side = torch.full((len(images),), settings.cutout)
        hole = image_ops.boxes(*_pixel(u[:, 3:5], height, width), side, side, height, width)
        images = images.masked_fill(hole.to(images.device, non_blocking=True), 128)
    return images


def draw_box(place: Tensor, u: Tensor, scale: float, height: int, width: int) -> list[Tensor]:
    """[top, left, tall, wide] of a box in each image, int64 [B] in pixels.

    place: float64 [B, 2] and u: float64 [B, 2 ATTEMPTS], uniform in [0, 1): where the box lies, and
    share and ratio of each attempt. The first attempt that fits is taken; where none does, all of
    an image that is no longer than 4/3 of its short side, of another the largest box that is not.
    """
    share, ratio = u.unflatten(1, (ATTEMPTS, 2)).unbind(2)
    area = (scale + (1 - scale) * share) * (height * width)
    ratio = _ratios()[(ratio * RATIOS).long()]
    tall, wide = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
    first = fits.byte().argmax(1, keepdim=True)
    longest = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    sides = [
        torch.where(fits.any(1), sizes.gather(1, first)[:, 0], most)
        for sizes, most in zip((tall, wide), longest, strict=True)
    ]
    room = torch.tensor([height, width]) - torch.stack(sides, dim=1)
    centre = torch.where(fits.any(1)[:, None], (place * (room + 1)).long(), room // 2)
    return [*centre.unbind(1), *sides]


@functools.lru_cache
def _ratios():
    """RATIOS aspect ratios from 3/4 to 4/3, evenly spaced in their logarithm: a table, because the
    last bit of a power may depend on the batch."""
    return (4 / 3) ** torch.linspace(-1, 1, RATIOS, dtype=torch.float64)


def draw_mix(
    key: Key, settings: Augmentation, count: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(partner, weight, share) of a mix x = weight x + (1 - weight) x[partner].

    partner: int64 [B] in [0, count). weight: float32 [B, 1, H, W], the image's share of each pixel;
    share: float32 [B], its mean over the pixels, which is the label's share too. On the CPU.
    """
    u = key.uniforms(MIX, 5)
    share = torch.ones(len(u), dtype=torch.float64)
    weight = share[:, None, None, None].expand(-1, 1, height, width)
    if settings.mixup:
        b = symmetric_beta(u[:, 2], settings.mixup)
        share = torch.maximum(b, 1 - b)
        weight = share[:, None, None, None].expand_as(weight)
    if settings.cutmix:
        side = (1 - symmetric_beta(u[:, 2], settings.cutmix)).sqrt()
        sides = (side * height).long(), (side * width).long()
        box = image_ops.boxes(*_pixel(u[:, 3:5], height, width), *sides, height, width)
        cut = u[:, 1] < (0.5 if settings.mixup else 1.0)
        share = torch.where(cut, 1 - box.double().mean((1, 2, 3)), share)
        weight = torch.where(cut[:, None, None, None], (~box).double(), weight)
    return (u[:, 0] * count).long(), weight.float(), share.float()


def symmetric_beta(u: Tensor, alpha: float) -> Tensor:
    """The quantile of Beta(alpha, alpha) at u in [0, 1], float64 [B], exact for alpha 1.

    Interpolated in a table, so that no power is taken whose last bit may depend on the batch; the
    error stays below 1e-4 and below 2e-6 for alpha up to 1.
    """
    t, below = _beta_table(alpha)
    half = torch.minimum(u, 1 - u)
    right = torch.searchsorted(below, half).clamp(1, len(t) - 1)
    along = (half - below[right - 1]) / (below[right] - below[right - 1])
    t = t[right - 1] + along * t.diff()[right - 1]
    return torch.where(u < 0.5, t, 1 - t)


@functools.lru_cache
def _beta_table(alpha):
    """t from 0 to 1/2, and the distribution function there, from 0 to 1/2.

    That is the integral of (t (1 - t))^(alpha - 1) dt, summed in w = t^alpha for its pole at 0.
    """
    t = torch.linspace(0, 1, 4097, dtype=torch.float64) ** (1 / min(alpha, 1)) / 2
    density = (1 - t) ** (alpha - 1)
    below = ((t**alpha).diff() * (density[1:] + density[:-1])).cumsum(0)
    return t, torch.cat([t[:1], below / below[-1] / 2])


def _pixel(u, height, width):
    return (u[:, 0] * height).long(), (u[:, 1] * width).long()
