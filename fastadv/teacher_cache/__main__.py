r"""python -m fastadv.teacher_cache: fill, verify, list and clear out caches of teacher outputs.

    python -m fastadv.teacher_cache fill DIR --run runs/rslad [--views 20]
    python -m fastadv.teacher_cache fill DIR --teacher wrn34_10 --teacher-checkpoint FILE \
        --data cifar10 --data-dir DATA
    python -m fastadv.teacher_cache verify DIR [--run runs/rslad] [--sample 1000]
    python -m fastadv.teacher_cache info DIR
    python -m fastadv.teacher_cache prune DIR [--keep NAME ...]

A cache is a table of what one teacher says of a training set. It has one row for each view of each
image; a view is one way in which the augmentation may crop and flip an image. DIR is the folder of
all caches, or the folder of one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import data
from ..errors import Parser, UsageError, as_command
from ..runs.config import device
from ..runs.progress import bar
from ..train import cli
from ..train.build import build_loader, build_method, build_teacher
from . import TeacherCache, store

PROGRAM = "python -m fastadv.teacher_cache"


def fill(args, rest):
    """Computes the rows that are missing, view by view; a later call goes on where one ended."""
    cache, loader = opened(args, rest)
    views = loader.views if args.views is None else min(args.views, loader.views)
    rows = torch.arange(len(loader.images))
    with tqdm(total=views * len(rows), unit="row", disable=None) as shown:
        for view in range(views):
            missing = rows[~cache.filled(loader.index, torch.full_like(rows, view))]
            shown.update(len(rows) - len(missing))
            for part in missing.split(loader.batch_size):
                x, _, index, ids = loader.view_batch(part, torch.full_like(part, view))
                cache.lookup(index, ids, x)
                if not cache.writable:
                    raise OSError(f"{args.directory}: cannot be written, see the warning above")
                shown.update(len(part))
            cache.sync()
    cache.close()
    print(f"{cache.folder}: {views} of {loader.views} views filled, {cache.misses} rows computed")


def verify(args, rest):
    """Checks the checksum of every row and, where a teacher is given, computes a random sample of
    the rows again."""
    bad = 0
    for folder in caches(args.directory):
        try:
            _, count, damaged = checked(folder)
        except store.Damaged as error:
            print(error)
            bad += 1
            continue
        print(f"{folder}: {count} rows filled, {len(damaged)} damaged")
        bad += len(damaged)
    if args.run or rest:
        bad += recomputed(args, rest)
    else:
        print("no teacher given: checksums alone were verified")
    if bad:
        raise UsageError(f"{args.directory}: {bad} problems, see above; `prune` removes damage")


def recomputed(args, rest):
    """How many of a random sample of the filled rows differ from what the teacher says now."""
    cache, loader = opened(args, rest)
    rows = torch.arange(len(loader.images))
    views = bar(range(loader.views), "search", unit="view")
    there = [cache.filled(loader.index, torch.full_like(rows, view)) for view in views]
    view, row = torch.stack(there).nonzero(as_tuple=True)
    if not len(row):
        raise UsageError(f"{cache.folder}: no rows of this teacher, images and augmentation")
    generator = torch.Generator()
    generator.seed()
    sample = torch.randperm(len(row), generator=generator)[: args.sample]
    differ, largest = 0, 0.0
    for part in bar(sample.split(loader.batch_size), "verify", unit="batch"):
        x, _, index, ids = loader.view_batch(row[part], view[part])
        stored, now = cache.lookup(index, ids, x), cache.compute(x)
        errors = [(stored[name] - now[name]).abs().flatten(1).amax(1) for name in cache.names]
        errors = torch.stack(errors).amax(0)
        differ += int((errors > 0).sum())
        largest = max(largest, float(errors.max()))
    print(f"{cache.folder}: {len(sample)} rows recomputed, {differ} differ, by at most {largest:g}")
    if largest:
        print("differences of rounding come from another device, thread count or version of torch")
    return differ


def info(args, rest):
    """Prints the teacher and images of each cache, how full it is, and its size on the disk."""
    for folder in caches(args.directory):
        try:
            header = store.read_header(folder)
            table = store.Table(header, folder)
        except store.Damaged as error:
            print(f"{folder.name}\n  {error}")
            continue
        teacher, images = header["teacher"], header["images"]
        views, outputs = header["augmentation"]["views"], header["outputs"]
        count, possible = table.count(), images["count"] * views
        shape = "x".join(map(str, images["shape"]))
        shapes = ", ".join(f"{name} {header['shapes'][name]}" for name in outputs["names"])
        print(
            f"{folder.name}\n"
            f"  teacher {teacher['architecture']}, {teacher['precision']},"
            f" parameters {teacher['parameters'][:16]}, buffers {teacher['buffers'][:16]}\n"
            f"  images {images['count']} of {shape}, pixels {images['pixels'][:16]},"
            f" {views} views each\n"
            f"  outputs {shapes}, {outputs['dtype']}\n"
            f"  filled {count} of {possible} rows ({count / possible:.1%}),"
            f" {table.allocated() / 1e6:.1f} MB on disk"
        )


def prune(args, rest):
    """Deletes caches that cannot be read, and damaged rows of the others; with --keep also all
    caches that are not named."""
    folders = store.caches(args.directory)
    kept = None if args.keep is None else {Path(name).name for name in args.keep}
    if unknown := (kept or set()) - {folder.name for folder in folders}:
        raise UsageError(f"--keep names no cache of {args.directory}: {', '.join(sorted(unknown))}")
    for folder in folders:
        if kept is not None and folder.name not in kept:
            reason = "not kept"
        else:
            try:
                table, _, damaged = checked(folder)
            except store.Damaged as error:
                reason = error
            else:
                if len(damaged):
                    table.clear(damaged)
                    print(f"{folder}: cleared {len(damaged)} damaged rows")
                continue
        store.remove(folder)
        print(f"removed {folder}: {reason}")


def caches(directory):
    """The folders of caches in `directory`, one at least, or UsageError."""
    folders = store.caches(directory)
    if not folders:
        raise UsageError(f"{directory}: no caches in it")
    return folders


def checked(folder):
    """(its open table, rows filled, damaged ids, numpy [D]) of a cache. Raises store.Damaged."""
    table = store.Table(store.read_header(folder), folder)
    starts = range(0, table.rows, store.CHUNK)
    counts, damaged = zip(*map(table.check, bar(starts, folder.name)), strict=True)
    return table, sum(counts), np.concatenate(damaged)


def opened(args, rest):
    """(TeacherCache, Loader) of a run or of the flags of `python -m fastadv.train`."""
    given = rest
    if args.run:
        flags = (word.partition("=")[0] for word in rest if word.startswith("--"))
        known = cli.PLACE_FLAGS + cli.OWN_FLAGS
        cli.check_beside_run("--run", (flag for flag in flags if flag not in known))
        given = ["--resume", args.run, *rest]
    config, _ = cli.parse(given, prog=f"{PROGRAM} {args.command.__name__}", resuming="--run")
    device(config.device)  # raises where this machine has none
    method, which = build_method(config), args.which
    named = getattr(config, which) or getattr(config, f"{which}_checkpoint")
    if which not in method.teachers and not named:
        raise UsageError(
            f"method {config.method} has no {which}; --which names one of its teachers, which are: "
            f"{', '.join(method.teachers) or 'none'}"
        )
    dataset = data.load(config.data, config.data_dir, **config.images())
    teacher, loader = build_teacher(config, dataset, which), build_loader(config, dataset)
    names = args.names.split(",") if args.names else method.cacheable().get(which)
    if not names:
        raise UsageError(f"method {config.method} reads no {which} of x alone: give --names")
    dtype = getattr(torch, config.teacher_cache_dtype)
    return TeacherCache(teacher, loader, names, args.directory, dtype), loader


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


COUNT = cli.typed(positive, "a whole number of at least 1")


def arguments(argv):
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="fill|verify|info|prune")
    for command in (fill, verify, info, prune):
        text = " ".join(command.__doc__.split())
        form = argparse.HelpFormatter  # which breaks long lines
        one = commands.add_parser(
            command.__name__, help=text, description=text, formatter_class=form
        )
        one.add_argument("directory", metavar="DIR", help="the folder of all caches, or of one")
        one.set_defaults(command=command)
        if command in (fill, verify):
            add_teacher(one)
        if command is fill:
            text = "compute only the first N views of each image; default: all"
            one.add_argument("--views", type=COUNT, metavar="N", help=text)
        if command is verify:
            text = "how many rows to compute again; default: %(default)s"
            one.add_argument("--sample", type=COUNT, default=1000, metavar="N", help=text)
        if command is prune:
            text = "delete all caches but these, which `info` lists"
            one.add_argument("--keep", nargs="+", metavar="NAME", help=text)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in (fill, verify):
        one = commands.choices[args.command.__name__]
        one.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


def add_teacher(parser):
    """Adds the flags of the commands that ask a teacher."""
    parser.epilog = (
        "Without --run the teacher and the data are given by the flags of python -m fastadv.train, "
        "such as --teacher-checkpoint and --data. With --run, flags for places, such as "
        "--data-dir, may go with it."
    )
    text = "the folder of a run: its teacher, data and augmentation"
    parser.add_argument("--run", metavar="RUN", help=text)
    parser.add_argument(
        "--which",
        choices=("teacher", "clean_teacher"),
        default="teacher",
        help="which teacher, of a run that has two; default: %(default)s",
    )
    parser.add_argument(
        "--names",
        metavar="NAME,NAME",
        help="which outputs of the teacher, such as logits,penultimate; default: what the method "
        "reads",
    )


def main(argv=None):
    args, rest = arguments(argv)
    args.command(args, rest)


if __name__ == "__main__":
    with as_command("the same command goes on from here"):
        main()
