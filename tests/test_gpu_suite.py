"""The suite for GPUs: its parts survive each other, and the choices follow from the rows."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def python(text):
    return sys.executable, "-c", text


def gone(pid):
    """Whether a process has ended, given a second to."""
    for _ in range(20):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_part_that_crashes_or_hangs_costs_itself_alone(bench, tmp_path, capsys, monkeypatch):
    parts = bench("parts")
    monkeypatch.setattr(parts, "GRACE", 0.5)
    child = f"{tmp_path}/child"
    hangs = (
        "import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"p = subprocess.Popen(['sleep', '60']); open({child!r}, 'w').write(str(p.pid)); "
        "print('before it hung'); time.sleep(60)"
    )
    given = [
        parts.Part("crashes", python("import os; print('so far', flush=True); os.abort()"), 30),
        parts.Part("fails", python("raise ValueError('no such kernel')"), 30),
        parts.Part("hangs", python(hangs), 5),
        parts.Part("says where", python("import time\ntime.sleep(60)"), 4),
        parts.Part("absent", python("1"), 30, missing="no GPU"),
        parts.Part(
            "passes", python("import os; print(os.environ['A'])"), 30, {"A": "what it said"}
        ),
    ]
    start = time.monotonic()
    outcomes = parts.run_parts(given, tmp_path, 60, ROOT)
    assert time.monotonic() - start < 40
    states = {outcome.name: outcome.state for outcome in outcomes}
    assert states == {
        "crashes": "failed",
        "fails": "failed",
        "hangs": "timed out",
        "says where": "timed out",
        "absent": "skipped",
        "passes": "passed",
    }
    assert gone(int(Path(child).read_text()))
    assert (tmp_path / "passes.log").read_text() == "what it said\n"
    screen = (tmp_path / "summary.txt").read_text()
    for text in ("exit status -6", "so far", "ValueError: no such kernel", "before it hung"):
        assert text in screen
    assert "stopped after 5 s" in screen
    assert "\n    KeyboardInterrupt\n" in screen
    assert "skipped   absent           0 s  no GPU" in screen
    assert "what it said" not in screen
    assert "passes" in capsys.readouterr().out


def test_parts_share_a_budget(bench, tmp_path, monkeypatch):
    parts = bench("parts")
    monkeypatch.setattr(parts, "LEAST", 1)
    sleep = python("import time; time.sleep(30)")
    given = [parts.Part("long", sleep, 30), parts.Part("late", sleep, 30)]
    before = parts.Outcome("before", "passed")
    outcomes = parts.run_parts(given, tmp_path, 1.5, ROOT, [before])
    assert outcomes[0] == before
    long, late = outcomes[1:]
    assert long.state == "timed out"
    assert 1 < long.seconds < 10
    assert (late.state, late.why) == ("not run", "the budget is spent")


def test_an_interrupted_suite_leaves_nothing_running(bench, tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    suite = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
import parts
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
part = parts.Part("long", (sys.executable, "-c", {child!r}), 60)
parts.run_parts([part], Path({str(tmp_path)!r}), 60, ".")
"""
    process = subprocess.Popen([sys.executable, "-c", suite])
    for _ in range(200):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 1
    assert gone(int(pid.read_text()))


def test_a_checkout_can_be_imported_where_it_is_not_installed(bench, tmp_path):
    folder = bench("gpu").uninstalled(tmp_path)
    code = "import fastadv.kernels.host as host, fastadv; print(fastadv.__file__, host.__file__)"
    options = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, **options)
    assert done.stdout.split() == [
        str(folder / "fastadv" / "__init__.py"),
        str(folder / "fastadv" / "kernels" / "host.py"),
    ]


@pytest.fixture
def cases(bench, monkeypatch):
    """The module of the cases, with two cases of its own: one breaks in parts, one as a whole."""
    module, made = bench("gpu_cases"), bench("timing").Case

    def breaks():
        raise RuntimeError("no memory")

    def gate(providers):
        assert "broken" not in providers

    def one():
        providers = {"eager": int, "broken": breaks, "fastadv": int, "fastadv graph": breaks}
        floors = {"fastadv": "broken"}
        return made("op", "s", providers, lambda: gate(providers), floors=floors)

    monkeypatch.setitem(module.PARTS, "ceilings", lambda: iter([breaks, one]))
    return module


def test_one_that_fails_costs_the_others_nothing(cases):
    (first, none, failed), (second, rows, more) = cases.rows("ceilings", 0)
    assert (first, none, failed) == (0, [], 1)
    assert (second, more) == (1, 1)
    assert [row["provider"] for row in rows] == ["eager", "fastadv"]
    assert rows[0]["left out"] == "broken: no memory; fastadv graph: no memory"
    assert [n for n, *_ in cases.rows("ceilings", 0, skip=1)] == [1]


