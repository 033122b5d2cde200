"""The configuration of a training run: one flat dataclass, from recipes (JSON) and flags."""

import dataclasses
import json
import math
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata

import torch

from ..errors import UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Fields that say where things are on one machine, and how a run is shown: it may go on with others.
PATHS = (
    "data_dir",
    "extra_data",
    "student_checkpoint",
    "teacher_checkpoint",
    "clean_teacher_checkpoint",
    "teacher_cache",
)
PLACES = ("device", *PATHS, "log")
SCHEDULES = "step", "cosine", "linear", "onecycle"


def _whole(least):
    rule = f"at least {least}, whole and below 2^63"
    return rule, lambda value: type(value) is int and least <= value < 2**63


_POSITIVE = "positive and finite", lambda value: 0 < value < math.inf
_NOT_NEGATIVE = "at least 0 and finite", lambda value: 0 <= value < math.inf
_SHARE = "in [0, 1)", lambda value: 0 <= value < 1
# What a run's numbers must be; augmentation and methods check their own.
RULES = {
    "eps": ("in (0, 1]", lambda value: 0 < value <= 1),  # of images in [0, 1]
    **dict.fromkeys(("step_size", "lr", "clip_grad", "save_every"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "awp_gamma", "warmup"), _NOT_NEGATIVE),
    **dict.fromkeys(("momentum", "ema"), _SHARE),
    "extra_fraction": ("in (0, 1)", lambda value: 0 < value < 1),
    **dict.fromkeys(("epochs", "batch_size", "student_width", "image_size"), _whole(1)),
    **dict.fromkeys(("eval_every", "accumulate", "patience"), _whole(1)),
    **dict.fromkeys(("steps", "swa_start", "awp_warmup", "seed"), _whole(0)),
}


def number(text):
    """A float from "0.031" or "8/255". Raises UsageError quoting the text."""
    top, slash, bottom = str(text).partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{text!r} is not a number such as 0.031 or 8/255") from None


def device(name):
    """The torch.device of this name. Raises UsageError when nothing can be computed on it here."""
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"device is {name!r}, which cannot be used here ({reason}): give another, such as cpu"
        ) from None
    return torch.device(name)


def check_image_size(data, image_size):
    """Raises UsageError unless `image_size` is given for data "folder", and for that alone."""
    if data != "folder" and image_size is not None:
        raise UsageError(
            f"image_size is {image_size!r}, must be left out for data {data}: its images have one"
        )
    if data == "folder" and not (type(image_size) is int and 1 <= image_size < 2**15):
        found = "missing" if image_size is None else repr(image_size)
        raise UsageError(
            f"image_size is {found}, must be a whole number of pixels such as 64 for data folder"
        )


