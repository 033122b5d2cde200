"""Whole training steps: perturb, outer problem, backward, optimiser; `--suite train` of run.py.

"published" is the step of the authors' code (see published.py), in float32; "compiled" the same
with torch.compile of both networks, left out if it would take minutes more; "bf16 autocast" the
same under torch.autocast with both networks in channels_last; "fastadv bf16" the trainer's step
with --precision bf16, its batch drawn by the Loader. With the teacher cache a cold step stores the
teacher's logits, as in a first epoch, and a warm one finds them; "no teacher" is a step with these
logits given, which a cache cannot beat; after ", compiled" the student is as --compile has it.
AdaAD and AdvFunMatch ask the teacher at every x_adv, which no cache can hold; their published steps
take a minute each, so three samples are taken. data, teacher, attack and outer are shares of a
step's time; the teacher's counts wherever it runs.

Not a pytest-benchmark module: a step takes seconds.
"""

import contextlib
import copy
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import published
import torch
from bench_attack import network
from published import EPS, STEP_SIZE, STEPS
from timing import Case, without_bfloat16

from fastadv import data, freeze, methods
from fastadv.attacks import PGD
from fastadv.attacks.graphs import Captured
from fastadv.data.dataset import image_set
from fastadv.engine.student import FastStudent
from fastadv.teacher_cache import BLOCK, TeacherCache

COMPILED = "fastadv bf16", "fastadv bf16, warm cache"
SECTIONS = ("data", "teacher", "attack", "outer")


class Clock:
    """The seconds that each section of a step takes; time in nested sections belongs to the
    innermost."""

    def __init__(self):
        self.seconds, self.running, self.since = Counter(), [], 0.0

    def enter(self, name):
        self._stop()
        self.running.append(name)

    def leave(self):
        self._stop()
        self.running.pop()

    def _stop(self):
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def section(self, name):
        self.enter(name)
        yield
        self.leave()

    @contextlib.contextmanager
    def teacher(self, twin):
        """A context in which all that `twin` computes, forward and backward, is the section
        "teacher". The twin must be the last network to run forward, so that it is the first in the
        backward pass."""
        forward = twin.forward

        def timed(x):
            with self.section("teacher"):
                out = forward(Mark.apply(x, self.leave))
            return Mark.apply(out, lambda: self.enter("teacher"))

        twin.forward = timed
        try:
            yield
        finally:
            del twin.forward

    def shares(self):
        whole = sum(self.seconds.values())
        return {name: round(self.seconds[name] / whole, 4) for name in SECTIONS}


class Mark(torch.autograd.Function):
    """The identity, which calls `passed` when the backward pass goes through it."""

    @staticmethod
    def forward(ctx, x, passed):
        ctx.passed = passed
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.passed()
        return gradient, None


def image_loader(count, device):
    """A Loader over random colour images of 32x32 with all 162 views."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=random, dtype=torch.uint8)
    split = image_set(pixels.numpy(), (torch.arange(count) % 10).numpy())
    options = {"shuffle": True, "channels_last": True, "device": device}
    return data.Loader(split, count, padding=4, flips=2, **options)


def published_step(name, student, teacher, optimizer, x):
    _, loss = published.METHODS[name](student, teacher, x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def autocast_step(name, student, teacher, x):
    """The published step of copies in channels_last under autocast, as a call."""
    nets = [copy.deepcopy(net).to(memory_format=torch.channels_last) for net in (student, teacher)]
    published.torch_alone(nets[0])
    optimizer = torch.optim.SGD(nets[0].parameters(), 1e-3, 0.9)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16):
            published_step(name, *nets, optimizer, x)

    return step


class Engine:
    """fastadv's step of a method on the images of a loader, in bfloat16 with a teacher cache."""

    def __init__(self, name, student, teacher, loader, compiled=False):
        low = torch.bfloat16
        student = copy.deepcopy(student).to(memory_format=torch.channels_last).train()
        self.teacher = freeze(copy.deepcopy(teacher).to(memory_format=torch.channels_last), low)
        twin = freeze(student, low)
        trained = FastStudent(student, low)
        if compiled:
            trained.compile(fullgraph=True, dynamic=False)
        self.nets = methods.Nets(trained, self.teacher, student_twin=twin)
        self.method = methods.get(name, attack=PGD(EPS, STEP_SIZE, STEPS, "gaussian"))
        if loader.images.is_cuda:
            self.method.attack = Captured(self.method.attack)
        fused = loader.images.is_cuda
        self.optimizer = torch.optim.SGD(student.parameters(), 1e-3, 0.9, fused=fused)
        self.loader, self.rows = loader, torch.arange(len(loader.images))
        self.cache = TeacherCache(self.teacher, loader, ("logits",), Path(tempfile.mkdtemp()))
        self.unseen = iter(range(1, loader.views))

    def batch(self, view=0):
        return methods.Batch(*self.loader.view_batch(self.rows, torch.full_like(self.rows, view)))

    def lookup(self, batch):
        return self.cache.lookup(batch.index, batch.view, batch.x)["logits"]

    def step(self, lookup=None, view=0, clock=None):
        """lookup: batch -> the teacher's logits on x, which the teacher itself gives without."""
        clock = clock or Clock()
        with clock.section("data"):
            batch = self.batch(view)
        if lookup:
            with clock.section("teacher"):
                batch.memo["teacher", "x", "logits"] = lookup(batch)
        with clock.section("attack"):
            batch.x_adv = self.method.perturb(self.nets, batch, {})
        with clock.section("outer"):
            loss, _ = self.method.outer(self.nets, batch, {})
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def cold(self, clock=None):
        self.step(self.lookup, next(self.unseen), clock=clock)

    def variants(self):
        """{provider: step(clock=None)}; those with a cache where the method can use one."""
        if not self.method.cacheable():
            return {"fastadv bf16": self.step}
        known = self.lookup(self.batch())
        return {
            "fastadv bf16, no cache": self.step,
            "fastadv bf16, cold cache": self.cold,
            "fastadv bf16, warm cache": partial(self.step, self.lookup),
            "fastadv bf16, no teacher": partial(self.step, lambda _: known),
        }

    def shares(self, step, steps=3):
        """{section: share} of the time of some steps."""
        clock = Clock()
        with clock.teacher(self.teacher):
            for _ in range(steps):
                step(clock=clock)
        return clock.shares()


