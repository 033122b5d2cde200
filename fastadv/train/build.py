"""Makes the parts that a Config describes: the method, the networks, the loader."""

import dataclasses

import torch
from tqdm import tqdm

from .. import data, methods, models
from ..attacks import PGD, Captured
from ..engine.frozen import freeze
from ..engine.query import evaluating
from ..engine.student import FastStudent
from ..errors import UsageError, about, values_from_user
from ..evaluate import check_fits, check_names, from_run
from ..evaluate.networks import checkpoint_file
from ..models.weights import load_pretrained
from ..models.zoo import is_own
from ..runs import parallel
from ..runs.config import PRECISIONS

TEACHERS = ("teacher", "clean_teacher")


def build_method(config):
    """The method with its attack. Where the config has None, start and BatchNorm mode are the
    method's own."""
    kind = methods.named(config.method)
    for name in methods.COMMON:
        if name in config.method_options:
            raise UsageError(
                f"{name} is no option of a method alone: use --{name.replace('_', '-')}"
            )
    with values_from_user():
        attack = PGD(
            config.eps,
            config.step_size,
            config.steps,
            config.init or kind.init,
            clip_start=kind.clip_start if config.init in (None, kind.init) else None,
        )
    method = methods.get(
        config.method,
        attack=attack,
        attack_bn=config.attack_bn,
        milestones=config.milestones,
        epochs=config.epochs,
        **config.method_options,
    )
    if config.eps_schedule != "constant" and not isinstance(method.attack, PGD):
        kind = type(method.attack).__name__
        raise UsageError(
            f"eps_schedule is {config.eps_schedule!r}, must be constant with the method's own "
            f"attack, a {kind}: only a PGD has a radius and a step to change"
        )
    if config.compile and isinstance(method, methods.VFD):
        raise UsageError(
            f"compile is given, must not be with {config.method}: it reads features inside the "
            "student, and a compiled network shows its logits alone"
        )
    if method.attack_bn == "train" and config.precision_attack != config.precision_outer:
        raise UsageError(
            f"precision_attack is {config.precision_attack}, must be precision_outer "
            f"({config.precision_outer}) when attack_bn is train: the student itself is attacked"
        )
    return method


def capturing(config, attack):
    """`attacks.Captured` of the attack where a GPU can replay it as a CUDA graph, else None."""
    replayed = isinstance(attack, PGD) and attack.restarts == 1 and attack.keep == "last"
    on_gpu = torch.device(config.device).type == "cuda"
    return Captured(attack) if replayed and on_gpu and config.cuda_graph == "auto" else None


def scheduled(config, attack, epoch, captured=None):
    """The attack of an epoch: `attack` with the radius and the step that eps_schedule gives it, as
    a CUDA graph by `captured`, if given."""
    if config.eps_schedule != "constant":
        share = (epoch + 1) / config.epochs
        eps, step_size = share * config.eps, share * config.step_size
        attack = dataclasses.replace(attack, eps=eps, step_size=step_size)
    if captured is None:
        return attack
    captured.attack = attack
    return captured


def build_student(config, dataset):
    """The student with fresh weights. Raises UsageError if it does not take the data's images."""
    channels = dataset.train.images.shape[1]
    with about("student"):
        student = models.get(config.student, dataset.num_classes, channels, config.student_width)
    check_fits(student, dataset, config.student)
    return student


def start_student(student, config, dataset):
    """Copies the weights of the config's student_checkpoint, if any, into the student."""
    if (path := config.student_checkpoint) is None:
        return
    path = checkpoint_file(path)
    with about("student_checkpoint"):
        fresh = load_pretrained(student, path, dataset.num_classes)
    if fresh and parallel.rank() == 0:
        tqdm.write(
            f"student: {path} has another number of classes, so {', '.join(fresh)} starts afresh"
        )


def build_nets(config, dataset, method, resumed=False):
    """(methods.Nets, the bare student). resumed: a run's last weights replace the student's, so
    that it needs none to start from."""
    check_teachers(config, method)
    student = build_student(config, dataset)
    if not resumed:
        start_student(student, config, dataset)
    student.to(config.device, memory_format=torch.channels_last)
    asked = [which for which in TEACHERS if which in method.teachers]
    teachers = {which: build_teacher(config, dataset, which) for which in asked}
    trained = FastStudent(student, PRECISIONS[config.precision_outer])
    if config.compile:
        check_whole(trained, dataset)
        trained.compile(fullgraph=True, dynamic=False)
    nets = methods.Nets(
        student=trained,
        student_twin=freeze(student, PRECISIONS[config.precision_attack]),
        **teachers,
    )
    return nets, student


@torch.no_grad()
def check_whole(student, dataset):
    """Raises UsageError where torch.compile cannot take the student as one graph."""
    traced = torch.compile(student, backend="eager", fullgraph=True)
    device = next(student.parameters()).device
    try:
        with evaluating(student):
            traced(torch.zeros(1, *dataset.train.images.shape[1:], device=device))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"compile is given, but torch.compile cannot take the student whole: {reason}"
        ) from error


def check_teachers(config, method):
    """Raises UsageError for a teacher that is given but that the method does not have."""
    for which in TEACHERS:
        for field in (which, f"{which}_checkpoint"):
            if getattr(config, field) and which not in method.teachers:
                raise UsageError(f"{field} is given, but method {config.method} has no {which}")


def build_teacher(config, dataset, which):
    """The frozen "teacher" or "clean_teacher" of the config, in the teachers' precision. Without a
    checkpoint a network of a user's own has the weights that it comes with."""
    architecture, path = getattr(config, which), getattr(config, f"{which}_checkpoint")
    own = architecture is not None and is_own(architecture)
    if path is None and not own:
        raise UsageError(f"{which}_checkpoint is missing, which method {config.method} needs")
    with about(which):
        if architecture is None:
            name = which.replace("_", "-")
            teacher, _ = from_run(path, f"; weights from elsewhere need --{name}")
        elif path is None:
            teacher = models.get(architecture).eval()
        else:
            channels = dataset.train.images.shape[1]
            teacher = models.load(architecture, path, dataset.num_classes, channels)
    check_fits(teacher, dataset, path or architecture)
    if path is not None:
        check_names(path, dataset)
    teacher.to(config.device, memory_format=torch.channels_last)
    return freeze(teacher, PRECISIONS[config.precision_teacher])


def build_loader(config, dataset):
    """Shuffled batches of the training set, and of extra data, with the config's augmentation."""
    side = min(dataset.train.images.shape[2:])
    if config.cutout > side:
        raise UsageError(f"cutout is {config.cutout}, must be at most {side}, the images' side")
    names = (field.name for field in dataclasses.fields(data.Augmentation))
    extra = config.extra_data and data.load_extra(config.extra_data, dataset)
    return data.Loader(
        dataset.train,
        config.batch_size,
        padding=dataset.padding,
        flips=dataset.flips,
        shuffle=True,
        seed=config.seed,
        channels_last=True,
        device=config.device,
        augmentation=data.Augmentation(**{name: getattr(config, name) for name in names}),
        num_classes=dataset.num_classes,
        rank=parallel.rank(),
        world=parallel.world(),
        extra=extra,
        extra_fraction=config.extra_fraction,
    )
