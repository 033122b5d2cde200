"""The packed file of a folder of pictures."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib

import pytest
import torch
from pictures import save, tree
from PIL import Image

from fastadv import data
from fastadv.data import __main__ as command
from fastadv.data import folder, pack, pictures
from fastadv.errors import UsageError
from fastadv.runs import Config
from fastadv.train import train

SIZE = 12
IMAGE = 3 * SIZE * SIZE


@pytest.fixture
def root(tmp_path, monkeypatch):
    """24 pictures in blocks of five."""
    monkeypatch.setattr(pictures, "BLOCK_BYTES", 5 * IMAGE)
    return tree(tmp_path / "pets")


def write(root, **options):
    """Packs anew, but for what a stopped writer has left."""
    pack.place(root, SIZE).unlink(missing_ok=True)
    return pack.write(folder.scan(root), SIZE, **({"workers": 0} | options))


def load(root, **options):
    return data.load("folder", root, image_size=SIZE, **options)


def temporary(root):
    return root / f".packed-{SIZE}.fastadv.tmp"


def same(one, other):
    for split in ("train", "val", "test"):
        for field in ("images", "labels", "index"):
            a, b = (getattr(getattr(made, split), field) for made in (one, other))
            assert torch.equal(a, b), (split, field)
    return one.classes == other.classes


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val", "test")])
def test_a_packed_folder_is_what_it_is_without(root, splits, monkeypatch):
    tree(root, splits)
    decoded = load(root)
    path, skipped = write(root)
    assert (path, skipped) == (root / "packed-12.fastadv", [])
    assert not temporary(root).exists()
    assert pack.verify(path) == sum(map(len, (decoded.train, decoded.val, decoded.test)))
    monkeypatch.setattr(pictures, "decode", None)  # nothing is decoded
    assert same(load(root), decoded)


def test_all_splits_are_views_of_one_mapping(root):
    write(root)
    made = load(root)
    with open("/proc/self/maps") as maps:
        (line,) = [line for line in maps if "packed-12.fastadv" in line]
    start, end = (int(number, 16) for number in line.split()[0].split("-"))
    for split in (made.train, made.val, made.test):
        assert start <= split.images.data_ptr() < end
    loader = data.Loader(made.train, 4, padding=made.padding, flips=made.flips, shuffle=True)
    assert loader.images.data_ptr() == made.train.images.data_ptr()


def test_the_same_pictures_make_the_same_bytes(root):
    first = write(root)[0].read_bytes()
    assert write(root, workers=2)[0].read_bytes() == first


def test_a_packed_folder_is_not_packed_again(root, monkeypatch):
    bad = root / "train/dog/3.png"
    bad.write_bytes(b"")
    path, skipped = write(root, skip_broken=True)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "blocks", None)
        assert pack.write(folder.scan(root), SIZE) == (path, skipped) == (path, ["train/dog/3.png"])
    path.write_bytes(path.read_bytes()[:-1])
    pack.write(folder.scan(root), SIZE, workers=0, skip_broken=True)
    assert pack.verify(path) == 23


def test_other_pictures_and_other_sizes_are_refused(root):
    path, _ = write(root)
    with pytest.raises(UsageError, match="^seed is 1, must be 0, that of .*packed-12.fastadv$"):
        load(root, seed=1)
    path.with_name("packed-20.fastadv").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="packed-20.fastadv has images of 12 pixels, must have 20"):
        data.load("folder", root, image_size=20)
    again = re.escape(f"pack again by `python -m fastadv.data pack {root} --image-size 12`")
    message = rf"packed-12.fastadv is of other pictures than .*pets has now, must be .*{again}"
    picture = root / "train/dog/3.png"
    stat = os.stat(picture)
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UsageError, match=message):
        load(root)
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load(root)
    picture.rename(picture.with_name("4a.png"))
    with pytest.raises(UsageError, match=message):
        load(root)
    write(root)
    load(root)


@pytest.mark.parametrize("length", [0, 5, 15, 100, 300, 4095, 4096, 5000, -1])
def test_truncated_files(root, length):
    path, _ = write(root)
    path.write_bytes(path.read_bytes()[:length])
    for call in (load, lambda root: pack.verify(path)):
        with pytest.raises(UsageError, match=r"packed-12.fastadv is .*, must .*: delete it$"):
            call(root)


def test_every_damaged_byte_of_the_head_is_seen(root):
    path, _ = write(root)
    content = path.read_bytes()
    end = pack.Head.of(folder.scan(root), SIZE).end
    for at in range(end):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(UsageError, match=r"packed-12.fastadv is .*must"):
            pack.verify(path)


def test_a_head_that_promises_too_much(root):
    path, _ = write(root)
    listing = folder.scan(root)
    for counts in ({"train": 2**60}, {"train": 2**80}, {"train": -1}, {"train": "1"}, {}, 7):
        facts = pack.Head.of(listing, SIZE).facts | {"counts": counts}
        text = json.dumps(facts).encode()
        prefix = pack.PREFIX.pack(pack.MAGIC, len(text), zlib.crc32(text))
        path.write_bytes(prefix + text)
        with pytest.raises(UsageError, match=r"is damaged or cut short"):
            load(root)


def test_a_table_of_other_numbers_than_the_labels(root):
    path, _ = write(root)
    content = path.read_bytes()
    with open(path, "rb") as file:
        head = pack.Head.read(file)
    head.table = head.table.copy()
    head.table[0, 0] = 2**32 - 1  # of which verify would read as many images
    path.write_bytes(head.bytes() + content[head.end :])
    for call in (load, lambda root: pack.verify(path)):
        with pytest.raises(UsageError, match=r"is damaged or cut short"):
            call(root)


def test_damaged_images_are_found_by_verify(root, capsys):
    path, _ = write(root)
    content = bytearray(path.read_bytes())
    content[-7 * IMAGE] ^= 1
    path.write_bytes(content)
    load(root)
    with pytest.raises(UsageError, match="is damaged in pictures 15 to 19, must match its checks"):
        pack.verify(path)
    argv = ["verify", str(root), "--image-size"]
    with pytest.raises(UsageError, match="is damaged in pictures 15 to 19"):
        command.main([*argv, "12"])
    content[-7 * IMAGE] ^= 1
    path.write_bytes(content)
    command.main([*argv, "12"])
    assert capsys.readouterr().out == f"{path}: 24 pictures, all as they were packed\n"
    with pytest.raises(FileNotFoundError, match="packed-13.fastadv: no such file, must be packed"):
        command.main([*argv, "13"])


def test_broken_pictures_are_named_or_left_out(root, capsys):
    bad = root / "train/dog/3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    (root / "test/cat/0.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"(dog/3|cat/0)\.png is broken \(.*--skip-broken`$"):
        write(root)
    argv = ["pack", str(root), "--image-size", "12", "--workers", "0", "--skip-broken"]
    command.main(argv)
    said = capsys.readouterr().out
    assert "packed-12.fastadv: 22 pictures of 2 classes, 12 x 12 pixels\n" in said
    assert "left out as broken: 2\ntrain/dog/3.png\ntest/cat/0.png\n" in said
    made = load(root)
    assert [len(split) for split in (made.train, made.val, made.test)] == [10, 1, 11]
    assert 9 not in made.train.index.tolist() + made.val.index.tolist()
    assert made.test.index.tolist() == list(range(1, 12))
    assert pack.verify(root / "packed-12.fastadv") == 22
    listing = folder.scan(root)
    for split, part in ((made.train, "train"), (made.test, "test")):
        names = sorted(file for file in listing.files if file.startswith(part))
        for image, index in zip(split.images, split.index, strict=True):
            assert torch.equal(image, torch.from_numpy(pictures.decode(root / names[index], SIZE)))


def test_a_split_without_a_whole_picture(root):
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    write(root, skip_broken=True)
    with pytest.raises(UsageError, match="has no pictures left in test, must have one or more"):
        load(root)


def stopped_after(monkeypatch, files):
    """Makes decoding end with an exception that is no error of a picture."""
    decode, calls = pictures.decode, []

    def counted(path, size):
        calls.append(path)
        if len(calls) > files:
            raise KeyboardInterrupt
        return decode(path, size)

    monkeypatch.setattr(pictures, "decode", counted)
    return calls


def test_a_stopped_writer_is_gone_on_from(root, monkeypatch, terminal):
    expected = write(root)[0].read_bytes()
    with monkeypatch.context() as patch:
        stopped_after(patch, 13)
        with pytest.raises(KeyboardInterrupt):
            write(root)
    assert temporary(root).exists()
    with monkeypatch.context() as patch:
        calls = stopped_after(patch, 99)
        assert write(root)[0].read_bytes() == expected
    assert len(calls) == 24 - 10  # two blocks of five were whole
    assert "check:   0%|          | 0/5 " in terminal.getvalue()  # the blocks that it had


@pytest.mark.parametrize("damage", ["image", "table", "label", "json"])
def test_what_a_stopped_writer_left_is_checked(root, monkeypatch, damage):
    expected = write(root)[0].read_bytes()
    head = pack.Head.of(folder.scan(root), SIZE)
    with monkeypatch.context() as patch:
        stopped_after(patch, 13)
        with pytest.raises(KeyboardInterrupt):
            write(root)
    content = bytearray(temporary(root).read_bytes())
    at = {"image": head.images_at + 6 * IMAGE, "table": head.table_at + 8, "json": 20}
    content[at.get(damage, head.labels_at + 6 * 8)] ^= 1
    temporary(root).write_bytes(content)
    with monkeypatch.context() as patch:
        calls = stopped_after(patch, 99)
        assert write(root)[0].read_bytes() == expected
    assert len(calls) == (24 if damage == "json" else 24 - 5)


def test_what_was_left_out_is_not_gone_on_from_without_the_flag(root, monkeypatch):
    first = folder.scan(root).files[0]
    (root / first).write_bytes(b"")
    with monkeypatch.context() as patch:
        stopped_after(patch, 13)
        with pytest.raises(KeyboardInterrupt):
            write(root, skip_broken=True)
    with pytest.raises(UsageError, match=re.escape(f"{first} is broken")):
        write(root)
    _, skipped = write(root, skip_broken=True)
    assert skipped == [first]


def test_other_pictures_are_not_gone_on_from(root, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_after(patch, 13)
        with pytest.raises(KeyboardInterrupt):
            write(root)
    save(root / "train/dog/3.png", 99, (SIZE, SIZE, 3))
    write(root)
    packed = load(root)
    (root / "packed-12.fastadv").unlink()
    assert same(packed, load(root))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(root, monkeypatch, code):
    expected = write(root)[0].read_bytes()
    pwrite, end = os.pwrite, 4096 + 12 * IMAGE

    def full(file, content, at):
        if at >= end:
            raise OSError(code, os.strerror(code))
        return pwrite(file, content[: end - at], at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UsageError, match=r"takes 0.00 GB, for which the disk must have room"):
            write(root)
    assert temporary(root).exists()
    assert write(root)[0].read_bytes() == expected


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "another class"])
def test_changed_folders_are_packed_again(root, change):
    """Training refuses the packed file in words, and the same command packs the pictures anew."""
    write(root)
    there = root / "train/dog/3.png"
    if change == "added":
        save(root / "train/dog/9.png", 99, (SIZE, SIZE, 3))
    elif change == "removed":
        there.unlink()
    elif change == "renamed":
        there.rename(root / "train/dog/9.png")
    else:
        for split in ("train", "test"):
            save(root / split / "emu/0.png", 99, (SIZE, SIZE, 3))
    with pytest.raises(UsageError, match="is of other pictures than .*: pack again by `python -m"):
        load(root)
    command.main(["pack", str(root), "--image-size", str(SIZE), "--workers", "0"])
    packed = load(root)
    pack.place(root, SIZE).unlink()
    assert same(packed, load(root))


def test_a_file_that_is_replaced_while_it_is_read(root, monkeypatch):
    """Labels and images come from one file, though another lies there by now."""
    path, _ = write(root)
    expected, after = load(root), Image.new("RGB", (SIZE, SIZE))
    read = pack.Head.read

    def replaced(file):
        head = read(file)
        for picture in root.rglob("*.png"):
            after.save(picture)
        path.unlink()
        write(root)
        return head

    monkeypatch.setattr(pack.Head, "read", replaced)
    listing = folder.scan(root)
    images, _ = pack.read(path, listing, SIZE)
    assert torch.equal(images[: len(expected.train)], expected.train.images)


def test_two_writers_at_once(root):
    with open(temporary(root), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is being written by another process: wait for it$"):
            write(root)
    write(root)


def test_a_file_that_another_writer_has_just_finished(root, monkeypatch):
    """It has been renamed between opening it and locking it: writing on would damage it."""
    lock, whole = fcntl.flock, []

    def late(file, how):
        if not whole:
            whole.append(None)
            temporary(root).unlink()
            whole.append(write(root)[0].read_bytes())
        return lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="is being written by another process: wait for it$"):
        write(root)
    assert pack.place(root, SIZE).read_bytes() == whole[1]


def test_a_killed_writer_ends_with_the_same_bytes(tmp_path):
    root = tree(tmp_path / "pets", per_class=300, size=8)
    argv = [sys.executable, "-m", "fastadv.data", "pack", root, "--image-size", "96"]
    argv += ["--workers", "1"]
    path = root / "packed-96.fastadv"
    kills = 0
    while not path.exists() and kills < 2:
        writer = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        grown = root / ".packed-96.fastadv.tmp"
        before = grown.stat().st_blocks if grown.exists() else 0
        while writer.poll() is None and (
            not grown.exists() or grown.stat().st_blocks < before + 8192
        ):
            time.sleep(0.001)
        if writer.poll() is None:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
            kills += 1
    assert kills
    for _ in range(60):  # a killed writer's workers hold its lock until they notice
        done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if b"is being written by another process" not in done.stderr:
            break
        time.sleep(0.5)
    assert not done.returncode, done.stderr
    found = path.read_bytes()
    path.unlink()
    assert pack.write(folder.scan(root), 96, workers=0)[0].read_bytes() == found


def test_training_is_the_same_with_and_without_the_packed_file(tmp_path):
    root = tree(tmp_path / "pets", per_class=10, size=36)

    def metrics(out):
        config = Config(
            method="at",
            data="folder",
            data_dir=str(root),
            image_size=32,
            student="resnet18",
            student_width=4,
            steps=1,
            epochs=1,
            batch_size=9,
            milestones=(),
            out=str(tmp_path / out),
        )
        (row,) = train(config)
        return {name: value for name, value in row.items() if name != "images_per_s"}

    decoded = metrics("decoded")
    command.main(["pack", str(root), "--image-size", "32"])
    assert metrics("packed") == decoded
