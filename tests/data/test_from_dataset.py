"""torch Datasets and sequences as fastadv's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fastadv import data, evaluate, models
from fastadv.attacks import suite
from fastadv.data import convert
from fastadv.errors import UsageError

LEVELS = torch.arange(256, dtype=torch.uint8).repeat(12 * 3)[: 12 * 3 * 16 * 16].view(12, 3, 16, 16)
LABELS = torch.arange(12) % 4


class Items(Dataset):
    """A Dataset that is no TensorDataset."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def pairs(form, labels=None):
    labels = LABELS.tolist() if labels is None else labels
    return list(zip(map(form, LEVELS), labels, strict=True))


def last(x):
    return x.permute(1, 2, 0)


FORMS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "channels last": lambda x: last(x).numpy(),
    "ToTensor": lambda x: x / 255,
    "float64": lambda x: x.double().numpy() / 255,
    "floats, channels last": lambda x: last(x) / 255,
    "Pillow": lambda x: Image.fromarray(last(x).numpy()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_pixels(form):
    made = data.from_dataset(Items(pairs(FORMS[form])), pairs(FORMS[form]), name="mine")
    assert (made.name, made.num_classes, made.padding, made.flips) == ("mine", 4, 2, 2)
    assert [len(split) for split in (made.train, made.val, made.test)] == [11, 1, 12]
    assert made.test.images.dtype == torch.uint8
    for split in (made.train, made.val, made.test):
        assert torch.equal(split.images, LEVELS[split.index])
        assert torch.equal(split.labels, LABELS[split.index])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["first", "last", "grey"])
def test_tensors_are_converted_at_once(dtype, form, monkeypatch):
    """And as they are one by one."""
    images = {"first": LEVELS, "last": LEVELS.permute(0, 2, 3, 1), "grey": LEVELS[:, 0]}[form]
    given = images if dtype == torch.uint8 else images.to(dtype) / 255
    whole = TensorDataset(given, LABELS.int())
    expected = convert.as_image_set(Items(whole))
    monkeypatch.setattr(convert, "CHUNK", 5)
    monkeypatch.setattr(TensorDataset, "__getitem__", None)
    made = convert.as_image_set(whole)
    assert torch.equal(made.images, LEVELS[:, :1] if form == "grey" else LEVELS)
    assert torch.equal(made.labels, LABELS)
    assert made.images.is_contiguous()
    assert made.labels.dtype == torch.int64
    for field in ("images", "labels", "index"):
        assert torch.equal(getattr(made, field), getattr(expected, field))


@pytest.mark.parametrize("image", ["image", "img"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label"])
def test_dictionaries_as_hugging_face_has_them(image, label):
    items = [{"id": 7, image: x, label: y, "other": 0} for x, y in pairs(FORMS["Pillow"])]
    with pytest.raises(UsageError, match=r"^train item 0 has the keys id, pic, must have image or"):
        data.from_dataset([{"id": 7, "pic": 0}], items)
    made = data.from_dataset(items, items)
    assert torch.equal(made.test.images, LEVELS)
    assert torch.equal(made.test.labels, LABELS)


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3), torch.tensor(3).byte()])
def test_labels_of_any_integer_type(label):
    assert convert.as_image_set(pairs(last, [label] * 12)).labels.tolist() == [3] * 12


def test_grey_images_and_those_among_coloured_ones():
    grey = [(Image.fromarray(x[0].numpy()), y) for x, y in pairs(lambda x: x)]
    made = data.from_dataset(grey, grey)
    assert torch.equal(made.test.images, LEVELS[:, :1])
    assert (made.padding, made.flips) == (1, 1)
    mixed = grey[:6] + pairs(FORMS["Pillow"])[6:]
    made = data.from_dataset(mixed, mixed)
    assert torch.equal(made.test.images[:6], LEVELS[:6, :1].expand(-1, 3, -1, -1))
    assert torch.equal(made.test.images[6:], LEVELS[6:])


