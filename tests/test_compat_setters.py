"""The setters of torchattacks, and its files. What torchattacks 3.5.1 does is written out here in
plain torch."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastadv import compat, freeze

EPS = 8 / 255
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
KINDS = {
    "FGSM": lambda model: compat.FGSM(model),
    "PGD": lambda model: compat.PGD(model, steps=4, random_start=False),
    "PGDL2": lambda model: compat.PGDL2(model, steps=4, random_start=False),
}
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.3), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(288, 6))
    net(X)
    with torch.no_grad():
        net[-1].bias -= net.eval()(X).mean(0)
    return net


@pytest.fixture
def labels(model):
    with torch.no_grad():
        return model(X).argmax(1)


def descent(kind, net, x, y, sign):
    """The attack `kind` from x: ascends sign times the cross-entropy to y."""
    eps, alpha, steps = {
        "FGSM": (EPS, EPS, 1),
        "PGD": (EPS, 2 / 255, 4),
        "PGDL2": (1.0, 0.2, 4),
    }[kind]
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(sign * F.cross_entropy(net(x_adv), y), x_adv)
        if kind == "PGDL2":
            grad = grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = x_adv.detach() + alpha * grad - x
            delta = delta * (eps / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        else:
            delta = (x_adv.detach() + alpha * grad.sign() - x).clamp(-eps, eps)
        x_adv = (x + delta).clamp(0, 1).detach()
    return x_adv


def close(a, b):
    """Whether all but a few pixels, whose gradient is 0 up to rounding, agree."""
    return a.dtype == b.dtype and (a - b).abs().gt(1e-5).double().mean() < 0.005


def least_likely(net, x, labels, kth):
    """Sample by sample: the class with the kth smallest logit among the others."""
    targets = []
    for row, label in zip(net(x), labels.tolist(), strict=True):
        others = [c for c in range(6) if c != label]
        targets.append(others[row[others].argsort()[kth - 1]])
    return torch.tensor(targets)


@each
def test_targeted_attacks_descend_the_loss_to_the_targets(model, labels, kind, capsys):
    attack = KINDS[kind](model)
    chosen = (labels + 2) % 6
    assert close(attack(X, labels), descent(kind, model, X, labels, 1))
    for name, set_mode, given, targets in (
        ("label", lambda: attack.set_mode_targeted_by_label(), chosen, chosen),
        ("label", lambda: attack.set_mode_targeted_by_label(), labels, labels),
        (
            "custom",
            lambda: attack.set_mode_targeted_by_function(lambda images, y: (y + 2) % 6),
            labels,
            chosen,
        ),
        (
            "least-likely",
            lambda: attack.set_mode_targeted_least_likely(),
            labels,
            least_likely(model, X, labels, 1),
        ),
        (
            "least-likely",
            lambda: attack.set_mode_targeted_least_likely(kth_min=3),
            labels,
            least_likely(model, X, labels, 3),
        ),
    ):
        set_mode()
        assert capsys.readouterr().out == f"Attack mode is changed to 'targeted({name})'.\n"
        assert (attack.get_mode(), attack.targeted) == (f"targeted({name})", True)
        assert close(attack(X, given), descent(kind, model, X, targets, -1))
    attack.set_mode_default()
    assert capsys.readouterr().out == "Attack mode is changed to 'default.'\n"
    assert (attack.get_mode(), attack.targeted) == ("default", False)
    assert close(attack(X, labels), descent(kind, model, X, labels, 1))


def test_random_targets_are_torchattacks_own_draws(model, labels, capsys):
    attack = KINDS["PGD"](model)
    attack.set_mode_targeted_random(quiet=True)
    assert capsys.readouterr().out == ""
    torch.manual_seed(7)
    found = attack(X, labels)
    torch.manual_seed(7)
    targets = []
    for label in labels.tolist():
        others = [c for c in range(6) if c != label]
        targets.append(others[int(len(others) * torch.rand(1))])
    assert close(found, descent("PGD", model, X, torch.tensor(targets), -1))
    assert len({(t - y) % 6 for t, y in zip(targets, labels.tolist(), strict=True)}) > 2


def test_functions_of_targets_get_images(model, labels):
    attack, seen = KINDS["PGD"](model), []
    attack.set_normalization_used(MEAN, STD)
    attack.set_mode_targeted_by_function(lambda *given: seen.append(given) or labels, quiet=True)
    attack(attack.normalize(X), labels)
    ((images, given),) = seen
    torch.testing.assert_close(images, X, rtol=0, atol=1e-6)
    assert images.min() >= 0
    assert torch.equal(given, labels)


@each
@pytest.mark.parametrize("targeted", [False, True])
def test_normalised_inputs_are_attacked_as_images(model, labels, kind, targeted):
    """eps is one of images; the model gets normalised ones."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = X.clone()
    x[:, :, :2] = x[:, :, :2].round()  # black and white pixels leave the box by a rounding

    def net(images):
        return model((images - mean) / std)

    for given in ((MEAN, STD), (np.array(MEAN), np.array(STD)), (mean, std)):
        attack = KINDS[kind](model)
        attack.set_normalization_used(*given)
        if targeted:
            attack.set_mode_targeted_least_likely(quiet=True)
        found = attack((x - mean) / std, labels)
        target = least_likely(net, x, labels, 1) if targeted else labels
        expected = descent(kind, net, x, target, -1 if targeted else 1)
        assert close(found * std + mean, expected)
        assert not close(found * std + mean, x)
    assert attack((x - mean) / std, labels).dtype == torch.float32
    assert attack(((x - mean) / std).double(), labels).dtype == torch.float64


