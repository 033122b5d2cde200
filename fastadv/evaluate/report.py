"""The results of an evaluation as a table, as RobustBench's JSON, and as two figures."""

import json
import math

import torch
import torch.nn.functional as F

from ..attacks.suite import CASCADES
from ..runs.log import new_figure, save_figure
from .calibration import calibration, clean_outputs, confusion, worst_outputs
from .corruptions import NAME, by_corruption, mce, mean_accuracy

SHOWN = 8  # images of the grid


def fraction(eps, norm):
    """A radius as text: 8/255 for 0.03137 where linf has a whole number of levels, else the
    decimal."""
    levels = eps * 255
    whole = norm == "linf" and abs(levels - round(levels)) < 1e-6 * levels
    return f"{round(levels)}/255" if whole else f"{eps:g}"


def table(columns, rows):
    """A text table; `rows` is {label: {column: accuracy}}, printed in percent."""
    width = max(map(len, rows)) + 2
    wide = [max(len(name) + 2, 11) for name in columns]
    head = " " * width + "".join(f"{c:>{w}}" for c, w in zip(columns, wide, strict=True))
    body = [
        f"{label:{width}}"
        + "".join(f"{100 * row[c]:{w - 1}.2f}%" for c, w in zip(columns, wide, strict=True))
        for label, row in rows.items()
    ]
    return "\n".join([head, *body])


def within(stages):
    """The stages whose examples lie within the radius: those that do not corrupt."""
    return [stage for stage in stages if not stage.corrupts]


def worst_case(record, stages):
    """bool [N]: which images are right under every stage, corruptions apart."""
    return torch.stack([record.right(stage.name) for stage in within(stages)]).all(0)


def rates(record, stages):
    """{stage: accuracy in [0, 1]}, and "worst case" over all of them. Corruptions have one entry,
    "corruptions": the mean over all of them and their severities."""
    attacks, found = within(stages), {}
    for stage in attacks:
        found[stage.name] = record.right(stage.name).double().mean().item()
    if attacks:
        found["worst case"] = worst_case(record, stages).double().mean().item()
    if corrupted := by_corruption(record, stages):
        found[NAME] = mean_accuracy(corrupted)
    return found


def interval(rate, count, z=1.96):
    """(low, high): the accuracies in [0, 1] with which `rate` of `count` images agree, at 95 % for
    z = 1.96, were they drawn anew from the same source (Wilson 1927)."""
    centre = rate + z**2 / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return tuple((centre + sign * spread) / (1 + z**2 / count) for sign in (-1, 1))


def describe(record, stages):
    """A text table with the accuracy, its 95 % confidence interval (Wilson) and the cost of each
    stage, and one with the accuracy under each corruption, if any."""
    found = rates(record, stages)
    corrupted = [_corrupted(record, stages)] if found.pop(NAME, None) is not None else []
    if not found:
        return corrupted[0]
    width = max(map(len, found)) + 2
    columns = ("attacked", "seconds", "forward", "backward")
    head = f"{'accuracy':>11}{'95 % interval':>16}" + "".join(f"{name:>11}" for name in columns)
    lines = [" " * width + head]
    for name, rate in found.items():
        low, high = (100 * end for end in interval(rate, record.count))
        lines.append(f"{name:{width}}{100 * rate:10.2f}%{f'{low:.2f}-{high:.2f}%':>16}")
        if name in record.costs:
            cost = record.costs[name]
            lines[-1] += f"{cost.images:11}{cost.seconds:11.1f}"
            lines[-1] += f"{cost.forwards:11}{cost.backwards:11}"
    return "\n\n".join(["\n".join(lines), *corrupted])


def _corrupted(record, stages):
    """A text table of the accuracy under corruptions, and the mean error."""
    corrupted = by_corruption(record, stages)
    columns = [f"severity {i}" for i in range(1, 6)]
    rows = {
        name: dict(zip(columns, found, strict=True), mean=sum(found) / len(found))
        for name, found in corrupted.items()
    }
    text = f"mean error {100 * (1 - mean_accuracy(corrupted)):.2f}%"
    if (relative := mce(corrupted, stages)) is not None:
        text += f", mCE {100 * relative:.2f}% of AlexNet's"
    return f"{table([*columns, 'mean'], rows)}\n{text}"


