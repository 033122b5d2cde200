"""The files of a TeacherCache under kills, several writers, damage and full disks: no wrong row."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from fastadv import data, freeze
from fastadv.data.dataset import ImageSet
from fastadv.teacher_cache import TeacherCache, store

VIEWS = 18


def open_cache(directory, seed=0):
    """(cache, batch of all 40 x 18 views), small enough to be written faster than killed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8, generator=generator)
    split = ImageSet(images, torch.arange(40) % 10, torch.arange(40) + 3)
    loader = data.Loader(split, 16, padding=1, flips=2)
    torch.manual_seed(seed)
    teacher = freeze(nn.Sequential(nn.Flatten(), nn.Linear(16, 10)))
    cache = TeacherCache(teacher, loader, directory=directory)
    rows = torch.arange(40).repeat_interleave(VIEWS)
    return cache, loader.view_batch(rows, torch.arange(VIEWS).repeat(40))


def look_up(cache, batch, rows=slice(None)):
    return cache.lookup(batch.index[rows], batch.view[rows], batch.x[rows])["logits"]


@pytest.fixture(scope="module")
def expected():
    cache, batch = open_cache(None)
    return look_up(cache, batch)


@pytest.fixture(scope="module")
def spawner():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastadv.teacher_cache", "numpy"])
    return context


@pytest.fixture
def full(tmp_path):
    """The folder of a cache with all rows."""
    cache, batch = open_cache(tmp_path)
    look_up(cache, batch)
    cache.close()
    return cache.folder


def test_a_row_whose_checksum_is_zero_is_there(full, monkeypatch):
    """0 is the mark of an absent row."""
    table = store.Table(store.read_header(full), full)
    ids, values = np.arange(3, 9), np.ones((6, table.width), table.dtype)
    table.clear(ids)
    monkeypatch.setattr(store.zlib, "crc32", lambda *_: 0)
    table.write(ids, values)
    assert table.filled(ids).all()
    read, filled = table.read(ids)
    assert filled.all()
    assert np.array_equal(read, values)


def fill_at_random(directory, seed, ready):
    torch.set_num_threads(1)
    cache, batch = open_cache(directory)
    generator = torch.Generator().manual_seed(seed)
    ready.set()
    while True:
        look_up(cache, batch, torch.randint(len(batch.x), (5,), generator=generator))


def kill_and_check(spawner, directory, expected, kills):
    counts, longest = [], 0.02  # seconds, or as many as this machine needs to store something
    for seed in range(kills):
        ready = spawner.Event()
        process = spawner.Process(target=fill_at_random, args=(directory, seed, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(random.Random(seed).uniform(0, longest))
        process.kill()
        process.join()
        if not store.caches(directory):
            longest *= 2
            continue
        cache, batch = open_cache(directory)
        filled = cache.filled(batch.index, batch.view)
        if not filled.any():
            longest *= 2
        else:
            assert torch.equal(look_up(cache, batch, filled), expected[filled])
        assert cache.misses == 0
        counts.append(int(filled.sum()))
        if counts[-1] > 600:
            cache._table.clear(np.arange(43 * VIEWS))  # start over
    assert max(counts) > min(counts)


def test_kills_at_random_moments(spawner, tmp_path, expected):
    kill_and_check(spawner, tmp_path, expected, 10)


@pytest.mark.slow
def test_200_kills_at_random_moments(spawner, tmp_path, expected):
    kill_and_check(spawner, tmp_path, expected, 200)


class Death(BaseException):
    """Of the process, at this instruction."""


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_death_at_every_write_leaves_rows_whole_or_absent(share, tmp_path, expected, monkeypatch):
    """share: how much of the last write reaches the file."""
    pwrite = os.pwrite
    lost = []
    for writes in itertools.count():
        left = iter(range(writes))

        def dying(fd, payload, offset, left=left):
            if next(left, None) is None:
                pwrite(fd, payload[: int(share * len(payload))], offset)
                raise Death
            return pwrite(fd, payload, offset)

        cache, batch = open_cache(tmp_path / str(writes))
        monkeypatch.setattr(os, "pwrite", dying)
        try:
            look_up(cache, batch, slice(6))
        except Death:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(os, "pwrite", pwrite)
        cache, batch = open_cache(tmp_path / str(writes))
        filled = cache.filled(batch.index, batch.view)
        lost.append(6 - int(filled.sum()))
        if share == 0.5 and writes >= 6:  # half a mark: sectors never tear 4 bytes, but be sure
            with pytest.raises(store.Damaged):
                look_up(cache, batch, slice(6))
        else:
            assert torch.equal(look_up(cache, batch, slice(6)), expected[:6])
    assert writes == 12
    assert lost[0] == lost[5] == 6


def fill_differently(directory, mine, start, results):
    """Fills all rows at the pace of the others, with answers that tell the process."""
    torch.set_num_threads(1)
    cache, batch = open_cache(directory)
    compute = cache._compute
    cache._compute = lambda x: compute(x) + np.float16(mine)
    found = torch.empty(len(batch.x), 10)
    for rows in torch.arange(len(batch.x)).split(7):
        start.wait()
        found[rows] = look_up(cache, batch, rows)
    results.put((mine, found.numpy()))


def test_of_two_writers_the_first_wins(spawner, tmp_path, expected):
    start, results = spawner.Barrier(2), spawner.Queue()
    jobs = [
        spawner.Process(target=fill_differently, args=(tmp_path, mine, start, results))
        for mine in (8, 64)
    ]
    for job in jobs:
        job.start()
    found = dict(results.get(timeout=60) for _ in jobs)
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert np.array_equal(found[8], found[64])
    cache, batch = open_cache(tmp_path)
    assert np.array_equal(found[8], look_up(cache, batch).numpy())
    assert cache.misses == 0
    shifts = (torch.from_numpy(found[8]) - expected).round().amax(1)
    assert set(shifts.tolist()) == {8, 64}


def leaves(value, path=()):
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def header_fields():
    cache, _ = open_cache(None)
    return [("format",), ("crc32",), *leaves(cache._header)]


@pytest.mark.parametrize("honest", [False, True])
@pytest.mark.parametrize("field", header_fields(), ids=".".join)
def test_every_field_of_the_header_counts(field, honest, full):
    """honest: with the checksum that belongs to the altered header, as another version writes."""
    header = json.loads((full / "header.json").read_text())
    place = header
    for key in field[:-1]:
        place = place[key]
    place[field[-1]] = {int: 7, str: "other", list: [5]}[type(place[field[-1]])]
    if honest and field != ("crc32",):
        rest = {k: v for k, v in header.items() if k != "crc32"}
        header["crc32"] = f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"
    (full / "header.json").write_text(json.dumps(header))
    message = f"{full.name}.*(damaged|{field[-1]}|has 15480 bytes)"
    with pytest.raises(ValueError, match=message):
        open_cache(full.parent)
    with pytest.raises(ValueError, match=message):
        open_cache(full)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"format": 1}', "\xff", "\0"])
def test_what_is_no_header_is_refused(text, full):
    (full / "header.json").write_text(text, encoding="latin1")
    with pytest.raises(store.Damaged, match="header.json: damaged.*prune"):
        open_cache(full.parent)


@pytest.mark.parametrize("name", ["rows.bin", "marks.bin"])
@pytest.mark.parametrize("change", [-1, 1, None])
def test_files_of_another_length_are_refused(name, change, full):
    path = full / name
    if change is None:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + change)
    problem = "missing" if change is None else r"has \d+ bytes, must have"
    with pytest.raises(store.Damaged, match=f"{name}: {problem}.*prune"):
        open_cache(full.parent)