@pytest.mark.parametrize(
    "training", [(), (True,), (True, True), (True, False, True), (True, True, True), (False, True)]
)
@pytest.mark.parametrize("given", [False, True])
def test_training_mode_is_of_the_call(model, labels, training, given):
    """Modules whose names say BatchNorm or Dropout train only if told to; all modes come back."""
    model.train(given)
    model[1].eval()
    before, seen, mean = [m.training for m in model.modules()], [], model[1].running_mean.clone()
    model.register_forward_hook(lambda *_: seen.append([m.training for m in model.modules()]))
    attack = KINDS["PGD"](model)
    attack.set_mode_targeted_least_likely(quiet=True)
    attack.set_model_training_mode(*training)
    attack(X, labels)
    whole, norm, drop = (*training, False, False, False)[:3]
    during = [whole] * 2 + [whole and norm, whole, whole and drop] + [whole] * 2
    assert seen == [[False] * 7] + [during] * 4  # targets are those of the model in eval mode
    assert [m.training for m in model.modules()] == before
    assert torch.equal(model[1].running_mean, mean) != (whole and norm)


def test_modes_come_back_after_an_exception(model, labels):
    model.train()
    attack = KINDS["PGD"](model)
    with pytest.raises(ValueError, match="y has labels from"):
        attack(X, labels + 6)
    assert all(module.training for module in model.modules())


def test_attributes_are_those_of_torchattacks(model):
    shared = "device=cpu, attack_mode=default, targeted=False, normalization_used=False"
    attack = compat.PGD(model, eps=0.25, alpha=0.0625, steps=3)
    end = "eps=0.25, alpha=0.0625, steps=3, random_start=True)"
    assert repr(attack) == f"PGD(model_name=Sequential, {shared}, {end}"
    attack.set_normalization_used(MEAN, STD)
    assert "normalization_used=True" in repr(attack)
    end = "eps=0.5, steps=10, norm=Linf, n_restarts=1, seed=0, loss=ce, eot_iter=1, thr_decr=0.75"
    apgd = compat.APGD(model, eps=0.5)
    assert repr(apgd) == f"APGD(model_name=Sequential, {shared}, {end}, verbose=False)"
    attack.eps = 0.125
    assert attack.attack.eps == 0.125
    attack.set_model(nn.Flatten())
    assert attack.model_name == "Flatten"


def test_twins_are_brought_up_to_date(model, labels):
    twin = freeze(model.eval())
    with torch.no_grad():
        model[0].weight.neg_()
    a, b = (KINDS["PGD"](net)(X, labels) for net in (model, twin))
    assert close(a, b)


def test_ints_are_pixels(model, labels):
    attack = KINDS["PGD"](model)
    expected = (attack(X, labels) * 255).to(torch.uint8)
    attack.set_return_type("int")
    assert torch.equal(attack(X, labels), expected)
    attack.set_return_type("float")
    assert attack(X, labels).dtype == torch.float32
    assert torch.equal(attack.to_type(expected, "float"), expected / 255)
    assert attack.to_type(X, "float") is X
    plain = compat.PGD(nn.Sequential(Normalise(), model), steps=4, random_start=False)
    expected = (plain(X, labels) * 255).to(torch.uint8)
    attack.set_normalization_used(MEAN, STD)
    attack.set_return_type("int")
    found = attack(attack.normalize(X), labels)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).double().mean() < 0.02


