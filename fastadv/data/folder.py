"""Pictures in one folder per class: DIR/train/<class>/*, DIR/val/<class>/*, DIR/test/<class>/*."""

import hashlib
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from ..runs import parallel
from ..runs.progress import bar
from . import pack, pictures
from .dataset import Dataset, ImageSet

HELD_OUT = 1_000
RESIDENT = 1 << 30  # bytes of images up to which a folder need not be packed


@dataclass(frozen=True)
class Listing:
    """The picture files of a folder in the order in which their images are stored: those of train,
    of val, of test.

    files: [N], relative to `root`; labels, index: int64 [N], where index is the position among the
    sorted names of the split's folder. counts: {split: files}. fingerprint: hash of all names,
    sizes and times of change. seed: what chose the images that are held out.
    """

    root: Path
    classes: tuple[str, ...]
    files: list[str]
    labels: np.ndarray
    index: np.ndarray
    counts: dict[str, int]
    fingerprint: str
    seed: int


def load(data_dir: str | Path, seed: int, image_size: int) -> Dataset:
    """The folder's pictures as images uint8 [N, 3, image_size, image_size].

    They are mapped from the packed file, if there is one, else decoded into memory. With only one
    of val and test that one is test, and a tenth of train, at most 1000, is held out as val. Crops
    are padded by image_size // 8 and mirrored. Raises UsageError naming folder, file or command.
    """
    listing = scan(data_dir, seed)
    path = pack.place(listing.root, image_size)
    if path.exists():
        images, labels = pack.read(path, listing, image_size)
    else:
        images, labels = _decoded(listing, image_size), listing.labels
    whole, index = labels >= 0, torch.from_numpy(listing.index)
    # Slices of one array: of mapped images nothing is copied.
    splits, row, file = {}, 0, 0
    for name, count in listing.counts.items():
        kept = torch.from_numpy(whole[file : file + count])
        rows = slice(row, row + int(kept.sum()))
        if rows.start == rows.stop:
            raise UsageError(f"{path} has no pictures left in {name}, must have one or more")
        split_labels = torch.from_numpy(labels[file : file + count])[kept]
        splits[name] = ImageSet(images[rows], split_labels, index[file : file + count][kept])
        row, file = rows.stop, file + count
    padding, classes = image_size // 8, listing.classes
    return Dataset(listing.root.name, len(classes), padding, 2, **splits, classes=classes)


def scan(data_dir: str | Path, seed: int = 0) -> Listing:
    """Lists the folder without opening a picture. Raises UsageError where it has another form,
    FileNotFoundError where it is missing."""
    root = Path(os.path.abspath(data_dir))
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir is {str(root)!r}, must be a folder: there is none")
    folders = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if "train" not in folders or len(folders) < 2:
        raise UsageError(
            f"data_dir is {str(root)!r}, must have the folders train, and val or test, with a "
            "folder for each class"
        )
    classes = _subfolders(root / "train")
    if len(classes) < 2:
        raise UsageError(
            f"{root / 'train'} has {len(classes)} folders, must have one for each of two or more "
            "classes"
        )
    parts, facts = {}, hashlib.sha256()
    for name in folders:
        parts[name] = _split(root, name, classes)
        for file in bar(parts[name][0], f"check {name}", unit="picture"):
            stat = os.stat(root / file)
            facts.update(os.fsencode(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
    ordered = _held_out(parts, seed) if len(folders) == 2 else parts
    files, labels, index = zip(*ordered.values(), strict=True)
    return Listing(
        root,
        classes,
        [file for part in files for file in part],
        np.concatenate(labels),
        np.concatenate(index),
        {name: len(part[0]) for name, part in ordered.items()},
        facts.hexdigest(),
        seed,
    )


def _subfolders(folder):
    """The names of the visible folders in a folder, sorted."""
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _split(root, split, classes):
    """(files, labels, index) of one folder of classes, in the order of the names."""
    files, labels, others = [], [], Counter()
    for name in bar(_subfolders(root / split), f"list {split}", unit="class"):
        folder = root / split / name
        if name not in classes:
            raise UsageError(f"{folder} is a class that {root / 'train'} lacks, must be one of it")
        found, of_others = _visible(folder)
        others.update(of_others)
        if not found:
            raise UsageError(f"{folder} has no pictures, must have JPEG, PNG or WebP files")
        files += sorted(path.relative_to(root).as_posix() for path in found)
        labels += [classes.index(name)] * len(found)
    if not files:
        raise UsageError(f"{root / split} has no pictures, must have a folder for each class")
    if others:
        passed = ", ".join(f"{count} {ending or 'without'}" for ending, count in others.items())
        text = f"{root / split} has files that are no JPEG, PNG or WebP by their ending, which are"
        warnings.warn(f"{text} passed over: {passed}", stacklevel=4)
    return files, np.array(labels), np.arange(len(files))


def _visible(folder):
    """(paths of the pictures anywhere below a folder, endings of the other files), without hidden
    files and folders."""
    found, endings = [], []
    for where, below, names in os.walk(folder, onerror=_refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for path in (Path(where) / name for name in names if not name.startswith(".")):
            if path.suffix.lower() in pictures.EXTENSIONS:
                found.append(path)
            else:
                endings.append(path.suffix)
    return found, endings


def _refuse(error):
    """Has os.walk raise the error of a folder that it would pass over."""
    raise error


def _held_out(parts, seed):
    """train without a tenth, that tenth as val, and the other part as test."""
    files, labels, index = parts.pop("train")
    if len(files) < 10:
        raise UsageError(f"train has {len(files)} pictures, must have 10 or more without a val")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).numpy()
    val, train = np.split(order, [min(HELD_OUT, len(files) // 10)])
    chosen = {"train": train, "val": val}
    chosen = {k: ([files[i] for i in v], labels[v], index[v]) for k, v in chosen.items()}
    (test,) = parts.values()
    return chosen | {"test": test}


def _decoded(listing, size):
    """The images of all pictures, uint8 [N, 3, size, size], in memory."""
    count = len(listing.files)
    command = pack.command(listing.root, size)
    if (total := count * 3 * size * size) > RESIDENT:
        raise UsageError(
            f"data_dir is {str(listing.root)!r}, whose {count} pictures take {total / 1e9:.1f} GB "
            f"at {size} pixels: must be packed once, by `{command}`"
        )
    if parallel.world() > 1:
        raise UsageError(
            f"data_dir is {str(listing.root)!r}, which is not packed: must be for several "
            f"processes, by `{command}`"
        )
    pictures.need_pillow()
    images, row = torch.empty(count, 3, size, size, dtype=torch.uint8), 0
    with bar(text="decode", total=count, unit="picture") as shown:
        for block in pictures.blocks(listing.root, listing.files, size):
            for place, reason in block.broken.items():
                raise pack.broken(listing.root / listing.files[row + place], reason, command)
            images[row : row + len(block.images)] = torch.from_numpy(block.images)
            row += len(block.images)
            shown.update(len(block.images))
    return images
