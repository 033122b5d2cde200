"""The parts of a training method: its networks, a batch, and the two problems, inner and outer."""

import zlib
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .. import losses
from ..attacks import APGD, PGD
from ..engine.features import forward_features
from ..engine.frozen import Frozen, InPrecision, freeze, original, refresh
from ..engine.query import ask
from ..errors import UsageError
from ..ops._logits import int64_labels, wide
from ..ops._torch import uncompiled, version


class Answering(nn.Module):
    """Wraps a network for methods: images are cast to the dtype of its parameters, and it returns
    its logits, in float32 where the network computes in half precision. The attributes of the
    network are the wrapper's too."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.training = net.training

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def __eq__(self, other):
        """Wrappers of one network are equal, so that a CUDA graph knows it again in other Nets."""
        return isinstance(other, Answering) and self.net is other.net

    def __hash__(self):
        return hash(self.net)

    def forward(self, x):
        return wide(ask(self.net, x))


def answering(net):
    """A network wrapped as `Answering`; one that answers so already, or is no module, as it is."""
    plain = isinstance(net, nn.Module) and not isinstance(net, (InPrecision, Answering))
    return Answering(net) if plain else net


@dataclass
class Nets:
    """The networks of a method, [0, 1] images -> logits or what has them (`logits_of`), in
    any floating dtype: each is seen as `answering` it. Teachers are frozen and in eval mode;
    ValueError where one is in train mode, TypeError for what is no network.

    teacher: the robust one. clean_teacher: the natural ("standard", "vanilla") one. student_twin:
    the student as attacks in eval mode see it; made from `student` when missing.
    """

    student: nn.Module
    teacher: nn.Module | None = None
    clean_teacher: nn.Module | None = None
    student_twin: Frozen | None = None

    def __post_init__(self):
        for one in fields(self):
            net = getattr(self, one.name)
            absent = net is None and one.name != "student"
            if not absent and (isinstance(net, type) or not callable(net)):
                raise TypeError(f"{one.name} is {net!r}, must be a torch.nn.Module")
        for name in ("teacher", "clean_teacher"):
            if getattr(getattr(self, name), "training", False):
                raise ValueError(f"{name} is in train mode, must be in eval mode: freeze({name})")
        for one in fields(self):
            setattr(self, one.name, answering(getattr(self, one.name)))
        self._copied = {}  # {twin: the state of its model at the last refresh here}

    def refresh_teachers(self):
        """Refreshes the teachers that are twins of a model which has changed since the last time:
        one in training, say. Most teachers never change, and a refresh copies them whole."""
        for name in ("teacher", "clean_teacher"):
            twin = uncompiled(getattr(self, name))
            if isinstance(twin, Frozen):
                state = state_of(original(twin))
                if state is None or state != self._copied.get(twin):
                    refresh(twin)
                    self._copied[twin] = state

    def with_twin(self):
        """These nets with the student's twin, refreshed, in the place of the student."""
        if self.student_twin is None:
            raw = self.student.net if isinstance(self.student, Answering) else self.student
            self.student_twin = freeze(raw)
        refresh(self.student_twin)
        return replace(self, student=self.student_twin)


def state_of(net):
    """A value that differs after training of `net`, by whatever code. Address and version of each
    tensor do not tell alone, as fused optimisers and writes to `.data` count no version: a checksum
    of its bytes stands beside them. It costs one read of the tensor; a refresh copies it, folds and
    packs it. None on a device where a look at numbers would wait."""
    tensors = [*net.parameters(), *net.buffers()]
    if not all(tensor.is_cpu for tensor in tensors):
        return None
    return [(t.data_ptr(), version(t), checksum(t)) for t in tensors]


def checksum(tensor):
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy())


class AdversarialImages:
    """The attribute x_adv of a Batch. Reading it raises ValueError until it is set."""

    def __get__(self, batch, owner):
        if batch is None:
            return None  # the default of the dataclass
        if batch.__dict__["x_adv"] is None:
            raise ValueError(
                "batch.x_adv is missing: set it to method.perturb(nets, batch, state) first"
            )
        return batch.__dict__["x_adv"]

    def __set__(self, batch, value):
        batch.__dict__["x_adv"] = value