def as_json(record, stages, settings, warnings, labels):
    """RobustBench's fields (accuracies in percent and eps as text, as there), then ours; `stages`
    begin with "clean". labels: of the images, int64 [N].

    settings: "architecture", "dataset", "eps", "norm", "precision", "seed" and more, of any type.
    """
    raw = rates(record, stages)
    found = {name: percent(rate) for name, rate in raw.items()}
    attacks = {
        stage.name: {
            "accuracy": found[stage.name],
            "interval": _interval(raw[stage.name], record.count),
            **vars(record.costs[stage.name]),
        }
        for stage in within(stages)
    }
    standard = [f"aa:{name}" for name in CASCADES["aa"]]
    fields = settings | {
        "eps": fraction(settings["eps"], settings["norm"]),
        "eps_value": settings["eps"],
    }
    fields["clean_acc"] = found["clean"]
    if len(attacks) > 1:
        fields["robust_acc"] = found["worst case"]
    if all(name in found for name in standard):
        fields["autoattack_acc"] = found[standard[-1]]
    fields |= {"number_forward_passes": "1", "unreliable": bool(warnings), "warnings": warnings}
    largest = max(record.costs[name].largest for name in attacks)
    fields |= {"max_perturbation": largest, "attacks": attacks}
    rights = {"clean": record.right("clean"), "worst case": worst_case(record, stages)}
    fields["by_class"] = {
        name: {"interval": _interval(raw[name], record.count), **_by_class(right, labels)}
        for name, right in rights.items()
    }
    fields |= _outputs(record, stages, labels)
    if corrupted := by_corruption(record, stages):
        fields[NAME] = _corruptions(record, stages, corrupted)
    costs = [record.costs[stage.name] for stage in stages]
    fields["cost"] = {
        name: sum(getattr(cost, name) for cost in costs)
        for name in ("seconds", "forwards", "backwards")
    }
    return json.dumps(fields, indent=2)


def _outputs(record, stages, labels):
    """Confusion and calibration of the clean images and of the worst case, in percent; nothing for
    an evaluation that was begun without them."""
    found = {"clean": clean_outputs(record), "worst case": worst_outputs(record, stages)}
    if None in found.values():
        return {}
    return {
        "confusion": {name: confusion(guess, labels) for name, (guess, _) in found.items()},
        "calibration": {
            name: _calibration(sure, guess == labels) for name, (guess, sure) in found.items()
        },
    }


def _calibration(confidence, right):
    error, bins = calibration(confidence, right)
    rows = [
        {"images": count}
        | ({"confidence": percent(sure), "accuracy": percent(rate)} if count else {})
        for count, sure, rate in bins
    ]
    return {"ece": percent(error), "bins": rows}


def _corruptions(record, stages, corrupted):
    """Accuracy and cost under corruptions, and the mean error; `corrupted`: of `by_corruption`."""
    own = [stage for stage in stages if stage.corrupts]
    relative = mce(corrupted, stages)
    return {
        "source": own[0].attack.source,
        "mean_error": percent(1 - mean_accuracy(corrupted)),
        **({} if relative is None else {"mce": percent(relative)}),
        "accuracy": {name: [*map(percent, found)] for name, found in corrupted.items()},
        "seconds": sum(record.costs[stage.name].seconds for stage in own),
    }


def percent(share):
    return f"{100 * share:.2f}"


def _interval(rate, count):
    return [*map(percent, interval(rate, count))]


def _by_class(right, labels):
    """Of the classes among the labels [N] the worst, and all accuracies; right: bool [N]."""
    classes = labels.unique().tolist()
    found = {label: right[labels == label].double().mean().item() for label in classes}
    accuracy = {label: percent(rate) for label, rate in found.items()}
    return {"worst_class": min(found, key=found.get), "accuracy": accuracy}


def grid(path, record, stages, images, eps):
    """A PNG of the first SHOWN images that an attack broke: clean, adversarial, and their
    difference. Draws nothing where there are none or matplotlib is not installed."""
    broken = record.right(stages[0].name) & ~worst_case(record, stages)
    rows = broken.nonzero()[:SHOWN, 0]
    if not len(rows):
        return
    clean = images[rows].float() / 255
    adversarial = torch.from_numpy(record.examples[rows.numpy()])
    difference = 0.5 + (adversarial - clean) / (2 * eps)
    parts = (F.pad(part, (1, 1, 1, 1), value=1.0) for part in (clean, adversarial, difference))
    panels = torch.cat([torch.cat(list(part), 2) for part in parts], 1)
    figure = new_figure((1.2 * len(rows), 4))
    if figure is None:
        return
    axes = figure.subplots()
    shown = panels.clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(shown.squeeze(2) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
    height = images.shape[2] + 2
    axes.set_yticks(
        [height * (i + 0.5) for i in range(3)],
        ["clean", "adversarial", "difference\n(grey is 0, black -eps, white +eps)"],
    )
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    save_figure(figure, path)


def comparison(path, columns, results):
    """A PNG of bars over the columns of {label: {column: accuracy}}. Draws nothing where matplotlib
    is not installed."""
    figure = new_figure((8, 4.5))
    if figure is None:
        return
    axes = figure.subplots()
    width = 0.8 / len(results)
    for i, (label, found) in enumerate(results.items()):
        places = [j + (i - (len(results) - 1) / 2) * width for j in range(len(columns))]
        axes.bar(places, [100 * found[name] for name in columns], width, label=label)
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    axes.set(ylabel="accuracy, %", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)
