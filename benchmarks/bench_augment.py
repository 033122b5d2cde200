"""augment: random crop, flip and scale of a uint8 batch, against a loop over images or a gather."""

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases

from fastadv import ops


def loop(images, dy, dx, flip, padding):
    height, width = images.shape[2:]
    padded = F.pad(images, [padding] * 4)
    views = []
    for image, y, x, mirror in zip(padded, dy.tolist(), dx.tolist(), flip.tolist(), strict=True):
        view = image[:, y : y + height, x : x + width]
        views.append(view.flip(-1) if mirror else view)
    return torch.stack(views).float().div(255)


def gather(images, dy, dx, flip, padding):
    height, width = images.shape[2:]
    padded = F.pad(images, [padding] * 4)
    here = {"device": images.device}
    rows = dy[:, None] + torch.arange(height, **here)
    columns = torch.arange(width, **here).expand(len(images), -1)
    columns = dx[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    batch = torch.arange(len(images), **here)[:, None, None]
    views = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None]]
    return views.permute(0, 3, 1, 2).float().div(255)


def case(padding, *shape):
    batch = shape[0]
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    dy, dx = torch.randint(0, 2 * padding + 1, (2, batch))
    args = images, dy, dx, torch.randint(0, 2, (batch,)).bool(), padding
    compiled = torch.compile(gather)

    def gate():
        expected = loop(*args)
        for result in (gather(*args), ops.augment(*args), ops.augment(*args, channels_last=True)):
            assert torch.equal(result, expected)

    return Case(
        "augment",
        "x".join(map(str, shape)),
        {
            "eager loop": lambda: loop(*args),
            "eager gather": lambda: gather(*args),
            "compile gather": lambda: compiled(*args),
            "fastadv": lambda: ops.augment(*args),
            "fastadv channels_last": lambda: ops.augment(*args, channels_last=True),
            "images / 255": lambda: images / 255,
        },
        gate,
        nbytes=5 * images.numel(),
    )


def cases():
    return [case(4, 128, 3, 32, 32), case(1, 128, 1, 8, 8), case(16, 64, 3, 224, 224)]


test_augment = pytest_cases(cases)