def _flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything that decides a run. Names and defaults are those of the command line."""

    method: str = _flag("rslad", "such as at, rslad or vfd+trades; all below")
    method_options: dict = field(default_factory=dict)
    data: str = _flag("cifar10", "digits, cifar10, cifar100, svhn, npz or folder")
    data_dir: str | None = _flag(None, "folder of the data set's files, or the .npz file")
    image_size: int | None = _flag(
        None, "width and height that pictures of data folder get, in pixels"
    )
    extra_data: str | None = _flag(
        None, "an .npz of more training images, such as generated ones: image and label"
    )
    extra_fraction: float = _flag(0.7, "share of them in each batch")
    student: str = _flag(
        "resnet18", "a network such as resnet18, mobilenet_v2, wrn34_10 or timm:resnet50"
    )
    student_width: int | None = _flag(
        None, "channels of the student's first convolution, if not the published number"
    )
    student_checkpoint: str | None = _flag(
        None,
        "weights that the student starts from: a run, by its folder or a .safetensors in it, "
        "or a file from elsewhere; of other classes, the classifier starts afresh",
    )
    teacher: str | None = _flag(
        None, "the robust teacher's network, where fastadv did not write its checkpoint"
    )
    teacher_checkpoint: str | None = _flag(
        None, "the robust teacher's weights: a run's .safetensors, or a .pt from elsewhere"
    )
    clean_teacher: str | None = _flag(
        None, "the clean teacher's network, where fastadv did not write its checkpoint"
    )
    clean_teacher_checkpoint: str | None = _flag(
        None, "the weights of the clean teacher, which was trained without attacks"
    )
    eps: float = _flag(8 / 255, "radius, such as 8/255")
    step_size: float | None = _flag(None, "attack step; eps/4 if not given")
    steps: int = _flag(10, "attack steps in training")
    eps_schedule: str = _flag(
        "constant", "of radius and step in training: constant, or linear, from small to full"
    )
    init: str | None = _flag(None, "uniform, gaussian or zero start; the method's own if not given")
    attack_bn: str | None = _flag(
        None, "BatchNorm mode while attacking: eval or train; the method's own if not given"
    )
    crop: str = _flag(
        "padded", "random crops: padded, which shift the image, or resized, of parts of it"
    )
    crop_scale: float = _flag(0.08, "smallest share of the image in a resized crop")
    policy: str = _flag(
        "none", "strong augmentation: none, autoaugment, randaugment or trivialaugment"
    )
    randaugment_n: int = _flag(2, "how many operations randaugment applies to an image")
    randaugment_m: float = _flag(9.0, "strength of randaugment's operations, 0 to 30")
    cutout: int = _flag(0, "side of a grey square in pixels, even")
    mixup: float = _flag(0.0, "alpha of mixup's Beta distribution, such as 1")
    cutmix: float = _flag(0.0, "alpha of cutmix's Beta distribution, such as 1")
    views_per_image: int | None = _flag(
        None, "how many augmented views an image has; they take turns by epoch"
    )
    epochs: int = _flag(200, "passes over the training set")
    batch_size: int = _flag(128, "images per step")
    accumulate: int = _flag(1, "steps whose gradients are averaged for one update of the weights")
    optimizer: str = _flag("sgd", "sgd or adamw")
    lr: float = _flag(0.1, "learning rate, the largest of the schedule")
    momentum: float = _flag(0.9, "momentum of SGD")
    nesterov: bool = _flag(False, "Nesterov's momentum")
    weight_decay: float = _flag(5e-4, "weight decay")
    norm_decay: bool = _flag(True, "weight decay of BatchNorm's parameters and of biases too")
    schedule: str = _flag(
        "step", "of the learning rate: step (see --milestones), cosine, linear or onecycle"
    )
    milestones: tuple[int, ...] = _flag(
        (100, 150), "epochs after which lr drops to a tenth in schedule step, with commas"
    )
    warmup: float = _flag(0.0, "epochs in which the learning rate rises at first")
    clip_grad: float | None = _flag(None, "largest norm of the gradient")
    ema: float | None = _flag(None, "decay of an exponential average of weights, such as 0.999")
    swa_start: int | None = _flag(None, "epoch from which weights are averaged equally")
    recompute_bn: bool = _flag(
        False, "BatchNorm statistics of the averaged weights are taken of the training images anew"
    )
    awp_gamma: float = _flag(0.0, "adversarial weight perturbation, in norms of the weights")
    awp_warmup: int = _flag(0, "epochs before the weights are perturbed")
    eval_every: int = _flag(1, "epochs between validations; the last one is always validated")
    patience: int | None = _flag(
        None, "ends training after so many validations that were no better than the best before"
    )
    save_every: float | None = _flag(
        None, "minutes between checkpoints within an epoch; a resumed run loses no more"
    )
    precision_attack: str = _flag("fp32", "fp32 or bf16: the attacked network")
    precision_outer: str = _flag("fp32", "fp32 or bf16: the student's own step")
    precision_teacher: str = _flag("fp32", "fp32 or bf16: teachers")
    teacher_cache: str = _flag(
        "runs/teacher-cache", "folder of teacher outputs that all runs share, or memory, or off"
    )
    teacher_cache_dtype: str = _flag(
        "float16", "how it stores outputs: float16, or float32, exactly"
    )
    log: str | None = _flag(
        None, "tensorboard: each epoch also goes to its event files, in the run folder"
    )
    seed: int = _flag(0, "weights, order, augmentation and attack starts")
    device: str = _flag("cpu", "cpu or cuda")
    out: str | None = _flag(None, "run folder; a fresh one under runs/ if not given")

    def __post_init__(self):
        self._check_fields()
        if self.step_size is None:
            self.step_size = self.eps / 4
        for name in ("precision_attack", "precision_outer", "precision_teacher"):
            if getattr(self, name) not in PRECISIONS:
                raise UsageError(f"{name} is {getattr(self, name)!r}, must be fp32 or bf16")
        if self.ema is not None and self.swa_start is not None:
            raise UsageError(f"ema is {self.ema} and swa_start {self.swa_start}: give one of them")
        if self.recompute_bn and self.ema is None and self.swa_start is None:
            raise UsageError("recompute_bn is given, but neither ema nor swa_start: give one")
        if self.swa_start is not None and self.swa_start >= self.epochs:
            raise UsageError(f"swa_start is {self.swa_start}, must be in [0, {self.epochs - 1}]")
        if self.awp_warmup and not (self.awp_gamma and self.awp_warmup < self.epochs):
            raise UsageError(
                f"awp_warmup is {self.awp_warmup}, must be below epochs ({self.epochs}) and have "
                f"awp_gamma ({self.awp_gamma})"
            )
        self._check_optimizer()
        check_image_size(self.data, self.image_size)
        if self.policy != "randaugment" and (self.randaugment_n, self.randaugment_m) != (2, 9):
            raise UsageError(f"randaugment_n or _m is given, but policy is {self.policy!r}")
        if self.extra_data is None and self.extra_fraction != Config.extra_fraction:
            raise UsageError(f"extra_fraction is {self.extra_fraction}, but extra_data is missing")
        if self.crop != "resized" and self.crop_scale != Config.crop_scale:
            raise UsageError(f"crop_scale is {self.crop_scale}, but crop is {self.crop!r}")
        if self.log not in (None, "tensorboard"):
            raise UsageError(f"log is {self.log!r}, must be tensorboard or left out")
        if self.teacher_cache_dtype not in ("float16", "float32"):
            raise UsageError(
                f"teacher_cache_dtype is {self.teacher_cache_dtype!r}, must be float16 or float32"
            )
        # A run may be resumed from anywhere.
        for name in PATHS:
            if getattr(self, name) not in (None, "memory", "off"):
                setattr(self, name, os.path.abspath(getattr(self, name)))

    def _check_optimizer(self):
        """Raises UsageError for settings of the updates that exclude each other."""
        choices = {"optimizer": ("sgd", "adamw"), "schedule": SCHEDULES}
        choices["eps_schedule"] = ("constant", "linear")
        for name, known in choices.items():
            if getattr(self, name) not in known:
                names = f"{', '.join(known[:-1])} or {known[-1]}"
                raise UsageError(f"{name} is {getattr(self, name)!r}, must be {names}")
        if self.optimizer != "sgd" and (self.nesterov or self.momentum != Config.momentum):
            raise UsageError(
                f"momentum is {self.momentum} and nesterov {self.nesterov}, which optimizer "
                f"{self.optimizer} does not have"
            )
        if self.nesterov and not self.momentum:
            raise UsageError("nesterov is given, but momentum is 0: must be positive for it")
        if self.warmup >= self.epochs:
            raise UsageError(f"warmup is {self.warmup}, must be below epochs ({self.epochs})")
        if self.accumulate > 1 and self.awp_gamma:
            raise UsageError(
                f"accumulate is {self.accumulate}, must be 1 with awp_gamma ({self.awp_gamma}), "
                "which moves the weights for one step"
            )

    def _check_fields(self):
        """Raises UsageError for the first field that no run can have."""
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if one.name in (*PATHS, "out") and isinstance(value, os.PathLike):
                setattr(self, one.name, os.fspath(value))
            elif one.type in (str, str | None, dict, bool) and not isinstance(value, one.type):
                kind = {dict: "an object of options", bool: "true or false"}.get(one.type, "text")
                raise UsageError(f"{one.name} is {value!r}, must be {kind}")
        if self.data == "digits" and self.data_dir is not None:
            raise UsageError(f"data_dir is {self.data_dir!r}, but digits come with scikit-learn")
        for name, (rule, holds) in RULES.items():
            value = getattr(self, name)
            missing = value is None and getattr(Config, name) is None  # which is a default then
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not missing and not (number and holds(value)):
                rule = rule if number else f"a number, {rule}"
                unit = name == "eps" and number and 1 < value <= 255
                hint = f" (did you mean {value}/255?)" if unit else ""
                raise UsageError(f"{name} is {value!r}, must be {rule}{hint}")
        epochs = self.milestones if isinstance(self.milestones, (tuple, list)) else [None]
        whole = all(type(epoch) is int for epoch in epochs)
        if not whole or [0, *epochs] != sorted({0, *epochs}):
            raise UsageError(
                f"milestones is {self.milestones!r}, must be whole numbers of epochs from 1 on, "
                "each larger than the one before"
            )
        self.milestones = tuple(epochs)

    def doubts(self, images):
        """Sentences on settings that can be, but are hardly meant for so many training images."""
        late = [str(epoch) for epoch in self.milestones if epoch >= self.epochs]
        if late and self.schedule == "step":
            yield (
                f"milestones has {', '.join(late)}, which {self.epochs} epochs do not reach: lr "
                "does not drop there"
            )
        if self.batch_size > images:
            yield (
                f"batch_size is {self.batch_size}, more than the {images} training images: an "
                "epoch is one step"
            )
        if self.batch_size > 1 == images % self.batch_size:
            yield (
                f"batch_size is {self.batch_size}, which leaves one of {images} images for the "
                "last batch: BatchNorm has little or nothing to take statistics of"
            )

    def to_json(self):
        return json.dumps(dataclasses.asdict(self) | {"versions": versions()}, indent=2)

    @classmethod
    def from_json(cls, text):
        """The Config that `to_json` wrote. Raises ValueError or TypeError for other text."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise UsageError(f"config is a {type(values).__name__}, must be an object of fields")
        values.pop("versions", None)
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise UsageError(f"config has unknown fields: {', '.join(sorted(unknown))}")
        return cls(**values)


def versions():
    """Python, torch and fastadv, for the record of a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastadv": metadata.version("fastadv"),
    }
