"""Images for training from a folder of JPEG files, on one core; `--suite data`.

    python benchmarks/run.py --suite data

"decode each epoch" is what most trainers do: torch's DataLoader opens, crops, resizes and mirrors
each file by Pillow every time that it comes, here without worker processes. "packed" is fastadv's
Loader on the file of `fastadv.data pack`, "packed, resized" the same with random resized crops.
"""

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import Case

from fastadv import data
from fastadv.data import folder, pack, pictures

PER_CLASS, CLASSES = 64, 4
# (pixels of the images, of the files, images per batch)
SIZES = ((32, (32, 32), 128), (224, (500, 375), 32))


def write_pictures(root, size):
    """JPEG files as smooth as photographs: noise that is enlarged."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(CLASSES):
            where = root / split / str(label)
            where.mkdir(parents=True)
            for i in range(PER_CLASS):
                noise = rng.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
                content = io.BytesIO()
                Image.fromarray(noise).resize(size, Image.BICUBIC).save(content, "jpeg", quality=90)
                (where / f"{i}.jpg").write_bytes(content.getvalue())


class Files(torch.utils.data.Dataset):
    """Files with the transforms that are usual for their size: shifts of 32 pixels, resized crops
    of 224."""

    def __init__(self, root, size):
        self.files = sorted((root / "train").rglob("*.jpg"))
        self.size, self.rng = size, np.random.default_rng(0)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image:
            image = image.convert("RGB")
            if self.size == 32:
                padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
                dy, dx = self.rng.integers(0, 9, 2)
                pixels = padded[dy : dy + 32, dx : dx + 32]
            else:
                pixels = np.asarray(self.resized(image))
        if self.rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
        return x, int(self.files[i].parent.name)

    def resized(self, image):
        """A box of 8 % to 100 % of the area, of an aspect ratio of 3/4 to 4/3."""
        area = image.width * image.height * self.rng.uniform(0.08, 1)
        ratio = np.exp(self.rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        wide = min(image.width, round((area * ratio) ** 0.5))
        tall = min(image.height, round((area / ratio) ** 0.5))
        left = self.rng.integers(0, image.width - wide + 1)
        top = self.rng.integers(0, image.height - tall + 1)
        box = (left, top, left + wide, top + tall)
        return image.resize((self.size, self.size), Image.BILINEAR, box=box)


def case(root, size, file_size, batch):
    write_pictures(root, file_size)
    listing = folder.scan(root)
    pack.write(listing, size, workers=0)
    dataset = data.load("folder", root, image_size=size)
    settings = {"padding": dataset.padding, "flips": 2, "shuffle": True}
    loaders = {
        "decode each epoch": torch.utils.data.DataLoader(Files(root, size), batch, shuffle=True),
        "packed": data.Loader(dataset.train, batch, **settings),
        "packed, resized": data.Loader(
            dataset.train, batch, augmentation=data.Augmentation(crop="resized"), **settings
        ),
    }

    def epoch(loader):
        return lambda: [None for _ in (loader.epoch(0) if hasattr(loader, "epoch") else loader)]

    def gate():
        names = sorted(name for name in listing.files if name.startswith("train"))
        for i in range(0, len(dataset.train), 7):
            file = root / names[int(dataset.train.index[i])]
            expected = torch.from_numpy(pictures.decode(file, size).copy())
            assert torch.equal(dataset.train.images[i], expected)

    providers = {name: epoch(loader) for name, loader in loaders.items()}
    shape = f"{size} pixels, files of {file_size[0]}x{file_size[1]}"
    return Case("load images", shape, providers, gate, images=len(dataset.train), calls=1)


def cases():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for sizes in SIZES:
            with tempfile.TemporaryDirectory() as root:
                yield case(Path(root), *sizes)
    finally:
        torch.set_num_threads(threads)
