"""The bodies of the CUDA kernels give the right numbers, without a GPU.

emulate.cpp compiles the lines of csrc/cuda for the CPU and runs them thread by thread, at whatever
size of the grid. The ops are then called as ever, only that `_native` hands what it would give a
GPU to the emulation.
"""

import contextlib
import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastadv import ops, testing
from fastadv.ops import _library, _native
from fastadv.ops.softmax_kl import reference
from fastadv.testing import OpCase, check_values

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"),
    pytest.mark.skipif(_library.ops["pgd_step"].cpu != "native", reason="of the native ops"),
]
SOURCE = Path(__file__).with_name("emulate.cpp")
FLAGS = "-O1 -std=gnu++17 -shared -fPIC -ffp-contract=off -Wall -Wextra -Werror"
GRIDS = (1, 37, 4096)
CODES = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "I": ctypes.c_uint32,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "b": ctypes.c_bool,
    "H": ctypes.c_uint16,
}
MEMBERS = {  # of the structs in csrc/
    "pgd_step": "pppppllffiff",
    "random_start": "ppppllllfiifIIff",
    "augment": "ppppplllllb",
    "softmax_kl": "pppppppllllddbi",
}
CHOICES = {"linf": 0, "uniform": 0, "f32": 0, "bf16": 1, "f16": 2}
EPS, STEP = 8 / 255, 2 / 255
ALL = True, True, True


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("emulate") / "emulate.so"
    command = ["g++", *FLAGS.split(), "-Wno-unknown-pragmas", SOURCE, "-o", out]
    if "asan" in os.environ.get("LD_PRELOAD", ""):  # make sanitize
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(out)


def struct(kernel, values):
    """The kernel's struct of these values."""
    fields = [(str(i), CODES[code]) for i, code in enumerate(MEMBERS[kernel])]
    made = type(kernel, (ctypes.Structure,), {"_fields_": fields})
    return made(*(CHOICES.get(value, value) for value in values))


@pytest.fixture
def emulating(library, monkeypatch):
    """A context manager: inside, native calls run on a grid of so many threads. Gives the list of
    (kernel, items of work) of the launches."""
    monkeypatch.setattr(testing, "isas", lambda: ["cuda"])

    @contextlib.contextmanager
    def on_grid(threads):
        launches = []

        def run(kernel, device, *args):
            work = ctypes.c_int64(-1)
            launched = ctypes.byref(struct(kernel, args))
            getattr(library, kernel)(launched, ctypes.c_int64(threads), ctypes.byref(work))
            launches.append((kernel, work.value))

        with monkeypatch.context() as patch:
            patch.setattr(_native, "run", run)
            yield launches

    return on_grid


def same_bits(a, b):
    return a.stride() == b.stride() and torch.equal(a.view(torch.int32), b.view(torch.int32))


def step_case(shape, per_sample=False, in_place=False):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=g)
    x_adv = x + (2 * torch.rand(shape, generator=g) - 1) * 1.2 * EPS
    grad = torch.randn(shape, generator=g)
    grad[grad.abs() < 0.1] = 0
    grad[grad > 2] = math.nan
    radius = torch.rand(shape[0], generator=g) * EPS if per_sample else None
    args = (x_adv, grad, x, radius, EPS, STEP, "linf", 0.0, 1.0)
    return OpCase("pgd_step_" if in_place else "pgd_step", args)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("size", [0, 1, 7, 31, 32, 33, 1000])
def test_pgd_step(emulating, size, per_sample):
    for batch in (1, 3):
        case = step_case((batch, size), per_sample)
        expected = case.overload(*case.args)
        for grid in GRIDS:
            with emulating(grid):
                assert same_bits(case.overload(*case.args), expected)
    with emulating(37):
        check_values(step_case((3, size), per_sample, in_place=True))


def test_pgd_step_on_images_of_any_layout(emulating):
    with emulating(37):
        for per_sample in (False, True):
            check_values(step_case((3, 3, 4, 8), per_sample))
            check_values(step_case((2, 3, 5, 7), per_sample, in_place=True))


