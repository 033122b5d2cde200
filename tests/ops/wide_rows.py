"""Rows of logits for which the Triton kernels over rows are compiled: `COMPILED` of the ops' tests,
which tests/kernels/test_triton_compile.py reads."""

import torch

LABELS = torch.empty(64, dtype=torch.int64)
# {how a variant's name ends: logits}: one tile a row, and a row that is looped over.
WIDE = {
    f"C={classes} {str(dtype).removeprefix('torch.')}": torch.empty(64, classes, dtype=dtype)
    for classes, dtype in ((1000, torch.bfloat16), (32768, torch.float32))
}


def labelled(kernel):
    """`COMPILED` of an op of logits and labels; it reads each label, and the label's logit."""
    return [(f"{kernel} {kind}", (z, LABELS, True), 2) for kind, z in WIDE.items()]
