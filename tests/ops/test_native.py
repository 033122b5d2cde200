"""The compiled library keeps its promises: symbols, headers, dispatch, and life without it."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastadv.engine import packed
from fastadv.ops import _native

ROOT = Path(__file__).parents[2]
CMAKE = (ROOT / "CMakeLists.txt").read_text()
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx") if X86 else ("scalar",)
COMPILER = shutil.which("g++")
STEP = "import torch; from fastadv import info, ops; x = torch.full((2, 3), 0.5); "
STEP += "print(ops.pgd_step(x, -torch.ones(2, 3), x, 8 / 255, 2 / 255)[1, 2].item()); "


def flags(isa):
    """The compile flags of one instruction set, as CMakeLists.txt has them."""
    common = re.search(r"target_compile_options\(fastadv_\$\{isa\} PRIVATE (-O3[^$]*)", CMAKE)[1]
    own = re.search(rf"set\(flags_{isa} ([^)]*)\)", CMAKE)[1]
    own = re.sub(r"\${flags_(\w+)}", lambda other: " ".join(flags(other[1])), own)
    return [*common.split(), *own.replace('"', "").split(), "-fopenmp", "-std=gnu++17", "-fPIC"]


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize(
    "isa",
    [pytest.param(isa, marks=[pytest.mark.slow] * (isa != "scalar")) for isa in ISAS],
)
def test_objects_share_no_symbol(isa, tmp_path):
    """A weak symbol would let the linker keep one instruction set's copy for all of them."""
    out = tmp_path / "kernels.o"
    source = ROOT / "csrc" / "cpu" / "kernels.cpp"
    command = [COMPILER, *flags(isa), f"-DFASTADV_ISA={isa}", "-c", source, "-o", out]
    subprocess.run(command, check=True)
    listed = subprocess.run(["nm", "-C", out], check=True, capture_output=True, text=True).stdout
    symbols = re.findall(r"^(?:[0-9a-f]{16}| {16}) (\S) (.+)$", listed, re.MULTILINE)
    assert len(symbols) == len(listed.splitlines())
    assert [name for kind, name in symbols if kind in "WwVvu"] == []
    table = f"fastadv::{isa}::table"
    assert [name for kind, name in symbols if kind.isupper() and kind != "U"] == [table]


# Instructions by the first bytes of their code, behind prefixes of 16-bit operands and the like:
# those of AVX and later begin with C4, C5 or 62 (AVX-512), those of SSSE3 to SSE4 with 0F 38 or 3A.
PREFIXES = r"^(?:(?:66|67|f2|f3|2e|3e|26|64|65|f0|4[0-9a-f]) )*"
AVX, AVX512, SSE4 = rf"{PREFIXES}c[45] ", rf"{PREFIXES}62 ", rf"{PREFIXES}0f 3[8a] "
BMI = r"\t(andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx) "
MASKS = r"%k[0-7]|%zmm"  # of AVX-512, whose instructions on masks begin as AVX's do
BF16 = r"\tv(dpbf16ps|cvtne2?ps2bf16)"
TILES = r"\t(\w*tile\w*|tdp\w+) ?"
# What is in no flag of CMakeLists.txt: VNNI, IFMA, VBMI, BITALG, VPOPCNTDQ, CD, GFNI, FP16.
NEWER = (
    r"\tv(pdp|p4dp|pmadd52|perm[bi]2?b |pmultishift|pshufbit|popcnt|pshld|pshrd|pconflict|plzcnt)"
)
NEWER += r"|\tv(pcompress[bw]|pexpand[bw]|gf2p8|\w+ph |\w+sh )(?<!cvtps2ph )"
HIGHER = {
    "": (SSE4, AVX, AVX512),  # all but the kernels
    "scalar": (SSE4, AVX, AVX512),
    "avx2": (BMI, MASKS, AVX512, TILES),
    "avx512": (BMI, BF16, TILES, NEWER),
    "avx512_bf16": (BMI, TILES, NEWER),
    "amx": (BMI, r"\ttdp(?!bf16ps)", NEWER),
}
OWN = {"avx2": "%ymm", "avx512": "%zmm", "avx512_bf16": r"\tvdpbf16ps", "amx": r"\ttdpbf16ps"}


