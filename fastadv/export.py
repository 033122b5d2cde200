r"""python -m fastadv.export: a run's network as a .pt file for RobustBench and other codes.

python -m fastadv.export --checkpoint runs/at-cifar10/best.safetensors --out model.pt
"""

import re
from pathlib import Path

from torch import nn

from . import models
from .errors import Parser, as_command
from .evaluate import from_run
from .runs.code import bring_in

# What RobustBench calls these networks, at their published width and for colour images.
ROBUSTBENCH = {
    r"resnet18": r"ResNet(BasicBlock, [2, 2, 2, 2], num_classes)",
    r"resnet34": r"ResNet(BasicBlock, [3, 4, 6, 3], num_classes)",
    r"preact_resnet18": r"PreActResNet(PreActBlockV2, [2, 2, 2, 2], num_classes, True)",
    r"wrn(\d+)_(\d+)": r"WideResNet(\1, num_classes, \2)",
    r"dm_wrn(\d+)_(\d+)": r"DMWideResNet(num_classes, \1, \2, Swish, mean, std)",
}


def robustbench_class(name):
    """The class of `robustbench.model_zoo.architectures` for the model `name`, None without one."""
    found = ((re.fullmatch(pattern, name), call) for pattern, call in ROBUSTBENCH.items())
    return next((match.expand(call) for match, call in found if match), None)


def check_out(path):
    """Raises OSError where no file can be written, before a network is read for it."""
    if path.is_dir():
        raise IsADirectoryError(
            f"--out is {path}, a folder, must be a file such as {path}/model.pt"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out is {path}, but there is no folder {path.parent}")


def main(argv=None):
    parser = Parser(prog="python -m fastadv.export", description=__doc__)
    add = parser.add_argument
    text = "a run, by its folder (whose best checkpoint is taken) or a .safetensors in it"
    add("--checkpoint", required=True, metavar="PATH", help=text)
    text = 'the file to write, as torch.save writes {"state_dict": ...}'
    add("--out", required=True, metavar="PATH", help=text)
    text = "the function that the run was trained with by --student-from"
    add("--student-from", metavar="module:function", help=text)
    args = parser.parse_args(argv)
    if args.student_from:
        bring_in("--student-from", args.student_from, models.register)
    check_out(Path(args.out))
    model, config = from_run(args.checkpoint)
    models.export(model, args.out)
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    fits = stem is not None and stem.in_channels == 3 and config.student_width is None
    theirs = robustbench_class(config.student) if fits else None
    whose = f"for RobustBench's {theirs}" if theirs else "for which RobustBench has no class"
    print(f"{args.out}: weights of {config.student}, {whose}")


if __name__ == "__main__":
    with as_command("nothing was written"):
        main()
