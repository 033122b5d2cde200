"""Adversarial inputs normalised, as whole numbers, and in files that torchattacks reads too."""

import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from ..attacks import checks
from ..engine.query import ask, evaluating

TYPES = ("float", "int")


def statistics(mean, std):
    """{"mean", "std"} of normalised inputs as tensors [1, C, 1, 1]. Raises TypeError or ValueError
    unless both have one number per channel, positive ones in std."""
    found = {}
    for name, values in (("mean", mean), ("std", std)):
        try:
            numbers = torch.as_tensor(values, dtype=torch.get_default_dtype())
        except (TypeError, ValueError, RuntimeError):
            given = checks.described(values)
            raise TypeError(f"{name} is {given}, must be one number per channel") from None
        found[name] = numbers.detach().cpu().reshape(1, -1, 1, 1)
    if found["mean"].shape != found["std"].shape:
        counts = " and std ".join(str(v.numel()) for v in found.values())
        raise ValueError(f"mean has {counts} numbers, must both have one per channel")
    if not (found["std"] > 0).all() or not found["mean"].isfinite().all():
        raise ValueError(f"std is {std} and mean {mean}, must be positive and finite")
    return found


def normalized(inputs, mean, std):
    """(inputs - mean) / std, in the dtype of inputs."""
    return (inputs - mean.to(inputs)) / std.to(inputs)


def unnormalized(inputs, mean, std):
    """inputs * std + mean, in the dtype of inputs."""
    return inputs * std.to(inputs) + mean.to(inputs)


def to_type(inputs, type):
    """Inputs in [0, 1] as type "int", which is uint8 of 0 to 255, cut off; or uint8 as "float"."""
    checks.one_of("type", type, TYPES)
    if type == "int" and inputs.is_floating_point():
        return (inputs * 255).to(torch.uint8)
    if type == "float" and inputs.dtype == torch.uint8:
        return inputs.float() / 255
    return inputs


def save(
    attack,
    data_loader,
    save_path=None,
    verbose=True,
    return_verbose=False,
    save_predictions=False,
    save_clean_inputs=False,
    save_type="float",
):
    """Attacks each (inputs, labels) of a loader. With a save_path, writes a file for `load`.

    The file has adv_inputs in [0, 1] and labels, and on demand preds, the classes that the model
    gives adv_inputs, and clean_inputs; save_type: "float", or "int" for uint8, cut off, so that
    images may differ from the examples by up to 1/255. verbose: prints after each batch the share
    of inputs that keep their label, in percent, the mean l2 distance (of inputs as they are given,
    so of normalised ones) to those that do not, and the seconds of the batch. return_verbose:
    returns the last three. The file is written once, at the end.
    """
    checks.one_of("save_type", save_type, TYPES)
    if not len(data_loader):
        raise ValueError("data_loader has no batches, must have one or more")
    found = {"adv_inputs": [], "labels": [], "preds": [], "clean_inputs": []}
    right = total = 0
    distances = []
    for step, (inputs, labels) in enumerate(data_loader):
        begun = time.time()
        adv_inputs = attack.adversarial(inputs, labels)
        with torch.no_grad(), evaluating(attack.model):
            preds = ask(attack.model, adv_inputs).argmax(1)
        kept = preds == labels.to(preds.device)
        right, total = right + kept.sum().item(), total + len(kept)
        distance = (adv_inputs - inputs.to(adv_inputs.device)).flatten(1).norm(dim=1)
        distances.append(distance[~kept])
        results = 100 * right / total, torch.cat(distances).mean().item(), time.time() - begun
        if verbose:
            _tell((step + 1) / len(data_loader) * 100, *results)
        batch = adv_inputs, labels, preds, inputs
        for values, new in zip(found.values(), batch, strict=True):
            values.append(new.detach().cpu())
    if verbose:
        print()
    if save_path is not None:
        wanted = {"preds": save_predictions, "clean_inputs": save_clean_inputs}
        found = {k: torch.cat(values) for k, values in found.items() if wanted.get(k, True)}
        for key in found.keys() & {"adv_inputs", "clean_inputs"}:
            if attack.normalization_used is not None:
                found[key] = attack.inverse_normalize(found[key])
            found[key] = to_type(found[key], save_type)
        torch.save(found | {"save_type": save_type}, save_path)
    return results if return_verbose else None


def _tell(progress, robust, l2, seconds):
    print(
        f"- Save progress: {progress:2.2f} % / Robust accuracy: {robust:2.2f} % / L2: {l2:1.5f} "
        f"({seconds:2.3f} it/s) \t",
        end="\r",
    )


def load(
    load_path,
    batch_size=128,
    shuffle=False,
    normalize=None,
    load_predictions=False,
    load_clean_inputs=False,
):
    """A DataLoader of what `save` wrote: (adv_inputs, labels, and on demand preds and
    clean_inputs), float32. normalize: {"mean": ..., "std": ...}, one number per channel each, to
    normalise inputs. Raises ValueError for what the file does not have."""
    keys = ["adv_inputs", "labels"]
    keys += ["preds"] * load_predictions + ["clean_inputs"] * load_clean_inputs
    found = torch.load(load_path, weights_only=True)
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"{load_path} has no {', '.join(missing)}: save had not been told to")
    for key in {"adv_inputs", "clean_inputs"} & set(keys):
        found[key] = to_type(found[key], "float")
        if normalize is not None:
            numbers = statistics(normalize["mean"], normalize["std"])
            found[key] = normalized(found[key], **numbers)
    print(f"Data is loaded in the following order: [{', '.join(keys)}]")
    dataset = TensorDataset(*(found[key] for key in keys))
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)