class Normalise(nn.Module):
    def forward(self, x):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (x - mean) / std


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", ["float", "int"])
def test_files_hold_what_was_found(model, labels, tmp_path, capsys, normalised, kind):
    attack, path = KINDS["PGD"](model), tmp_path / "adv.pt"
    if normalised:
        attack.set_normalization_used(MEAN, STD)
    inputs = attack.normalize(X) if normalised else X
    labels[0] = (labels[0] + 1) % 6
    expected = attack(inputs, labels)
    with torch.no_grad():
        preds = model(expected).argmax(1)
    attack.set_return_type("int")  # which is not for files
    wanted = {"save_predictions": True, "save_clean_inputs": True, "save_type": kind}
    loader = DataLoader(TensorDataset(inputs, labels), 5)
    model.train()  # predictions are those of eval mode
    told = attack.save(loader, path, return_verbose=True, **wanted)
    assert all(module.training for module in model.modules())
    wrong = preds != labels
    assert told[0] == pytest.approx(100 * (1 - wrong.double().mean().item()))
    distance = (expected - inputs)[wrong].flatten(1).norm(dim=1).mean().item()
    assert told[1] == pytest.approx(distance, rel=1e-5)
    lines = capsys.readouterr().out.split("\r")
    assert len(lines) == 4
    share = f"Robust accuracy: {told[0]:.2f} % / L2: {told[1]:.5f} "
    assert lines[2].startswith(f"- Save progress: 100.00 % / {share}")
    normalize = {"mean": MEAN, "std": STD} if normalised else None
    both = {"load_predictions": True, "load_clean_inputs": True}
    loader = attack.load(path, batch_size=7, normalize=normalize, **both)
    assert "order: [adv_inputs, labels, preds, clean_inputs]" in capsys.readouterr().out
    assert [len(batch[0]) for batch in loader] == [7, 5]
    found = [torch.cat(column) for column in zip(*loader, strict=True)]
    tolerance = (1 / 255 if kind == "int" else 1e-6) / (min(STD) if normalised else 1) + 1e-6
    for value, right in zip(found, (expected, labels, preds, inputs), strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=tolerance)
    raw = torch.load(path, weights_only=True)
    assert raw["save_type"] == kind
    assert raw["adv_inputs"].dtype == (torch.uint8 if kind == "int" else torch.float32)
    level = 255 if kind == "int" else 1
    torch.testing.assert_close(raw["clean_inputs"] / level, X, rtol=0, atol=1.001 / 255)


def test_files_hold_no_more_than_was_asked(model, labels, tmp_path, capsys):
    attack, path = KINDS["FGSM"](model), tmp_path / "adv.pt"
    loader = DataLoader(TensorDataset(X, labels), 6)
    assert attack.save(loader, path, verbose=False) is None
    assert attack.save(loader, verbose=False) is None
    assert capsys.readouterr().out == ""
    assert torch.load(path, weights_only=True).keys() == {"adv_inputs", "labels", "save_type"}
    assert [len(batch) for batch in attack.load(path, 12)] == [2]
    torch.manual_seed(0)
    ((x_adv, _),) = attack.load(path, 12, shuffle=True)
    assert not torch.equal(x_adv, attack(X, labels))
    with pytest.raises(ValueError, match=r"adv.pt has no preds: save had not been told to"):
        attack.load(path, load_predictions=True)


def test_files_that_would_run_code_are_refused(tmp_path):
    torch.save({"adv_inputs": X, "labels": Normalise()}, tmp_path / "adv.pt")
    with pytest.raises(pickle.UnpicklingError):
        compat.PGD.load(tmp_path / "adv.pt")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda a: a.set_mode_targeted_by_function(None), TypeError, "target_map_function is None"),
        (lambda a: a.set_mode_targeted_least_likely(0), ValueError, "kth_min is 0, must be at lea"),
        (lambda a: a.set_mode_targeted_least_likely(1.5), TypeError, "kth_min is 1.5, must be a w"),
        (lambda a: a.set_normalization_used(MEAN, STD[:2]), ValueError, "mean has 3 and std 2 num"),
        (lambda a: a.set_normalization_used(MEAN, [0, 1, 1]), ValueError, r"std is \[0, 1, 1\]"),
        (lambda a: a.set_normalization_used("a", STD), TypeError, "mean is 'a', must be one numb"),
        (lambda a: a.set_return_type("uint8"), ValueError, "type is 'uint8', must be one of float"),
        (lambda a: a.save([], save_type="png"), ValueError, "save_type is 'png', must be one of f"),
        (lambda a: a.save([]), ValueError, "data_loader has no batches"),
        (lambda a: a(X), TypeError, "labels is None, must be a tensor"),
        (lambda a: a(X * 2 - 1, Y), ValueError, r"inputs is in \[-.*, 0.99.*\], must be in \[0, 1"),
        (lambda a: a(X * torch.nan, Y), ValueError, r"inputs is in \[nan, nan\], must be in"),
    ],
)
def test_wrong_settings_are_named(model, call, error, match):
    with pytest.raises(error, match=match):
        call(compat.PGD(model))


