r"""python -m fastadv.evaluate: clean and robust accuracy of networks.

    python -m fastadv.evaluate --checkpoint runs/rslad/best.safetensors --data-dir DIR
    python -m fastadv.evaluate --checkpoint model_cifar_wrn.pt --model wrn34_10 \
        --data cifar10 --data-dir DIR --attacks paper,aa --precision bf16 --out results
    python -m fastadv.evaluate --model-from my_package.nets:robust_net --data cifar10 --data-dir DIR

--attacks names single attacks and suites. Attacks are fgsm, pgd20, cw, apgd-ce, square and others,
pgd-50-10 (50 steps, 10 restarts), and transfer-NAME, which follows the gradients of --source.
fmn, ddn, deepfool and cw-l2 look for the nearest adversarial example of each image: the report then
has the median of its distance and the accuracy at every radius.
Suites are paper (the attacks of most papers), quick, aa (AutoAttack's standard version), aa-plus
and aa-rand (for networks whose forward pass is random). The clean accuracy always comes first.
corruptions are the 15 of CIFAR-10-C and ImageNet-C, read from --corruptions-dir or made of the
images.

An image counts as broken when the network itself, in fp32, misclassifies its adversarial example,
and the example lies within the radius and in [0, 1]; --precision speeds up the search alone.

With --out the same command goes on where it was stopped. Under torchrun the processes share the
images out, with the same result.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from .. import data, models
from ..attacks import checks, suite
from ..errors import Parser, UsageError, as_command, values_from_user
from ..runs import checkpoint, parallel
from ..runs.code import bring_in
from ..runs.config import PRECISIONS, Config, device, versions
from ..train.cli import NUMBER, WHOLE, flag
from . import corruptions, curve, networks, report, search, validity
from .page import page
from .record import Record, digest, open_examples


@dataclass
class Subject:
    """One network under evaluation: its label, the architecture's name and the run's Config."""

    label: str
    architecture: str
    model: torch.nn.Module
    config: Config


def arguments(argv):
    parser = Parser(
        prog="python -m fastadv.evaluate", usage="%(prog)s [FLAGS]", description=__doc__
    )
    add_networks(parser.add_argument_group("networks").add_argument)
    add_images(parser.add_argument_group("images").add_argument)
    add_attacks(parser.add_argument_group("attacks").add_argument)
    add = parser.add_argument_group("output").add_argument
    text = "folder for reports, figures and what a stopped evaluation goes on from"
    add("--out", type=Path, metavar="DIR", help=text)
    text = "write the adversarial examples (adversarial.npy) and a figure into --out"
    add("--save-adversarial", action="store_true", help=text)
    return parser.parse_args(argv)


def add_networks(add):
    add(
        "--checkpoint",
        nargs="+",
        metavar="PATH",
        help="runs, by their folder (whose best checkpoint is taken) or a .safetensors in it; with "
        "--model or --model-from also weight files from elsewhere, such as a .pt",
    )
    text = f"architecture of checkpoints from elsewhere: {models.KNOWN}"
    add("--model", metavar="NAME", help=text)
    text = "channels of the stem of --model, if not the published ones"
    add("--width", type=WHOLE, metavar="N", help=text)
    add(
        "--model-from",
        metavar="module:function",
        help="a network of your own: the function to import, which makes it; --checkpoint then "
        "loads weights into it",
    )
    add(
        "--student-from",
        action="append",
        default=[],
        metavar="module:function",
        help="the function that a run was trained with by --student-from; give the flag again for "
        "a run with another one",
    )
    text = "a run's checkpoint: transfer-NAME attacks follow its network's gradients"
    add("--source", metavar="PATH", help=text)


def add_images(add):
    add("--data", metavar="NAME", help=f"{data.KNOWN}; default: the run's")
    text = "in place of --data, a data set of your own: the function to import, which reads it"
    add("--data-from", metavar="module:function", help=text)
    text = "folder of the data set's files, or the .npz file; default: the run's"
    add("--data-dir", metavar="PATH", help=text)
    text = "width and height that pictures of --data folder get, in pixels; default: the run's"
    add("--image-size", type=WHOLE, metavar="N", help=text)
    text = "validation images (held out from training) or test images; default: %(default)s"
    add("--split", choices=("val", "test"), default="test", help=text)
    text = "only N images: the first of CIFAR, SVHN and digits, of others N drawn by a fixed seed"
    add("--limit", type=WHOLE, metavar="N", help=text)


def add_attacks(add):
    text = "attacks and suites, see above; default: %(default)s"
    add("--attacks", default="paper", metavar="NAME,NAME", help=text)
    text = "folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C, for corruptions; default: made here"
    add("--corruptions-dir", type=Path, metavar="DIR", help=text)
    add("--eps", type=NUMBER, metavar="X", help="radius; default: the run's, else 8/255 (linf)")
    text = "of the radius; default: %(default)s"
    add("--norm", choices=checks.NORMS, default="linf", help=text)
    text = "what the search for examples computes in; default: %(default)s"
    add("--precision", choices=PRECISIONS, default="fp32", help=text)
    text = "images per batch, which changes no result; default: %(default)s"
    add("--batch-size", type=WHOLE, default=256, metavar="N", help=text)
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda; default: %(default)s")
    text = "of the attacks' random starts; default: %(default)s"
    add("--seed", type=WHOLE, default=0, metavar="N", help=text)


def import_own(args):
    """Brings in the code of a user's own that the flags name."""
    for name in args.student_from:
        bring_in("--student-from", name, models.register)
    if args.data_from:
        if args.data:
            raise UsageError("--data and --data-from are both given: give one")
        bring_in("--data-from", args.data_from, data.register)
        args.data = args.data_from


