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
REGISTERS = {  # at most, of 255; 64 keep half of an SM's threads resident
    "linf_kernel": 40,
    "l2_kernel": 64,
    "linf_ascent_kernel": 72,
    "l2_ascent_kernel": 64,
    "shift_kernel": 48,
    "ball_kernel": 80,
    "augment_kernel": 40,
    "fold_bn_kernel": 48,
    "difference_kernel": 64,
    "cosine_kernel": 96,
    "tile_kernel": 64,
    "loop_kernel": 96,
    "cross_entropy_kernel": 80,
    "margin_kernel": 64,
    "dlr_kernel": 88,
    "softmax_entropy_kernel": 80,
    "mart_bce_kernel": 80,
}
TYPES = {
    "torch.float32": "*fp32",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.int64": "*i64",
    "torch.int32": "*i32",
    "torch.uint8": "*u8",
    "torch.bool": "*i1",
}


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
    assert len(report) == len(list(calls()))  # names are unique
    return [(name, facts[str(arch)]) for name, facts in report.items() if str(arch) in facts]


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_suffice(report, arch):
    for name, code in pairs(report, arch):
        assert code["local"] == 0, f"{name} spills {code['local']} bytes"
        assert not re.search(r"\b(STL|LDL)\b", code["sass"]), f"{name} touches local memory"
        assert code["registers"] <= REGISTERS[name.split()[0]], f"{name}: {code['registers']}"


@pytest.mark.parametrize("arch", ARCHS)
def test_accesses_are_128_bits_wide(report, arch):
    """All but what is per sample or a byte, where the rows are aligned."""
    for name, code in pairs(report, arch):
        if code["narrow"] is None:
            continue
        loads, stores = (re.findall(rf"\b{op}\.E\S*", code["sass"]) for op in ("LDG", "STG"))
        narrow = [load for load in loads if ".128" not in load]
        assert len(narrow) == code["narrow"], f"{name}: {loads}"
        assert len(narrow) < len(loads) or name.startswith("augment"), f"{name}: {loads}"
        assert any(".128" in store for store in stores), f"{name}: {stores}"


@pytest.mark.parametrize("arch", ARCHS)
def test_what_fits_in_a_tile_is_read_once(report, arch):
    """Whatever the passes over it: 1000 bfloat16 are one access of 128 threads."""
    for name, code in pairs(report, arch):
        if "C=1000 bfloat16" in name:
            tensors = 2 if name.startswith("tile_kernel") else 1
            loads = re.findall(r"\bLDG\.E\.128\b", code["sass"])
            assert len(loads) == tensors, f"{name}: {loads}"


@pytest.mark.parametrize("arch", ARCHS)
def test_what_must_have_cpus_bits_has_no_fused_multiply_add(report, arch):
    for name, code in pairs(report, arch):
        if name.startswith(("linf", "shift")):
            assert "FFMA" not in code["sass"], name
            assert "FADD" in code["sass"], name


def calls():
    """(name, op, arguments of its launcher, narrow loads or None where rows are not aligned) of
    every variant. A name begins with the kernel's, whose first variant is compiled for all ARCHS,
    the others for sm_90."""
    yield from images()
    yield from features()
    yield from rows()


