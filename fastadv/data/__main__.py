"""python -m fastadv.data: pictures in one folder per class, packed for training.

    python -m fastadv.data pack DIR --image-size 64
    python -m fastadv.data verify DIR --image-size 64

`python -m fastadv.train --data folder --data-dir DIR --image-size 64` then trains on them.
"""

import argparse

from ..errors import Parser, as_command
from ..train.cli import typed
from . import folder, pack

PROGRAM = "python -m fastadv.data"


def pack_folder(args):
    """Decode all pictures of DIR into one file, which lies in DIR and which training maps. The
    same command goes on where it was stopped."""
    listing = folder.scan(args.directory)
    size = args.image_size
    path, skipped = pack.write(listing, size, workers=args.workers, skip_broken=args.skip_broken)
    count = len(listing.files) - len(skipped)
    print(f"{path}: {count} pictures of {len(listing.classes)} classes, {size} x {size} pixels")
    if skipped:
        print(f"left out as broken: {len(skipped)}\n" + "\n".join(skipped))


def verify(args):
    """Compare all images of the packed file of DIR with its checksums."""
    path = pack.place(args.directory, args.image_size)
    print(f"{path}: {pack.verify(path)} pictures, all as they were packed")


def at_least(least):
    def read(text):
        if int(text) < least:
            raise ValueError
        return int(text)

    return typed(read, f"a whole number of at least {least}")


def arguments(argv):
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="pack|verify")
    for name, command in (("pack", pack_folder), ("verify", verify)):
        text = " ".join(command.__doc__.split())
        form = argparse.HelpFormatter  # which breaks long lines
        one = commands.add_parser(name, help=text, description=text, formatter_class=form)
        one.set_defaults(command=command)
        text = "the folder of train, and of val or test"
        one.add_argument("directory", metavar="DIR", help=text)
        text = "width and height that all pictures get, in pixels"
        one.add_argument("--image-size", type=at_least(1), required=True, metavar="N", help=text)
        if command is pack_folder:
            text = "processes that decode; default: one per core, fewer for few pictures"
            one.add_argument("--workers", type=at_least(0), metavar="N", help=text)
            text = "leave out pictures that cannot be read, and list them"
            one.add_argument("--skip-broken", action="store_true", help=text)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    args.command(args)


if __name__ == "__main__":
    with as_command("the same command goes on from here"):
        main()
