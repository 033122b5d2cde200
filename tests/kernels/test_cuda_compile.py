"""The CUDA kernels in the built module are good machine code for every target, without a GPU."""

import re
import subprocess

import pytest

from fastadv.ops import _native

triton = pytest.importorskip("triton")
if not hasattr(_native._C, "cuda_built"):
    pytest.skip("fastadv._C was built without CUDA kernels", allow_module_level=True)

ARCHS = ("sm_80", "sm_90", "sm_100")
LOGITS = "f", "4Bf16", "3F16"  # types of logits, as names of symbols have them
KERNELS = {
    *("PgdStepBody1", "PgdStepBody4", "AugmentBody1", "AugmentBody4"),
    *("RandomStartQuads1", "RandomStartQuads3", "RandomStartSingles"),
    *(f"SoftmaxKL{kind} {dtype}" for kind in ("Rows", "Sum") for dtype in LOGITS),
}


def cuobjdump(*options):
    command = [triton.knobs.nvidia.cuobjdump.path, *options, _native._C.__file__]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def kernel_of(symbol):
    """PgdStepBody4 of a mangled grid_kernel<PgdStepBody<4>>, SoftmaxKLSum f of ..Sum<float>."""
    body, argument = re.search(r"_kernelINS\d*_\d+([A-Za-z]+?)(?:I(.+?)E)?E", symbol).groups()
    if argument is None:
        return body
    number = re.fullmatch(r"Li(\d)", argument)
    return body + number[1] if number else f"{body} {re.sub('NS.?_', '', argument)}"


def by_kernel(text, pattern):
    """{architecture: {kernel: what the text says of it}}; pattern finds the symbols' lines."""
    found = {}
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        pieces = re.split(pattern, part)
        names = map(kernel_of, pieces[1::2])
        found.setdefault(part.split()[0], {}).update(zip(names, pieces[2::2], strict=True))
    return found


@pytest.fixture(scope="module")
def sass():
    found = by_kernel(cuobjdump("-sass"), r"Function : (\S+)")
    return {
        arch: {name: re.findall(r"/\*\w{4,5}\*/\s+(.*?);", code) for name, code in kernels.items()}
        for arch, kernels in found.items()
    }


def lines(code, *opcodes):
    return [line for line in code if any(re.search(rf"\b{op}\b", line) for op in opcodes)]


def test_machine_code_for_each_target_and_ptx_of_the_last(sass):
    assert set(sass) == set(ARCHS)
    assert all(set(kernels) == KERNELS for kernels in sass.values())
    assert re.findall(r"(sm_\d+)\.ptx", cuobjdump("--list-ptx")) == ["sm_100"]


def test_registers_suffice(sass):
    usage = by_kernel(cuobjdump("-res-usage"), r"Function (\S+):")
    for arch in ARCHS:
        assert set(usage[arch]) == KERNELS
        for name, text in usage[arch].items():
            used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text)}
            assert used["REG"] <= 64, f"{arch} {name}: {used}"
            assert used["STACK"] == used["LOCAL"] == 0, f"{arch} {name}: {used}"
            assert lines(sass[arch][name], "LDL", "STL") == [], f"{arch} {name}"


@pytest.mark.parametrize(
    ("kernel", "loads"), [("PgdStepBody4", 6), ("RandomStartQuads1", 1), ("RandomStartQuads3", 3)]
)
def test_accesses_are_128_bits_wide(sass, kernel, loads):
    """That many loads are under way before the first store; the stores are as wide."""
    for arch in ARCHS:
        accesses = lines(sass[arch][kernel], "LDG", "STG")
        first = next(i for i, line in enumerate(accesses) if "STG" in line)
        assert "STG.E.128" in accesses[first], f"{arch}: {accesses}"
        assert sum("LDG.E.128" in line for line in accesses[:first]) == loads, f"{arch}: {accesses}"


def test_views_are_stored_128_bits_at_a_time(sass):
    for arch in ARCHS:
        stores = lines(sass[arch]["AugmentBody4"], "STG")
        assert stores
        assert all("STG.E.128" in store for store in stores), f"{arch}: {stores}"


def test_what_must_have_cpus_bits_has_no_fused_multiply_add(sass):
    for arch in ARCHS:
        for name, code in sass[arch].items():
            if name.startswith(("PgdStep", "RandomStart")):
                assert lines(code, "FFMA") == [], f"{arch} {name}"
                assert lines(code, "FADD"), f"{arch} {name}"