@dataclass(repr=False)
class Batch:
    """x: float32 or float64 [B, C, H, W] in [0, 1]; y: integers [B], or probabilities [B, classes]
    where images are mixed; index, view: ids of image and augmentation, on any device. x_adv: the
    adversarial images; to read them before they are set is a ValueError. The teachers' outputs for
    the batch are computed once and kept in `memo`."""

    x: torch.Tensor
    y: torch.Tensor
    index: torch.Tensor | None = None
    view: torch.Tensor | None = None
    x_adv: torch.Tensor | None = AdversarialImages()
    memo: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if isinstance(self.y, torch.Tensor):
            self.y = int64_labels(self.y)

    def teacher_logits(self, nets, teacher="teacher", on="x"):
        """Logits of a teacher on "x" or "x_adv": computed once per batch, without gradient."""
        return self.teacher_features(nets, ("logits",), teacher, on)["logits"]

    def teacher_features(self, nets, names, teacher="clean_teacher", on="x"):
        """{name: features} of a teacher, see `forward_features`; computed once, no gradient."""
        net = getattr(nets, teacher)
        if net is None:
            raise ValueError(f"nets.{teacher} is None, must be a network for this method")
        if any((teacher, on, name) not in self.memo for name in names):
            with torch.no_grad():
                logits, features = forward_features(net, getattr(self, on), names)
            features["logits"] = logits
            self.memo |= {(teacher, on, name): value for name, value in features.items()}
        return {name: self.memo[teacher, on, name] for name in names}


class Method(nn.Module):
    """A training method: `inner` is maximised over x_adv, `outer` minimised over the student.

    attack: a PGD; by default with the sizes common to all papers and the start of this one.
    attack_bn: "eval" attacks the frozen twin, "train" the student itself, BatchNorm statistics and
    all; by default as the authors' code has it. milestones: the epochs after which the rates of
    dynamic weights and temperatures drop to a tenth, in all papers those of the learning rate.
    epochs: how many the run has, over which the weight of some terms grows.

    Of the class: teachers, the nets it needs besides the student. adversarial: whether it trains on
    adversarial examples at all. loss_scale: the size of its loss as a share of a batch mean of
    cross-entropy or KL. Divide a learning rate that suits such a mean by it, and multiply the
    weight decay. init and clip_start: the paper's start. capturable: whether `inner`
    reads nothing but its arguments and the method's own tensors, for `attacks.Captured`.
    """

    capturable = True
    teachers = ()
    adversarial = True
    loss_scale = 1.0
    init = "gaussian"
    clip_start = None
    attack_bn = "eval"

    def __init__(self, attack=None, attack_bn=None, milestones=(), epochs=200):
        super().__init__()
        wrong = isinstance(attack, (type, APGD)) or not hasattr(attack, "ascend")
        if attack is not None and wrong:
            raise TypeError(f"attack is {attack!r}, must be a PGD")
        self.attack = attack or PGD(init=self.init, clip_start=self.clip_start)
        self.attack_bn = self.attack_bn if attack_bn is None else attack_bn
        self.milestones, self.epochs = milestones, epochs

    def __setattr__(self, name, value):
        if name == "attack_bn" and value not in ("eval", "train"):
            raise UsageError(f"attack_bn is {value!r}, must be 'eval' or 'train'")
        super().__setattr__(name, value)

    def prepare(self, nets, x):
        """Makes what depends on the networks, such as a projector; x [B, C, H, W] is an example.
        Called once, before the optimiser and `init_state`."""

    def cacheable(self):
        """{teacher: names of `forward_features`}: the outputs for x that this method reads, which a
        cache may keep. Outputs for x_adv are not among them."""
        return {}

    def init_state(self, device):
        """Dynamic weights and temperatures as a dict of tensors; empty for most methods. The
        values of a batch that change them are averaged over processes (`parallel.mean`), so that
        they are the same in all."""
        return {}

    def targets(self, nets, batch, state):
        """The constants of the inner problem, [B, ...] each, computed once per attack."""
        return ()

    def inner(self, nets, x_adv, *targets):
        """The objective that the attack maximises, [B]."""
        raise NotImplementedError

    def queried(self, nets):
        """The networks as `inner` queries them in one attack."""
        return nets if self.attack_bn == "train" else nets.with_twin()

    def outer(self, nets, batch, state):
        """(loss, new state): the loss that the student minimises on batch.x and batch.x_adv."""
        raise NotImplementedError

    def perturb(self, nets, batch, state, start=None):
        """x_adv [B, ...] for this batch; x itself where the method is not adversarial."""
        nets.refresh_teachers()
        if not self.adversarial:
            return batch.x
        nets = self.queried(nets)
        targets = self.targets(nets, batch, state)
        inner = partial(self.inner, nets)
        index = batch.index
        if index is not None:
            index = index.to(batch.x.device, non_blocking=True)
        return self.attack.ascend(inner, batch.x, *targets, start=start, index=index)

    def end_epoch(self, state):
        """The state that the next epoch starts with."""
        return state | {"epoch": state["epoch"] + 1} if "epoch" in state else state

    def grown(self, weight, state):
        """`weight` in the share of the epochs that have begun: the whole in the last one."""
        return weight * (int(state["epoch"]) + 1) / self.epochs

    def decayed(self, rate, state):
        """`rate` after the milestones that state["epoch"] has passed."""
        return rate * 0.1 ** sum(int(state["epoch"]) >= epoch for epoch in self.milestones)