@pytest.mark.parametrize("name", ["rows.bin", "marks.bin"])
def test_a_file_cut_while_it_is_open_is_an_error_not_a_crash(name, full):
    cache, batch = open_cache(full.parent)
    os.truncate(full / name, 100)
    with pytest.raises(store.Damaged, match=f"{name}: ends before"):
        look_up(cache, batch)


@pytest.mark.parametrize("name", ["rows.bin", "marks.bin"])
def test_any_flipped_bit_is_found(name, full, expected):
    content = (full / name).read_bytes()
    size = len(content) // (43 * VIEWS)
    for seed in range(60):
        row, bit = random.Random(seed).randrange(720), random.Random(-seed).randrange(8 * size)
        at = (row + 3 * VIEWS) * size + bit // 8
        altered = bytearray(content)
        altered[at] ^= 1 << bit % 8
        (full / name).write_bytes(altered)
        cache, batch = open_cache(full.parent)
        with pytest.raises(store.Damaged, match="rows.bin: row .*checksum.*prune"):
            look_up(cache, batch)
        others = torch.arange(720) != row
        assert torch.equal(look_up(cache, batch, others), expected[others])
    (full / name).write_bytes(content)


def test_damage_of_many_bytes_gives_no_wrong_row(full, expected):
    rng = random.Random(0)
    content = {name: (full / name).read_bytes() for name in ("rows.bin", "marks.bin")}
    for _ in range(30):
        for name, good in content.items():
            altered = bytearray(good)
            start, length = rng.randrange(len(good)), rng.randrange(1, 400)
            fill = rng.choice([b"\0", b"\xff", b"A"])
            altered[start : start + length] = (fill * length)[: len(good) - start]
            (full / name).write_bytes(altered)
        cache, batch = open_cache(full.parent)
        refused = 0
        for rows in torch.arange(720).split(1):
            try:
                assert torch.equal(look_up(cache, batch, rows), expected[rows])
            except store.Damaged:
                refused += 1
        assert refused + cache.misses > 0


def test_a_mark_on_an_absent_row_is_found(tmp_path):
    cache, batch = open_cache(tmp_path)
    look_up(cache, batch, slice(10))
    with open(cache.folder / "marks.bin", "r+b") as file:
        file.seek(4 * (3 * VIEWS + 11))
        file.write(b"\1")
    with pytest.raises(store.Damaged):
        look_up(cache, batch, [11])


