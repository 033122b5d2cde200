"""What attacks that look for the nearest adversarial example say: accuracy as a function of eps."""

import torch

from ..runs.log import new_figure, save_figure
from .report import fraction
from .search import within

SHARES = 0.25, 0.5, 1.0, 2.0  # of eps: the radii whose accuracies are printed
NEAREST = "nearest of all"


def distances(record, stages):
    """{stage: float64 [N]} of the stages that look for the nearest adversarial example: how far it
    is from its image; 0 where the image itself is misclassified, infinity where none was found.
    Where there are several such stages, "nearest of all" has the least.

    The examples are those that the model itself misclassifies. An image may have a nearer one that
    no attack has found, so the distances are upper bounds, and so are accuracies made of them.
    Raises ValueError while images were not attacked yet.
    """
    found = {}
    for stage in stages:
        if stage.minimal:
            record.right(stage.name)
            found[stage.name] = record.distance(stage.name)
    if len(found) > 1:
        found[NEAREST] = torch.stack([*found.values()]).amin(0)
    return found


def accuracy(distance, eps, norm):
    """The share, in [0, 1], of images whose nearest adversarial example is farther than eps."""
    return (~within(distance, eps, norm)).double().mean().item()


def summary(found, eps, norm):
    """{stage: {"median": the median distance, None if it is infinite, "found": for how many of the
    images an example was found, in percent, "robust_acc": {radius: accuracy in percent}}} of
    `distances`, for some radii around eps."""
    return {
        name: {
            "median": median if (median := _median(distance)) < torch.inf else None,
            "found": f"{100 * distance.isfinite().double().mean():.2f}",
            "robust_acc": {
                fraction(share * eps, norm): f"{100 * accuracy(distance, share * eps, norm):.2f}"
                for share in SHARES
            },
        }
        for name, distance in found.items()
    }


def _median(distance):
    """The median; of an even number of values the mean of the middle two."""
    ordered, last = distance.sort().values, len(distance) - 1
    return ((ordered[last // 2] + ordered[(last + 1) // 2]) / 2).item()


def describe(found, eps, norm):
    """A text table of the median of `distances` and the accuracy at some radii around eps."""
    width = max(map(len, found)) + 2
    radii = [fraction(share * eps, norm) for share in SHARES]
    lines = [
        f"distance of the nearest adversarial example ({norm}), accuracy at radius",
        " " * width + f"{'median':>11}" + "".join(f"{radius:>11}" for radius in radii),
    ]
    for name, row in summary(found, eps, norm).items():
        median = "infinite" if row["median"] is None else f"{row['median']:.5f}"
        rates = "".join(f"{rate:>10}%" for rate in row["robust_acc"].values())
        lines.append(f"{name:{width}}{median:>11}{rates}")
    return "\n".join(lines)


def plot(path, found, eps, norm):
    """A PNG of accuracy as a function of the radius, one curve per stage, eps marked. Draws nothing
    where matplotlib is not installed."""
    figure = new_figure((7, 4.5))
    if figure is None:
        return
    axes = figure.subplots()
    finite = torch.cat([v[v.isfinite()] for v in found.values()] + [torch.tensor([2.0 * eps])])
    last = max(2 * eps, finite.quantile(0.99).item())
    radii = torch.linspace(0, last, 400, dtype=torch.float64).tolist()
    for name, distance in found.items():
        axes.plot(radii, [100 * accuracy(distance, radius, norm) for radius in radii], label=name)
    axes.axvline(eps, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"radius, {norm}", ylabel="accuracy, %", xlim=(0, last), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)
