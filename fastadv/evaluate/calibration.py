"""What a network takes images for, and how sure it is: confusion and calibration."""

import torch

BINS = 15


def clean_outputs(record):
    """(predicted, confidence) [N] of the clean images, as of `Record.outputs`; None where an
    evaluation was begun without them."""
    predicted, confidence = record.outputs("clean")
    return (predicted, confidence) if (predicted >= 0).all() else None


def worst_outputs(record, stages):
    """(predicted, confidence) [N] of each image's worst example: the first that is misclassified,
    and if none is, the one that the network is least sure of. None as of `clean_outputs`.

    `stages` begin with "clean"; corrupted images do not count.
    """
    if (found := clean_outputs(record)) is None:
        return None
    predicted, confidence = (values.clone() for values in found)
    broken = ~record.right("clean")
    for stage in stages:
        if stage.corrupts:
            continue
        label, sure = record.outputs(stage.name)
        wrong = ~record.right(stage.name)
        if (label[wrong] < 0).any():
            return None
        worse = ~broken & (wrong | ((label >= 0) & (sure < confidence)))
        predicted[worse], confidence[worse] = label[worse], sure[worse]
        broken |= wrong
    return predicted, confidence


def confusion(predicted, labels):
    """{label: {predicted class: images}} of all pairs that there are; both integers [N]."""
    pairs, counts = torch.stack([labels.long(), predicted.long()]).unique(dim=1, return_counts=True)
    found = {}
    for label, guess, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        found.setdefault(label, {})[guess] = count
    return found


def calibration(confidence, right):
    """(expected calibration error, bins) over BINS bins of confidence, equally wide (Guo et al.
    2017, arXiv 1706.04599, eq. 3): the mean over images of the distance between the mean confidence
    and the accuracy in an image's bin, both in [0, 1].

    confidence: [N] in [0, 1]; right: bool [N]. bins: (images, mean confidence, accuracy) of each, a
    bin (low, high]; None for the means of an empty one.
    """
    confidence, right = confidence.double(), right.double()
    place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    count = torch.bincount(place, minlength=BINS)
    sums = [torch.bincount(place, values, BINS) for values in (confidence, right)]
    error = (sums[0] - sums[1]).abs().sum().item() / len(confidence)
    means = [(values / count).tolist() for values in sums]
    bins = [
        (n, *((sure, rate) if n else (None, None)))
        for n, sure, rate in zip(count.tolist(), *means, strict=True)
    ]
    return error, bins
