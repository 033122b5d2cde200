"""Teacher outputs that are computed once: rows keyed by (teacher, images, image, view)."""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..attacks.checks import check_model, described
from ..data import Loader
from ..engine.features import forward_features
from ..engine.frozen import original, refresh
from ..errors import UsageError, about, values_from_user
from ..ops._torch import version
from . import store
from .identity import differences, identity

BLOCK = 32  # images per teacher forward
RESERVE = 1 << 30  # bytes of the disk that a cache leaves to others, such as checkpoints


class TeacherCache:
    """The outputs of `teacher` for the views of a Loader's images, kept in a folder or in memory.

    teacher: a Frozen twin, or another network in eval mode without trainable parameters. loader:
    gives images, views and augmentation; its order and batch size play no part. names: outputs as
    `forward_features` names them. directory: the caches' folder, where each identity (teacher,
    images, augmentation, outputs; see `identity`) has a folder of its own that all runs share; or
    one of those; None: memory of this process, shared with its forks. dtype: torch.float16, which
    is off by at most 2^-11 of a value (2^-25 below 6e-5), or torch.float32, which is exact.

    A row's value depends on the row alone: misses are computed in blocks of BLOCK images, filled up
    with zeros, and returned as stored, rounded, or as another process stored them first. So a run
    that finds a row trains bit for bit like the one that computed it.

    hits, misses: rows looked up; forwards: blocks computed. Where the disk refuses, the cache warns
    once, goes on with what it has and stores no more; `writable` is then False.
    Raises ValueError for a teacher that may change, more views than can be numbered
    (`views_per_image` not given), names of no outputs, a folder of another identity (naming the
    part that differs), and store.Damaged for one that is truncated, altered or of another format;
    TypeError for names that are no names.
    """

    def __init__(self, teacher, loader, names=("logits",), directory=None, dtype=torch.float16):
        _check(teacher, loader, names, dtype)
        self.teacher, self.names, self.dtype = teacher, tuple(sorted(set(names))), dtype
        self.hits = self.misses = self.forwards = 0
        self.writable, self.folder, self._table = True, None, None
        refresh(teacher)  # what is asked and watched from here on is one network
        kind = str(dtype).removeprefix("torch.")
        outputs = {"names": list(self.names), "dtype": kind, "block": BLOCK}
        shapes, probe = self._probed(loader)
        self.identity = identity(teacher, loader, outputs)
        self._versions = self._tensor_versions()
        self._known = torch.zeros(self.identity["images"]["end"], dtype=torch.bool)
        self._known[loader.index.cpu()] = True
        self._views = loader.views
        self._ahead = self._reader = self._reader_process = None
        self._header = self.identity | {"shapes": shapes, "probe": probe}
        if directory is not None:
            self.folder = Path(directory) / _folder_name(self.identity)
            try:
                if store.is_cache(Path(directory)):
                    self.folder = Path(directory)
                if (self.folder / "header.json").exists():
                    self._open()
            except OSError as error:
                self._turn_off(error)
        self.shapes = {name: tuple(self._header["shapes"][name]) for name in self.names}

    def lookup(self, index, view, x):
        """{name: float32 [B, ...] on x's device}: the teacher's outputs for x.

        index, view: int64 [B] that name the images x, float32 [B, C, H, W], as the loader does.
        That x are those images is not checked. Raises ValueError for ids that the loader does not
        have, a teacher seen to have changed (not by writes to the `.data` of its tensors), outputs
        that dtype cannot hold, and store.Damaged for a row that is not as it was written.
        """
        self._check_unchanged()
        ids = self._ids(index, view)
        values, filled = self._read(ids)
        missing = np.flatnonzero(~filled)
        self.hits += len(ids) - len(missing)
        self.misses += len(missing)
        if len(missing):
            absent, first, again = np.unique(ids[missing], return_index=True, return_inverse=True)
            fresh = self._compute(x[torch.from_numpy(missing[first]).to(x.device)])
            self._check_unchanged()
            values[missing] = self._write(absent, fresh)[again]
        return self._named(values, x.device)

    def compute(self, x):
        """The same as `lookup` of images that are not stored; nothing is stored."""
        return self._named(self._compute(x), x.device)

    def prefetch(self, index, view):
        """Starts reading the rows of the next lookup in the background; its results are the same.

        Only the last call counts, and only for a lookup of the same index and view.
        """
        if self._table is None:
            return
        if self._reader_process != os.getpid():  # threads do not survive a fork
            self._reader, self._reader_process = ThreadPoolExecutor(1), os.getpid()
        ids = self._ids(index, view)
        self._ahead = os.getpid(), ids, self._reader.submit(self._table.read, ids)

    def filled(self, index, view):
        """Whether each row is stored already, bool [B]."""
        ids = self._ids(index, view)
        if self._table is None:
            return torch.zeros(len(ids), dtype=torch.bool)
        return torch.from_numpy(self._table.filled(ids))

    def sync(self):
        """Returns when all rows so far would survive a loss of power; once per epoch is enough."""
        if self._table is not None and self.writable:
            try:
                self._table.sync()
            except OSError as error:
                self._turn_off(error)

    def close(self):
        """Syncs, and gives files and memory back."""
        self.sync()
        self._ahead = None
        if self._reader is not None and self._reader_process == os.getpid():
            self._reader.shutdown()
        if self._table is not None:
            self._table.close()
            self._table = None

    def _open(self):
        """Opens the table in self.folder."""
        header = store.read_header(self.folder)
        different = differences(self.identity, header)
        if different:
            raise UsageError(
                f"{self.folder} is the cache of something else: {', '.join(different)} differ;"
                " give the folder above it, or another"
            )
        for name, values in header["probe"].items():
            ours, theirs = torch.tensor(self._header["probe"][name]), torch.tensor(values)
            if (ours - theirs).abs().max() > 0.02 * theirs.abs().max() + 1e-3:
                raise UsageError(
                    f"{self.folder} is the cache of a teacher with other {name}, though its weights"
                    " and structure are the same: has its code changed? give another folder"
                )
        self._table = store.Table(header, self.folder)

    def _make(self):
        """Opens the table, in a folder made for it or in memory."""
        if self.folder is None:
            self._table = store.Table(self._header)
        else:
            store.create(self.folder, self._header)
            self._open()

    def _ids(self, index, view):
        """Row numbers, int64 numpy [B]."""
        index, view = index.cpu(), view.cpu()
        if len(index) and not (index.min() >= 0 and index.max() < len(self._known)):
            raise ValueError(f"index has a number outside [0, {len(self._known)})")
        if not self._known[index].all():
            raise ValueError("index has an image that the cache's loader does not have")
        if len(view) and not (view.min() >= 0 and view.max() < self._views):
            raise ValueError(f"view has a number outside [0, {self._views})")
        return (index * self._views + view).numpy()

    def _read(self, ids):
        """(values, filled) of the rows; `prefetch` may have read them already."""
        ahead, self._ahead = self._ahead, None
        if self._table is None:
            return self._nothing(len(ids))
        if ahead and ahead[0] == os.getpid() and np.array_equal(ahead[1], ids):
            return self._rows(ahead[2].result, len(ids))
        return self._rows(lambda: self._table.read(ids), len(ids))

    def _rows(self, read, count):
        """The (values, filled) of `read()`. Where the disk cannot be read, all rows are absent and
        the cache is turned off."""
        try:
            return read()
        except OSError as error:
            self._turn_off(error)
            self._table = None
            return self._nothing(count)

    def _nothing(self, count):
        """(values, filled) of rows that are all absent."""
        width = sum(map(math.prod, self.shapes.values()))
        return torch.zeros(count, width, dtype=self.dtype).numpy(), np.zeros(count, bool)

    def _write(self, ids, values):
        """The values of the rows as they are stored, or would be."""
        if not self.writable:
            return values
        try:
            if self._table is None:
                self._make()
            if self.folder and shutil.disk_usage(self.folder).free < RESERVE + values.nbytes:
                raise OSError(errno.ENOSPC, f"the disk of {self.folder} is left {RESERVE >> 20} MB")
            return self._table.write(ids, values)
        except OSError as error:
            self._turn_off(error)
            return values

    def _named(self, values, device):
        """{name: float32 [B, ...]} of numpy values [B, width]."""
        flat = torch.from_numpy(values)
        if device.type == "cuda":  # from pinned memory, whose copy the host does not wait for
            flat = flat.pin_memory()
        flat = flat.to(device, non_blocking=True).float()
        parts = flat.split([*map(math.prod, self.shapes.values())], 1)
        return {
            name: part.reshape(-1, *shape).contiguous()
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _compute(self, x):
        """The teacher's outputs for x side by side, numpy [B, width] in the stored type."""
        rows = []
        for part in x.split(BLOCK):
            outputs = self._forward(part)
            rows.append(torch.cat([v.flatten(1) for v in outputs.values()], 1)[: len(part)])
            self.forwards += 1
        values = torch.cat(rows).cpu().to(self.dtype)
        if not values.isfinite().all():
            raise UsageError(
                f"the teacher's {', '.join(self.names)} have NaN, or numbers too large for"
                f" {self.dtype}; float32 holds larger ones (--teacher-cache-dtype float32)"
            )
        return values.numpy()

    def _forward(self, x):
        """{name: [BLOCK, ...]} for at most BLOCK images, whose strides play no part."""
        block = torch.zeros(BLOCK, *x.shape[1:], device=x.device)
        block = block.contiguous(memory_format=torch.channels_last)
        block[: len(x)] = x
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            _, outputs = forward_features(self.teacher, block, self.names)
        return outputs

    def _probed(self, loader):
        """({name: shape of one image's output}, {name: some of its values}) on fixed noise; not
        counted as a forward. The values tell teachers apart whose hashes are the same."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(1, *loader.images.shape[1:], generator=generator)
        with about("names"), values_from_user():
            outputs = self._forward(noise.to(loader.device))
        for name, value in outputs.items():
            if value.dim() < 2 or len(value) != BLOCK:
                raise UsageError(
                    f"{name} of {BLOCK} images is {list(value.shape)}, not rows of them"
                )
        shapes = {name: list(value.shape[1:]) for name, value in outputs.items()}
        return shapes, {name: value[0].flatten()[:64].tolist() for name, value in outputs.items()}

    def _check_unchanged(self):
        if self._tensor_versions() != self._versions:
            raise ValueError("the teacher has changed since its cache was opened: is it trained?")

    def _tensor_versions(self):
        """A value that changes when a tensor is replaced or changed in place, and when a module's
        mode changes. A twin's own tensors are written by every refresh, so those of its model are
        looked at."""
        net = original(self.teacher)
        tensors = itertools.chain(net.parameters(), net.buffers())
        modes = any(module.training for module in self.teacher.modules())
        return modes, [(tensor.data_ptr(), version(tensor)) for tensor in tensors]

    def _turn_off(self, error):
        self.writable = False
        warnings.warn(f"the teacher cache stores no more: {error}", stacklevel=3)


def _check(teacher, loader, names, dtype):
    check_model(teacher, "teacher")
    if not isinstance(loader, Loader):
        raise TypeError(f"loader is {described(loader)}, must be a data.Loader")
    texts = isinstance(names, (tuple, list, set)) and all(isinstance(name, str) for name in names)
    if not texts or not names:
        raise TypeError(f"names is {names!r}, must be a tuple of outputs such as ('logits',)")
    if any(module.training for module in teacher.modules()):
        raise ValueError("teacher is in train mode, must be in eval mode, such as freeze(teacher)")
    if any(parameter.requires_grad for parameter in teacher.parameters()):
        raise ValueError("teacher has trainable parameters, must have none: freeze(teacher)")
    net = original(teacher)
    if any(tensor.is_inference() for tensor in (*net.parameters(), *net.buffers())):
        raise ValueError(
            "teacher has tensors of torch.inference_mode, whose changes nobody counts: make or load"
            " it outside"
        )
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"dtype is {dtype}, must be torch.float16 or torch.float32")
    if loader.extra is not None:
        raise UsageError(
            "extra_data is given, must be left out for a teacher cache: hardly a view of such "
            "images comes twice"
        )
    if loader.views >= 2**32:
        raise UsageError(
            f"views_per_image is {loader.augmentation.views_per_image}, must be below 2^32 for a"
            " teacher cache: without it strong augmentation repeats no view"
        )


def _folder_name(identity):
    """A folder's name, such as WideResNet-50000x3x32x32-162views-1f0c5e9a77b3d420."""
    images = identity["images"]
    shape = "x".join(map(str, [images["count"], *images["shape"]]))
    views = identity["augmentation"]["views"]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return f"{identity['teacher']['architecture']}-{shape}-{views}views-{digest}"
