"""The Triton kernels compile to good machine code for every target, without a GPU.

The launchers are called on CPU tensors with recorders in place of the kernels, so what is compiled
is what a GPU would be given. This file is also the script that does it and prints the report: a
process of its own, because TRITON_INTERPRET may be set in this one.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

ARCHS = (80, 90, 100)
REGISTERS = {"linf_kernel": 40, "l2_kernel": 64, "tile_kernel": 64, "loop_kernel": 96}
TYPES = {"torch.float32": "*fp32", "torch.bfloat16": "*bf16", "torch.float16": "*fp16"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """{variant: {arch: facts of its machine code}}"""
    pytest.importorskip("triton")
    cwd = tmp_path_factory.mktemp("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cwd / "cache")
    done = subprocess.run(
        [sys.executable, __file__], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


def pairs(report, arch):
    assert len(report) == len(list(calls()))
    return [(name, facts[str(arch)]) for name, facts in report.items()]


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_suffice(report, arch):
    for name, code in pairs(report, arch):
        assert code["local"] == 0, f"{name} spills {code['local']} bytes"
        assert not re.search(r"\b(STL|LDL)\b", code["sass"]), f"{name} touches local memory"
        assert code["registers"] <= REGISTERS[name.split()[0]], f"{name}: {code['registers']}"


@pytest.mark.parametrize("arch", ARCHS)
def test_accesses_are_128_bits_wide(report, arch):
    """All but per-sample values, where the rows are aligned."""
    for name, code in pairs(report, arch):
        if "C=10 " in name or "C=21841" in name:
            continue
        scalars = name.count("weight") + name.count("per sample")
        loads, stores = (re.findall(rf"\b{op}\.E\S*", code["sass"]) for op in ("LDG", "STG"))
        wide_loads, wide_stores = ([a for a in all_ if ".128" in a] for all_ in (loads, stores))
        assert len(wide_loads) >= 2, f"{name}: {loads}"
        assert len(loads) - len(wide_loads) <= scalars, f"{name}: {loads}"
        assert wide_stores, f"{name}: {stores}"
        if name.startswith("linf"):
            assert len(wide_loads) == 3 * len(wide_stores) == 6, f"{name}: {loads} {stores}"


@pytest.mark.parametrize("arch", ARCHS)
def test_linf_has_no_fused_multiply_add(report, arch):
    for name, code in pairs(report, arch):
        if name.startswith("linf"):
            assert "FFMA" not in code["sass"]
            assert "FADD" in code["sass"]


def calls():
    """(name, module, arguments of its function) of every variant."""
    for norm in ("linf", "l2"):
        for eps in ("", " per sample"):
            yield f"{norm}_kernel{eps}", "pgd_step", (norm, eps)
    for classes in (10, 1000, 4096, 21841, 32768):
        for dtype, asked in (("float32", "student teacher weight"), ("bfloat16", "student")):
            kernel = "tile_kernel" if classes <= 4096 else "loop_kernel"
            yield f"{kernel} C={classes} {dtype} {asked}", "softmax_kl", (classes, dtype, asked)


def arguments(module, spec):
    import torch

    if module == "pgd_step":
        norm, eps = spec
        x = torch.empty(64, 3, 32, 32)
        return x, x, x, torch.empty(64) if eps else None, 0.1, 0.1, norm, 0.0, 1.0
    classes, dtype, asked = spec
    logits = torch.empty(64, classes, dtype=getattr(torch, dtype))
    weight = torch.empty(64) if "weight" in asked else None
    grads = [name in asked for name in ("student", "teacher", "weight")]
    return logits, logits, weight, 1.0, "batchmean", *grads


class Recorder:
    """Stands for a kernel: remembers the arguments and options of its last launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        names = self.kernel.arg_names
        Recorder.last = self.kernel, dict(zip(names, args, strict=False)) | options


def source(kernel, values):
    """The specialised source as Triton's launcher makes it, and the compiler's options."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        is_tensor = hasattr(value, "data_ptr")
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        kind = {float: "fp32", int: "i32"}.get(type(value))
        signature[parameter.name] = TYPES[str(value.dtype)] if is_tensor else kind
        if is_tensor or (isinstance(value, int) and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), values


def facts(kernel, values, arch):
    import triton
    from triton.backends.compiler import GPUTarget

    code, options = source(kernel, dict(values))
    compiled = triton.compile(code, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = functools.partial(subprocess.check_output, text=True, stderr=subprocess.DEVNULL)
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = cuobjdump([tool, "-res-usage", file.name])
        sass = cuobjdump([tool, "-sass", file.name])
    used = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "registers": used["REG"],
        "local": used["STACK"] + used["LOCAL"],
        "sass": "\n".join(re.findall(r"/\*\w{4}\*/\s+(.*?);", sass)),
    }


def main():
    import importlib

    report = {}
    for name, module, spec in calls():
        launcher = importlib.import_module(f"fastadv.kernels.{module}")
        for kernel in [n for n in vars(launcher) if n.endswith("_kernel")]:
            if not isinstance(getattr(launcher, kernel), Recorder):
                setattr(launcher, kernel, Recorder(getattr(launcher, kernel)))
        getattr(launcher, module)(*arguments(module, spec))
        kernel, values = Recorder.last
        assert name.startswith(kernel.__name__), (name, kernel.__name__)
        assert values["enable_fp_fusion"] is False, name
        report[name] = {arch: facts(kernel, values, arch) for arch in ARCHS}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
