r"""python -m fastadv.evaluate: clean and robust accuracy of a checkpoint, in fp32.

python -m fastadv.evaluate --checkpoint runs/rslad/best.safetensors --data-dir DIR
python -m fastadv.evaluate --checkpoint model_cifar_wrn.pt --model wrn34_10 \
        --data cifar10 --data-dir DIR
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from . import checkpoint, data, models, parallel
from .attacks import APGD, FAB, FGSM, PGD
from .attacks.checks import check_labels, check_logits, evaluating
from .config import Config, device, number
from .frozen import freeze

# Steps are given for eps = 8/255 and scale with it. PGD-20 at 2/255 is what papers call PGD_SAT, at
# 0.003 PGD_TRADES; cw is the CW objective (kappa 50) under 30 linf steps from x itself.
PAPER = {
    "clean": lambda eps: PGD(eps, eps / 4, 0, init="zero"),
    "fgsm": FGSM,
    "pgd20": lambda eps: PGD(eps, eps / 4, 20),
    "pgd20_003": lambda eps: PGD(eps, eps * 0.003 * 255 / 8, 20),
    "cw": lambda eps: PGD(eps, eps / 4, 30, init="zero"),
}
# Auto-PGD with 100 steps and no restarts, as AutoAttack's "standard" version runs ce and t.
ATTACKS = PAPER | {
    "apgd-ce": lambda eps: APGD(eps),
    "apgd-dlr": lambda eps: APGD(eps, loss="dlr"),
    "apgd-t": lambda eps: APGD(eps, loss="targeted"),
    "fab-t": FAB,
}


def adversary(attack, eps):
    """(attack, keywords of its call) of a name of ATTACKS.

    Raises ValueError for an unknown name or a bad eps.
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack is {attack!r}, must be one of {', '.join(ATTACKS)}")
    return ATTACKS[attack](eps), {"loss": "cw"} if attack == "cw" else {}


def correct(model, split, attack, *, eps, batch_size=256, device="cpu", seed=0, progress=False):
    """Which images of `split` the model classifies right under `attack`: a bool tensor [N].

    attack: a name of ATTACKS. The random starts depend on (seed, image) alone, so batch size and
    order do not change them. Raises ValueError for an unknown attack, labels or logits that make
    no sense, and gradients with NaN or infinity: an attack that cannot move proves nothing.
    """
    attacker, keywords = adversary(attack, eps)
    twin = freeze(model)
    batches = data.Loader(split, batch_size, device=device).epoch(0)
    count = -(-len(split) // batch_size)
    right, bad = [torch.ones(0, dtype=torch.bool, device=device)], 0
    with torch.random.fork_rng(devices=[]):
        for x, y, index, _ in tqdm(
            batches, attack, count, leave=False, disable=None if progress else True
        ):
            torch.default_generator.manual_seed(seed)
            x_adv = attacker(twin, x, y, index=index, **keywords)
            with torch.no_grad():
                logits = twin(x_adv)
            check_logits(logits, len(x))
            check_labels(y, logits)
            right.append(logits.argmax(1) == y)
            bad += int(attacker.bad_gradients)
    if bad:
        raise ValueError(f"{attack}: {bad} gradients of the model had NaN or infinity in them")
    return torch.cat(right).cpu()


def accuracies(model, split, attacks, **options):
    """{attack: accuracy in [0, 1]} on `split`; options are those of `correct`. The processes
    of a `parallel.group()` must all call it: they share the images out, each gets the whole result.
    """
    share = split.take(torch.arange(parallel.rank(), len(split), parallel.world()))
    return {
        name: parallel.total(correct(model, share, name, **options).sum()).item() / len(split)
        for name in attacks
    }


def from_run(path):
    """(model with the weights of a fastadv checkpoint, the Config of its run).

    Raises ValueError naming the file when a run did not write it.
    """
    if Path(path).is_dir():
        path = Path(path) / "best.safetensors"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file (a run's is DIR/best.safetensors)")
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} is not a run's .safetensors: name its architecture as well")
    _, metadata = checkpoint.load(path)
    try:
        config = Config.from_json(json.dumps(metadata["config"]))
        classes, channels = metadata["num_classes"], metadata["in_channels"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its header is not that of a run ({error})") from error
    model = models.load(config.student, path, classes, channels, config.student_width)
    return model, config


def check_fits(model, dataset, path):
    """Raises ValueError unless the model of `path` takes the data set's images and classes."""
    images = dataset.train.images
    x = torch.zeros(1, *images.shape[1:])
    try:
        with evaluating(model), torch.no_grad():
            classes = model(x).shape[1]
    except RuntimeError as error:
        raise ValueError(f"{path} does not take images {list(x.shape[1:])}: {error}") from error
    if classes != dataset.num_classes:
        raise ValueError(f"{path} has {classes} classes, {dataset.name} {dataset.num_classes}")


def table(columns, rows):
    """A text table; `rows` is {label: {column: accuracy}}, printed in percent."""
    width = max(map(len, rows)) + 2
    head = " " * width + "".join(f"{name:>11}" for name in columns)
    body = [
        f"{label:{width}}" + "".join(f"{100 * row[c]:10.2f}%" for c in columns)
        for label, row in rows.items()
    ]
    return "\n".join([head, *body])


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m fastadv.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="of a run, or a .pt with --model")
    parser.add_argument("--model", help=f"architecture of a foreign checkpoint: {models.KNOWN}")
    parser.add_argument("--width", type=int, help="its stem's channels, if not the published ones")
    parser.add_argument("--data", help=f"{data.KNOWN}; default: the run's")
    parser.add_argument("--data-dir", help="folder (or npz file) of the images; default: the run's")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument(
        "--attacks",
        default=",".join(PAPER),
        help=f"of {', '.join(ATTACKS)}; default: %(default)s",
    )
    parser.add_argument("--eps", type=number, help="linf radius; default: the run's, else 8/255")
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the result to this file")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    names = args.attacks.split(",")
    for name in names:
        adversary(name, 0.0 if args.eps is None else args.eps)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit is {args.limit}, must be at least 1")
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(f"json is {args.json}, whose folder does not exist")
    if args.model:
        config = Config(data=args.data or "cifar10", data_dir=args.data_dir)
    else:
        model, config = from_run(args.checkpoint)
    dataset = data.load(args.data or config.data, args.data_dir or config.data_dir)
    split = getattr(dataset, args.split)
    if args.model:
        model = models.load(
            args.model, args.checkpoint, dataset.num_classes, split.images.shape[1], args.width
        )
    check_fits(model, dataset, args.checkpoint)
    if args.limit:
        split = split.take(torch.arange(min(args.limit, len(split))))
    eps = config.eps if args.eps is None else args.eps
    result = accuracies(
        model.to(device(args.device)),
        split,
        names,
        eps=eps,
        batch_size=args.batch_size,
        device=args.device,
        seed=args.seed,
        progress=True,
    )
    radius = f"linf eps {eps:.5g} ({eps * 255:.3g}/255)"
    print(f"{dataset.name} {args.split}, {len(split)} images, {radius}, fp32")
    print(table(names, {args.checkpoint: result}))
    if args.json:
        checkpoint.atomic_write(
            args.json,
            json.dumps(
                {
                    "checkpoint": args.checkpoint,
                    "data": dataset.name,
                    "split": args.split,
                    "images": len(split),
                    "eps": eps,
                    "seed": args.seed,
                    **result,
                },
                indent=2,
            ),
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