@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_either_byte_order(order):
    items = [(x.numpy().astype(f"{order}f4") / 255, y) for x, y in pairs(lambda x: x)]
    assert items[0][0].dtype.byteorder in (order, "=")
    assert torch.equal(convert.as_image_set(items).images, LEVELS)
    deep = np.arange(144, dtype=np.uint16).reshape(12, 12) * 450
    form = "I;16" if order == "<" else "I;16B"
    image = Image.frombytes(form, (12, 12), deep.astype(f"{order}u2").tobytes())
    (found,) = convert.as_image_set([(image, 0)]).images
    assert torch.equal(found, torch.from_numpy((deep >> 8).astype(np.uint8))[None])


def test_image_sets_are_checked_too():
    good = data.ImageSet(LEVELS, LABELS, torch.arange(12))
    assert data.from_dataset(good, good).test is good
    for field, value, match in (
        ("images", LEVELS / 255, r"images are torch.float32 \[12, 3, .*, must be uint8"),
        ("labels", LABELS.float(), "labels are torch.float32"),
        ("labels", LABELS - 1, "labels lie in -1..2, must be whole numbers from 0 on"),
        ("labels", LABELS.tolist(), "labels is a list, must be a tensor"),
        ("index", torch.arange(12) - 1, "index lies in -1..10, must be in 0.."),
    ):
        with pytest.raises(UsageError, match=f"^test.{match}"):
            data.from_dataset(good, replace(good, **{field: value}))


def test_colours_of_another_space_are_no_grey():
    colour = Image.new("LAB", (12, 12), (128, 60, 200))
    (found,) = convert.as_image_set([(colour, 0)]).images
    assert torch.equal(found, torch.from_numpy(np.array(colour.convert("RGB"))).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pillow_images_of_an_unknown_range_are_refused(mode):
    """Pillow's own conversion would make [0, 1] black, or cut at 255."""
    items = [*pairs(FORMS["Pillow"])[:2], (Image.new(mode, (12, 12), 1), 0)]
    with pytest.raises(UsageError, match=f"^train item 2 is a Pillow image of mode {mode}, .* 16 "):
        data.from_dataset(items, items)


def test_val_and_augmentation_that_are_given():
    items = TensorDataset(LEVELS, LABELS)
    made = data.from_dataset(
        items, items, val=Items(items), padding=3, flips=1, num_classes=4, seed=1
    )
    assert (len(made.train), len(made.val), made.padding, made.flips) == (12, 12, 3, 1)
    with pytest.warns(UserWarning, match="1 of 5 classes have no training image: 4$"):
        assert data.from_dataset(items, items, num_classes=5).num_classes == 5


def test_the_seed_chooses_what_is_held_out():
    items = TensorDataset(LEVELS.repeat(10, 1, 1, 1), LABELS.repeat(10))
    one, same, other = (data.from_dataset(items, items, seed=seed).val.index for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_image_size_resizes_the_centre():
    """As resizing the whole image and cropping it does."""
    wide = np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8)
    small = Image.fromarray(wide).resize((30, 10), Image.Resampling.BICUBIC).crop((10, 0, 20, 10))
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    for image in (wide, Image.fromarray(wide), wide.transpose(2, 0, 1), wide / 255):
        items = [(image, i % 2) for i in range(10)]
        made = data.from_dataset(items, items, image_size=10)
        assert torch.equal(made.test.images, expected.expand(10, -1, -1, -1))
    grey = [(image[..., 0], y) for image, y in [(wide, 0), (wide, 1)] * 5]
    made = data.from_dataset(grey, grey, image_size=10)
    assert torch.equal(made.test.images, expected[:1].expand(10, -1, -1, -1))


def bad(value, at=3):
    changed = LEVELS / 255
    changed[at, 1, 2, 3] = value
    return changed


NOT_PLAIN = "give the data set without normalisation and random transforms$"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (bad(1.25), LABELS, rf"item 3 has the value 1.25, must be in \[0, 1\]: {NOT_PLAIN}"),
        (bad(-1.0), LABELS, r"item 3 has the value -1, must be in \[0, 1\]"),
        (bad(float("nan")), LABELS, r"item 3 has the value nan, must be in \[0, 1\]"),
        (bad(0.1234), LABELS, rf"item 3 has the value 0.1234, must be multiples .*: {NOT_PLAIN}"),
        (LEVELS.long(), LABELS, r"item 0 is int64 \[3, 16, 16\], must be uint8, or floats"),
        (LEVELS[:, :2], LABELS, r"item 0 is uint8 \[2, 16, 16\], must be uint8, or floats"),
        (LEVELS, LABELS - 1, "item 0 has the label -1, must be in 0..3$"),
        (LEVELS, LABELS + 1, "item 3 has the label 4, must be in 0..3$"),
        (LEVELS, LABELS / 1, r"item 0 has the label tensor\(0.\), must be a whole number$"),
        (LEVELS, LABELS > 1, r"item 0 has the label tensor\(False\), must be a whole number$"),
    ],
)
def test_what_is_no_plain_image_or_label_is_named(fast, images, labels, message):
    items = TensorDataset(images, labels)
    with pytest.raises(UsageError, match=f"^test {message}"):
        data.from_dataset(pairs(last), items if fast else Items(items), num_classes=4)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(pairs(last))


