"""The configuration of a training run: one flat dataclass, from recipes (JSON) and flags."""

import dataclasses
import json
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata

import torch

from ..errors import UsageError
from . import rules

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
    train_images: int | None = _flag(
        None, "how many of the training images there are to train on, if not all"
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
    cuda_graph: str = _flag(
        "auto", "on a GPU: auto, which replays the attack as one CUDA graph where it can, or off"
    )
    compile: bool = _flag(
        False, "the student's own step by torch.compile, which must take the network whole"
    )
    out: str | None = _flag(None, "run folder; a fresh one under runs/ if not given")

    def __post_init__(self):
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if one.name in (*PATHS, "out") and isinstance(value, os.PathLike):
                setattr(self, one.name, os.fspath(value))
            elif one.type in (str, str | None, dict, bool) and not isinstance(value, one.type):
                kind = {dict: "an object of options", bool: "true or false"}.get(one.type, "text")
                raise UsageError(f"{one.name} is {value!r}, must be {kind}")
        rules.check(self)
        self.milestones = tuple(self.milestones)
        if self.step_size is None:
            self.step_size = self.eps / 4
        # A run may be resumed from anywhere.
        for name in PATHS:
            if getattr(self, name) not in (None, "memory", "off"):
                setattr(self, name, os.path.abspath(getattr(self, name)))

    def images(self):
        """The options of `data.load`."""
        return {"image_size": self.image_size, "train_images": self.train_images}

    def doubts(self, images):
        """Sentences on settings that can be, but are hardly meant for so many training images."""
        late = [str(epoch) for epoch in self.milestones if epoch >= self.epochs]
        if late and self.schedule == "step":
            half, most = self.epochs // 2, self.epochs * 3 // 4
            remedy = f"; give earlier ones, such as {half},{most}" if 0 < half < most else ""
            yield (
                f"milestones has {', '.join(late)}, which {self.epochs} epochs do not reach: lr "
                f"does not drop there{remedy}"
            )
        if 0 < (reach := self.steps * self.step_size) < self.eps * (1 - 1e-6):
            yield (
                f"steps is {self.steps} and step_size {self.step_size:.4g}, which together move "
                f"a pixel by {reach:.4g} of eps {self.eps:.4g}: give more or larger steps"
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
