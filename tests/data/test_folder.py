"""Pictures in one folder per class."""

import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from pictures import save, tree
from PIL import Image

from fastadv import data
from fastadv.data import folder, pack, pictures
from fastadv.errors import MissingPackage, UsageError
from fastadv.runs import Config, checkpoint, parallel
from fastadv.train import cli, train


def load(root, size=12, **options):
    return data.load("folder", root, image_size=size, **options)


def pixels(root, split, name):
    image = Image.open(root / split / name).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("other", ["val", "test"])
def test_one_other_folder_is_the_test_set(tmp_path, other):
    tree(tmp_path, ("train", other), per_class=10)
    made = load(tmp_path)
    assert (made.name, made.num_classes, made.classes) == (tmp_path.name, 2, ("cat", "dog"))
    assert (made.padding, made.flips) == (1, 2)
    assert [len(split) for split in (made.train, made.val, made.test)] == [18, 2, 20]
    assert sorted(made.train.index.tolist() + made.val.index.tolist()) == list(range(20))
    names = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(10)]
    for split, part in ((made.train, "train"), (made.val, "train"), (made.test, other)):
        for image, label, index in zip(split.images, split.labels, split.index, strict=True):
            assert torch.equal(image, pixels(tmp_path, part, names[index]))
            assert label == index // 10


def test_val_and_test_are_each_itself(tmp_path):
    tree(tmp_path, ("train", "val", "test"), per_class=2)
    made = load(tmp_path)
    for part in ("train", "val", "test"):
        split = getattr(made, part)
        assert split.index.tolist() == [0, 1, 2, 3]
        assert split.labels.tolist() == [0, 0, 1, 1]
        assert torch.equal(split.images[2], pixels(tmp_path, part, "dog/0.png"))
    assert made.padding == 1
    assert load(tmp_path, 32).padding == 4


def test_the_seed_chooses_what_is_held_out(tmp_path):
    tree(tmp_path, per_class=40, size=2)
    one, same, other = (load(tmp_path, 2, seed=seed).val.index for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """Its pictures would be missing, and nobody would know."""
    tree(tmp_path)
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="dog"):
        load(tmp_path)


def test_formats_nested_folders_and_hidden_files(tmp_path):
    tree(tmp_path)
    for name in ("a.JPG", "b.jpeg", "c.WebP", "deep/er/d.png"):
        save(tmp_path / "test/cat" / name)
    for name in ("._a.png", ".thumbs/b.png", "deep/.thumbs/c.png"):
        path = tmp_path / "test/cat" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no picture")
    (tmp_path / "test/.cache").mkdir()
    assert len(load(tmp_path).test) == 16
    for name in ("notes.txt", "e.gif", "deep/f.gif", "README"):
        (tmp_path / "test/cat" / name).write_text("no picture")
    with pytest.warns(UserWarning, match="test has files .* passed over: ") as caught:
        assert len(load(tmp_path).test) == 16
    (said,) = (str(warning.message) for warning in caught)
    assert sorted(said.split("over: ")[1].split(", ")) == ["1 .txt", "1 without", "2 .gif"]


MODES = {
    "grey": ("L", lambda x: x[..., :1].repeat(3, 2)),
    "alpha": ("RGBA", lambda x: x),
    "grey and alpha": ("LA", lambda x: x[..., :1].repeat(3, 2)),
    "palette": ("P", None),
    "black and white": ("1", None),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_rgb(tmp_path, mode):
    name, expected = MODES[mode]
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 4), np.uint8)
    plain = {"L": noise[..., 0], "LA": noise[..., [0, 3]], "RGBA": noise}.get(name)
    if plain is None:
        image = Image.fromarray(noise[..., :3]).convert(name)
    else:
        image = Image.fromarray(plain)
    image.save(tmp_path / "a.png", **({"transparency": b"\0\1"} if name == "P" else {}))
    found = pictures.decode(tmp_path / "a.png", 12).transpose(1, 2, 0)
    wanted = np.array(image.convert("RGB")) if expected is None else expected(noise)[..., :3]
    assert np.array_equal(found, wanted)


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    levels = np.arange(144, dtype=np.uint16).reshape(12, 12) * 450
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.array_equal(pictures.decode(tmp_path / "a.png", 12)[0], levels >> 8)


