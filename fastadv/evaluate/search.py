"""The search for adversarial examples on fast twins, and the verdict on the model itself."""

import logging
import math
import time
from typing import NamedTuple

import torch
from torch import nn

from ..attacks import checks, minimal, suite
from ..attacks.checks import checked_logits
from ..data.convert import as_image_set
from ..engine.frozen import freeze
from ..engine.query import ask, evaluating
from ..errors import UsageError, values_from_user
from ..ops._logits import wide
from ..runs.config import PRECISIONS
from ..runs.config import device as usable
from ..runs.progress import bar
from .record import RIGHT, UNKNOWN, WRONG, Cost, Record, floating
from .report import worst_case
from .shares import Shares

_log = logging.getLogger("fastadv")
# How much further than eps, or than 1, rounding may take an example, as a share of it.
ROUNDING = {"linf": 1e-6, "l2": 1e-5, "l1": 1e-5, "l0": 0.0}


class Counted(nn.Module):
    """Wraps a network and counts the images that pass through it, forward and backward. Images are
    cast to the dtype of its parameters, and its logits are taken out of what it returns. Where it
    raises, a ValueError says so."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.forwards = self.backwards = 0

    def forward(self, x):
        try:
            logits = ask(self.net, x)
        except Exception as error:
            raise ValueError(f"model raised {type(error).__name__}: {error}") from error
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad):
        self.backwards += len(grad)


class Verdict(NamedTuple):
    """What a model itself says of examples, [B] each. valid: within the radius and in [0, 1], to
    rounding; distance: to the clean image; predicted: the likeliest class, and confidence, float32:
    its probability."""

    right: torch.Tensor
    valid: torch.Tensor
    distance: torch.Tensor
    predicted: torch.Tensor
    confidence: torch.Tensor

    @property
    def broken(self):
        return ~self.right & self.valid


@torch.no_grad()
def judge(model, x, x_adv, y, eps, norm):
    """The Verdict on the examples x_adv [B, ...] of `model` itself, without autocast: in the dtype
    of its parameters, float32 for most. Raises ValueError for labels or logits that make no sense.
    """
    distance = minimal.distance(x_adv.double() - x, norm)
    inside = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    autocast = torch.autocast(x.device.type, enabled=False)
    with values_from_user(), evaluating(model), autocast:
        logits = checked_logits(model, x_adv, y)
    predicted, confidence = logits.argmax(1), wide(logits).softmax(1).amax(1).float()
    valid = inside & within(distance, eps, norm)
    return Verdict(predicted == y, valid, distance, predicted, confidence)


def within(distance, eps, norm):
    """Which distances [B] are at most eps, to rounding."""
    slack = ROUNDING[norm] * max(1, eps) if math.isfinite(eps) else 0.0
    return distance <= eps + slack


class Search:
    """Attacks batches on twins of a model, and of a source whose examples are transferred to it.

    Examples that the twin alone misclassifies, because its arithmetic is not the model's, are made
    again on the model itself, so that a fast search finds no fewer examples. A model that cannot be
    frozen is attacked as it is.
    """

    def __init__(self, model, source, precision):
        self.model = Counted(model)
        self.twin = Counted(_twin(model, PRECISIONS[precision]))
        self.source = None if source is None else Counted(_twin(source, PRECISIONS[precision]))

    def __call__(self, stage, x, y, index, seed):
        """(x_adv, verdict, cost) of one batch under one stage. The distance is infinity where an
        attack looks for the nearest adversarial point and x_adv is none."""
        eps, norm = math.inf if stage.minimal else stage.attack.eps, stage.attack.norm
        start, before = time.perf_counter(), self._passes()
        cost = Cost(images=len(x))

        def attempt(twin, rows=slice(None)):
            torch.default_generator.manual_seed(seed)
            x_adv = stage(twin, x[rows], y[rows], index[rows])
            cost.bad_gradients += int(getattr(stage.attack, "bad_gradients", 0))
            return x_adv

        x_adv = attempt(self.source if stage.transferred else self.twin)
        verdict = judge(self.model, x, x_adv, y, eps, norm)
        if not (stage.transferred or stage.fixed):
            disputed = self._disputed(x_adv, y, verdict.right)
            cost.disputed = len(disputed)
            if len(disputed):
                x_adv[disputed] = attempt(self.model, disputed)
                verdict = judge(self.model, x, x_adv, y, eps, norm)
        cost.invalid = int((~verdict.right & ~verdict.valid).sum())
        if stage.minimal:
            distance = verdict.distance.where(verdict.broken, torch.inf)
            near = verdict.valid & within(verdict.distance, stage.eps, norm)
            verdict = verdict._replace(valid=near, distance=distance)
        broken = verdict.broken
        cost.largest = verdict.distance[broken].max().item() if broken.any() else 0.0
        cost.forwards, cost.backwards = (b - a for a, b in zip(before, self._passes(), strict=True))
        cost.seconds = time.perf_counter() - start
        return x_adv, verdict, cost

    @torch.no_grad()
    def _disputed(self, x_adv, y, right):
        """The rows, int64, of examples that the model classifies right and the twin does not."""
        rows = right.nonzero()[:, 0]
        if not len(rows):
            return rows
        with evaluating(self.twin):
            return rows[self.twin(x_adv[rows]).argmax(1) != y[rows]]

    def _passes(self):
        nets = [net for net in (self.model, self.twin, self.source) if net is not None]
        return sum(net.forwards for net in nets), sum(net.backwards for net in nets)


def _twin(model, dtype):
    """freeze(model), or the model itself where it cannot be copied."""
    try:
        return freeze(model, dtype)
    except RuntimeError as error:
        _log.warning("%s is attacked as it is, slower: %s", type(model).__name__, error)
        return model


def run(
    model,
    split,
    stages,
    *,
    source=None,
    precision="fp32",
    batch_size=256,
    device="cpu",
    seed=0,
    record=None,
    progress=False,
    shared=False,
):
    """Attacks the images of `split`, stage after stage (see `suite.stages`): the Record.

    split: a data.ImageSet, whose images may also be float32 or float64 in [0, 1], or a torch
    Dataset or sequence of images and labels, as `data.from_dataset` takes it.
    The search runs on twins in `precision` ("fp32" or "bf16"); an image counts as broken when
    `model` itself, in the dtype of its own parameters, misclassifies its example and the example
    lies within ball and box. A stage's batches are filled from the images that it still has to
    attack. Random draws depend on (seed, image) alone, so that batch size and order do not change
    them. source: the network that "transfer-" attacks follow. record: what is known already, to go
    on from. progress: prints the accuracy under each stage when it ends, and shows bars at once.
    shared: the processes of a `parallel.group()` share each batch of batch_size images per process;
    all must call it, and each gets the whole record, the same as one process would.
    Raises ValueError or TypeError for arguments that make no sense and stages that need more
    classes than the model has, before any attack; ValueError naming the stage and the images for
    labels, logits or models that make no sense.
    """
    checks.one_of("precision", precision, PRECISIONS)
    checks.whole("batch_size", batch_size, 1)
    if checks.whole("seed", seed, 0) >= 2**63:
        raise ValueError(f"seed is {seed}, must be in [0, 2^63)")
    device, split = usable(device), as_image_set(split)
    stages, record = _checked(model, split, stages, source, record, device)
    search, shares = Search(model, source, precision), Shares(shared)
    try:
        with torch.random.fork_rng(devices=[]):
            for stage in stages:
                for known in (record.stage(stage.name)[0], *_outputs(record, stage)):
                    shares.begun(known)
            for stage in stages:
                _attack(search, stage, split, record, batch_size, device, seed, progress, shares)
                if progress:
                    share = record.right(stage.name).double().mean()
                    print(f"{stage.name}: {share:.2%} right", flush=True)
    finally:
        record.save(force=True)
    return record


def _checked(model, split, stages, source, record, device):
    """(stages as a list, the record), after checks of all arguments of an evaluation."""
    checks.check_model(model)
    if source is not None:
        checks.check_model(source, "source")
    columns = {name: getattr(split, name, None) for name in ("images", "labels", "index")}
    for name, column in columns.items():
        checks.check_tensor(f"split.{name}", column)
    if not isinstance(record, (Record, type(None))):
        raise TypeError(f"record is {checks.described(record)}, must be a Record")
    count = len(columns["images"])
    for name, column in columns.items():
        if len(column) != count:
            raise ValueError(f"split.{name} has {len(column)} rows, split.images {count}")
    record = record or Record(count)
    if record.count != count:
        raise ValueError(f"record is of {record.count} images, split has {count}")
    stages = suite.made(stages)
    for stage in stages:
        if stage.transferred and source is None:
            raise ValueError(f"{stage.name} needs a source: the network to transfer from")
    if max((stage.classes for stage in stages), default=0) > 2:  # those of any classifier
        with torch.no_grad(), evaluating(model):
            logits = Counted(model)(floating(split.images[:1].to(device)))
            checks.check_logits(logits, 1)
        classes = logits.shape[1]
        for stage in stages:
            if stage.classes > classes:
                needs = f"{stage.name} needs {stage.classes} classes"
                raise ValueError(f"{needs}, the model has {classes}: leave it out")
    return stages, record


def _attack(search, stage, split, record, batch_size, device, seed, progress, shares):
    """Runs one stage on the images that it has not attacked yet."""
    verdicts, total = record.stage(stage.name)
    within_eps = f" within {stage.eps}" if stage.minimal else ""
    record.bind(stage.name, f"{stage.attack} on {stage.loss}, seed {seed}{within_eps}")
    for name in stage.after:
        wrong = ~record.right(name)
        verdicts[wrong] = WRONG
        for mine, theirs in zip(record.outputs(stage.name), record.outputs(name), strict=True):
            mine[wrong] = theirs[wrong]
    todo = (verdicts == UNKNOWN).nonzero()[:, 0]
    keeps = shares.keeps(record) and not stage.corrupts
    at_once = {"delay": 0} if progress else {}  # a delayed bar waits for the end of the first batch
    shown = bar(text=stage.name, total=len(todo), unit="image", **at_once)
    for rows in todo.split(batch_size * shares.world) if len(todo) else ():
        x_adv, found, cost = _batch(search, stage, split, shares.of(rows), device, seed)
        broken, *found = (shares.together(part, len(rows)) for part in found)
        broken = broken.bool()
        if keeps:
            fresh = broken & ~record.broken(rows)
            record.keep(rows[fresh], shares.together(x_adv, len(rows))[fresh])
        for mine, part in zip(_outputs(record, stage), found, strict=False):  # distance comes last
            mine[rows] = part
        verdicts[rows] = torch.where(broken, WRONG, RIGHT).to(torch.uint8)
        total.add(shares.cost(cost))
        record.save()
        shown.update(len(rows))
    shown.close()


def _outputs(record, stage):
    """What the record keeps of a stage's examples: class, confidence and, where the attack looks
    for the nearest one, distance."""
    found = record.outputs(stage.name)
    return (*found, record.distance(stage.name)) if stage.minimal else found


def _batch(search, stage, split, rows, device, seed):
    """(x_adv, (broken uint8, predicted, confidence, distance) [B] each, cost) of the images at
    `rows`, on the CPU. What is invalid has no prediction: -1."""
    x, y, index = (v[rows].to(device) for v in (split.images, split.labels, split.index))
    x = floating(x)
    if not len(rows):
        kinds = torch.uint8, torch.int32, torch.float32, torch.float64
        return x.cpu(), tuple(torch.zeros(0, dtype=kind) for kind in kinds), Cost()
    try:
        y = checks.as_labels(y, x)
        x_adv, verdict, cost = search(stage, x, y, index, seed)
    except ValueError as error:
        images = f"images {int(rows[0])} to {int(rows[-1])}"
        kind = UsageError if isinstance(error, UsageError) else ValueError
        raise kind(f"{stage.name}, {images}: {error}") from error
    predicted = verdict.predicted.where(verdict.right | verdict.valid, -1).int()
    found = verdict.broken.byte(), predicted, verdict.confidence, verdict.distance
    return x_adv.cpu(), tuple(part.cpu() for part in found), cost


def correct(model, split, attack, *, eps, norm="linf", **options):
    """Which images of `split` the model classifies right under `attack`: a bool tensor [N].

    attack: a name that `suite.stages` knows, of a suite under all its attacks; options are those
    of `run`. Raises ValueError for an unknown attack, labels or logits that make no sense, and
    gradients with NaN or infinity: an attack that cannot move proves nothing.
    """
    stages = suite.stages([attack], eps, norm)
    record = run(model, split, stages, **options)
    if bad := sum(record.costs[stage.name].bad_gradients for stage in stages):
        raise UsageError(f"{attack}: {bad} gradients of the model had NaN or infinity in them")
    return record.right(attack) if attack in record.costs else worst_case(record, stages)


def accuracies(model, split, attacks, **options):
    """{attack: accuracy in [0, 1]} on `split`; options are those of `correct`. The processes
    of a `parallel.group()` must all call it: they share the images out, each gets the whole result.
    """
    attacks = checks.listed("attacks", attacks, "names")
    split = as_image_set(split)
    return {
        name: int(correct(model, split, name, shared=True, **options).sum()) / len(split)
        for name in attacks
    }