def machine_code():
    """{instruction set: lines of the compiled module's code for it}; "": of what runs on any."""
    command = ["objdump", "--disassemble", "--insn-width=15", _native._C.__file__]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {isa: [] for isa in HIGHER}
    for function in listed.split("\n\n"):
        name, _, code = function.partition(":\n")
        # As C++ writes fastadv::avx2::..., with the lengths of the names.
        inside = [isa for isa in ISAS if f"7fastadv{len(isa)}{isa}" in name]
        if inside or "fastadv" in name or "pybind11" in name:
            found["".join(inside[:1])] += [line.partition(":\t")[2] for line in code.splitlines()]
    return found


@pytest.mark.skipif(bool(_native.missing), reason="no compiled module")
@pytest.mark.skipif(not X86 or not shutil.which("objdump"), reason="no x86, or no objdump")
def test_no_code_needs_a_higher_instruction_set():
    """Whatever the flags are: an instruction that a processor lacks kills the process."""
    for isa, lines in machine_code().items():
        if isa in ("", "scalar", "avx2", "avx512"):  # other compilers may not know the rest
            assert len(lines) > 1000, isa
        higher = re.compile("|".join(f"(?:{kind})" for kind in HIGHER[isa]))
        assert [line for line in lines if higher.search(line)][:5] == [], isa or "outside kernels"
        if lines and isa in OWN:
            assert any(re.search(OWN[isa], line) for line in lines), isa


@pytest.mark.skipif(bool(_native.missing), reason="no compiled module")
def test_blocks_are_as_large_as_the_kernels_have_them():
    sizes = packed.IMAGES, packed.CHANNELS
    assert sizes == (_native.constant("images_per_block"), _native.constant("channels_per_block"))


@pytest.mark.skipif(bool(_native.missing), reason="no compiled module")
def test_a_call_that_a_kernel_does_not_know_is_refused():
    args = [0] * 5 + [1, 1, 0.1, 0.1, "linf", 0.0, 1.0]
    with pytest.raises(TypeError, match="pgd_step takes 13 arguments, not 12"):
        _native.run("pgd_step", _native.CPU, *args[1:])
    args[9] = "l3"
    with pytest.raises(
        ValueError, match="argument 10 of pgd_step is 'l3', must be one of linf, l2"
    ):
        _native.run("pgd_step", _native.CPU, *args)


@pytest.mark.skipif(bool(_native.missing), reason="no compiled module")
@pytest.mark.parametrize(
    ("position", "value", "wanted"),
    [
        (1, None, "an address"),
        (6, 1.5, "a whole number"),
        (8, "0.1", "a number"),
        (10, 1, "one of linf, l2"),
        (13, None, "a whole number"),  # the threads, which are no member of the struct
    ],
)
def test_an_argument_of_a_wrong_kind_is_named(position, value, wanted):
    args = [0] * 5 + [1, 1, 0.1, 0.1, "linf", 0.0, 1.0, 1]
    args[position - 1] = value
    message = f"argument {position} of pgd_step is {value!r}, must be {wanted}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        _native._C.pgd_step(*args)


def test_only_bind_knows_python_or_torch():
    outside = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11)')
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"bind.cpp", "kernels.cpp", "table.h", "vec.h"}
    knows = [path.name for path in files if outside.search(path.read_text())]
    assert knows == ["bind.cpp"]


