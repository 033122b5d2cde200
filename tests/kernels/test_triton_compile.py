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
from kernel_tests import MODULES

ARCHS = (80, 90, 100)
TYPES = {
    "torch.float64": "*fp64",
    "torch.float32": "*fp32",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.int64": "*i64",
    "torch.int32": "*i32",
    "torch.uint8": "*u8",
    "torch.bool": "*i1",
}


@pytest.fixture(scope="module", params=["first", pytest.param("all", marks=pytest.mark.slow)])
def report(request, tmp_path_factory):
    """[(variant, facts of its machine code for one of ARCHS)]: of the first variant of each kernel
    for sm_90, or of all."""
    pytest.importorskip("triton")
    cwd = tmp_path_factory.mktemp("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cwd / "cache")
    done = subprocess.run(
        [sys.executable, __file__, request.param],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


def test_registers_suffice(report):
    limits = {}
    for tests in MODULES.values():
        limits |= tests.REGISTERS
    for name, code in report:
        assert code["local"] == 0, f"{name} spills {code['local']} bytes"
        assert not re.search(r"\b(STL|LDL)\b", code["sass"]), f"{name} touches local memory"
        # Of 255; 64 keep half of an SM's threads resident.
        assert code["registers"] <= limits[name.split()[0]], f"{name}: {code['registers']}"


def test_accesses_are_128_bits_wide(report):
    """All but what is per sample or a byte, where the rows are aligned."""
    for name, code in report:
        if code["narrow"] is None:
            continue
        loads, stores = (re.findall(rf"\b{op}\.E\S*", code["sass"]) for op in ("LDG", "STG"))
        narrow = [load for load in loads if ".128" not in load]
        assert len(narrow) == code["narrow"], f"{name}: {loads}"
        assert len(narrow) < len(loads) or name.startswith("augment"), f"{name}: {loads}"
        assert any(".128" in store for store in stores), f"{name}: {stores}"


def test_what_fits_in_a_tile_is_read_once(report):
    """Whatever the passes over it: 1000 bfloat16 are one access of 128 threads."""
    for name, code in report:
        if "C=1000 bfloat16" in name:
            tensors = 2 if name.startswith(("softmax_kl", "ikl")) else 1
            loads = re.findall(r"\bLDG\.E\.128\b", code["sass"])
            assert len(loads) == tensors, f"{name}: {loads}"


def test_what_must_have_cpus_bits_has_no_fused_multiply_add(report):
    for name, code in report:
        if name.startswith(("linf", "shift")):
            assert "FFMA" not in code["sass"], name
            assert "FADD" in code["sass"], name


def test_indices_reach_beyond_two_to_the_31(report):
    """The number of a program, or of its sample, is 64 bits wide before it is multiplied. Its
    remainder, the place within a sample, is small."""
    small = "arith.extsi", "arith.remsi", "tt.addptr"
    for name, code in report:
        narrow = set()
        for result, operation, operands in re.findall(r"(%\S+) = (\S+) (.*)", code["ttir"]):
            of_number = not narrow.isdisjoint(re.findall(r"%\w+", operands))
            if operation == "tt.get_program_id" or (of_number and operation == "arith.divsi"):
                narrow.add(result)
            elif of_number:
                assert operation in small, f"{name}: {result} {operands}"
        assert narrow, name


def variants():
    """(op, name, arguments of its launcher, narrow loads or None where rows are not aligned) of
    every variant. A name begins with the kernel's, whose first variant is compiled for all ARCHS,
    the others for sm_90; only the first for sm_90 where the tests are to be fast."""
    return [(op, *variant) for op, tests in MODULES.items() for variant in tests.COMPILED]


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
        "ttir": compiled.asm["ttir"],
        "sass": "\n".join(re.findall(r"/\*\w{4}\*/\s+(.*?);", sass)),
    }


def main(which):
    import importlib

    report, seen = [], set()
    for op, name, args, narrow in variants():
        launcher = importlib.import_module(f"fastadv.kernels.{op}")
        own = name.split()[0].removesuffix("_kernel")  # where a file has two launchers
        launch = next(vars(launcher)[n] for n in (own, op, f"{op}_") if n in vars(launcher))
        for kernel in [n for n in vars(launcher) if n.endswith("_kernel")]:
            if not isinstance(getattr(launcher, kernel), Recorder):
                setattr(launcher, kernel, Recorder(getattr(launcher, kernel)))
        launch(*args)
        kernel, values = Recorder.last
        assert name.startswith(kernel.__name__), (name, kernel.__name__)
        assert values["enable_fp_fusion"] is False, name
        archs = (90,) if kernel in seen or which == "first" else ARCHS
        if kernel not in seen or which == "all":
            report += [(name, facts(kernel, values, arch) | {"narrow": narrow}) for arch in archs]
        seen.add(kernel)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
