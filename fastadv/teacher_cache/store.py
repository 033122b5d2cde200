"""The files of a cache: rows that are right or absent, whatever happens to the process.

A folder holds `header.json` (format, identity, shapes of the outputs, its own checksum), `rows.bin`
[rows, width] and `marks.bin` [rows], uint32 little-endian: 0 for a row that is absent, else the
CRC-32 of its bytes, started from its number and the identity. Both files have their full size from
the start and holes where nothing was written.

A row is written first and its mark second, so a killed process leaves a row whole or absent. After
a loss of power, rows written since the last `sync` may have a mark and no bytes: their checksum
tells. Files are read and written by pread and pwrite, never through a mapping, whose failures
(full disk, truncated file, bad sector) are signals that end the process.
"""

import contextlib
import errno
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..runs.checkpoint import atomic_write

FORMAT = 1
FILES = ("header.json", "rows.bin", "marks.bin")
CHUNK = 8192  # rows checked at a time


class Damaged(UsageError):
    """A file that is not as it was written; the message names it and says what to do."""

    def __init__(self, path, problem):
        advice = f"run `python -m fastadv.teacher_cache prune {Path(path).parent}`"
        super().__init__(f"{path}: {problem}; {advice}, which removes what is damaged")


def create(folder, header):
    """Makes the folder with no row filled. Where another process was first, its header stays."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "marks.bin").touch()
    with _locked(folder / "marks.bin"):
        if (folder / "header.json").exists():
            return
        header = {"format": FORMAT} | header
        for name, size in _sizes(header).items():
            with open(folder / name, "ab") as file:
                file.truncate(0)
                file.truncate(size)
                os.fsync(file.fileno())
        text = json.dumps(header | {"crc32": _header_crc(header)}, indent=2)
        atomic_write(folder / "header.json", text)


def read_header(folder):
    """The header of a cache's folder. Raises Damaged, or OSError when it cannot be read."""
    path = folder / "header.json"
    try:
        header = json.loads(path.read_bytes())
        version = header["format"]
    except FileNotFoundError:
        raise Damaged(path, "missing") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(path, "damaged: not the JSON of a header") from None
    if version != FORMAT:
        raise Damaged(path, f"format is {version!r}, must be {FORMAT}, the one of this fastadv")
    if header.pop("crc32", None) != _header_crc(header):
        raise Damaged(path, "damaged: it does not match its checksum")
    try:
        _sizes(header)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Damaged(path, "damaged: it does not say how large the files are") from None
    return header


