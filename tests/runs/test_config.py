"""What a Config refuses, what it doubts, and what it reads on any machine."""

import dataclasses
import json
import math
import warnings

import pytest
from small_runs import config

from fastadv.runs.config import Config
from fastadv.runs.config import device as usable
from fastadv.runs.rules import RULES
from fastadv.train import train

WRONG = {
    "eps": [0, True, -0.1, math.inf, math.nan, "8/255", None],
    "step_size": [0, -0.1, math.inf, math.nan],
    "lr": [0, True, -0.1, math.inf, math.nan, "0.1", None],
    "clip_grad": [0, -1, math.inf, math.nan],
    "weight_decay": [-1e-4, math.inf, math.nan, None],
    "awp_gamma": [-0.01, math.inf, math.nan],
    "momentum": [1, 1.5, -0.1, math.nan],
    "ema": [1, 1.0, -0.1, math.nan],
    "epochs": [0, -1, 2.5, "3", True, None],
    "batch_size": [0, 1.5],
    "student_width": [0, 4.0],
    "image_size": [0, 1.5, True],
    "eval_every": [0, -1],
    "steps": [-1, 2.5],
    "swa_start": [-1, 0.5],
    "awp_warmup": [-1, 0.5],
    "seed": [-1, 0.5, None, 2**63],
    "save_every": (0, -1, math.inf, math.nan),
    "warmup": (-1, math.inf, math.nan),
    "accumulate": (0, -1, 1.5, True),
    "patience": (0, -1, 1.5),
    "train_images": (0, -1, 1.5, True),
    "extra_fraction": (0, 1, 1.5, -0.1, math.nan, "0.7"),
}


def test_every_number_has_a_rule():
    kinds = {int, float, int | None, float | None}
    numbers = {field.name for field in dataclasses.fields(Config) if field.type in kinds}
    augmentation = {"randaugment_n", "randaugment_m", "crop_scale", "cutout", "mixup", "cutmix"}
    assert numbers - augmentation - {"views_per_image"} == RULES.keys() == WRONG.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_numbers_that_no_run_can_have(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, must be "):
        Config(**{name: value})


def test_numbers_are_said_to_be_numbers():
    for name, value in (("eps", "8/255"), ("lr", None), ("epochs", "3"), ("seed", True)):
        with pytest.raises(ValueError, match=f"^{name} is {value!r}, must be a number, "):
            Config(**{name: value})
    with pytest.raises(ValueError, match=r"^eps is 8, must be in \(0, 1\] .did you mean 8/255"):
        Config(eps=8)


def test_the_least_numbers_are_taken():
    least = dict.fromkeys(("epochs", "batch_size", "student_width", "eval_every"), 1)
    least |= dict.fromkeys(("steps", "swa_start", "awp_warmup", "seed"), 0)
    least |= dict.fromkeys(("eps", "step_size", "lr", "clip_grad"), 1e-9)
    least |= dict.fromkeys(("weight_decay", "awp_gamma", "momentum"), 0)
    made = Config(**least, milestones=())
    assert {name: getattr(made, name) for name in least} == least
    assert Config(ema=0).ema == 0
    assert Config(seed=2**63 - 1).seed == 2**63 - 1
    assert Config(eps=0.4).step_size == pytest.approx(0.1)


@pytest.mark.parametrize(
    "milestones",
    [(150, 100), (100, 100), (-5,), (0, 10), (0,), (1.5,), ("1", "2"), (True,), 3, "12"],
)
def test_milestones_that_are_no_order_of_epochs(milestones):
    with pytest.raises(
        ValueError, match="milestones is .*, must be whole numbers of epochs from 1"
    ):
        Config(milestones=milestones)


@pytest.mark.parametrize("milestones", [(), (1,), [1, 2, 3], (199,)])
def test_milestones_in_order(milestones):
    assert Config(milestones=milestones).milestones == tuple(milestones)


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", 5), ("data", None), ("out", 3), ("teacher", False), ("method_options", [])],
)
def test_text_is_text(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*, must be (text|an object of options)"):
        Config(**{name: value})


def test_paths_are_taken_as_such(tmp_path):
    made = Config(data_dir=tmp_path / "a", out=tmp_path / "b", teacher_cache=tmp_path)
    assert (made.data_dir, made.out) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert Config.from_json(made.to_json()) == made


def test_digits_have_no_folder():
    with pytest.raises(ValueError, match="data_dir is 'x', but digits come with scikit-learn"):
        Config(data="digits", data_dir="x")


def test_what_a_run_hardly_means(npz, tmp_path):
    """Said when it trains, and not where its record is read."""
    small = {"epochs": 2, "milestones": (1, 2, 5), "batch_size": 145, "step_size": 0.05}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        doubtful = config(npz, tmp_path / "run", **small)
        Config.from_json(doubtful.to_json())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(doubtful)
    said = [str(one.message) for one in caught if one.category is UserWarning]
    assert said == [
        "milestones has 2, 5, which 2 epochs do not reach: lr does not drop there",
        "batch_size is 145, more than the 144 training images: an epoch is one step",
    ]
    full = {"step_size": 0.05}
    assert list(config(npz, tmp_path, batch_size=11, **full).doubts(144)) == [
        "batch_size is 11, which leaves one of 144 images for the last batch: BatchNorm has little "
        "or nothing to take statistics of"
    ]
    assert not list(config(npz, tmp_path, batch_size=1, **full).doubts(144))
    assert list(config(npz, tmp_path, eps=0.2, step_size=None, steps=2).doubts(144)) == [
        "steps is 2 and step_size 0.05, which together move a pixel by 0.1 of eps 0.2: "
        "give more or larger steps"
    ]
    assert not list(config(npz, tmp_path, eps=0.7, step_size=None, steps=4).doubts(144))
    assert list(Config(epochs=30, milestones=(15, 30)).doubts(1280)) == [
        "milestones has 30, which 30 epochs do not reach: lr does not drop there; give earlier "
        "ones, such as 15,22"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(config(npz, tmp_path / "fine", epochs=2, milestones=(1,), batch_size=144, **full))


def test_a_record_from_elsewhere_is_read():
    """A Config is read by evaluation, export and students: it needs nothing of its machine."""
    saved = json.loads(Config().to_json())
    places = {"device": "cuda:99", "data_dir": "/gone", "teacher_cache": "/gone/too"}
    read = Config.from_json(json.dumps(saved | places | {"clean_teacher_checkpoint": "/no.pt"}))
    assert {name: getattr(read, name) for name in places} == places
    assert read.clean_teacher_checkpoint == "/no.pt"


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", ""])
def test_a_device_is_one_that_computes(name):
    with pytest.raises(ValueError, match=f"device is '{name}', which cannot be used here \\(") as e:
        usable(name)
    assert "\n" not in str(e.value)
    assert str(e.value).endswith("): give another, such as cpu")
    assert usable("cpu").type == "cpu"