def test_accesses_are_wide_where_they_may_be(emulating):
    def work(op, *args, **kwargs):
        with emulating(64) as launches:
            op(*args, **kwargs)
        return [n for _, n in launches]

    x, ragged = torch.rand(3, 40), torch.rand(3, 33)
    eps = torch.full((3,), EPS)
    shifted = torch.rand(121)[1:].view(3, 40)
    step = ops.pgd_step
    assert work(step, x, x, x, EPS, STEP) == work(step, x, x, x, eps, STEP) == [30]
    assert work(step, ragged, ragged, ragged, EPS, STEP) == [25]
    assert work(step, ragged, ragged, ragged, eps, STEP) == [99]  # a four would have two radii
    for operands in ((shifted, x, x), (x, shifted, x), (x, x, shifted)):
        assert work(step, *operands, EPS, STEP) == [120]
    images = torch.rand(2, 3, 4, 4)
    last = {"memory_format": torch.channels_last}
    assert work(ops.random_start, images, EPS) == [24]
    assert work(ops.random_start, images.contiguous(**last), EPS) == [8]  # of 12 elements each
    assert work(ops.random_start, shifted, EPS) == work(ops.random_start, x, EPS) == [30]
    assert work(ops.random_start, ragged, EPS) == [27]
    offsets = torch.zeros(2, dtype=torch.int64)
    for shape, expected in (((2, 3, 4, 4), 24), ((2, 3, 3, 3), 54)):
        pixels = torch.zeros(shape, dtype=torch.uint8)
        assert work(ops.augment, pixels, offsets, offsets, offsets.bool()) == [expected]
    assert work(ops.softmax_kl, x, x, reduction="none") == [3]


def test_pgd_step_edges(emulating):
    """Zeros keep their sign, NaN its place, and x_adv may lie outside of the box."""
    x = torch.tensor([[-0.0, 0.0, math.nan, 1.5, -1.0, 0.5]])
    x_adv = torch.tensor([[-0.0, -0.0, 0.5, 1.5, -1.0, math.nan]])
    for step in (STEP, -STEP, 0.0):
        for grad in (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, 1e-45):
            args = x_adv, torch.full_like(x, grad), x, EPS, step
            expected = ops.pgd_step(*args)
            with emulating(3):
                assert same_bits(ops.pgd_step(*args), expected)


START_SHAPES = [(0, 3, 4, 4), (2, 0, 3, 3), (3, 1), (3, 7), (3, 33), (2, 1000), (5, 3, 8, 8)]
START_SHAPES += [(4, 3, 5, 7), (2, 4, 4, 4), (2, 3, 2, 66)]


@pytest.mark.parametrize("shape", START_SHAPES)
@pytest.mark.parametrize("seed", [0, -(2**62) - 12345])
def test_random_start(emulating, shape, seed):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    laid = [x, *([x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [])]
    index = torch.arange(len(x)) * 10**10 - 7
    options = {"seed": seed, "step": 2**32 - 1, "restart": 5, "lo": 0.1, "hi": 0.8}
    for v in laid:
        for given in ({}, {"index": index}):
            for eps in (EPS, torch.linspace(0, 0.1, len(x))):
                expected = ops.random_start(v, eps, **options, **given)
                for grid in GRIDS:
                    with emulating(grid):
                        assert same_bits(ops.random_start(v, eps, **options, **given), expected)


def test_random_start_writes_what_it_should_and_no_more(emulating):
    with emulating(37):
        for shape in ((3, 33), (3, 32), (2, 3, 4, 4), (2, 3, 3, 3)):
            x = torch.rand(shape)
            rest = torch.tensor(9), None, None, EPS, "uniform", "linf", 1e-3, 0, 0, 0.0, 1.0
            check_values(OpCase("random_start", (x, *rest)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 1, 1, 1), (4, 4, 7, 15), (3, 3, 31, 33), (5, 3, 4, 5)]
)
def test_augment(emulating, shape, channels_last):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    dy, dx = torch.randint(-6, 15, (2, shape[0]), generator=g)
    for padding in (0, 4):
        for flip in (torch.zeros_like(dy).bool(), torch.arange(len(dy)) % 2 == 0):
            args = images, dy, dx, flip, padding, channels_last
            expected = ops.augment(*args)
            for grid in GRIDS:
                with emulating(grid):
                    assert same_bits(ops.augment(*args), expected)
            with emulating(37):
                check_values(OpCase("augment", args))


def test_augment_divides_as_torch_does_and_takes_any_offset(emulating):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    zero = torch.zeros(1, dtype=torch.int64)
    with emulating(8):
        assert torch.equal(ops.augment(images, zero, zero, zero > 0, 0), images / 255)
        for far in (2**62, -(2**62)):
            assert (ops.augment(images, zero + far, zero, zero > 0, 4) == 0).all()
            assert (ops.augment(images, zero, zero + far, zero > 0, 4) == 0).all()


def kl_case(batch, classes, reduction="none", temperature=1.0, dtype=torch.float32, scale=3.0):
    g = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(batch, classes, generator=g)
    noise = torch.randn(batch, classes, generator=g)
    student = 3 * noise if scale == 3 else teacher + scale * noise
    weight = torch.rand(batch, generator=g) if temperature != 1 else None
    logits = student.to(dtype), teacher.to(dtype)
    return OpCase("softmax_kl", (*logits, weight, temperature, reduction, *ALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 7, 10, 31, 32, 33, 64])