def python(code, **environment):
    """Runs code in a fresh interpreter; returns (exit status, stdout, stderr)."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTADV_")}
    command = [sys.executable, "-c", code]
    env = clean | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def stepped(stdout):
    """Whether the first line is 0.5 - 2/255, the step of STEP."""
    return abs(float(stdout.splitlines()[0]) - (0.5 - 2 / 255)) < 1e-6


@pytest.mark.skipif(bool(_native.missing), reason="no compiled module")
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in _native.isas()])
def test_isa_is_honoured(isa):
    status, out, err = python(STEP + "print(info.isa())", FASTADV_CPU_ISA=isa)
    assert status == 0, err
    assert stepped(out)
    assert out.splitlines()[1] == isa


@pytest.mark.skipif(bool(_native.missing), reason="no compiled module")
@pytest.mark.parametrize("isa", ["mmx", *(isa for isa in ISAS if isa not in _native.isas())])
def test_an_isa_that_is_not_here_raises(isa):
    status, _, err = python("import fastadv", FASTADV_CPU_ISA=isa)
    assert status != 0
    there = ", ".join(_native.isas())
    assert (
        f"FASTADV_CPU_ISA is {isa!r}, must be one of those that this build and machine have: "
        in err
    )
    assert err.endswith(f"{there}\n")
    with pytest.raises(ValueError, match=f"isa is '{isa}', which this build or machine does not"):
        _native.use_isa(isa)


def test_reference_backend_leaves_the_native_code_alone():
    trap = "from fastadv.ops import _native; _native.run = None; "
    status, out, err = python(trap + STEP + "print(info.report())", FASTADV_BACKEND="reference")
    assert status == 0, err
    assert stepped(out)
    assert re.search(r"^pgd_step +reference \(FASTADV_BACKEND=reference\)", out, re.MULTILINE)
    assert "FASTADV_BACKEND=reference" in out
    assert err == ""


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("nonsense", "FASTADV_BACKEND is 'nonsense', must be one of auto, native, triton, cuda"),
        ("cuda", "FASTADV_BACKEND is cuda, but "),
    ],
)
def test_backend_that_cannot_be_honoured_raises(choice, message):
    status, _, err = python("import fastadv", FASTADV_BACKEND=choice, CUDA_VISIBLE_DEVICES="-1")
    assert status != 0
    assert message in err


@pytest.mark.skipif(bool(_native.missing), reason="no compiled module")
@pytest.mark.skipif(Path(_native.__file__).parents[2] != ROOT, reason="not run from the checkout")
@pytest.mark.parametrize("stamp", ["'of other headers'", "None"])
def test_a_module_of_other_headers_is_refused(stamp):
    """As after a pull without a build; `None`: one that is older than the comparison."""
    stale = "import sys, types; stale = sys.modules['fastadv._C'] = types.ModuleType('_C'); "
    stale += f"stale.__file__ = '_C.so'; stale.headers = {stamp}; import fastadv"
    status, _, err = python(stale)
    assert status != 0
    last = err.splitlines()[-1]
    assert last.startswith("ImportError: _C.so was built from other headers than ")
    assert "must be built again: `make install`, or `pip install -e .`" in last


def test_without_the_compiled_module():
    """Ops run as plain torch, one warning says so, info says why, and native cannot be forced."""
    hide = "import sys; sys.modules['fastadv._C'] = None; "
    status, out, err = python(hide + STEP + "print(info.report()); print(info.isa())")
    assert status == 0, err
    assert stepped(out)
    assert len(err.splitlines()) == 1
    assert "CPU ops run as plain torch: fastadv._C is not there" in err
    assert re.search(r"^CPU kernels: +fastadv._C is not there", out, re.MULTILINE)
    assert re.search(r"^pgd_step_ +reference \(fastadv._C is missing\)", out, re.MULTILINE)
    assert out.splitlines()[-1] == "None"
    status, _, err = python(hide + "import fastadv", FASTADV_BACKEND="native")
    assert status != 0
    assert "FASTADV_BACKEND is native, but fastadv._C is not there" in err
