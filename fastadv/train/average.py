"""Averages of a student's weights over training, which are what a run publishes then."""

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from ..runs import parallel


def build_average(config, student):
    """The running average of the student's weights and BatchNorm statistics, or None: exponential
    over steps (EMA), or equal over epochs (SWA, Izmailov et al. 2018)."""
    if config.ema is not None:
        average = get_ema_multi_avg_fn(config.ema)
        return AveragedModel(student, multi_avg_fn=average, use_buffers=True)
    return None if config.swa_start is None else AveragedModel(student, use_buffers=True)


def recompute_statistics(model, loader, epoch):
    """BatchNorm statistics of averaged weights: the mean over the training images of an epoch, as
    they come out of the loader, without attacks (Izmailov et al. 2018, section 3.2)."""
    update_bn((batch.x for batch in loader.epoch(epoch)), model)
    parallel.mean_([b for name, b in model.named_buffers() if "running_" in name])
