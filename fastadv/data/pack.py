"""One file of the decoded pictures of a folder, which training maps instead of reading it.

    magic, length of the JSON, CRC-32 of JSON, table and labels              16 bytes
    JSON: version, image_size, block, classes, counts, seed, fingerprint
    table: rows and CRC-32 of each block                                      uint32 [blocks, 2]
    labels, -1 for a file that was left out                                   int64 [N]
    images, from the next multiple of 4096 on                                 uint8 [rows, 3, S, S]

All numbers are little-endian. N counts the files of a `Listing`, whose order the file keeps; a
block is `block` of them, and its CRC-32 is that of its images, then its labels. The file grows
under another name, where a killed writer leaves the blocks that are whole to the next one.
"""

import contextlib
import errno
import json
import os
import shlex
import struct
import zlib
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..errors import UsageError
from ..runs import checkpoint
from ..runs.progress import bar
from . import pictures
from .dataset import mapped_tensor

MAGIC, VERSION, PAGE = b"fastadvP", 1, 4096
PREFIX = struct.Struct("<8sII")
FULL = (errno.ENOSPC, errno.EDQUOT)


def place(root: Path, image_size: int) -> Path:
    """Where the packed file of a folder lies."""
    return Path(root) / f"packed-{image_size}.fastadv"


def command(root: Path, image_size: int) -> str:
    """The command that packs a folder."""
    return f"python -m fastadv.data pack {shlex.quote(str(root))} --image-size {image_size}"


def broken(path: Path, reason: str, packs: str) -> UsageError:
    """The error for a picture that cannot be read; packs: the command that packs its folder."""
    return UsageError(
        f"{path} is broken ({reason}), must be a whole JPEG, PNG or WebP file: mend or remove it, "
        f"or leave such files out by `{packs} --skip-broken`"
    )