def check(args):
    """Raises UsageError for flags that no evaluation can follow, before any work is done."""
    if not (args.checkpoint or args.model_from):
        raise UsageError("--checkpoint is missing: give a run, or a network by --model-from")
    if len({*(args.checkpoint or ())}) < len(args.checkpoint or ()):
        raise UsageError(f"--checkpoint has one twice: {', '.join(args.checkpoint)}")
    if args.model and args.model_from:
        raise UsageError("--model and --model-from are both given: give one")
    if (args.model or args.model_from) and not args.data:
        raise UsageError("--data is missing: without a run, nothing says which data to take")
    if args.norm != "linf" and args.eps is None:
        example = {"l2": 0.5, "l1": 12}[args.norm]
        raise UsageError(f"--eps is missing, which --norm {args.norm} needs, such as {example}")
    for name in ("limit", "batch_size", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"{flag(name)} is {getattr(args, name)}, must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed is {args.seed}, must be in [0, 2^63)")
    if args.save_adversarial and not args.out:
        raise UsageError("--save-adversarial needs --out, the folder to save in")
    if args.corruptions_dir and not corrupts(args):
        raise UsageError("--corruptions-dir is given, --attacks must then have corruptions")
    if args.corruptions_dir and args.split == "val":
        raise UsageError("--split is val, must be test with --corruptions-dir, which is of it")
    eps = 8 / 255 if args.eps is None else args.eps
    with values_from_user():
        stages = attacks(args, eps)
    if any(stage.transferred for stage in stages) and not args.source:
        raise UsageError("--source is missing, must be a run's checkpoint for transfer attacks")
    device(args.device)


def corrupts(args):
    """Whether --attacks has corruptions."""
    return corruptions.NAME in args.attacks.split(",")


def attacks(args, eps):
    """The stages of --attacks, clean first, without those of corruptions."""
    names = [name for name in args.attacks.split(",") if name != corruptions.NAME]
    return suite.stages(["clean", *names], eps, args.norm)


def dataset_of(args, config):
    """(name, folder, image size) of the images: the flags', else those of a run. Folder and size of
    a run are those of its own data set alone."""
    same = args.data in (None, config.data)
    of_run = (config.data_dir, config.image_size) if same else (None, None)
    return args.data or config.data, args.data_dir or of_run[0], args.image_size or of_run[1]


def subjects(args):
    """(list of Subject, Dataset) that the flags name. Raises UsageError where they do not fit."""
    paths, found = args.checkpoint or [None], []
    if not (args.model or args.model_from):
        for path in paths:
            otherwise = "; weights from elsewhere need --model, the name of their network"
            model, config = networks.from_run(path, otherwise)
            found.append(Subject(path, config.student, model, config))
    else:
        config = Config(data=args.data, data_dir=args.data_dir, image_size=args.image_size)
    sets = {dataset_of(args, subject.config) for subject in found} or {dataset_of(args, config)}
    if len(sets) > 1:
        raise UsageError(f"--data is missing: the runs were trained on {sorted(map(str, sets))}")
    *place, image_size = sets.pop()
    dataset = data.load(*place, image_size=image_size)
    for path in paths if not found else ():
        if args.model_from:
            model, name = networks.from_code(args.model_from, path), args.model_from
        else:
            channels, name = dataset.test.images.shape[1], args.model
            model = models.load(name, path, dataset.num_classes, channels, args.width)
        found.append(Subject(path or name, name, model, config))
    for subject in found:
        networks.check_fits(subject.model, dataset, subject.label)
    for path in args.checkpoint or ():
        networks.check_names(path, dataset)
    radii = {subject.config.eps for subject in found}
    if args.eps is None and len(radii) > 1:
        raise UsageError(f"--eps is missing: the runs were trained with {sorted(radii)}")
    return found, dataset


def folder(out, label):
    """The folder in `out` for a checkpoint. Its name is the checkpoint's path in one word."""
    path = Path(label)
    path = path.with_suffix("") if path.suffix in (".safetensors", ".pt", ".pth") else path
    return out / "-".join(part for part in path.parts if part.strip("./")).replace(":", "-")


