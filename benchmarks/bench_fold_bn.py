"""fold_bn: all BatchNorms of a network folded into bfloat16 copies of its weights, against torch's
own fuse_conv_bn_weights for one after another."""

import torch
from timing import Case, pytest_cases
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastadv import models, ops
from fastadv.engine.folded import Folded
from fastadv.engine.lower import lower


@torch.no_grad()
def published(folds):
    for weight_out, bias_out, weight, bias, norm in folds:
        if norm is not None:
            mean, var, gamma, beta, eps = norm
            weight, bias = fuse_conv_bn_weights(weight, bias, mean, var, eps, gamma, beta)
        weight_out.copy_(weight)
        if bias_out is not None:
            bias_out.copy_(bias)


@torch.no_grad()
def fastadv_(columns):
    ops.fold_bn_(*columns)


def case(name):
    trunk, _ = lower(models.get(name).eval(), torch.bfloat16, executor=Folded)
    folds = [fold for layer in trunk.layers for fold in layer.folds()]
    columns = list(zip(*folds, strict=True))

    def gate():
        results = []
        for fold in (lambda: fastadv_(columns), lambda: published(folds)):
            for out in columns[0]:
                out.fill_(torch.nan)
            fold()
            results.append([out.clone() for out in columns[0]])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)

    return Case(
        "fold_bn",
        name,
        {"eager": lambda: published(folds), "fastadv": lambda: fastadv_(columns)},
        gate,
        nbytes=sum(out.nbytes + weight.nbytes for out, _, weight, *_ in folds),
    )


def cases():
    return [case("resnet18"), case("wrn34_10")]


test_fold_bn = pytest_cases(cases)
