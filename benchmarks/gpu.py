"""The tests and benchmarks for a machine with an NVIDIA GPU; `--suite gpu` of run.py. It takes
eight minutes and needs no network.

    python benchmarks/run.py --suite gpu

It first installs the checkout into this Python and runs the tests for a GPU, those of CUDA kernels
also under compute-sanitizer if that is installed (see prepare.py). Then it times, on random images
and networks of random weights: ops on tensors of 300 MB ("of copy" is their bandwidth over that of
a copy on the same GPU) and on small ones, PGD-10, and whole training steps. "published" is the
published loop (see published.py) in float32 and eager mode, with torch's own settings, which
compute convolutions in TF32; "graph" replays a CUDA graph, "graph compiled" one of a twin under
torch.compile. Rows are appended to benchmarks/results/<gpu>.jsonl. Without a GPU it runs the tests
that need none, and stops.
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
from run import line, measure
from tables import markdown
from timing import RESULTS, Case, interleave, machine, summary

from fastadv.ops import _library


def there(make, *args, **options):
    """The case that `make` returns, with its tensors and networks made on the GPU."""
    with torch.device("cuda"):
        return make(*args, **options)


def cases():
    """Yields functions that return a case each, so that only one case is in memory at a time. An op
    on 8 images takes as long as its launch."""
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
    """The bandwidth of a copy of 1 GB, in GB/s of reading and writing together."""
    source = torch.rand(2**28, device="cuda")
    target = torch.empty_like(source)
    case = Case("copy", "1 GB", {"copy": lambda: target.copy_(source)}, gate=bool)
    return 2 * source.nbytes / summary(interleave(case)["copy"])["us"] / 1e3


def rows(seconds):
    """Yields the rows of all cases; None for a case that fails, whose error is printed."""
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
    """Times all cases, prints their rows and appends them to the results. Exits with an error if a
    case failed."""
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
