"""VFD-Adv, vanilla feature distillation (Cao et al. 2022, arXiv 2206.02158)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from .. import losses
from ..engine.features import forward_features
from ..engine.query import evaluating
from ..errors import UsageError
from .wrapper import Wrapper

DISTANCES = ("mse", "l2", "cosine")


class VFD(Wrapper):
    """max: that of `base`;
    min L_base + lambda_adv D(h_s(x_adv), h_v(x)) + lambda_clean D(h_s(x), h_v(x)),
    summed over the layers, batch mean.

    h_v are the features of a natural ("vanilla") teacher, always read at clean x, a constant.
    The paper's abstract fixes: a pre-trained natural teacher; the features of adversarial and of
    clean examples are both aligned to its; it joins any base method. This project's choice, as the
    full text was not available: the penultimate layer, the distance, both weights, the projector,
    and that the attack stays the base's. `benchmarks/vfd.py` compares them with others.

    base: a Method. layers: names of `forward_features`, "student:teacher" where they differ.
    distance: "mse" (mean over elements), "l2" or "cosine". normalise: features to unit length
    first. Where channels differ a learned linear map (1x1 convolution on maps) projects the
    student's; it trains with the student.
    lambda_adv, lambda_clean: beside the base's loss as it is, a tenth of the batch mean for RSLAD
    and others. Raises UsageError where maps differ in height or width.
    """

    def __init__(
        self,
        base,
        layers=("penultimate",),
        distance="mse",
        normalise=False,
        lambda_adv=1.0,
        lambda_clean=1.0,
    ):
        super().__init__(base, teacher="clean_teacher")
        if distance not in DISTANCES:
            raise UsageError(f"distance is {distance!r}, must be one of {', '.join(DISTANCES)}")
        self.distance, self.normalise = distance, normalise
        layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self.layers = [(a, b or a) for a, _, b in (layer.partition(":") for layer in layers)]
        if len({*self.layers}) < max(1, len(layers)) or "" in dict(self.layers):
            raise UsageError(f"layers is {layers}, must be one name or more, each once")
        self.weights = {"x_adv": lambda_adv, "x": lambda_clean}
        self.projectors = nn.ModuleList()

    def prepare(self, nets, x):
        super().prepare(nets, x)
        if nets.clean_teacher is None:
            raise ValueError("nets.clean_teacher is None, must be a network for this method")
        names, teacher_names = zip(*self.layers, strict=True)
        with torch.no_grad(), evaluating(nets.student):
            ours = example("student", nets.student, x, names)
            theirs = example("clean_teacher", nets.clean_teacher, x, teacher_names)
        for a, b in self.layers:
            self.projectors.append(projector(a, ours[a], b, theirs[b]))

    def cacheable(self):
        reads = super().cacheable()
        vanilla = dict.fromkeys((*reads.get("clean_teacher", ()), *(b for _, b in self.layers)))
        return reads | {"clean_teacher": tuple(vanilla)}

    def outer(self, nets, batch, state):
        if not self.projectors:
            raise ValueError("projectors are missing: call prepare(nets, x) before training")
        names, teacher_names = zip(*self.layers, strict=True)
        vanilla = batch.teacher_features(nets, teacher_names)
        student = WithFeatures(nets.student, names)
        loss, state = self.base.outer(replace(nets, student=student), batch, state)
        for on, weight in self.weights.items():
            if weight:
                features = student.features(getattr(batch, on))
                loss = loss + weight * self.alignment(features, vanilla)
        return loss, state

    def alignment(self, features, vanilla):
        """The sum over layers of D(h_s, h_v), batch mean."""
        total = 0.0
        for (a, b), project in zip(self.layers, self.projectors, strict=True):
            ours, theirs = project(features[a]).flatten(1), vanilla[b].flatten(1)
            if self.normalise:
                ours, theirs = F.normalize(ours), F.normalize(theirs)
            total = total + losses.feature(ours, theirs, self.distance)
        return total


class WithFeatures:
    """Wraps a network and keeps the features of the images that pass through it, so that VFD needs
    no second forward pass of images that the base method has passed through."""

    def __init__(self, net, names):
        self.net, self.names, self.seen = net, names, []

    def __call__(self, x):
        logits, features = forward_features(self.net, x, self.names)
        if logits.requires_grad:
            self.seen.append((x, features))
        return logits

    def features(self, x):
        if not any(x is image for image, _ in self.seen):
            self(x)
        return next(features for image, features in self.seen if image is x)


def example(which, net, x, names):
    """The features of x [B, C, H, W] in `net`, which an error calls `which`."""
    try:
        return forward_features(net, x, names)[1]
    except (ValueError, TypeError) as error:
        raise UsageError(f"layers of the {which}: {error}") from error


def projector(name, ours, teacher_name, theirs):
    """The identity, or a linear map from the student's channels to the teacher's."""
    if ours.shape[2:] != theirs.shape[2:]:
        raise UsageError(
            f"layers: {name} of the student is {list(ours.shape[1:])}, {teacher_name} of the "
            f"clean_teacher {list(theirs.shape[1:])}: they must agree in all but channels"
        )
    channels = ours.shape[1], theirs.shape[1]
    if channels[0] == channels[1]:
        return nn.Identity()
    like = {"device": ours.device, "dtype": ours.dtype}
    if ours.dim() == 4:
        return nn.Conv2d(*channels, 1, bias=False, **like)
    return nn.Linear(*channels, bias=False, **like)
