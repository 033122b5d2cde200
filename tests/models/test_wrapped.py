"""Weight files of networks in their wrappers: what a user has saved is what is loaded."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastadv import models

MEAN, STD = torch.tensor([0.1, 0.5, 0.4]), torch.tensor([0.2, 0.3, 0.25])


def net():
    """With weights and statistics of its own."""
    torch.manual_seed(0)
    result = models.get("resnet18", num_classes=7, width=4)
    for _ in range(2):
        result(torch.rand(16, 3, 8, 8))
    return result.eval()


class Normalize(nn.Module):
    def __init__(self, names=("mean", "std"), shape=(3, 1, 1)):
        super().__init__()
        self.names = names
        for name, value in zip(names, (MEAN, STD), strict=True):
            self.register_buffer(name, value.view(shape))

    def forward(self, x):
        mean, std = (getattr(self, name).view(3, 1, 1) for name in self.names)
        return (x - mean) / std


class Attacker(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.normalize, self.model = Normalize(("new_mean", "new_std")), model


class AttackerModel(nn.Module):
    """As in MadryLab's robustness: the network stands in it twice."""

    def __init__(self, model):
        super().__init__()
        self.normalizer = Normalize(("new_mean", "new_std"))
        self.model, self.attacker = model, Attacker(model)

    def forward(self, x):
        return self.model(self.normalizer(x))


class Lightning(nn.Module):
    """A network and the average of its weights side by side."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.ema_model = AveragedModel(models.get("resnet18", num_classes=7, width=4))

    def forward(self, x):
        return self.model(x)


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled, then parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "parallel, then compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "averaged": AveragedModel,
    "lightning": Lightning,
    "MadryLab": AttackerModel,
    "MadryLab, parallel": lambda model: nn.DataParallel(AttackerModel(model)),
    "first layer": lambda model: nn.Sequential(Normalize(), model),
    "first layer [C]": lambda model: nn.Sequential(Normalize(shape=(3,)), model),
    "first layer [1, C, 1, 1]": lambda model: nn.Sequential(Normalize(shape=(1, 3, 1, 1)), model),
    "first layer, mu": lambda model: nn.Sequential(Normalize(("mu", "sigma")), model),
    "first layer, parallel": lambda model: nn.DataParallel(nn.Sequential(Normalize(), model)),
    "parallel behind a layer": lambda model: nn.Sequential(Normalize(), nn.DataParallel(model)),
    "compiled with its layer": lambda model: torch.compile(nn.Sequential(Normalize(), model)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_network_in_a_wrapper_is_found(tmp_path, kind):
    x = torch.rand(4, 3, 8, 8)
    bare = net()
    wrapped = WRAPPERS[kind](bare)
    torch.save({"state_dict": wrapped.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    normal = any(isinstance(module, Normalize) for module in wrapped.modules())
    expected = bare(Normalize()(x)) if normal else bare(x)
    loaded = models.load("resnet18", tmp_path / "a.pt", 7, 3, 4)
    assert isinstance(loaded, models.Normalized) == normal
    torch.testing.assert_close(loaded(x), expected)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_takes_what_it_has_saved(tmp_path, kind):
    """Statistics and copies included: nothing is renamed or dropped where all fits as it is."""
    wrapped = WRAPPERS[kind](net())
    torch.save(wrapped.state_dict(), tmp_path / "a.pt")
    other = WRAPPERS[kind](models.get("resnet18", num_classes=7, width=4))
    for buffer in other.buffers():
        buffer.zero_()
    models.load_weights(other, tmp_path / "a.pt")
    theirs, ours = wrapped.state_dict(), other.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_wrapper_takes_the_file_of_another_around_it(tmp_path):
    wrapped = nn.Sequential(Normalize(), net())
    torch.save(nn.DataParallel(wrapped).state_dict(), tmp_path / "a.pt")
    other = nn.Sequential(Normalize(), models.get("resnet18", num_classes=7, width=4))
    models.load_weights(other, tmp_path / "a.pt")
    assert torch.equal(other.state_dict()["1.conv1.weight"], wrapped[1].conv1.weight)


def test_a_network_behind_a_layer_that_the_file_lacks_is_refused(tmp_path):
    """The statistics may be anything: such as those of a layer that keeps them in plain tensors."""
    torch.save(nn.Sequential(nn.Identity(), net()).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"does not fit this ResNet: missing .*unexpected 1\.bn1"):
        models.load("resnet18", tmp_path / "a.pt", 7, 3, 4)
    weights = nn.Sequential(Normalize(), net()).state_dict()
    del weights["0.std"]
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"statistics of its input, but no 0\.std"):
        models.load("resnet18", tmp_path / "a.pt", 7, 3, 4)


@pytest.mark.parametrize("names", [("mean", "std"), ("0.mean", "0.std")])
def test_statistics_that_are_one_number_many_times(tmp_path, names):
    """An expanded tensor is small in a file and is not unfolded before its size is known."""
    huge = torch.ones(1).expand(2**40)
    prefix = "1." if "." in names[0] else ""
    weights = {f"{prefix}{k}": v for k, v in net().state_dict().items()}
    torch.save(weights | dict.fromkeys(names, huge), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 1e6
    with pytest.raises(ValueError, match=f"normalises images of {2**40} channels, .* takes 3"):
        models.load("resnet18", tmp_path / "a.pt", 7, 3, 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_that_are_whole_numbers_are_refused(tmp_path, dtype):
    weights = net().state_dict()
    weights["linear.weight"] = weights["linear.weight"].to(dtype)
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"of another kind linear\.weight \({dtype}\)"):
        models.load("resnet18", tmp_path / "a.pt", 7, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_taken(tmp_path, dtype):
    bare = net()
    weights = {k: v.to(dtype) for k, v in bare.state_dict().items()}
    torch.save(weights, tmp_path / "a.pt")
    loaded = models.load("resnet18", tmp_path / "a.pt", 7, 3, 4)
    torch.testing.assert_close(loaded.conv1.weight, bare.conv1.weight, rtol=1e-2, atol=1e-2)
    assert loaded.conv1.weight.dtype == torch.float32