def test_softmax_kl(emulating, classes, dtype):
    with emulating(37):
        for batch in (0, 1, 33):
            for temperature in (1.0, 3.0):
                case = kl_case(batch, classes, "none", temperature, dtype)
                check_values(case, layouts=("contiguous", "offset"))
                for reduction in ("sum", "batchmean", "mean"):
                    case = kl_case(batch, classes, reduction, temperature, dtype)
                    check_values(case, layouts=("contiguous",))


def test_softmax_kl_does_not_depend_on_the_grid(emulating):
    for reduction in ("none", "batchmean"):
        case, results = kl_case(1600, 10, reduction, 2.0), []
        for grid in GRIDS:
            with emulating(grid):
                results.append(case.overload(*case.args))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
        with emulating(37):
            check_values(case, layouts=("contiguous",))  # more rows than a block has threads


@pytest.mark.parametrize("wanted", [(0, 0, 0), (0, 1, 0), (1, 0, 1)])
def test_softmax_kl_leaves_out_what_is_not_asked_for(emulating, wanted):
    case = kl_case(5, 10)
    with emulating(37):
        check_values(OpCase("softmax_kl", (*case.args[:5], *map(bool, wanted))))


@pytest.mark.parametrize("near", [1e-1, 1e-3, 1e-5])
def test_softmax_kl_of_near_equal_logits(emulating, near):
    with emulating(37):
        check_values(kl_case(64, 10, scale=near), layouts=("contiguous",))
        equal = kl_case(64, 10).args[0]
        loss, grad, *_ = ops.softmax_kl(equal, equal, None, 2.0, "none", True)
        assert (loss == 0).all()
        assert (grad == 0).all()


def test_softmax_kl_extremes(emulating):
    """Masked classes, infinite and large logits; NaN stays in its row."""
    student, teacher, *rest = kl_case(8, 10).args
    clean = student.clone(), teacher.clone()
    teacher[0, 1::2] = -math.inf
    student[0, 1], student[0, 3] = -math.inf, 1e4
    student[1, 4] = -math.inf
    student[2, 3], teacher[2, 5] = 1e4, 1e4
    student[3], teacher[3] = 1e6 * student[3], teacher[3] + 3e6
    teacher[4] = -math.inf
    teacher[4, 9] = 0
    student[6, 0], teacher[7, 9] = math.nan, math.nan
    exact = reference(student.double(), teacher.double(), *rest)
    same = reference(student, teacher, *rest)
    with emulating(37):
        got = ops.softmax_kl(student, teacher, None, 1.0, "none", *ALL)
        undisturbed = ops.softmax_kl(*clean, None, 1.0, "none", *ALL)
    for i, parts in enumerate(zip(got, exact, same, strict=True)):
        testing.assert_close(f"softmax_kl[{i}]", *parts)
    for a, b in zip(got, undisturbed, strict=True):
        assert torch.equal(a[5], b[5])
    assert got[0].isnan().tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_those_of_torch(library, dtype):
    library.widened.restype, library.narrowed.restype = ctypes.c_float, ctypes.c_uint16
    library.widened.argtypes = [ctypes.c_uint16, ctypes.c_bool]
    library.narrowed.argtypes = [ctypes.c_float, ctypes.c_bool]
    half = dtype == torch.float16
    raw = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = raw.view(dtype).float()
    widened = [library.widened(v & 0xFFFF, half) for v in raw.tolist()]
    torch.testing.assert_close(torch.tensor(widened), values, rtol=0, atol=0, equal_nan=True)
    finite = values[values.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()) / 2
    between = torch.cat([ties, ties * (1 + 1e-6), ties * (1 - 1e-6)]).float()
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65519.99, 65520.0, 3.4e38, 1e-45])
    v = torch.cat([values[~values.isnan()], between, edges])
    narrowed = torch.tensor([library.narrowed(x, half) for x in v.tolist()])
    assert torch.equal(narrowed.to(torch.int16), v.to(dtype).view(torch.int16))
    assert torch.tensor(library.narrowed(math.nan, half)).to(torch.int16).view(dtype).isnan()


def test_grids_fill_the_device_and_no_more(library):
    library.blocks.restype = ctypes.c_int64
    library.blocks.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    for work, block, expected in (
        (0, 256, 0),
        (1, 256, 1),
        (256, 256, 1),
        (257, 256, 2),
        (2**40, 256, 132 * 8),
        (2**40, 64, 132 * 32),
    ):
        assert library.blocks(work, block, 132) == expected
