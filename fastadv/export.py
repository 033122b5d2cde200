r"""python -m fastadv.export: a run's network as a .pt file for RobustBench and other codes.

python -m fastadv.export --checkpoint runs/at-cifar10/best.safetensors --out model.pt
"""

import argparse
import re
import sys

from . import models
from .evaluate import from_run

# Networks of published width for colour images, and the RobustBench class that loads their export.
ROBUSTBENCH = {
    r"resnet(18|34)": r"ResNet\1()",
    r"preact_resnet18": r"PreActResNet(PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True)",
    r"wrn(\d+)_(\d+)": r"WideResNet(depth=\1, widen_factor=\2)",
    r"dm_wrn(\d+)_(\d+)": r"DMWideResNet(depth=\1, width=\2, activation_fn=Swish, mean, std)",
}


def robustbench_class(name):
    """The class of `robustbench.model_zoo.architectures` for the model `name`, None without one."""
    found = ((re.fullmatch(pattern, name), call) for pattern, call in ROBUSTBENCH.items())
    return next((match.expand(call) for match, call in found if match), None)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m fastadv.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="of a run: DIR/best.safetensors")
    parser.add_argument("--out", required=True, help='file for torch.save of {"state_dict": ...}')
    args = parser.parse_args(argv)
    model, config = from_run(args.checkpoint)
    models.export(model, args.out)
    theirs = robustbench_class(config.student) if config.student_width is None else None
    print(f"{args.out}: {config.student}, for {theirs or 'no class of RobustBench'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