def test_a_lost_gpu_is_left_for_a_new_process(cases, monkeypatch, tmp_path):
    class Replaced(Exception):
        pass

    def execv(program, command):
        raise Replaced(command)

    monkeypatch.setattr(torch, "compile", torch.compile)  # main replaces it, of its own process
    monkeypatch.setattr(cases.os, "execv", execv)
    monkeypatch.setattr(cases, "usable", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_cases.py", "ceilings", "--out", str(tmp_path)])
    with pytest.raises(Replaced) as caught:
        cases.main()
    rest = ["--out", str(tmp_path), "--skip", "1", "--failed", "1"]
    assert caught.value.args[0][2:] == ["ceilings", *rest]
    monkeypatch.setattr(cases, "usable", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_cases.py", "ceilings", *rest])
    with pytest.raises(SystemExit, match="2 failed"):
        cases.main()
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def op_row(part, op, provider, us, shape="s"):
    return {"part": part, "op": op, "shape": shape, "provider": provider, "us": us}


def setting(where, block, us, current=False, shape="s"):
    provider = json.dumps({"BLOCK": block, "num_warps": 4})
    return op_row("tune", where, provider, us, shape) | {"current": current}


def test_choices_are_what_rows_justify(bench, tmp_path, monkeypatch, capsys):
    gpu = bench("gpu")
    rows = [
        # twice as fast on one shape, as fast on another: 1.41x
        op_row("ops_cuda", "pgd_step", "fastadv", 2.0, "small"),
        op_row("ops_triton", "pgd_step", "fastadv", 4.0, "small"),
        op_row("ops_cuda", "pgd_step", "fastadv in place", 3.0),
        op_row("ops_triton", "pgd_step", "fastadv in place", 3.0),
        op_row("ops_cuda", "pgd_step", "eager", 1.0),  # no choice of ours
        op_row("ops_triton", "pgd_step", "eager", 90.0),
        op_row("ops_cuda", "softmax_kl", "fastadv", 3.0),
        op_row("ops_triton", "softmax_kl", "fastadv", 3.2),  # 1.07x is too little
        op_row("ops_triton", "ikl", "fastadv", 3.2),  # has no CUDA C++
        op_row("attack", "PGD-10", "fastadv_bf16 graph", 6.0),
        op_row("attack", "PGD-10", "fastadv_bf16 graph, bias_relu", 4.0),
        setting("pgd_step.LINF", 1024, 10.0, current=True),
        setting("pgd_step.LINF", 2048, 8.0),
        setting("pgd_step.LINF", 4096, 9.0),
        setting("augment.CONFIG", 1024, 10.0, current=True),
        setting("augment.CONFIG", 2048, 9.5),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "choose", str(tmp_path / "rows.jsonl")])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "ON_GPU = {  # fastadv/ops/_library.py",
        '    "pgd_step": "cuda",  # 1.41x Triton',
        '    "pgd_step_": "cuda",  # 1.41x Triton',
        "    # softmax_kl: 1.07x Triton",
        "}",
        "FUSED_RELU = True  # fastadv/engine/folded.py: 1.50x",
        'LINF = {"BLOCK": 2048, "num_warps": 4}  # kernels/pgd_step.py at s: 1.25x',
        'CONFIG = {"BLOCK": 1024, "num_warps": 4}  # as it is: kernels/augment.py at s: 1.05x with '
        '{"BLOCK": 2048, "num_warps": 4}',
    ]
    assert gpu.choices([]) == []


def test_the_suite_has_every_part_in_order_of_value(bench, monkeypatch, tmp_path):
    gpu = bench("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    parts = gpu.parts(tmp_path)
    names = [part.name for part in parts]
    assert names[:5] == ["build", "ceilings", "ops_cuda", "ops_triton", "attack"]
    assert names[5:] == ["train", "tune", "tests", "tests_triton", "sanitizer", "learn"]
    assert not any(part.missing for part in parts)
    assert [part.environment.get("FASTADV_BACKEND") for part in parts[2:4]] == ["cuda", "triton"]
    tests = {str(path) for path in parts[7].command if str(path).endswith(".py")}
    assert {"tests/kernels/test_cuda_device.py", "tests/attacks/test_graphs.py"} <= tests
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    parts = gpu.parts(tmp_path)
    assert parts[2].missing == parts[9].missing == "no nvcc"
    with pytest.raises(SystemExit, match="--only is 'op', must be of build, ceilings, ops_cuda"):
        gpu.suite(tmp_path, 1, "op")


def test_a_dry_run_exercises_every_part(tmp_path):
    command = [sys.executable, BENCHMARKS / "run.py", "--suite", "gpu", "--out", tmp_path]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "check": False, "cwd": tmp_path}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = "ceilings", "ops_cuda", "ops_triton", "attack", "train", "tune", "learn"
    for part in ran:
        assert f"\npassed    {part}" in done.stdout
        assert (tmp_path / f"{part}.log").stat().st_size
    for part in ("build", "tests", "tests_triton", "sanitizer"):
        assert f"\nskipped   {part}" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {(row["part"], row["op"]) for row in rows}
    assert {("ceilings", "copy"), ("ceilings", "matmul"), ("ceilings", "launch")} <= found
    for op in ("pgd_step", "random_start linf", "softmax_kl", "augment"):
        assert {("ops_cuda", op), ("ops_triton", op)} <= found
    assert {("attack", "PGD-10"), ("train", "RSLAD step"), ("learn", "training")} <= found
    assert all(row["gpu"] is None for row in rows)
    assert all("of copy" in row for row in rows if "GB/s" in row and row["part"] != "ceilings")
    assert "ON_GPU = {" in done.stdout
    assert "BALL = {" in done.stdout
    assert done.stdout.endswith("a dry run on stand-ins, whose times mean nothing\n")