class LabelAttack(Method):
    """A method whose adversary maximises CE(s(x_adv), y)."""

    def targets(self, nets, batch, state):
        return (batch.y,)

    def inner(self, nets, x_adv, y):
        return losses.cross_entropy(nets.student(x_adv), y, reduction="none")


class StabilityAttack(Method):
    """A method whose adversary maximises KL(s(x) || s(x_adv)), with s(x) a constant."""

    def targets(self, nets, batch, state):
        with torch.no_grad():
            return (nets.student(batch.x),)

    def inner(self, nets, x_adv, clean):
        return losses.kl(nets.student(x_adv), clean, reduction="none")


class MismatchAttack(Method):
    """A method whose adversary maximises KL(t(x_adv) || s(x_adv); T), the gradient through both.

    teacher_every: 1, or m for an approximation of the method that no paper has: the teacher is
    asked at the first of every m steps of an attack, and in the m - 1 after it its logits of that
    step are a constant target. A whole number; UsageError for others.
    """

    temperature = 1.0

    def __init__(self, teacher_every=1, **options):
        super().__init__(**options)
        if teacher_every < 1 or teacher_every % 1:
            raise UsageError(
                f"teacher_every is {teacher_every}, must be a whole number of at least 1"
            )
        self.teacher_every = teacher_every

    def queried(self, nets):
        nets = super().queried(nets)
        if self.teacher_every == 1:
            return nets
        return replace(nets, teacher=StaleTeacher(nets.teacher, self.teacher_every))

    def inner(self, nets, x_adv):
        return losses.kl(nets.student(x_adv), nets.teacher(x_adv), self.temperature, "none")


class StaleTeacher:
    """A teacher for the steps of one attack. It is asked in the first of every `every` calls; the
    other calls return its last logits as a constant."""

    training = False

    def __init__(self, teacher, every):
        self.teacher, self.every, self.calls, self.logits = teacher, every, 0, None

    def __call__(self, x):
        self.calls += 1
        if (self.calls - 1) % self.every:
            return self.logits
        logits = self.teacher(x)
        self.logits = logits.detach()
        return logits


def first_epoch():
    """The count of epochs in a method's state. It is on the CPU, so that reading it never waits."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


def update_statistics(net, x):
    """A forward pass of weight zero, which moves the BatchNorm statistics of `net` and no more."""
    with torch.no_grad():
        net(x)


def probabilities(y, logits):
    """Labels as probabilities [B, C] like logits: one-hot for class ids, else as they are."""
    return F.one_hot(y, logits.shape[1]).to(logits) if y.dim() == 1 else y


def label_probability(logits, y):
    """softmax(logits)_y, [B]; its expectation where y are probabilities."""
    return (logits.softmax(1) * probabilities(y, logits)).sum(1)
