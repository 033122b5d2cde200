r"""python -m fastadv.train: adversarial training and robustness distillation.

    python -m fastadv.train                                   # the digits demo, about two minutes
    python -m fastadv.train --method rslad --data cifar10 --data-dir DIR --student resnet18 \
        --teacher wrn34_10 --teacher-checkpoint model_cifar_wrn.pt --precision bf16 --out runs/rslad
    python -m fastadv.train --recipe rslad-cifar10-resnet18 --data-dir DIR --teacher-checkpoint FILE
    python -m fastadv.train --resume runs/rslad
"""

import argparse
import dataclasses
import itertools
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import data, log, methods, models
from .attacks import PGD
from .config import PRECISIONS, Config, number, recipe
from .evaluate import accuracies, check_fits, from_run
from .frozen import InPrecision, freeze
from .run import Run


def train(config, resume=False):
    """Runs or resumes the training that `config` describes in the folder `config.out`.

    Returns the rows of its metrics.jsonl. After a kill, `resume=True` goes on from the last whole
    epoch, bit for bit as if it had never stopped (same machine, versions and thread count). Raises
    FileExistsError when the folder holds a run already, ValueError on unusable settings.
    """
    torch.manual_seed(config.seed)
    folder, device = Path(config.out), config.device
    dataset = data.load(config.data, config.data_dir)
    channels = dataset.train.images.shape[1]
    method = build_method(config).to(device)
    student = models.get(config.student, dataset.num_classes, channels, config.student_width)
    student.to(device, memory_format=torch.channels_last)
    if config.teacher_checkpoint and "teacher" not in method.teachers:
        raise ValueError(f"teacher_checkpoint is given, but method {config.method} has no teacher")
    nets = methods.Nets(
        student=InPrecision(student, PRECISIONS[config.precision_outer]),
        teacher=build_teacher(config, dataset) if "teacher" in method.teachers else None,
        student_twin=freeze(student, PRECISIONS[config.precision_attack]),
    )
    optimizer = torch.optim.SGD(
        [*student.parameters(), *method.parameters()],
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
    )
    loader = data.Loader(
        dataset.train,
        config.batch_size,
        padding=dataset.padding,
        flips=dataset.flips,
        shuffle=True,
        seed=config.seed,
        channels_last=True,
        device=device,
    )
    run = Run(config, dataset, student, method, optimizer, method.init_state(device))
    run.resume() if resume else run.open()

    for epoch in range(run.epoch, config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(epoch)
        student.train()
        loss_sum = torch.zeros((), device=device)
        bad_gradients = torch.zeros((), dtype=torch.int64, device=device)
        start = time.perf_counter()
        bar = tqdm(
            loader.epoch(epoch),
            f"{folder.name} {epoch + 1}/{config.epochs}",
            len(loader),
            leave=False,
            unit="batch",
        )
        for step, fields in enumerate(bar):
            batch = methods.Batch(*fields)
            batch.x_adv = method.perturb(nets, batch, run.state)
            loss, run.state = method.outer(nets, batch, run.state)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            bad_gradients += method.attack.bad_gradients
            if step % 20 == 0:
                bar.set_postfix(loss=f"{finite(loss, epoch):.4f}")
        run.state = method.end_epoch(run.state)
        row = {
            "epoch": epoch,
            "lr": config.lr_at(epoch),
            "loss": finite(loss_sum / len(loader), epoch),
            "bad_gradients": int(bad_gradients),
            "images_per_s": round(len(dataset.train) / (time.perf_counter() - start), 1),
        }
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            clean, robust = accuracies(
                student, dataset.val, ("clean", "pgd20"), eps=config.eps, device=device
            ).values()
            row |= {"clean_acc": clean, "robust_acc": robust}
        run.end_epoch(row)
    return log.read(run.metrics)


def finite(loss, epoch):
    """The loss as a float. Raises ValueError when training has diverged."""
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError(f"loss is {value} in epoch {epoch + 1}: training diverged; lower lr")
    return value


def build_method(config):
    """The method with its attack; the method's own start where config.init is None."""
    init = config.init or methods.METHODS.get(config.method, methods.Method).init
    attack = PGD(config.eps, config.step_size, config.steps, init)
    try:
        return methods.get(
            config.method, attack=attack, attack_bn=config.attack_bn, **config.method_options
        )
    except TypeError as error:
        raise ValueError(f"method {config.method} does not take these options: {error}") from None


def build_teacher(config, dataset):
    """The frozen teacher of config.teacher_checkpoint in the teacher's precision."""
    if config.teacher_checkpoint is None:
        raise ValueError(f"teacher_checkpoint is missing, which method {config.method} needs")
    if config.teacher is None:
        teacher, _ = from_run(config.teacher_checkpoint)
    else:
        channels = dataset.train.images.shape[1]
        teacher = models.get(config.teacher, dataset.num_classes, channels)
        models.load_weights(teacher, config.teacher_checkpoint)
    check_fits(teacher, dataset, config.teacher_checkpoint)
    teacher.to(config.device, memory_format=torch.channels_last)
    return freeze(teacher, PRECISIONS[config.precision_teacher])


def parse(argv):
    """(Config, resume) from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastadv.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", help="a published recipe; flags override its fields")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    parser.add_argument("--precision", choices=PRECISIONS, help="attack, outer and teacher at once")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="options",
        help="an option of the method, such as beta=6 or adv_weight=5/6",
    )
    types = {
        float: number,
        float | None: number,
        int: int,
        int | None: int,
        tuple[int, ...]: lambda text: tuple(int(v) for v in text.split(",") if v),
    }
    for field in dataclasses.fields(Config):
        if field.name != "method_options":
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(
                flag,
                type=types.get(field.type, str),
                default=argparse.SUPPRESS,
                help=field.metadata["help"],
            )
    given = vars(parser.parse_args(argv))
    resume, name, precision, options = (
        given.pop(k) for k in ("resume", "recipe", "precision", "options")
    )
    if resume:
        if given or name or precision or options:
            parser.error("--resume takes the run's own settings: no other flag goes with it")
        if not (Path(resume) / "config.json").is_file():
            raise FileNotFoundError(f"--resume is {resume}, a folder without a run's config.json")
        saved = Config.from_json((Path(resume) / "config.json").read_text())
        return dataclasses.replace(saved, out=resume), True
    fields = recipe(name) if name else {}
    fields |= {
        f"precision_{part}": precision for part in ("attack", "outer", "teacher") if precision
    }
    for option in options:
        if "=" not in option:
            raise ValueError(f"--set is {option!r}, must be NAME=VALUE, such as beta=6")
    pairs = [option.partition("=")[::2] for option in options]
    fields["method_options"] = fields.get("method_options", {}) | {k: number(v) for k, v in pairs}
    config = Config(**(fields | given))
    config.out = config.out or str(fresh_folder(f"{config.method}-{config.data}"))
    return config, False


def fresh_folder(name):
    """The first of runs/name, runs/name-2, ... that does not exist."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in (Path("runs") / n for n in names) if not path.exists())


def main(argv):
    if not argv:
        from .demo import demo

        demo(fresh_folder("digits"))
        return
    config, resume = parse(argv)
    train(config, resume)
    print(f"run folder: {config.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on from the last whole epoch")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
