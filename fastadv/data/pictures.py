"""Picture files as square uint8 images, decoded by Pillow in worker processes."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import MissingPackage

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow opens others too, by decoders that few have tested
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
ORIENTATION = 0x0112  # of EXIF, whose values are Pillow's:
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
BLOCK_BYTES = 1 << 21  # what a worker hands over at once: shared memory may be as small as 64 MB


class Block(NamedTuple):
    """Consecutive files: images uint8 [K, 3, S, S] of those that are whole, and why the others are
    not, {place in the block: reason}."""

    images: np.ndarray
    broken: dict[int, str]


def need_pillow() -> None:
    """Raises MissingPackage, an ImportError that says what to install, without Pillow."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingPackage("pictures need Pillow: pip install fastadv[images]") from error


def decode(path: str | Path, size: int) -> np.ndarray:
    """The picture of a JPEG, PNG or WebP file in RGB, upright, `square` of `size` pixels.

    Raises what Pillow does for a file that is broken, of another format, or too large to be meant.
    """
    from PIL import Image

    with Image.open(path, formats=FORMATS) as image:
        image.load()  # so that what is broken surfaces here
        try:
            turn = TURNS.get(image.getexif().get(ORIENTATION))
        except (MemoryError, OSError):
            raise
        except Exception:  # what is no EXIF surfaces as nearly any type, and says of no turn
            turn = None
        upright = image.transpose(Image.Transpose[turn]) if turn else image
        return square(rgb(upright), size)


def rgb(image):
    """A Pillow image of any mode in RGB; what is transparent has the colour that lies below."""
    if image.mode.startswith("I"):  # 16 bits, of which convert() would keep the lower 8
        from PIL import Image

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def square(image, size: int) -> np.ndarray:
    """A Pillow image in L or RGB as uint8 [C, size, size]: its short side resized to `size` by
    Pillow's bicubic filter, which averages where it shrinks, and the centre cropped.

    Both at once, so that an image of one pixel by millions becomes no larger.
    """
    from PIL import Image

    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return np.moveaxis(np.atleast_3d(pixels), 2, 0)


def files_per_block(size: int) -> int:
    """How many files make a block, of images of `size` pixels."""
    return max(1, BLOCK_BYTES // (3 * size * size))


def blocks(root: Path, files: list[str], size: int, workers: int | None = None) -> Iterator[Block]:
    """The pictures at `files`, relative to `root`, block by block in their order.

    workers: processes that decode; None takes one per core, fewer for few files. Raises what the
    system says of a file, such as that it may not be read, and MemoryError: it is not broken.
    """
    per_block = files_per_block(size)
    if workers is None:
        workers = min(os.cpu_count() or 1, len(files) // 256)
    loader = DataLoader(
        _Files(root, files, size),
        batch_size=per_block,
        num_workers=workers,
        collate_fn=_block,
        generator=torch.Generator(),  # leaves torch's own random state alone
    )
    for images, broken in loader:
        for reason in broken.values():
            if isinstance(reason, Exception):
                raise reason
        yield Block(images.numpy(), broken)


class _Files(torch.utils.data.Dataset):
    def __init__(self, root, files, size):
        self.root, self.files, self.size = root, files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        """The image, or why there is none: in words, or the system's error."""
        path = self.root / self.files[i]
        try:
            return decode(path, self.size)
        except Exception as error:  # a broken file surfaces as nearly any exception type
            of_system = getattr(error, "errno", None) not in (None, errno.EINVAL)  # of a bad seek
            if of_system or isinstance(error, MemoryError):
                return error
            return f"{type(error).__name__}: {error}".removesuffix(f" {str(path)!r}")


def _block(found):
    """(images tensor, broken) of a worker: tensors pass between processes without a copy."""
    images = [one for one in found if isinstance(one, np.ndarray)]
    broken = {i: one for i, one in enumerate(found) if not isinstance(one, np.ndarray)}
    return torch.from_numpy(np.stack(images) if images else np.empty((0,), np.uint8)), broken
