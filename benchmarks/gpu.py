"""All that a machine with an NVIDIA GPU can say of fastadv; `--suite gpu` of run.py, eight minutes.

    python benchmarks/run.py --suite gpu

Installs the checkout into this Python and runs the tests for a GPU, on CUDA kernels also under
compute-sanitizer where that is there (see prepare.py); then times, on random images and networks of
random weights: ops on tensors of 300 MB ("of copy": their bandwidth over that of a copy on the same
GPU) and on small ones, PGD-10 and whole training steps. "published" is the loop in float32 eager,
as torch sets itself up, with convolutions in TF32 (see published.py); "graph" replays a CUDA graph,
"graph compiled" one of a twin under torch.compile. Rows are appended to
benchmarks/results/<gpu>.jsonl. Without a GPU it runs what needs none and stops. Needs no network.
"""

import json
import sys
import traceback
from functools import partial

import bench_attack
import bench_augment
import bench_pgd_step
import bench_random_start
import bench_softmax_kl
import bench_train_step
import torch
from run import line, markdown, measure
from timing import RESULTS, Case, interleave, machine, summary

from fastadv.ops import _library


def there(make, *args, **options):
    """A case whose tensors and networks are made on the GPU."""
    with torch.device("cuda"):
        return make(*args, **options)


def cases():
    """What makes each case, called one after the other, for memory. A step on 8 images takes as
    long as its launch."""
    few, some, many = (8, 3, 32, 32), (512, 3, 32, 32), (512, 3, 224, 224)
    for shape in (few, some, many):
        yield partial(there, bench_pgd_step.case, *shape)
    for shape in (some, many):
        yield partial(there, bench_random_start.case, bench_random_start.linf, *shape)
    for shape in ((512, 10), (2**22, 10), (2**16, 1000)):
        yield partial(there, bench_softmax_kl.case, *shape)
    yield partial(there, bench_augment.case, 4, *some)
    yield partial(there, bench_attack.case, "resnet18", batch=512)
    yield partial(there, bench_attack.case, "mobilenet_v2", batch=512, rivals=False)
    yield partial(there, bench_attack.case, "wrn34_10", batch=128, rivals=False)
    for method in ("rslad", "advfunmatch"):
        yield partial(bench_train_step.case, method, "resnet18", batch=512, device="cuda")


def copy_bandwidth():
    """GB/s of a copy of 1 GB, read and written."""
    source = torch.rand(2**28, device="cuda")
    target = torch.empty_like(source)
    case = Case("copy", "1 GB", {"copy": lambda: target.copy_(source)}, gate=bool)
    return 2 * source.nbytes / summary(interleave(case)["copy"])["us"] / 1e3


def rows(seconds):
    """Of all cases; None for one that fails, whose error is printed."""
    copy = copy_bandwidth()
    print(f"copy: {copy:.0f} GB/s")
    for make in cases():
        try:
            for row in measure(make(), seconds):
                share = {"of copy": round(row["GB/s"] / copy, 2)} if "GB/s" in row else {}
                yield {"suite": "gpu"} | row | share
        except Exception:  # of a kernel, a compiler or memory: the others are worth having
            traceback.print_exc()
            yield None
        torch.compiler.reset()
        torch.cuda.empty_cache()


def main():
    """Times, prints and appends. The exit status says whether a case failed."""
    where, found = machine(), []
    results = RESULTS / f"{where['gpu'].lower().replace(' ', '-')}.jsonl"
    backends = {"backends": {name: op.cuda for name, op in _library.ops.items()}}
    for row in rows(seconds=1.0):
        found.append(row)
        if row:
            print(line(row), flush=True)
            with open(results, "a") as file:
                file.write(json.dumps(row | where | backends) + "\n")
    print("\n".join(["", *markdown(list(filter(None, found))), "", str(where)]))
    if None in found:
        sys.exit(f"{found.count(None)} cases failed")


if __name__ == "__main__":
    main()