def images():
    import torch

    x = torch.empty(64, 3, 32, 32)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    each, ids = torch.empty(64), torch.empty(64, dtype=torch.int64)
    for norm in ("linf", "l2"):
        for eps in (None, each):
            name = f"{norm}_kernel{'' if eps is None else ' per sample'}"
            narrow = 0 if eps is None else 1
            yield name, "pgd_step", (x, x, x, eps, 0.1, 0.1, norm, 0.0, 1.0), narrow
    flags, count = [torch.empty(64, dtype=torch.bool)] * 3, torch.tensor(0)
    for norm in ("linf", "l2"):
        for eps in (None, each):
            name = f"{norm}_ascent_kernel{'' if eps is None else ' per sample'}"
            args = *[x] * 5, count, x, x, each, *flags, eps, 0.1, 0.75, norm, 0.0, 1.0
            yield name, "apgd_step_", args, 4 if eps is None else 5
    for name, laid, init, norm, narrow in (
        ("shift_kernel uniform", x, "uniform", "linf", 2),
        ("shift_kernel gaussian", x, "gaussian", "linf", 1),
        ("ball_kernel", x, "uniform", "l2", 2),
        ("ball_kernel channels_last", nhwc, "uniform", "l2", None),
    ):
        seed = torch.tensor(2**40)
        box = 0.1, 3, 2**32 - 1, 0.0, 1.0
        yield name, "random_start", (laid, seed, ids, each, 0.1, init, norm, *box), narrow
    weight, bias = torch.empty(64, 32, 3, 3), torch.empty(64)
    for dtype in (torch.bfloat16, torch.float32):
        norm = bias, bias, bias, bias, 1e-5
        args = [weight.to(dtype)], [bias.to(dtype)], [weight], [bias], [norm]
        yield f"fold_bn_kernel {dtype}", "fold_bn_", args, None
    for last in (False, True):
        args = x.to(torch.uint8), ids, ids, ids.bool(), 4, last
        yield f"augment_kernel channels_last={last}", "augment", args, 3 + 8


def features():
    import torch

    for size, dtype, distance in (
        (512, "float32", "mse"),
        (1024, "bfloat16", "cosine"),
        (65536, "bfloat16", "l2"),
        (65536, "float32", "cosine"),
    ):
        kernel = "cosine_kernel" if distance == "cosine" else "difference_kernel"
        v = torch.empty(64, size, dtype=getattr(torch, dtype))
        name = f"{kernel} size={size} {dtype} {distance}"
        yield name, "feature_distance", (v, v, distance, True, True), 0


def rows():
    import torch

    y, weight = torch.empty(64, dtype=torch.int64), torch.empty(64)
    asked = True, True, True
    for classes, dtype in ((1000, torch.bfloat16), (32768, torch.float32)):
        z = torch.empty(64, classes, dtype=dtype)
        kind = f"C={classes} {dtype}".replace("torch.", "")
        kernel = "tile_kernel" if classes <= 4096 else "loop_kernel"
        yield f"{kernel} {kind}", "softmax_kl", (z, z, weight, 1.0, "mean", *asked), 1
        # Of a label's op: the label, and its logit.
        yield f"margin_kernel {kind}", "margin", (z, y, True), 2
        yield f"dlr_kernel {kind}", "dlr", (z, y, True), 2
        yield f"mart_bce_kernel {kind}", "mart_bce", (z, y, True), 2
        yield f"cross_entropy_kernel {kind}", "cross_entropy", (z, y, 0.1, -100, "none", True), 2
        offset = 0.0 if classes == 32768 else 1e-5
        yield f"softmax_entropy_kernel {kind}", "softmax_entropy", (z, 2.0, offset, True), 0
    name = "cross_entropy_kernel C=32768 probabilities"
    yield name, "cross_entropy", (z, torch.empty_like(z), 0.1, -100, "none", True), 0
    z = torch.empty(64, 10)
    yield "tile_kernel C=10", "softmax_kl", (z, z, weight, 1.0, "mean", *asked), None
    yield "cross_entropy_kernel C=10", "cross_entropy", (z, y, 0.1, -100, "none", True), None


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
        if kind == "i32" and not -(2**31) <= value < 2**31:
            kind = "i64"
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

    report, seen = {}, set()
    for name, op, args, narrow in calls():
        launcher = importlib.import_module(f"fastadv.kernels.{op.rstrip('_')}")
        for kernel in [n for n in vars(launcher) if n.endswith("_kernel")]:
            if not isinstance(getattr(launcher, kernel), Recorder):
                setattr(launcher, kernel, Recorder(getattr(launcher, kernel)))
        getattr(launcher, op)(*args)
        kernel, values = Recorder.last
        assert name.startswith(kernel.__name__), (name, kernel.__name__)
        assert values["enable_fp_fusion"] is False, name
        archs = (90,) if kernel in seen else ARCHS
        seen.add(kernel)
        report[name] = {arch: facts(kernel, values, arch) | {"narrow": narrow} for arch in archs}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
