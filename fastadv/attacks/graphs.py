"""An attack as one CUDA graph: all its steps in a single launch."""

import dataclasses
import functools
import itertools

import torch
from torch import nn

from ..engine.frozen import refresh
from ..engine.query import ask, evaluating
from .checks import as_labels, check_images, check_labels, check_tensor, one_of
from .pgd import OBJECTIVES, PGD, started


class Captured:
    """A PGD that captures its steps as a CUDA graph and replays the graph for every later attack
    that is alike: images and targets of the same shape and layout, the same objective and the same
    networks. The graph is captured at the second attack of a kind.

    A graph reads the networks' tensors where they lie in memory, so that new weights need no new
    graph: optimisers write them in place, and so does the refresh of a twin of `freeze`. A smaller
    batch is filled up with the images of a former one, which is possible as samples do not depend
    on each other.

    No graph is used for images on other devices, networks in train mode, an eps per sample, calls
    with a target, and objectives that cannot be recognised when they come again. An objective can
    be if it is a functools.partial of a function, or of a method of a module that is `capturable`
    (training methods are), and its arguments are networks, dataclasses of networks, numbers and
    text.

    attack: a PGD with one restart that keeps the last iterate; ValueError for others.
    bad_gradients: as of a PGD.
    """

    def __init__(self, attack):
        if not (isinstance(attack, PGD) and attack.restarts == 1 and attack.keep == "last"):
            raise ValueError(f"attack is {attack!r}, must be a PGD with restarts=1 and keep='last'")
        self.attack, self.bad_gradients = attack, 0
        self.seen = self.graph = None  # the likeness of the last attack, and its graph
        self.model = self.classes = None  # the last model whose logits were checked

    def __call__(
        self,
        model,
        x,
        y=None,
        *,
        loss="ce",
        target_logits=None,
        target=None,
        start=None,
        index=None,
    ):
        """As `PGD.__call__`, but the logits of a model are checked in its first call alone."""
        one_of("loss", loss, OBJECTIVES)
        constant = target_logits if loss == "kl" else y
        known = model is self.model and isinstance(x, torch.Tensor) and on_gpu(x)
        if not known or constant is None or target is not None:
            given = {"target_logits": target_logits, "target": target}
            given |= {"start": start, "index": index}
            x_adv = self._noted(self.attack(model, x, y, loss=loss, **given))
            if on_gpu(x):
                with torch.no_grad(), evaluating(model):
                    self.model, self.classes = model, ask(model, x[:1]).shape[1]
            return x_adv
        check_images(x, self.attack.lo, self.attack.hi)
        check_tensor("target_logits" if loss == "kl" else "y", constant, like=x)
        if loss != "kl":
            constant = as_labels(y, x)
            check_labels(constant, self.classes)
        refresh(model)
        inner = functools.partial(_objective, model, loss)
        with evaluating(model):
            return self.ascend(inner, x, constant.detach(), start=start, index=index)

    @torch.inference_mode(False)
    def ascend(self, inner, x, *targets, start=None, index=None):
        """As `PGD.ascend`."""
        if any(len(target) != len(x) for target in targets):
            lengths = ", ".join(str(len(target)) for target in targets)
            raise ValueError(f"targets have {lengths} rows, must have {len(x)}, one per image")
        key = _likeness(self.attack, inner, x, targets) if on_gpu(x) else None
        if key is None or key != self.seen:
            self.seen = key
            self.graph = None  # frees its memory
            return self._noted(self.attack.ascend(inner, x, *targets, start=start, index=index))
        start = self.attack.start(x, index) if start is None else started(start, x)
        with torch.cuda.device_of(x):
            if self.graph is None or len(x) > self.graph.batch:
                self.graph = None
                self.graph = AttackGraph(self.attack, inner, x, targets)
            x_adv, bad = self.graph(start, x, *targets)
        self.bad_gradients = bad.sum()
        return x_adv

    def _noted(self, x_adv):
        """x_adv of the PGD, after a note of its bad gradients."""
        self.bad_gradients = self.attack.bad_gradients
        return x_adv


class AttackGraph:
    """The steps of an attack as a CUDA graph, which has its own memory for the arguments of a call:
    batches may be smaller than the one that was captured."""

    def __init__(self, attack, inner, x, targets):
        self.batch = len(x)
        self.x_adv, *inputs = self.inputs = [v.detach().clone() for v in (x, x, *targets)]
        self.replay, self.bad = capture(lambda: attack.climb(inner, self.x_adv, *inputs))

    def __call__(self, start, *inputs):
        """(x_adv, int64 [B], the number of each sample's bad gradients) of the steps from `start`
        on; inputs: x and the targets."""
        for memory, value in zip(self.inputs, (start, *inputs), strict=True):
            memory[: len(start)].copy_(value)
        self.replay()
        return self.x_adv[: len(start)].clone(), self.bad[: len(start)].clone()


def capture(function):
    """(a function that replays a CUDA graph of `function`, the tensors that it then writes to)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # libraries allocate memory once per stream, which must not happen in a graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = function()
    return graph.replay, returned


def on_gpu(x):
    return x.is_cuda and x.numel() > 0


def _objective(model, loss, x_adv, target):
    return OBJECTIVES[loss](ask(model, x_adv), target)


def _likeness(attack, inner, x, targets):
    """A value that is the same for all attacks which one graph can compute; None for an attack
    that cannot be recognised."""
    if not isinstance(inner, functools.partial) or isinstance(attack.eps, torch.Tensor):
        return None
    owner = getattr(inner.func, "__self__", None)
    nets = _networks((*inner.args, *inner.keywords.values()))
    if nets is None or not (owner is None or getattr(owner, "capturable", False)):
        return None
    if any(module.training for net in nets for module in net.modules()):
        return None
    held = nets if owner is None else (*nets, owner)
    tensors = itertools.chain(*((*net.parameters(), *net.buffers()) for net in held))
    addresses = [tensor.data_ptr() for tensor in tensors]
    images = [(v.dtype, v.device, v.shape[1:], v.stride()) for v in (x, *targets)]
    attack = dataclasses.replace(attack)  # as it is now
    return attack, inner.func, inner.args, inner.keywords, images, addresses


def _networks(values):
    """The networks among these values and in dataclasses of nothing but networks; None if a value
    is none of these and neither a number nor text. A number in a dataclass could change unseen."""
    found = []
    for value in values:
        if value is None or isinstance(value, (int, float, str)):
            continue
        parts = (value,)
        if dataclasses.is_dataclass(value) and not isinstance(value, nn.Module):
            parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        parts = [part for part in parts if part is not None]
        if not all(isinstance(part, nn.Module) for part in parts):
            return None
        found += parts
    return found