Y = torch.zeros(12, dtype=torch.int64)


def test_wrong_calls_are_named(model, labels):
    attack = compat.PGD(model)
    attack.set_normalization_used(MEAN, STD)
    with pytest.raises(ValueError, match=r"inputs is in .* where the normalisation is undone, mus"):
        attack(4 * X, labels)
    attack = compat.PGD(model)
    attack.set_mode_targeted_least_likely(kth_min=6, quiet=True)
    with pytest.raises(ValueError, match="kth_min is 6, must be at most 5"):
        attack(X, labels)
    with pytest.raises(ValueError, match="labels has labels from 6 to 6, must be in"):
        attack(X, Y + 6)
    attack.set_mode_targeted_by_function(lambda images, y: y + 6, quiet=True)
    with pytest.raises(ValueError, match=r"target has labels from .* must be in \[0, 5\]"):
        attack(X, labels)


def test_apgd_has_no_targets(model):
    with pytest.raises(ValueError, match="APGD has no targeted mode in torchattacks"):
        compat.APGD(model).set_mode_targeted_by_label()


SCRIPT = """
import torch
import torchattacks

atk = torchattacks.PGD(model, eps=8/255, alpha=2/255, steps=4)
print(atk)
adv_images = atk(images, labels)

# Inputs that are normalised.
atk = torchattacks.PGD(model, eps=8/255, alpha=2/255, steps=4, random_start=True)
atk.set_normalization_used(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
normalised = atk(atk.normalize(images), labels)
pixels = atk.inverse_normalize(normalised)

# Targeted mode.
atk = torchattacks.PGD(model, eps=8/255, alpha=2/255, steps=4)
atk.set_mode_targeted_random()
random = atk(images, labels)
atk.set_mode_targeted_least_likely(kth_min=1)
least = atk(images, labels)
atk.set_mode_targeted_by_function(target_map_function=lambda images, labels: (labels + 1) % 6)
custom = atk(images, labels)
atk.set_mode_targeted_by_label()
chosen = atk(images, (labels + 1) % 6)
atk.set_mode_default()

# Files.
atk.save(data_loader=loader, save_path=path, verbose=True)
adv_loader = atk.load(load_path=path)
robust, l2, seconds = atk.save(data_loader=loader, return_verbose=True)

# Train mode during the attack.
atk.set_model_training_mode(model_training=False, batchnorm_training=False, dropout_training=False)
others = [
    torchattacks.FGSM(model, eps=8/255)(images, labels),
    torchattacks.PGDL2(model, eps=1.0, alpha=0.2, steps=4, random_start=True)(images, labels),
    torchattacks.APGD(model, norm="Linf", eps=8/255, steps=4, n_restarts=1, seed=0)(images, labels),
]
"""


def test_a_script_runs_with_another_import(model, labels, tmp_path):
    script = SCRIPT.replace("import torchattacks", "from fastadv import compat as torchattacks")
    loader = DataLoader(TensorDataset(X, labels), 6)
    found = {"model": model, "images": X, "labels": labels, "loader": loader}
    found["path"] = tmp_path / "adv.pt"
    exec(script, found)
    for name in ("adv_images", "pixels", "random", "least", "custom", "chosen"):
        moved = (found[name] - X).abs()
        assert moved.max() <= EPS + 1e-6, name
        assert moved.flatten(1).amax(1).min() > 1 / 255, name
    ((x_adv, y),) = found["adv_loader"]
    assert torch.equal(y, labels)
    assert (x_adv - X).abs().max() <= EPS + 1e-6
    assert 0 <= found["robust"] < 100
    assert found["l2"] > 0
    assert all((x_adv != X).any() for x_adv in found["others"])
