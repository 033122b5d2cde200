"""The optimiser of a run and the learning rate of each of its updates."""

import math

import torch


def build_optimizer(config, parameters):
    """torch's SGD or AdamW of the parameters; without `norm_decay` those of one dimension, which
    are BatchNorm's and biases, keep their size."""
    decayed = [p for p in parameters if config.norm_decay or p.dim() > 1]
    rest = [p for p in parameters if not config.norm_decay and p.dim() <= 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if parameters[0].is_cuda:
        options["fused"] = True  # one kernel for all; on a CPU it would round otherwise
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **options)


def learning_rate(config, update, updates):
    """The learning rate of one of a run's `updates` of the weights, counted from 0.

    It rises in equal steps to `lr` for `warmup` epochs. Then, as in torch.optim.lr_scheduler:
    "step" is MultiStepLR, a tenth from each milestone on; "cosine" CosineAnnealingLR and "linear"
    LinearLR, both down to 0 after the last update; "onecycle" is OneCycleLR without its momentum,
    whose own rise takes `warmup` epochs, or 0.3 of all where that is 0.
    """
    rise = round(updates * config.warmup / config.epochs)
    if config.schedule == "onecycle":
        top = (rise or 0.3 * updates) - 1
        if update < top:
            return _cosine(config.lr / 25, config.lr, update / top)
        return _cosine(config.lr, config.lr / 25e4, (update - top) / ((updates - 1 - top) or 1))
    if update < rise:
        return config.lr * ((update + 1) / rise)
    if config.schedule == "step":
        epoch = update * config.epochs // updates
        return config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
    share = (update - rise) / (updates - rise)
    return config.lr * (1 - share) if config.schedule == "linear" else _cosine(config.lr, 0, share)


def _cosine(start, end, share):
    """From start at share 0 to end at share 1, along half a wave."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