def test_a_turned_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    shape = (12, 12, 3)
    saved = save(tmp_path / "a.png", shape=shape, exif=exif)
    found = pictures.decode(tmp_path / "a.png", 12)
    assert np.array_equal(found.transpose(1, 2, 0), np.rot90(saved, -1))


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_what_is_no_exif_turns_nothing(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    save(path, shape=(12, 12, 3), exif=b"Exif\0\0no TIFF at all")
    whole = np.array(Image.open(path).convert("RGB"))
    assert np.array_equal(pictures.decode(path, 12).transpose(1, 2, 0), whole)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_odd_entries_of_exif_break_no_picture(tmp_path, orientation):
    """Pillow's own turning fails at writing the other entries back; those are not needed."""
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)
    exif += struct.pack("<HHII", 0x0100, 5, 1, 38)  # the width as a fraction
    exif += struct.pack("<HHIHHI", 0x0112, 3, 1, orientation, 0, 0) + struct.pack("<II", 1, 1)
    plain = Image.Exif()
    plain[0x0112] = orientation
    for name, entries in (("odd.png", exif), ("plain.png", plain)):
        save(tmp_path / name, shape=(12, 12, 3), exif=entries)
    found, expected = (pictures.decode(tmp_path / n, 12) for n in ("odd.png", "plain.png"))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("shape", [(20, 60, 3), (60, 20, 3)])
def test_pictures_are_resized_and_cropped(tmp_path, shape):
    save(tmp_path / "a.png", shape=shape)
    with Image.open(tmp_path / "a.png") as image:
        size = (shape[1] // 2, shape[0] // 2)
        small = np.array(image.resize(size, Image.Resampling.BICUBIC))
    top, left = ((side - 10) // 2 for side in small.shape[:2])
    found = pictures.decode(tmp_path / "a.png", 10).transpose(1, 2, 0)
    assert np.array_equal(found, small[top : top + 10, left : left + 10])


def test_workers_decode_the_same(tmp_path):
    listing = folder.scan(tree(tmp_path))
    state = torch.get_rng_state()
    none, two = (
        np.concatenate([b.images for b in pictures.blocks(tmp_path, listing.files[:8], 12, w)])
        for w in (0, 2)
    )
    assert np.array_equal(none, two)
    assert torch.equal(torch.get_rng_state(), state)


def bomb(path):
    """A PNG that says it has 40000 x 40000 pixels."""
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(1000))):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content)


def truncated(path):
    save(path, shape=(64, 64, 3))
    path.write_bytes(path.read_bytes()[:-3000])


