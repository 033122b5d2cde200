"""All that a machine with an NVIDIA GPU can say of fastadv; `--suite gpu` of run.py, eight minutes.

Builds the compiled module, runs the tests that need a GPU and, where compute-sanitizer is there,
those of the CUDA kernels under it; then times, on random images and networks of random weights: ops
on tensors of 300 MB ("of copy": their bandwidth over that of a copy on the same GPU) and on small
ones, the host's time to launch pgd_step, PGD-10 and whole training steps. "published" is the loop
in float32 eager, as torch sets itself up, with convolutions in TF32 (see published.py); "graph"
replays a CUDA graph, "graph compiled" one of a twin under torch.compile. Rows are appended to
benchmarks/results/<gpu>.jsonl.

Without a GPU what needs none is run: the build, the Triton kernels interpreted and compiled, the
CUDA kernels' bodies on the CPU and their machine code. Needs no network.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import bench_attack
import bench_augment
import bench_pgd_step
import bench_random_start
import bench_softmax_kl
import bench_train_step
import torch
from timing import RESULTS, Case, interleave, summary

ROOT = Path(__file__).parents[1]


def prepare():
    """Build and tests. Exits where they fail, and where there is no GPU to go on with."""
    pytest = sys.executable, "-m", "pytest", "-m"
    execute(sys.executable, "setup.py", "build_ext", "--inplace")
    if not torch.cuda.is_available():
        execute(*pytest, "not gpu and not slow", "tests/kernels", "tests/test_graphs.py")
        sys.exit("no GPU is present: what needs none has run, nothing was timed")
    execute(*pytest, "gpu")
    if sanitizer := shutil.which("compute-sanitizer"):
        tests = "gpu", "tests/kernels/test_cuda_device.py"
        execute(sanitizer, "--error-exitcode", "1", *pytest, *tests)


def execute(*command):
    print(*command, flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


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


def rows(measure, seconds):
    """Of all cases, as `measure` of run.py makes them."""
    copy = copy_bandwidth()
    print(f"copy: {copy:.0f} GB/s")
    for case in cases():
        for row in measure(case, seconds):
            share = {"of copy": round(row["GB/s"] / copy, 2)} if "GB/s" in row else {}
            yield row | share
        torch.compiler.reset()
        torch.cuda.empty_cache()


def results():
    """The file of this GPU's rows."""
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    return RESULTS / f"{name}.jsonl"