class Head:
    """What lies before the images of a packed file. `table` and `labels` fill up as it grows."""

    def __init__(self, facts: dict):
        self.facts, text = facts, json.dumps(facts, sort_keys=True).encode()
        self.json = text.ljust(-(-len(text) // 8) * 8)
        self.size, self.block = facts["image_size"], facts["block"]
        self.count = sum(facts["counts"].values())
        self.table = np.zeros((-(-self.count // self.block), 2), "<u4")
        self.labels = np.zeros(self.count, "<i8")
        self.table_at = PREFIX.size + len(self.json)
        self.labels_at = self.table_at + self.table.nbytes
        self.end = self.labels_at + self.labels.nbytes
        self.images_at = -(-self.end // PAGE) * PAGE
        self.image_bytes = 3 * self.size**2

    @classmethod
    def of(cls, listing, image_size: int) -> "Head":
        """The head of a folder of which nothing is packed yet."""
        facts = {
            "version": VERSION,
            "image_size": image_size,
            "block": pictures.files_per_block(image_size),
            "classes": listing.classes,
            "counts": listing.counts,
            "seed": listing.seed,
            "fingerprint": listing.fingerprint,
        }
        head = cls(facts)
        head.labels[:] = listing.labels
        return head

    @classmethod
    def read(cls, file) -> "Head":
        """The head of an open packed file, which is read up to its images. Raises UsageError unless
        it is whole, and the images behind it as many as it says."""
        path, size, prefix = file.name, os.fstat(file.fileno()).st_size, file.read(PREFIX.size)
        if len(prefix) < PREFIX.size or prefix[:8] != MAGIC:
            raise UsageError(f"{path} is no packed file of fastadv, must be one: delete it")
        _, length, crc = PREFIX.unpack(prefix)
        text = file.read(length)
        try:
            head = cls(_checked(json.loads(text), size))
            numbers = file.read(head.end - head.table_at)
            head.table, head.labels = head.parted(numbers)
            whole = head.json == text and head.blocks_agree()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole or zlib.crc32(numbers, zlib.crc32(text)) != crc:
            raise UsageError(f"{path} is damaged or cut short, must match its checksum: delete it")
        expected = head.images_at + head.rows() * head.image_bytes
        if size != expected:
            raise UsageError(f"{path} is {size} bytes long, must be {expected}: delete it")
        return head

    def parted(self, numbers: bytes) -> tuple[np.ndarray, np.ndarray]:
        """(table, labels) of the bytes between JSON and images."""
        table = np.frombuffer(numbers, "<u4", self.table.size).reshape(-1, 2)
        return table, np.frombuffer(numbers, "<i8", self.count, self.table.nbytes)

    def blocks_agree(self) -> bool:
        """Whether each block has as many images as labels."""
        whole = np.add.reduceat(self.labels >= 0, np.arange(0, self.count, self.block), dtype="<u4")
        return np.array_equal(whole, self.table[:, 0])

    def rows(self) -> int:
        """How many images there are."""
        return int((self.labels >= 0).sum())

    def files(self, number: int) -> slice:
        """The files of a block."""
        return slice(number * self.block, min((number + 1) * self.block, self.count))

    def bytes(self) -> bytes:
        numbers = self.table.tobytes() + self.labels.tobytes()
        crc = zlib.crc32(numbers, zlib.crc32(self.json))
        return PREFIX.pack(MAGIC, len(self.json), crc) + self.json + numbers


def _checked(facts, size):
    """The JSON of a head in a file of `size` bytes. Raises for one that cannot be."""
    counts = [*facts["counts"].values()]
    numbers = [facts["image_size"], facts["block"], *counts]
    right = facts["version"] == VERSION and all(type(n) is int and 0 < n < 2**31 for n in numbers)
    if not right or sum(counts) > size:
        raise ValueError
    return facts


def _crc(images: bytes, labels: np.ndarray) -> int:
    return zlib.crc32(labels.tobytes(), zlib.crc32(images))


def read(path: Path, listing, image_size: int) -> tuple[Tensor, np.ndarray]:
    """(images uint8 [rows, 3, S, S] mapped from the file, labels int64 [N], -1 for files that were
    left out). Raises UsageError unless the file is whole, and of this listing and size."""
    with open(path, "rb") as file:  # once: another might lie there the next time
        head, wanted = Head.read(file), Head.of(listing, image_size)
        rows = head.rows()
        place = head.images_at, (rows, 3, head.size, head.size)
        mapped = np.memmap(file, np.uint8, "r", *place) if rows else None
    if head.size != image_size:
        raise UsageError(f"{path} has images of {head.size} pixels, must have {image_size}")
    if head.facts["seed"] != listing.seed:
        raise UsageError(f"seed is {listing.seed}, must be {head.facts['seed']}, that of {path}")
    same = head.json == wanted.json  # and so as many labels
    if not (same and ((head.labels == -1) | (head.labels == listing.labels)).all()):
        raise UsageError(
            f"{path} is of other pictures than {listing.root} has now, must be of these: pack "
            f"again by `{command(listing.root, image_size)}`"
        )
    if not rows:
        raise UsageError(f"{path} has no pictures, must have one or more")
    return mapped_tensor(mapped), head.labels.astype(np.int64)


def verify(path: Path) -> int:
    """How many images the packed file at `path` has. Raises UsageError for the first block whose
    images are not those that were packed, FileNotFoundError where there is no file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file, must be packed first")
    with open(path, "rb") as file:
        head = Head.read(file)
        file.seek(head.images_at)
        for number, (rows, crc) in enumerate(bar(head.table.tolist(), "verify", unit="block")):
            files = head.files(number)
            if _crc(file.read(rows * head.image_bytes), head.labels[files]) != crc:
                at = f"pictures {files.start} to {files.stop - 1}"
                raise UsageError(f"{path} is damaged in {at}, must match its checksums: delete it")
    return head.rows()


def write(
    listing, image_size: int, *, workers: int | None = None, skip_broken: bool = False
) -> tuple[Path, list[str]]:
    """Packs a folder: (path of the file, files that were left out as broken).

    Goes on behind what an earlier call has left of the same folder, and does nothing where that has
    packed it. Raises UsageError for a broken picture, unless those are skipped, and for a full
    disk.
    """
    pictures.need_pillow()
    path = place(listing.root, image_size)
    if path.exists():
        with contextlib.suppress(UsageError):  # of other pictures, or damaged
            return path, _left_out(listing, read(path, listing, image_size)[1])
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            _lock(file, temporary)
            head = _fill(file, listing, image_size, workers, skip_broken)
            _put(file, 0, head.bytes())
            file.truncate(head.images_at + head.rows() * head.image_bytes)
            os.fsync(file.fileno())
            os.replace(temporary, path)
            checkpoint.sync_folder(path.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        size = len(listing.files) * 3 * image_size**2
        raise UsageError(
            f"{path} takes {size / 1e9:.2f} GB, for which the disk must have room "
            f"({error.strerror}): the same command goes on from {temporary}"
        ) from error
    return path, _left_out(listing, head.labels)


def _left_out(listing, labels):
    return [listing.files[i] for i in (labels < 0).nonzero()[0]]


def _lock(file, path):
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "this system has no file locks of the kind needed") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:  # or it was, and has its name by now
        raise UsageError(f"{path} is being written by another process: wait for it")


def _fill(file, listing, image_size, workers, skip_broken):
    """Writes the blocks that are missing: the Head, whose table and labels are whole then."""
    head = Head.of(listing, image_size)
    done, rows = _resumed(file, head, skip_broken)
    start = min(done * head.block, head.count)
    rest = pictures.blocks(listing.root, listing.files[start:], image_size, workers)
    with tqdm(total=head.count, initial=start, desc="pack", unit="picture", disable=None) as shown:
        for number, (images, reasons) in enumerate(rest, done):
            files = head.files(number)
            for at, reason in reasons.items():
                at += files.start
                if not skip_broken:
                    packs = command(listing.root, image_size)
                    raise broken(listing.root / listing.files[at], reason, packs)
                head.labels[at] = -1
            pixels = images.tobytes()
            head.table[number] = len(images), _crc(pixels, head.labels[files])
            # The row of the table comes last: with it the block is whole.
            _put(file, head.images_at + rows * head.image_bytes, pixels)
            _put(file, head.labels_at + 8 * files.start, head.labels[files].tobytes())
            _put(file, head.table_at + 8 * number, head.table[number].tobytes())
            rows += len(images)
            shown.update(files.stop - files.start)
    return head


def _resumed(file, head, skip_broken):
    """(blocks, rows) that an earlier writer of the same head has left whole in the file; `head`
    gets their rows of its table and labels. Begins the file where there are none."""
    start = os.pread(file.fileno(), head.end, 0)
    if len(start) < head.end or start[PREFIX.size : head.table_at] != head.json:
        file.truncate(0)
        _put(file, 0, head.bytes())
        return 0, 0
    table, labels = head.parted(start[head.table_at :])
    rows = 0
    for number, (count, crc) in enumerate(bar(table.tolist(), "check", unit="block")):
        files = head.files(number)
        left_out = labels[files] < 0
        if count != (~left_out).sum() or (left_out.any() and not skip_broken):
            return number, rows
        at = head.images_at + rows * head.image_bytes
        if _crc(os.pread(file.fileno(), count * head.image_bytes, at), labels[files]) != crc:
            return number, rows
        head.table[number], head.labels[files] = (count, crc), labels[files]
        rows += count
    return len(table), rows


def _put(file, at, content):
    """Writes all of `content`, of which one call may write a part."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(file.fileno(), rest, at)
        rest, at = rest[written:], at + written
