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

import bench_attack
import bench_augment
import bench_pgd_step
import bench_random_start
import bench_softmax_kl
import bench_train_step
import torch
from run import line, markdown, measure
from timing import RESULTS, Case, interleave, machine, summary


def there(make, *args, **options):
    """A case whose tensors and networks are made on the GPU."""
    with torch.device("cuda"):
        return make(*args, **options)


def cases():
    """Made one after the other, for memory. A step on 8 images takes as long as its launch."""
    few, some, many = (8, 3, 32, 32), (512, 3, 32, 32), (512, 3, 224, 224)
    for shape in (few, some, many):
        yield there(bench_pgd_step.case, *shape)
    for shape in (some, many):
        yield there(bench_random_start.case, bench_random_start.linf, *shape)
    for shape in ((512, 10), (2**22, 10), (2**16, 1000)):
        yield there(bench_softmax_kl.case, *shape)
    yield there(bench_augment.case, 4, *some)
    yield there(bench_attack.case, "resnet18", batch=512)
    yield there(bench_attack.case, "mobilenet_v2", batch=512, rivals=False)
    yield there(bench_attack.case, "wrn34_10", batch=128, rivals=False)
    for method in ("rslad", "advfunmatch"):
        yield bench_train_step.case(method, "resnet18", batch=512, device="cuda")


def copy_bandwidth():
    """GB/s of a copy of 1 GB, read and written."""
    source = torch.rand(2**28, device="cuda")
    target = torch.empty_like(source)
    case = Case("copy", "1 GB", {"copy": lambda: target.copy_(source)}, gate=bool)
    return 2 * source.nbytes / summary(interleave(case)["copy"])["us"] / 1e3


def rows(seconds):
    """Of all cases."""
    copy = copy_bandwidth()
    print(f"copy: {copy:.0f} GB/s")
    for case in cases():
        for row in measure(case, seconds):
            share = {"of copy": round(row["GB/s"] / copy, 2)} if "GB/s" in row else {}
            yield {"suite": "gpu"} | row | share
        torch.compiler.reset()
        torch.cuda.empty_cache()


def main():
    """Times, prints and appends."""
    where, found = machine(), []
    results = RESULTS / f"{where['gpu'].lower().replace(' ', '-')}.jsonl"
    for row in rows(seconds=1.0):
        print(line(row), flush=True)
        found.append(row)
        with open(results, "a") as file:
            file.write(json.dumps(row | where) + "\n")
    print("\n".join(["", *markdown(found), "", str(where)]))


if __name__ == "__main__":
    main()
