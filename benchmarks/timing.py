"""What every benchmark shares: a case with its rivals, the interleaved clock, the result row."""

import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
LOOPS = 100  # calls in a CUDA graph


@dataclass
class Case:
    """One op at one shape. Each provider is a call without arguments; the first is the baseline.

    gate: raises unless fastadv's result is right; runs before any timing.
    nbytes: memory traffic of one call when every operand is touched once; exceptions by provider.
    images: of one call, where they are what is counted. floors: {provider: the one whose time it
    cannot beat}. facts: {provider: {column: value}} of what is no time, asked after the timing.
    left_out: the providers that are missing, and why. loops: {provider: how often one call of it
    does what a call of the others does once}. calls: how often each provider is called before it is
    timed; with 0 the gate does that. samples: the least number of them.
    """

    op: str
    shape: str
    providers: dict[str, Callable]
    gate: Callable
    nbytes: int = 0
    exceptions: dict[str, int] = field(default_factory=dict)
    images: int = 0
    floors: dict[str, str] = field(default_factory=dict)
    facts: Callable = dict
    left_out: str | None = None
    loops: dict[str, int] = field(default_factory=dict)
    calls: int = 4
    samples: int = 5

    def nbytes_of(self, provider):
        return self.exceptions.get(provider, self.nbytes)


def without_bfloat16(device):
    """Why torch's bfloat16 is not measured on a device, or None. On a CPU without products of
    bfloat16 a forward pass of a ResNet-18 takes minutes."""
    from fastadv.ops import _native  # here, so that run.py can install it first

    if device.type != "cpu" or _native.isa() in _native.WITH_BF16:
        return None
    return "torch in bf16: no products of bfloat16 here, takes minutes"


def finish():
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def exact():
    """Within it convolutions on a GPU are in float32, as on a CPU, and not in TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def interleave(case, seconds=2.0):
    """Seconds per call, {name: [samples]}: one sample of each in turn until time is up.

    A sample repeats a short call until about a millisecond has passed, and ends with what
    it gave a GPU to do.
    """
    repeats = dict.fromkeys(case.providers, 1)
    for name, call in case.providers.items():
        for _ in range(case.calls):
            finish()
            start = time.perf_counter()
            call()
            finish()
            repeats[name] = max(1, int(1e-3 / max(time.perf_counter() - start, 1e-7)))
    samples = {name: [] for name in case.providers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[name]) < case.samples:
        for name, call in case.providers.items():
            finish()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            finish()
            done = repeats[name] * case.loops.get(name, 1)
            samples[name].append((time.perf_counter() - start) / done)
    return samples


def in_graph(call):
    """A function that makes LOOPS calls as one CUDA graph, so that the host has next to no part in
    their time; for tensors on a CPU, LOOPS calls. The graph is captured in its first call."""
    from fastadv.attacks.graphs import capture  # here, so that run.py can install it first

    def loop():
        for _ in range(LOOPS):
            call()

    @functools.cache
    def replay():
        return capture(loop)[0] if torch.cuda.is_available() else loop

    return lambda: replay()()


def summary(samples):
    """Median, p20 and p80 in microseconds."""
    q = torch.quantile(
        torch.tensor(samples, dtype=torch.float64), torch.tensor([0.5, 0.2, 0.8]).double()
    )
    return {
        key: round(value * 1e6, 2)
        for key, value in zip(("us", "p20", "p80"), q.tolist(), strict=True)
    }


def peak_of(script, *arguments):
    """{"peak MB": what a benchmark, run as a script with these arguments, prints of
    `memory_added`}; empty on other systems than Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"peak MB": int(done.stdout)}


def memory_added(call):
    """The MB that a call adds to this process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident()["VmRSS"]
    call()
    return round((_resident()["VmHWM"] - before) / 1024)


def _resident():
    """{field: kB} of this process."""
    lines = _lines("/proc/self/status")
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}


def machine():
    """Hardware, versions and commit of a result row."""
    import fastadv  # here, so that run.py can install it first
    from fastadv import info

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    changed = _git("status", "--porcelain", "-uno", ":/", ":!results")  # but for rows of before
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "isa": info.isa(),
        "fastadv": fastadv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _git(*command):
    """What git prints of this repository; nothing where there is none."""
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parent, "check": False}
    try:
        return subprocess.run(["git", *command], **options).stdout.strip()
    except OSError:  # git is not installed
        return ""


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def pytest_cases(cases):
    """A pytest-benchmark test over the cases that cases() returns and their providers: a group per
    op and shape. conftest.py calls cases(), so that nothing is made where it is not run."""

    def test(benchmark, case, provider):
        case.gate()
        benchmark.group = f"{case.op} {case.shape}"
        benchmark(case.providers[provider])

    test.cases = cases
    return test