def limited(dataset, args):
    """(ImageSet, in words how many images of which it has) of the split and limit of the flags."""
    split = getattr(dataset, args.split)
    if args.limit is None or args.limit >= len(split):
        return split, f"{len(split)} images"
    if dataset.mixed:  # what papers take, and the same for all who compare
        return split.take(torch.arange(args.limit)), f"first {args.limit} of {len(split)} images"
    words = f"{args.limit} of {len(split)} images, drawn by a fixed seed"
    return split.sample(args.limit), words


def evaluate(subject, dataset, split, words, args, source, corrupted):
    """Attacks one network and reports it: {stage: accuracy}. corrupted: more stages."""
    eps = subject.config.eps if args.eps is None else args.eps
    settings = {
        "architecture": subject.architecture,
        "dataset": dataset.name,
        "split": args.split,
        "images": len(split),
        "attacks": args.attacks,
        "eps": eps,
        "norm": args.norm,
        "precision": args.precision,
        "seed": args.seed,
    }
    stages = attacks(args, eps) + corrupted
    some = split.sample(args.batch_size)
    x, y = some.images.to(args.device).float() / 255, some.labels.to(args.device)
    model, stages, warnings = validity.probe(subject.model.to(args.device), x, y, stages)
    warnings += corruptions.left_out(stages)
    print(
        f"\n{subject.label}: {dataset.name} {args.split}, {words}, {args.norm} eps "
        f"{report.fraction(eps, args.norm)}, {args.precision} search, fp32 verdict, seed "
        f"{args.seed}",
        flush=True,
    )
    out = args.out and folder(args.out, subject.label)
    settings |= {
        "weights_sha256": digest(subject.model.state_dict().values()),
        "images_sha256": digest((split.images, split.labels)),
        "corruptions_dir": args.corruptions_dir and str(args.corruptions_dir),
        "source": source and digest(source.state_dict().values()),
        "saved": args.save_adversarial,
    } | versions()
    record = Record(len(split), settings, out)
    if args.save_adversarial:
        begun = bool(record.verdicts)
        record.examples = open_examples(out / "adversarial.npy", split.images, begun)
    search.run(
        model,
        split,
        stages,
        source=source,
        precision=args.precision,
        batch_size=args.batch_size,
        device=args.device,
        seed=args.seed,
        record=record,
        progress=parallel.rank() == 0,
        shared=True,
    )
    warnings += validity.review(record, stages)
    print(report.describe(record, stages))
    distances = curve.distances(record, stages)
    if distances:
        print(curve.describe(distances, eps, args.norm))
    for warning in warnings:
        print(f"warning: {warning}")
    if out:
        settings |= {"checkpoint": subject.label, "chosen": words, "date": date.today().isoformat()}
        settings["classes"] = dataset.classes
        if distances:
            settings["minimal_norm"] = curve.summary(distances, eps, args.norm)
            curve.plot(out / "minimal_norm.png", distances, eps, args.norm)
        text = report.as_json(record, stages, settings, warnings, split.labels)
        checkpoint.atomic_write(out / "report.json", text)
        checkpoint.atomic_write(out / "report.html", page(json.loads(text)))
        if args.save_adversarial:
            report.grid(out / "adversarial.png", record, stages, split.images, eps)
        print(f"report: {out / 'report.json'} and report.html")
    return report.rates(record, stages)


def main(argv=None):
    with parallel.group(), contextlib.ExitStack() as stack:
        if parallel.rank():  # the first process prints and writes
            stack.enter_context(contextlib.redirect_stdout(None))
        command(arguments(argv))


def command(args):
    parallel.check_device(args.device)
    if parallel.rank():
        args.out, args.save_adversarial = None, False
    import_own(args)
    check(args)
    found, dataset = subjects(args)
    source = networks.from_run(args.source)[0].to(args.device) if args.source else None
    if source is not None:
        networks.check_fits(source, dataset, args.source)
        networks.check_names(args.source, dataset)
    of_set = dataset.test, args.corruptions_dir, dataset.classes
    corrupted = corruptions.corruption_stages(*of_set) if corrupts(args) else []
    rest = *limited(dataset, args), args, source, corrupted
    results = {one.label: evaluate(one, dataset, *rest) for one in found}
    if len(results) > 1:
        root = os.path.commonpath(map(os.path.abspath, results))
        short = {os.path.relpath(label, root): rates for label, rates in results.items()}
        stages = next(iter(short.values()))
        rows = {stage: {label: rates[stage] for label, rates in short.items()} for stage in stages}
        print("\n" + report.table(short, rows))
        if args.out:
            report.comparison(args.out / "comparison.png", stages, short)
            print(f"comparison: {args.out / 'comparison.png'}")


if __name__ == "__main__":
    with as_command("nothing is reported; with --out the same command goes on from here"):
        main()
