"""The configuration of a training run: one flat dataclass, from recipes (JSON) and flags."""

import dataclasses
import json
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata, resources

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def number(text):
    """A float from "0.031" or "8/255". Raises ValueError quoting the text."""
    top, slash, bottom = str(text).partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number such as 0.031 or 8/255") from None


def device(name):
    """The torch.device of this name. Raises ValueError when this machine does not have it."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which cannot be used here: {error}") from None
    return torch.device(name)


def _flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything that decides a run. Names and defaults are those of the command line."""

    method: str = _flag("rslad", "such as at, rslad or vfd+trades; all below")
    method_options: dict = field(default_factory=dict)
    data: str = _flag("cifar10", "digits, cifar10, cifar100, svhn or npz")
    data_dir: str | None = _flag(None, "folder of the data set's files, or the .npz file")
    student: str = _flag("resnet18", "a network such as resnet18, mobilenet_v2 or wrn34_10")
    student_width: int | None = _flag(None, "channels of its stem, for narrow networks")
    teacher: str | None = _flag(None, "architecture of a checkpoint that fastadv did not write")
    teacher_checkpoint: str | None = _flag(None, "robust teacher: a run's .safetensors or a .pt")
    clean_teacher: str | None = _flag(None, "the same of the clean teacher's checkpoint")
    clean_teacher_checkpoint: str | None = _flag(None, "natural teacher: .safetensors or .pt")
    eps: float = _flag(8 / 255, "radius, such as 8/255")
    step_size: float | None = _flag(None, "attack step; eps/4 if not given")
    steps: int = _flag(10, "attack steps in training")
    init: str | None = _flag(None, "uniform, gaussian or zero start; the method's own if not given")
    attack_bn: str | None = _flag(
        None, "BatchNorm mode while attacking: eval or train; the method's own if not given"
    )
    policy: str = _flag(
        "none", "strong augmentation: none, autoaugment, randaugment or trivialaugment"
    )
    randaugment_n: int = _flag(2, "operations per image of randaugment")
    randaugment_m: float = _flag(9.0, "their strength, 0 to 30")
    cutout: int = _flag(0, "side of a grey square in pixels, even")
    mixup: float = _flag(0.0, "alpha of mixup's Beta distribution, such as 1")
    cutmix: float = _flag(0.0, "alpha of cutmix's Beta distribution, such as 1")
    views_per_image: int | None = _flag(
        None, "augmentations of an image, which take turns by epoch"
    )
    epochs: int = _flag(200, "passes over the training set")
    batch_size: int = _flag(128, "images per step")
    lr: float = _flag(0.1, "learning rate of SGD")
    momentum: float = _flag(0.9, "momentum of SGD")
    weight_decay: float = _flag(5e-4, "weight decay of SGD")
    milestones: tuple[int, ...] = _flag(
        (100, 150), "epochs after which lr drops to a tenth: 100,150"
    )
    clip_grad: float | None = _flag(None, "largest norm of the gradient")
    ema: float | None = _flag(None, "decay of an exponential average of weights, such as 0.999")
    swa_start: int | None = _flag(None, "epoch from which weights are averaged equally")
    awp_gamma: float = _flag(0.0, "adversarial weight perturbation, in norms of the weights")
    awp_warmup: int = _flag(0, "epochs before the weights are perturbed")
    eval_every: int = _flag(1, "epochs between validations; the last one is always validated")
    precision_attack: str = _flag("fp32", "fp32 or bf16: the attacked network")
    precision_outer: str = _flag("fp32", "fp32 or bf16: the student's own step")
    precision_teacher: str = _flag("fp32", "fp32 or bf16: teachers")
    teacher_cache: str = _flag(
        "runs/teacher-cache", "folder of teacher outputs that all runs share, or memory, or off"
    )
    teacher_cache_dtype: str = _flag("float16", "of what it stores: float16, or float32, exact")
    seed: int = _flag(0, "weights, order, augmentation and attack starts")
    device: str = _flag("cpu", "cpu or cuda")
    out: str | None = _flag(None, "run folder; a fresh one under runs/ if not given")

    def __post_init__(self):
        self.milestones = tuple(self.milestones)
        if self.step_size is None:
            self.step_size = self.eps / 4
        for name in ("precision_attack", "precision_outer", "precision_teacher"):
            if getattr(self, name) not in PRECISIONS:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be fp32 or bf16")
        if self.ema is not None and self.swa_start is not None:
            raise ValueError(f"ema is {self.ema} and swa_start {self.swa_start}: give one of them")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}, must be in [0, 1)")
        if self.swa_start is not None and not 0 <= self.swa_start < self.epochs:
            raise ValueError(f"swa_start is {self.swa_start}, must be in [0, {self.epochs - 1}]")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad is {self.clip_grad}, must be positive")
        if self.awp_warmup and not (self.awp_gamma and self.awp_warmup < self.epochs):
            raise ValueError(
                f"awp_warmup is {self.awp_warmup}, must be below epochs ({self.epochs}) and have "
                f"awp_gamma ({self.awp_gamma})"
            )
        if self.policy != "randaugment" and (self.randaugment_n, self.randaugment_m) != (2, 9):
            raise ValueError(f"randaugment_n or _m is given, but policy is {self.policy!r}")
        if self.teacher_cache_dtype not in ("float16", "float32"):
            raise ValueError(
                f"teacher_cache_dtype is {self.teacher_cache_dtype!r}, must be float16 or float32"
            )
        device(self.device)
        # A run may be resumed from anywhere.
        for name in ("data_dir", "teacher_checkpoint", "clean_teacher_checkpoint", "teacher_cache"):
            if getattr(self, name) not in (None, "memory", "off"):
                setattr(self, name, os.path.abspath(getattr(self, name)))
        for name in ("epochs", "batch_size", "eval_every", "student_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("lr", "momentum", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must not be negative")

    def lr_at(self, epoch):
        """The learning rate of epoch `epoch`, counted from 0."""
        return self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)

    def to_json(self):
        return json.dumps(dataclasses.asdict(self) | {"versions": versions()}, indent=2)

    @classmethod
    def from_json(cls, text):
        values = json.loads(text)
        values.pop("versions", None)
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"config has unknown fields: {', '.join(sorted(unknown))}")
        return cls(**values)


def versions():
    """Python, torch and fastadv, for the record of a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastadv": metadata.version("fastadv"),
    }


def recipes():
    """{name: fields} of the published recipes, the files of `fastadv/recipes/`.

    Besides the fields of Config each has `source`, what is published and where, and `published`,
    {attack: accuracy in percent} with the `provenance` of these numbers.
    """
    folder = resources.files("fastadv.recipes")
    files = sorted((p for p in folder.iterdir() if p.name.endswith(".json")), key=lambda p: p.name)
    return {path.name[:-5]: json.loads(path.read_text()) for path in files}


def recipe(name):
    """The fields of Config of a published recipe. Raises ValueError that lists the names."""
    known = recipes()
    if name not in known:
        raise ValueError(f"recipe is {name!r}, must be one of {', '.join(known)}")
    return {k: v for k, v in known[name].items() if k not in ("source", "published")}