def check(name, student, teacher, x):
    """One attack step and the loss in float32 are the published ones, from the same start; but
    rounding turns about 0.1 % of the signs where two random networks make the gradient."""
    start = x + 0.001 * torch.randn_like(x)
    wanted, loss = published.METHODS[name](copy.deepcopy(student), teacher, x, steps=1, start=start)
    method = methods.get(name, attack=PGD(EPS, STEP_SIZE, 1))
    nets = methods.Nets(copy.deepcopy(student).train(), freeze(teacher))
    batch = methods.Batch(x, None)
    batch.x_adv = method.perturb(nets, batch, {}, start=start)
    assert (batch.x_adv == wanted).float().mean() >= 0.99
    batch.x_adv = wanted
    torch.testing.assert_close(method.outer(nets, batch, {})[0], loss, rtol=1e-3, atol=1e-5)


def case(
    name,
    student_name,
    teacher_name="wrn34_10",
    batch=64,
    samples=3,
    rival=False,
    compiled=False,
    device="cpu",
    **size,
):
    """rival: with torch.compile of the published step. compiled: with that of fastadv's student, as
    --compile has it. Of the student size holds what `models.get` takes."""
    torch.manual_seed(0)
    student, teacher = network(student_name, **size), network(teacher_name)
    student, teacher, loader = student.to(device), teacher.to(device), image_loader(batch, device)
    engine = Engine(name, student, teacher, loader)
    x, optimizer = engine.batch().x.contiguous(), torch.optim.SGD(student.parameters(), 1e-3, 0.9)
    steps = engine.variants()
    if compiled:
        again = Engine(name, student, teacher, loader, compiled=True).variants()
        steps |= {f"{key}, compiled": again[key] for key in again if key in COMPILED}
    providers = {
        "published, fp32 eager": lambda: published_step(name, student, teacher, optimizer, x),
        **steps,
    }
    left_out = [] if rival else ["compiled: too slow"]
    if low := without_bfloat16(x.device):
        left_out.append(low)
    else:
        autocast = autocast_step(name, student, teacher, engine.batch().x)
        providers["published, bf16 autocast"] = autocast
    if rival:
        nets = torch.compile(student), torch.compile(teacher)
        providers["published, fp32 compiled"] = lambda: published_step(name, *nets, optimizer, x)
    if engine.method.cacheable():
        providers["lookup alone"] = lambda: engine.lookup(engine.batch())

    def gate():
        assert engine.nets.student.net.training  # as the published step leaves its student
        check(name, student, teacher, x)
        if engine.method.cacheable():
            with torch.no_grad():
                wanted = torch.cat([engine.teacher(part) for part in x.split(BLOCK)])
            misses = engine.cache.misses
            found = engine.lookup(engine.batch())
            torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)  # bf16, other layout
            assert engine.cache.misses == misses > 0
        for step in steps.values():
            step()
        if rival:
            providers["published, fp32 compiled"]()

    return Case(
        f"{engine.method.__class__.__name__} step",
        f"{student_name}, {teacher_name}, {batch}x3x32x32",
        providers,
        gate,
        images=batch,
        facts=lambda: {key: engine.shares(step) for key, step in steps.items() if not x.is_cuda},
        left_out="; ".join(left_out) or None,
        calls=0,
        samples=samples,
    )


def cases():
    for student in ("resnet18", "mobilenet_v2"):
        yield case("rslad", student, samples=5, rival=True)
        yield case("adaad", student)
        yield case("advfunmatch", student)
