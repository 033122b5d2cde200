"""What the settings of a run must be, alone and beside each other."""

import math

from ..errors import UsageError


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
    **dict.fromkeys(("eval_every", "accumulate", "patience", "train_images"), _whole(1)),
    **dict.fromkeys(("steps", "swa_start", "awp_warmup", "seed"), _whole(0)),
}
CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "cosine", "linear", "onecycle"),
    "eps_schedule": ("constant", "linear"),
    **dict.fromkeys(("precision_attack", "precision_outer", "precision_teacher"), ("fp32", "bf16")),
    "teacher_cache_dtype": ("float16", "float32"),
    "cuda_graph": ("auto", "off"),
}


def check(config):
    """Raises UsageError for the first setting that no run can have."""
    if config.data == "digits" and config.data_dir is not None:
        raise UsageError(f"data_dir is {config.data_dir!r}, but digits come with scikit-learn")
    _check_numbers(config)
    _check_milestones(config.milestones)
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            names = f"{', '.join(known[:-1])} or {known[-1]}"
            raise UsageError(f"{name} is {getattr(config, name)!r}, must be {names}")
    if config.log not in (None, "tensorboard"):
        raise UsageError(f"log is {config.log!r}, must be tensorboard or left out")
    _check_average(config)
    _check_updates(config)
    _check_images(config)


def _check_numbers(config):
    for name, (rule, holds) in RULES.items():
        value = getattr(config, name)
        missing = value is None and getattr(type(config), name) is None  # which is a default then
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not missing and not (number and holds(value)):
            rule = rule if number else f"a number, {rule}"
            unit = name == "eps" and number and 1 < value <= 255
            hint = f" (did you mean {value}/255?)" if unit else ""
            raise UsageError(f"{name} is {value!r}, must be {rule}{hint}")


def _check_milestones(milestones):
    epochs = milestones if isinstance(milestones, (tuple, list)) else [None]
    whole = all(type(epoch) is int for epoch in epochs)
    if not whole or [0, *epochs] != sorted({0, *epochs}):
        raise UsageError(
            f"milestones is {milestones!r}, must be whole numbers of epochs from 1 on, each larger "
            "than the one before"
        )


def _check_average(config):
    """Of weights."""
    ema, start, epochs = config.ema, config.swa_start, config.epochs
    if ema is not None and start is not None:
        raise UsageError(f"ema is {ema} and swa_start {start}: give one of them")
    if config.recompute_bn and ema is None and start is None:
        raise UsageError("recompute_bn is given, but neither ema nor swa_start: give one")
    if start is not None and start >= epochs:
        raise UsageError(f"swa_start is {start}, must be in [0, {epochs - 1}]")


def _check_updates(config):
    """Of the optimiser, its rate, and the perturbation of weights."""
    if config.awp_warmup and not (config.awp_gamma and config.awp_warmup < config.epochs):
        raise UsageError(
            f"awp_warmup is {config.awp_warmup}, must be below epochs ({config.epochs}) and have "
            f"awp_gamma ({config.awp_gamma})"
        )
    if config.optimizer != "sgd" and (config.nesterov or config.momentum != type(config).momentum):
        raise UsageError(
            f"momentum is {config.momentum} and nesterov {config.nesterov}, which optimizer "
            f"{config.optimizer} does not have"
        )
    if config.nesterov and not config.momentum:
        raise UsageError("nesterov is given, but momentum is 0: must be positive for it")
    if config.warmup >= config.epochs:
        raise UsageError(f"warmup is {config.warmup}, must be below epochs ({config.epochs})")
    if config.accumulate > 1 and config.awp_gamma:
        raise UsageError(
            f"accumulate is {config.accumulate}, must be 1 with awp_gamma ({config.awp_gamma}), "
            "which moves the weights for one step"
        )


def _check_images(config):
    """Of their size and augmentation."""
    check_image_size(config.data, config.image_size)
    if config.policy != "randaugment" and (config.randaugment_n, config.randaugment_m) != (2, 9):
        raise UsageError(f"randaugment_n or _m is given, but policy is {config.policy!r}")
    if config.extra_data is None and config.extra_fraction != type(config).extra_fraction:
        raise UsageError(f"extra_fraction is {config.extra_fraction}, but extra_data is missing")
    if config.crop != "resized" and config.crop_scale != type(config).crop_scale:
        raise UsageError(f"crop_scale is {config.crop_scale}, but crop is {config.crop!r}")


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