BROKEN = {
    "bomb": (bomb, "DecompressionBombError: "),
    "truncated": (truncated, "OSError: "),
    "empty": (lambda path: path.write_bytes(b""), "UnidentifiedImageError: "),
    "text": (lambda path: path.write_text("<html>"), "UnidentifiedImageError: "),
    "another format": (lambda p: Image.new("RGB", (9, 9)).save(p, "GIF"), "UnidentifiedImage"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_named(tmp_path, kind):
    make, reason = BROKEN[kind]
    tree(tmp_path)
    make(tmp_path / "train/dog/3.png")
    message = rf"train/dog/3\.png is broken \(({reason}).*--image-size 12 --skip-broken`"
    with pytest.raises(UsageError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError("no room")])
def test_an_error_of_the_system_breaks_no_picture(tmp_path, monkeypatch, error, workers):
    """With --skip-broken a whole picture would be missing, and nobody would know."""
    tree(tmp_path)

    def failing(path, size):
        raise error

    monkeypatch.setattr(pictures, "decode", failing)
    with pytest.raises(type(error), match=str(error.args[-1])):
        pack.write(folder.scan(tmp_path), 12, workers=workers, skip_broken=True)
    assert not pack.place(tmp_path, 12).exists()


def test_no_part_of_a_damaged_picture_passes_for_the_whole(tmp_path):
    """Whatever byte is cut or turned: the picture as Pillow reads it, or an error."""
    path = tmp_path / "a.png"
    whole = save(path, shape=(12, 12, 3)).transpose(2, 0, 1)
    content, rejected = path.read_bytes(), 0
    for at in range(8, len(content), 3):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        for damaged in (content[:at], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                found = pictures.decode(path, 12)
            except Exception:  # as surfaces of a broken file
                rejected += 1
                continue
            with Image.open(path) as image:
                image.load()
                assert np.array_equal(found, np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    assert rejected > 300
    path.write_bytes(content)
    assert np.array_equal(pictures.decode(path, 12), whole)


def test_folders_of_another_form_are_named(tmp_path):
    def refused(match, size=12):
        with pytest.raises(UsageError, match=match):
            load(tmp_path, size)

    refused("^data_dir is .*, must have the folders train, and val or test, with")
    with pytest.raises(FileNotFoundError, match=r"^data_dir is .*gone', must be a folder: "):
        folder.scan(tmp_path / "gone")
    tree(tmp_path / "elsewhere", per_class=1)
    (tmp_path / "train").mkdir()
    refused("^data_dir is .*, must have the folders train, and val or test, with")
    (tmp_path / "val").mkdir()
    refused("train has 0 folders, must have one for each of two or more classes$")
    tree(tmp_path, ["train"], per_class=4)
    refused("val has no pictures, must have a folder for each class$")
    (tmp_path / "val/cat").mkdir()
    refused("val/cat has no pictures, must have JPEG, PNG or WebP files$")
    save(tmp_path / "val/cat/a.png")
    refused("^train has 8 pictures, must have 10 or more without a val$")
    tree(tmp_path, ["train"], per_class=5)
    load(tmp_path)
    save(tmp_path / "val/cow/a.png")
    refused("val/cow is a class that .*train lacks, must be one of it")
    (tmp_path / "train/cow").mkdir()
    refused("train/cow has no pictures, must have JPEG, PNG or WebP files$")


@pytest.mark.parametrize("size", [0, -1, 1.5, "64", True, 2**15])
def test_an_image_size_is_a_number_of_pixels(tmp_path, size):
    for make in (load, lambda _, n: Config(data="folder", data_dir=str(tmp_path), image_size=n)):
        with pytest.raises(UsageError, match="^image_size is .*, must be"):
            make(tmp_path, size)


def test_an_image_size_belongs_to_folders(tmp_path):
    for make in (data.load, lambda name, **options: Config(data=name, **options)):
        with pytest.raises(UsageError, match="^image_size is missing, must be .* for data folder$"):
            make("folder")
        with pytest.raises(UsageError, match="^image_size is 32, must be left out for data digits"):
            make("digits", image_size=32)
    argv = ["--method", "at", "--data", "folder", "--data-dir", str(tmp_path), "--image-size", "48"]
    assert cli.parse(argv)[0].image_size == 48


def test_a_large_folder_must_be_packed(tmp_path, monkeypatch):
    tree(tmp_path)
    monkeypatch.setattr(folder, "RESIDENT", 24 * 3 * 12 * 12)
    load(tmp_path)
    monkeypatch.setattr(folder, "RESIDENT", 24 * 3 * 12 * 12 - 1)
    with pytest.raises(UsageError, match="24 pictures take .* at 12 pixels: must be packed once, "):
        load(tmp_path)


def test_several_processes_do_not_each_decode_a_folder(tmp_path, monkeypatch):
    tree(tmp_path)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(
        UsageError, match="is not packed: must be for several processes, by `python"
    ):
        load(tmp_path)
    pack.write(folder.scan(tmp_path), 12)
    assert len(load(tmp_path).train)


def test_without_pillow(tmp_path, monkeypatch):
    tree(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingPackage, match=r"^pictures need Pillow: pip install fastadv\[images"):
        load(tmp_path)


def test_the_checkpoint_has_the_names_of_the_classes(tmp_path):
    root, out = tree(tmp_path / "pets", per_class=8, size=8), tmp_path / "run"
    train(
        Config(
            method="at",
            data="folder",
            data_dir=str(root),
            image_size=8,
            student="digits_net",
            student_width=4,
            steps=1,
            epochs=1,
            batch_size=8,
            milestones=(),
            out=str(out),
        )
    )
    _, metadata = checkpoint.load(out / "best.safetensors")
    assert metadata["classes"] == ["cat", "dog"]
    assert metadata["config"]["image_size"] == 8


def test_what_takes_long_has_bars(tmp_path, terminal):
    load(tree(tmp_path))
    for text in ("list train", "check train", "list test", "check test", "decode"):
        assert f"{text}:   0%" in terminal.getvalue(), text