def caches(directory):
    """The folders of caches in `directory`, or itself when it is one, whole or not. Raises
    UsageError where it is no folder."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such folder")
    folders = [directory] if is_cache(directory) else sorted(directory.iterdir())
    return [folder for folder in folders if is_cache(folder)]


def is_cache(folder):
    """Whether a cache was made here; its files may be missing or damaged."""
    named = re.search(r"views-[0-9a-f]{16}$", folder.name)
    return any((folder / name).exists() for name in (FILES if named else ("marks.bin",)))


def remove(folder):
    """Deletes the files of a cache, and the folder when nothing else is in it."""
    for path in [*(folder / name for name in FILES), *folder.glob(".header.json.*.tmp")]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


class Table:
    """The rows of a cache: in `folder`, or with None in anonymous memory (Linux only).

    header: what `create` wrote; it gives the number of rows, images.end * augmentation.views, and
    their width, that of all outputs together. Any number of processes may read and write; of two
    that write the same row the first wins. Raises Damaged when a file has the wrong size.
    """

    def __init__(self, header, folder=None):
        self.rows, self.width, self.dtype = _extent(header)
        self._salt = zlib.crc32(_canonical(header))
        if folder is None:
            self._data, self._marks = (_anonymous(name, n) for name, n in _sizes(header).items())
            self._lock_path = f"/proc/self/fd/{self._marks.fileno()}"
            return
        self._lock_path = folder / "marks.bin"
        self._data, self._marks = (_open(folder / n, size) for n, size in _sizes(header).items())

    def filled(self, ids):
        """Which of the rows `ids`, int64 [B], are there: bool [B]."""
        return self._read_marks(ids) != 0

    def read(self, ids):
        """(values [B, width], filled bool [B]) of the rows `ids`, int64 [B]; zeros where absent.

        Raises Damaged when the bytes of a row do not match its mark.
        """
        try:
            return self._read(ids)
        except Damaged:  # or in the middle of a write
            with _locked(self._lock_path, self._marks.mode):
                return self._read(ids)

    def write(self, ids, values):
        """Stores the rows that are absent, and returns all [B, width] as they are stored.

        ids: int64 [B], each once. Raises OSError when the disk refuses; every row is then whole or
        absent.
        """
        with _locked(self._lock_path):
            filled = self.filled(ids)
            new = np.flatnonzero(~filled)
            data = np.ascontiguousarray(values[new]).tobytes()
            self._scatter(self._data, ids[new], data)
            self._scatter(self._marks, ids[new], self._checksums(ids[new], data).tobytes())
        stored = values.copy()
        if filled.any():
            stored[filled], _ = self.read(ids[filled])
        return stored

    def check(self, start):
        """(number filled, damaged ids) among the rows from `start` to `start` + CHUNK."""
        ids = np.arange(start, min(start + CHUNK, self.rows))
        marks = np.frombuffer(_pread(self._marks, 4 * len(ids), 4 * start), "<u4")
        filled = np.flatnonzero(marks)
        if not len(filled):
            return 0, ids[:0]
        size = self.width * self.dtype.itemsize
        data = np.frombuffer(_pread(self._data, size * len(ids), size * start), np.uint8)
        data = data.reshape(len(ids), size)[filled].tobytes()
        bad = self._checksums(ids[filled], data) != marks[filled]
        return len(filled), ids[filled[bad]]

    def clear(self, ids):
        """Makes the damaged ones of the rows `ids` absent."""
        with _locked(self._lock_path):
            self._scatter(self._marks, ids, bytes(4 * len(ids)))

    def count(self):
        """How many rows are filled."""
        starts = range(0, self.rows, CHUNK)
        sizes = (min(CHUNK, self.rows - start) for start in starts)
        chunks = (_pread(self._marks, 4 * n, 4 * at) for at, n in zip(starts, sizes, strict=True))
        return sum(int(np.count_nonzero(np.frombuffer(chunk, "<u4"))) for chunk in chunks)

    def allocated(self):
        """Bytes that the rows and marks take, holes not counted."""
        return sum(os.fstat(f.fileno()).st_blocks * 512 for f in (self._data, self._marks))

    def sync(self):
        """Returns when all rows written so far are on the disk. Raises OSError."""
        for file in (self._data, self._marks):
            os.fsync(file.fileno())

    def close(self):
        self._data.close()
        self._marks.close()

    def _read_marks(self, ids):
        return np.frombuffer(self._gather(self._marks, ids), "<u4")

    def _read(self, ids):
        marks = self._read_marks(ids)
        filled = marks != 0
        data = self._gather(self._data, ids[filled])
        bad = self._checksums(ids[filled], data) != marks[filled]
        if bad.any():
            row = ids[filled][bad][0]
            raise Damaged(self._data.name, f"row {row} does not match its checksum in marks.bin")
        values = np.zeros((len(ids), self.width), self.dtype)
        values[filled] = np.frombuffer(data, self.dtype).reshape(-1, self.width)
        return values, filled

    def _checksums(self, ids, data):
        """The marks, uint32 [B], of rows `ids` whose bytes are `data`."""
        size, data = self.width * self.dtype.itemsize, memoryview(data)
        marks = (
            zlib.crc32(data[i * size : (i + 1) * size], (self._salt ^ row) & 0xFFFFFFFF) or 1
            for i, row in enumerate(ids.tolist())
        )
        return np.fromiter(marks, "<u4", len(ids))

    def _gather(self, file, ids):
        size = 4 if file is self._marks else self.width * self.dtype.itemsize
        return b"".join([_pread(file, size, row * size) for row in ids.tolist()])

    def _scatter(self, file, ids, data):
        size = 4 if file is self._marks else self.width * self.dtype.itemsize
        for i, row in enumerate(ids.tolist()):
            _pwrite(file, data[i * size : (i + 1) * size], row * size)


def _canonical(header):
    return json.dumps(header, sort_keys=True).encode()


def _header_crc(header):
    return f"{zlib.crc32(_canonical(header)):08x}"


def _extent(header):
    """(rows, width, dtype) of the table."""
    outputs = header["outputs"]
    width = sum(int(np.prod(header["shapes"][name])) for name in outputs["names"])
    rows = header["images"]["end"] * header["augmentation"]["views"]
    return rows, width, np.dtype(outputs["dtype"]).newbyteorder("<")


def _sizes(header):
    rows, width, dtype = _extent(header)
    return {"rows.bin": rows * width * dtype.itemsize, "marks.bin": rows * 4}


@contextlib.contextmanager
def _locked(path, mode="r+b"):
    """One process and thread at a time. The file is opened anew: a lock belongs to an opening, and
    a forked child has those of its parent."""
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "this system has no file locks of the kind needed") from None
    with open(path, mode) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _anonymous(name, size):
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, "a cache in memory needs Linux; give a directory")
    with os.fdopen(os.memfd_create(name), "r+b") as memory:
        memory.truncate(size)
        return open(f"/proc/self/fd/{memory.fileno()}", "r+b", buffering=0)


def _open(path, size):
    """The file for reading and, where that is allowed, writing."""
    try:
        # Open as long as the Table is, whose `close` closes it.
        file = open(path, "r+b" if os.access(path, os.W_OK) else "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError:
        raise Damaged(path, "missing") from None
    found = os.fstat(file.fileno()).st_size
    if found != size:
        file.close()
        raise Damaged(path, f"has {found} bytes, must have {size}")
    return file


def _pread(file, size, offset):
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise Damaged(file.name, f"ends before byte {offset + size}")
    return data


def _pwrite(file, data, offset):
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