def test_a_row_that_is_being_rewritten_is_waited_for(full, expected):
    cache, batch = open_cache(full.parent)
    altered, mended = threading.Event(), []

    def rewrite():
        with store._locked(full / "marks.bin"):
            (full / "rows.bin").write_bytes(bytes(len(good)))
            altered.set()
            time.sleep(0.2)
            (full / "rows.bin").write_bytes(good)
            mended.append(True)

    good = (full / "rows.bin").read_bytes()
    writer = threading.Thread(target=rewrite)
    writer.start()
    altered.wait()
    assert torch.equal(look_up(cache, batch), expected)
    assert mended
    writer.join()


def test_rows_of_another_place_or_teacher_are_found(full, tmp_path):
    other, batch = open_cache(tmp_path, seed=1)
    look_up(other, batch)
    for name in ("rows.bin", "marks.bin"):
        good = (full / name).read_bytes()
        size = len(good) // (43 * VIEWS)
        first = 3 * VIEWS * size
        moved = good[:first] + good[first + size : first + 2 * size] + good[first + size :]
        (full / name).write_bytes(moved)
    cache, batch = open_cache(tmp_path)
    with pytest.raises(store.Damaged, match="row 54 "):
        look_up(cache, batch, [0])
    for name in ("rows.bin", "marks.bin"):
        (full / name).write_bytes((other.folder / name).read_bytes())
    cache, batch = open_cache(tmp_path)
    with pytest.raises(store.Damaged):
        look_up(cache, batch, [5])


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("after", [0, 1, 7, 9, 14])
def test_a_full_disk_turns_the_cache_off(after, error, tmp_path, expected, monkeypatch):
    cache, batch = open_cache(tmp_path)
    look_up(cache, batch, slice(20))
    pwrite, left = os.pwrite, iter(range(after))

    def full_disk(fd, payload, offset):
        if next(left, None) is None:
            raise OSError(error, os.strerror(error))
        return pwrite(fd, payload, offset)

    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.warns(UserWarning, match=f"stores no more.*{os.strerror(error)}") as warned:
        assert torch.equal(look_up(cache, batch, slice(28)), expected[:28])
    assert len(warned) == 1
    assert not cache.writable
    hits = cache.hits
    monkeypatch.setattr(os, "pwrite", pwrite)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(look_up(cache, batch), expected)
        cache.sync()
    assert cache.hits - hits == 20 + max(0, after - 8)
    cache, batch = open_cache(tmp_path)
    assert int(cache.filled(batch.index, batch.view).sum()) == 20 + max(0, after - 8)
    assert torch.equal(look_up(cache, batch), expected)


def test_short_writes_are_continued(tmp_path, expected, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, payload, offset: pwrite(fd, payload[:3], offset))
    cache, batch = open_cache(tmp_path)
    assert torch.equal(look_up(cache, batch), expected)
    cache, batch = open_cache(tmp_path)
    assert torch.equal(look_up(cache, batch), expected)
    assert cache.misses == 0


def test_a_folder_that_cannot_be_made_turns_the_cache_off(tmp_path, expected):
    (tmp_path / "file").touch()
    cache, batch = open_cache(tmp_path / "file" / "caches")
    with pytest.warns(UserWarning, match="stores no more"):
        assert torch.equal(look_up(cache, batch), expected)
    assert not cache.filled(batch.index, batch.view).any()
    cache.prefetch(batch.index, batch.view)
    assert torch.equal(look_up(cache, batch), expected)
    assert cache.hits == 0


def test_a_system_without_memory_files_turns_the_cache_off(expected, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    cache, batch = open_cache(None)
    with pytest.warns(UserWarning, match="needs Linux; give a directory"):
        assert torch.equal(look_up(cache, batch), expected)


def test_a_half_made_folder_is_finished(tmp_path, expected):
    cache, _ = open_cache(tmp_path)
    cache.folder.mkdir()
    (cache.folder / "marks.bin").write_bytes(b"abc" * 5000)
    cache, batch = open_cache(tmp_path)
    look_up(cache, batch)
    cache, batch = open_cache(tmp_path)
    assert torch.equal(look_up(cache, batch), expected)
    assert cache.misses == 0


def test_a_cache_removed_while_in_use(tmp_path, expected):
    cache, batch = open_cache(tmp_path)
    look_up(cache, batch, slice(100))
    for file in cache.folder.iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="stores no more"):
        assert torch.equal(look_up(cache, batch), expected)
    assert cache.hits == 100


def test_holes_take_no_room(tmp_path):
    images = ImageSet(torch.zeros(9, 1, 4, 4).byte(), torch.zeros(9).long(), torch.arange(9))
    options = {"augmentation": data.Augmentation("randaugment", views_per_image=10**6)}
    loader = data.Loader(images, 9, **options)
    teacher = freeze(nn.Sequential(nn.Flatten(), nn.Linear(16, 10)))
    for directory in (tmp_path, None):
        cache = TeacherCache(teacher, loader, directory=directory)
        x, _, index, view = next(loader.epoch(0))
        cache.lookup(index, view, x)
        assert cache._table.allocated() < 200_000
        assert cache._table.count() == 9