class Unmeasured(Dataset):
    def __getitem__(self, i):
        return LEVELS[i], 0


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "train has no items, must have one or more"),
        (pairs(last)[:9], "train has 9 items, must have 10 or more without a val"),
        (Endless(), "train is a Endless, must be a Dataset or sequence that has a length"),
        (Unmeasured(), "train is a Unmeasured, must be a Dataset or seq"),
        ((x for x in ()), "train is a generator, must be a Dataset or seq"),
        (None, "train is a NoneType, must be a Dataset or seq"),
        ([LEVELS[0]], "train item 0 is a Tensor, must be a pair"),
        ([(LEVELS[0], 1, 2)], "train item 0 is a tuple, must be a pair"),
        ([("a.png", 1)], "train item 0 has an image of str, must be of Pillow"),
        ([(LEVELS[0], "cat")], "train item 0 has the label 'cat', must be a whole number"),
        ([(LEVELS[0], True)], "train item 0 has the label True, must be a whole number"),
        ([(LEVELS[0], 10**6)], "train item 0 has the label 1000000, must be in 0..99999"),
        (
            [(LEVELS[0], 1), (LEVELS[0, :, 1:], 1)],
            r"train item 1 is \[3, 15, 16\], must be \[3, 16, 16\] as item 0 is; image_size res",
        ),
        (pairs(lambda x: x[:, :8, :8]), r"test images are \[3, 16, 16\] each, must be \[3, 8, 8\]"),
    ],
)
def test_what_is_no_data_set_is_named(items, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        data.from_dataset(items, pairs(last))


def test_reading_one_by_one_has_a_bar(terminal):
    items = Items(pairs(FORMS["Pillow"]))
    data.from_dataset(items, items)
    for text in ("read train", "read test"):
        assert f"{text}:   0%" in terminal.getvalue()


def test_a_reader_of_ones_own_may_use_it(monkeypatch):
    monkeypatch.setattr(data, "OWN", {})
    items = TensorDataset(LEVELS, LABELS)
    data.register("mine", lambda data_dir, seed: data.from_dataset(items, items, seed=seed))
    assert len(data.load("mine").train) == 11


def test_evaluation_takes_a_dataset():
    torch.manual_seed(0)
    model = models.get("digits_net", 4, 3, width=4).eval()
    stages = suite.stages(["clean", "fgsm"], 0.1, "linf")
    whole = data.ImageSet(LEVELS, LABELS, torch.arange(12))
    expected = evaluate.run(model, whole, stages)
    for items in (TensorDataset(LEVELS / 255, LABELS), Items(pairs(FORMS["Pillow"]))):
        record = evaluate.run(model, items, stages)
        for stage in stages:
            assert torch.equal(record.right(stage.name), expected.right(stage.name))
    accuracies = evaluate.accuracies(model, items, ["clean"], eps=0.1)
    assert accuracies == {"clean": expected.right("clean").double().mean().item()}
    with pytest.raises(UsageError, match="^split item 3 has the value 1.25, must be in"):
        evaluate.run(model, TensorDataset(bad(1.25), LABELS), stages)
