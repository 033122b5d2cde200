"""AutoAttack on an exported checkpoint, as RobustBench does it, by the official code.

python -m fastadv.export --checkpoint runs/NAME/best.safetensors --out model.pt
python examples/autoattack_eval_plain.py model.pt --model resnet18 --data-dir DIR
"""

import argparse

import torch
from autoattack import AutoAttack

from fastadv import data, models


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--eps", type=float, default=8 / 255)
    args = parser.parse_args(argv)

    test = data.load(args.data, args.data_dir).test
    x, y = test.images[: args.images].float() / 255, test.labels[: args.images]
    model = models.load(args.model, args.checkpoint, in_channels=x.shape[1])

    adversary = AutoAttack(model, norm="Linf", eps=args.eps, version="standard")
    x_adv = adversary.run_standard_evaluation(x, y, bs=250)
    with torch.no_grad():
        robust = (model(x_adv).argmax(1) == y).float().mean().item()
    print(f"robust accuracy {robust:.2%}")
    return robust


if __name__ == "__main__":
    main()
