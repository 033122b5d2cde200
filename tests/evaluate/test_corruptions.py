"""Corrupted images as stages of an evaluation: read from the published folders, or made."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import Dropper
from torch import nn

from fastadv import UsageError, data, evaluate
from fastadv.attacks import suite
from fastadv.data.dataset import ImageSet
from fastadv.evaluate import Record, corruption_stages, corruptions, report, validity
from fastadv.evaluate.__main__ import main
from fastadv.evaluate.record import UNKNOWN
from fastadv.evaluate.severities import SEVERITIES
from fastadv.runs import checkpoint

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def arrays(npz, tmp_path_factory):
    """A folder in CIFAR-10-C's form of the 80 test images of `npz`."""
    folder = tmp_path_factory.mktemp("stripes-c")
    test, rng = data.load("npz", npz).test, np.random.default_rng(3)
    images = np.tile(test.images.permute(0, 2, 3, 1).numpy(), (5, 1, 1, 1))
    for name in SEVERITIES:
        noise = rng.normal(0, 15, images.shape) * (1 + np.arange(400) // 80).reshape(-1, 1, 1, 1)
        np.save(folder / f"{name}.npy", (images + noise).clip(0, 255).astype(np.uint8))
    np.save(folder / "labels.npy", np.tile(test.labels.numpy(), 5).astype(np.uint8))
    return folder


@pytest.fixture
def changed(arrays, tmp_path):
    """A copy of the folder, to be damaged."""
    for path in arrays.iterdir():
        (tmp_path / path.name).hardlink_to(path)

    def change(name, values, **options):
        (tmp_path / name).unlink()
        np.save(tmp_path / name, values, **options)

    change.folder = tmp_path
    return change


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder in ImageNet-C's form: two pictures of each of three classes, whose grey says which
    they are, and the set of clean images."""
    root = tmp_path_factory.mktemp("pictures-c")
    for i, (name, severity) in enumerate((n, s) for n in SEVERITIES for s in range(1, 6)):
        for j in range(6):
            path = root / name / str(severity) / CLASSES[j // 2] / f"val_{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 8), (3 * i, 40 * j, 7)).save(path)
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    return root, ImageSet(images, torch.arange(6) // 2, torch.arange(6))


def asked(stage, x, index):
    return stage(None, x, None, index)


def test_arrays_hold_the_test_set_five_times_over(npz, arrays):
    test = data.load("npz", npz).test
    stages = corruption_stages(test, arrays)
    assert len(stages) == 75
    assert stages[7].name == "corruptions:shot_noise-3"
    index = torch.tensor([5, 79, 0])
    found = asked(stages[7], test.images[index].double() / 255, index)
    whole = np.load(arrays / "shot_noise.npy")
    expected = whole[160 + index.numpy()].transpose(0, 3, 1, 2)
    assert found.dtype == torch.float64
    assert np.array_equal((found * 255).round().numpy(), expected)
    with pytest.raises(UsageError, match=r"index is 3 to 80, must be in \[0, 79\]: of the test"):
        asked(stages[7], test.images[:2].float(), torch.tensor([3, 80]))


def test_a_limit_takes_the_same_images_of_every_severity(npz, arrays, teacher, tmp_path, capsys):
    line = f"--checkpoint {teacher} --attacks corruptions --corruptions-dir {arrays} --limit 30"
    main([*line.split(), "--out", str(tmp_path)])
    text = capsys.readouterr().out
    (path,) = tmp_path.glob("*/report.json")
    found = json.loads(path.read_text())
    test, (model, _) = data.load("npz", npz).test, evaluate.from_run(teacher)
    chosen = test.sample(30)
    means = []
    for name in SEVERITIES:
        whole = torch.from_numpy(np.load(arrays / f"{name}.npy")).permute(0, 3, 1, 2)
        for severity in range(5):
            x = whole[80 * severity + chosen.index].float() / 255
            with torch.no_grad():
                right = (model(x).argmax(1) == chosen.labels).double().mean().item()
            assert found["corruptions"]["accuracy"][name][severity] == f"{100 * right:.2f}"
            means.append(right)
    assert found["corruptions"]["mean_error"] == f"{100 - 100 * np.mean(means):.2f}"
    assert found["corruptions"]["source"] == str(arrays)
    assert "mce" not in found["corruptions"]
    assert "robust_acc" not in found
    assert list(found["attacks"]) == ["clean"]
    assert found["max_perturbation"] == 0
    assert len({*found["corruptions"]["accuracy"]["fog"]}) > 1
    assert f"mean error {found['corruptions']['mean_error']}%" in text
    assert "severity 5" in text
    assert "fog" in path.with_name("report.html").read_text()
    with pytest.raises(
        UsageError, match="has an evaluation with corruptions_dir '.*', this one has None"
    ):
        main(f"--checkpoint {teacher} --attacks corruptions --limit 30 --out {tmp_path}".split())


def test_what_a_folder_lacks_is_named(npz, changed, folders):
    test = data.load("npz", npz).test
    for name in ("fog", "snow"):
        (changed.folder / f"{name}.npy").unlink()
    with pytest.raises(UsageError, match=r"lacks snow\.npy, fog\.npy: must have all fifteen"):
        corruption_stages(test, changed.folder)
    root, of_pictures = folders
    with pytest.raises(FileNotFoundError, match="corruptions_dir is .*nowhere', must be a folder"):
        corruption_stages(test, root / "nowhere")
    with pytest.raises(UsageError, match="lacks gaussian_noise, shot_noise, .*, jpeg_compression:"):
        corruption_stages(of_pictures, root / "fog" / "1" / "ant", CLASSES)


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        (
            "labels.npy",
            np.zeros(80, np.uint8),
            r"labels.npy is uint8 \[80\], must be integers \[400",
        ),
        ("labels.npy", np.zeros(400), r"labels.npy is float64 \[400\], must be integers \[400\]"),
        ("labels.npy", np.zeros(400, np.uint8), "labels.npy has other labels than the test images"),
        ("fog.npy", np.zeros((400, 8, 9, 1), np.uint8), r"fog.npy is uint8 \[400, 8, 9, 1\], must"),
        ("fog.npy", np.zeros((399, 8, 8, 1), np.uint8), r"must be uint8 \[400, 8, 8, 1\]: 5 for"),
        (
            "fog.npy",
            np.zeros((400, 8, 8, 1)),
            r"fog.npy is float64 \[400, 8, 8, 1\], must be uint8",
        ),
    ],
)
def test_arrays_of_other_images_are_refused(npz, changed, name, values, match):
    changed(name, values)
    with pytest.raises(UsageError, match=match):
        corruption_stages(data.load("npz", npz).test, changed.folder)


def test_damaged_and_pickled_arrays_are_refused(npz, changed):
    test = data.load("npz", npz).test
    whole = (changed.folder / "fog.npy").read_bytes()
    (changed.folder / "fog.npy").unlink()
    for content in (whole[:-1], whole[:20], b"", b"PK\x03\x04" + whole):
        (changed.folder / "fog.npy").write_bytes(content)
        with pytest.raises(UsageError, match=r"fog\.npy: not a readable \.npy of plain numbers"):
            corruption_stages(test, changed.folder)
    mark = changed.folder / "ran"
    changed("fog.npy", np.array([Dropper(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"fog\.npy: not a readable \.npy of plain numbers"):
        corruption_stages(test, changed.folder)
    assert not mark.exists()


def test_a_part_of_the_test_set_is_no_test_set(npz, arrays):
    test = data.load("npz", npz).test
    with pytest.raises(UsageError, match="test is not whole or not in the order as published"):
        corruption_stages(test.take(torch.arange(79, -1, -1)), arrays)
    with pytest.raises(UsageError, match=r"labels.npy is uint8 \[400\], must be integers \[395\]"):
        corruption_stages(test.take(torch.arange(79)), arrays)


def test_pictures_are_those_of_their_image(folders):
    root, test = folders
    stages = corruption_stages(test, root, CLASSES)
    assert len(stages) == 75
    index = torch.tensor([4, 0])
    found = (asked(stages[11], test.images[index].float(), index) * 255).round()
    assert found.shape == (2, 3, 8, 8)
    assert found[:, :, 3, 3].tolist() == [[33, 160, 7], [33, 0, 7]]
    assert all(stage.attack.reference is None for stage in stages)
    with pytest.raises(UsageError, match=r"index is -1 to 5, must be in \[0, 5\]"):
        asked(stages[11], test.images[:2].float(), torch.tensor([5, -1]))


def test_pictures_of_other_images_are_refused(folders, tmp_path):
    root, test = folders
    with pytest.raises(UsageError, match="1 has 3 folders, must have one for each class .* 0 with"):
        corruption_stages(test, root)
    fewer = test.take(torch.arange(5))
    with pytest.raises(UsageError, match="1 has 6 pictures, must have one for each of the 5 test"):
        corruption_stages(fewer, root, CLASSES)
    mixed = replace(test, labels=test.labels.flip(0))
    with pytest.raises(UsageError, match="6 test images, class by class"):
        corruption_stages(mixed, root, CLASSES)
    for name in SEVERITIES:
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "snow").unlink()
    (tmp_path / "snow" / "1").mkdir(parents=True)
    with pytest.raises(UsageError, match="lacks snow/2, snow/3, snow/4, snow/5: must have"):
        corruption_stages(test, tmp_path, CLASSES)


def test_a_broken_picture_is_named(folders, tmp_path):
    root, test = folders
    for name in SEVERITIES:
        (tmp_path / name).symlink_to(root / name)
    stages = corruption_stages(test, tmp_path, CLASSES)
    (tmp_path / "fog").unlink()
    broken = tmp_path / "fog" / "2" / "bee" / "val_2.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no picture")
    (fog,) = (stage for stage in stages if stage.name == "corruptions:fog-2")
    with pytest.raises(UsageError, match="bee/val_2.png: not a readable picture .Unidentified"):
        asked(fog, test.images[2:3].float(), torch.tensor([2]))
    with pytest.raises(UsageError, match="ant/val_0.png: not a readable picture .FileNotFound"):
        asked(fog, test.images[:1].float(), torch.tensor([0]))


def test_alexnets_errors_are_for_imagenets_classes(folders, tmp_path):
    classes = tuple(f"n{i:08d}" for i in range(1000))
    for name in SEVERITIES:
        for severity in range(1, 6):
            (tmp_path / name / str(severity)).mkdir(parents=True)
    for name in classes:
        folder = tmp_path / "gaussian_noise" / "1" / name
        folder.mkdir()
        (folder / "one.JPEG").touch()
    test = ImageSet(torch.zeros(1000, 3, 8, 8, dtype=torch.uint8), *[torch.arange(1000)] * 2)
    stages = corruption_stages(test, tmp_path, classes)
    assert stages[0].attack.reference == 0.886428
    assert stages[-1].attack.reference == 0.6065
    record = Record(1000)
    for stage in stages:  # one image in ten is right under all, under fog all are
        record.stage(stage.name)[0][:] = 1 if "fog" in stage.name else 2
        record.stage(stage.name)[0][::10] = 1
    rates = corruptions.by_corruption(record, stages)
    errors = [0.9 / e for name, e in corruptions.ALEXNET.items() if name != "fog"]
    assert corruptions.mce(rates, stages) == pytest.approx(sum(errors) / 15)
    assert corruptions.mean_accuracy(rates) == pytest.approx((14 * 0.1 + 1) / 15)
    assert f"mCE {100 * sum(errors) / 15:.2f}% of AlexNet's" in report.describe(record, stages)


class Thirds(nn.Module):
    """Says which third of the image is brightest."""

    def forward(self, x):
        return 9 * torch.stack([part.mean((1, 2, 3)) for part in x.chunk(3, 3)], 1)


@pytest.fixture
def thirds():
    """48 noisy images of three classes, each known by a lighter third."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (48, 1, 12, 12), generator=generator)
    labels = torch.arange(48) % 3
    for image, label in zip(images, labels, strict=True):
        image[:, :, 4 * label : 4 * label + 4] += 20
    return ImageSet(images.to(torch.uint8), labels, torch.arange(48))


def test_corrupted_images_are_the_same_in_any_batch_and_after_a_stop(thirds, tmp_path):
    stages = [suite.single("clean", 0.1), *corruption_stages(thirds)]
    assert {stage.attack.name for stage in stages[1:]} == {
        name for name in SEVERITIES if name not in ("motion_blur", "zoom_blur", "snow")
    }
    whole = evaluate.run(Thirds(), thirds, stages)
    cut = Record(48, folder=tmp_path)
    evaluate.run(Thirds(), thirds, stages[:9], batch_size=7, record=cut)
    cut.verdicts[stages[5].name][20:] = UNKNOWN
    cut.save(force=True)
    again = Record(48, folder=tmp_path)
    evaluate.run(Thirds(), thirds, stages, batch_size=11, record=again)
    for stage in stages:
        assert torch.equal(whole.right(stage.name), again.right(stage.name)), stage.name
        for a, b in zip(whole.outputs(stage.name), again.outputs(stage.name), strict=True):
            assert torch.equal(a, b) or torch.allclose(a, b, atol=1e-6)
    part = thirds.take(torch.tensor([40, 3, 17]))
    some = evaluate.run(Thirds(), part, stages)
    assert some.right("corruptions:shot_noise-5").tolist() == [
        whole.right("corruptions:shot_noise-5")[i].item() for i in (40, 3, 17)
    ]
    other = evaluate.run(Thirds(), thirds, stages, seed=1)
    names = [stage.name for stage in stages if "noise" in stage.name]
    assert any(not torch.equal(whole.right(n), other.right(n)) for n in names)
    assert not torch.equal(*(whole.right(f"corruptions:contrast-{i}").float() + i for i in (1, 5)))


def test_no_attack_counts_corruptions_and_they_no_attack(thirds):
    """Not in the worst case, the examples or the warnings, and none is searched for."""
    examples = thirds.images.float().numpy() / 255
    record = Record(48, examples=examples.copy())
    attacks = suite.stages("fgsm", 0.001)
    stages = [*corruption_stages(thirds), *attacks]
    evaluate.run(Thirds(), thirds, stages, record=record)
    assert np.abs(record.examples - examples).max() <= 0.001 + 1e-6
    assert (record.examples != examples).any()  # whichever stage was first
    rates = evaluate.rates(record, stages)
    assert list(rates) == ["fgsm", "worst case", "corruptions"]
    assert rates["worst case"] == rates["fgsm"] > rates["corruptions"] + 0.05
    assert record.costs["corruptions:fog-5"].backwards == 0
    assert record.costs["corruptions:fog-5"].forwards == 48  # the model alone is asked
    assert validity.review(record, stages) == []
    assert len(validity.review(record, attacks)) == 0
    assert not stages[0].by_gradient
    with pytest.raises(ValueError, match="attack is 'corruptions', must be one of"):
        suite.stages("corruptions", 0.1)


def test_what_is_too_small_is_left_out_and_said(teacher, capsys):
    main(f"--checkpoint {teacher} --attacks corruptions --limit 5".split())
    text = capsys.readouterr().out
    assert "warning: motion_blur, zoom_blur, snow left out of the corruptions: they need 16" in text
    large = replace_images((3, 16, 16))
    assert len(corruption_stages(large)) == 75
    assert corruptions.left_out(corruption_stages(large)) == []
    with pytest.raises(UsageError, match=r"images are \[3, 4, 9\], must be"):
        corruption_stages(replace_images((3, 4, 9)))


def replace_images(shape):
    return ImageSet(torch.zeros(1, *shape, dtype=torch.uint8), *[torch.arange(1)] * 2)


def test_flags_that_do_not_go_together(teacher, arrays):
    line = ["--checkpoint", str(teacher), "--corruptions-dir", str(arrays)]
    for extra, match in [
        (
            ["--attacks", "clean"],
            "--corruptions-dir is given, --attacks must then have corruptions",
        ),
        (["--attacks", "corruptions", "--split", "val"], "--split is val, must be test with"),
    ]:
        with pytest.raises(UsageError, match=match):
            main([*line, *extra])


def test_an_evaluation_that_was_begun_without_predictions_goes_on(teacher, tmp_path):
    line = f"--checkpoint {teacher} --attacks pgd20 --limit 20 --out {tmp_path}".split()
    main(line)
    (path,) = tmp_path.glob("*/report.json")
    assert {"confusion", "calibration"} <= json.loads(path.read_text()).keys()
    state = path.with_name("state.safetensors")
    tensors, metadata = checkpoint.load(state)
    assert {name.partition("/")[2] for name in tensors} == {"", "predicted", "confidence"}
    old = {name: values for name, values in tensors.items() if "/" not in name}
    old["pgd20"][10:] = UNKNOWN
    checkpoint.save(state, old, metadata)
    before = json.loads(path.read_text())
    main(line)
    after = json.loads(path.read_text())
    assert after["robust_acc"] == before["robust_acc"]
    assert not {"confusion", "calibration"} & after.keys()
    assert "Confusion" not in path.with_name("report.html").read_text()
