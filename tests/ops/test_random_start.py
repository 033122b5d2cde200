import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv import ops
from fastadv.ops import _library, _native
from fastadv.ops.random_start import _compiled, philox, reference
from fastadv.testing import OpCase, check_op, check_values, isas, using_isa

EPS = 8 / 255
ISAS = isas()
KINDS = [("uniform", "linf"), ("uniform", "l2"), ("gaussian", "linf")]
NHWC = {"memory_format": torch.channels_last}


def make(shape, init="uniform", norm="linf", per_sample=False, ids=False, eps=EPS, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g)
    radius = torch.rand(shape[0], generator=g) * eps if per_sample else None
    index = torch.randint(-(2**40), 2**40, shape[:1], generator=g) if ids else None
    key = torch.randint(-(2**62), 2**62, (), generator=g)
    box = (0.0, 1.0) if ids else (-math.inf, math.inf)
    return OpCase("random_start", (x, key, index, radius, eps, init, norm, 0.1, 3, 2**32 - 2, *box))


@pytest.mark.parametrize(("init", "norm"), [*KINDS, ("zero", "linf")])
@pytest.mark.parametrize("per_sample", [False, True])
def test_op(init, norm, per_sample):
    check_op(make((5, 3, 4, 7), init, norm, per_sample, ids=per_sample, eps=0.5))


@pytest.mark.parametrize(("init", "norm"), KINDS)
@pytest.mark.parametrize("size", [0, 1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 70001])
def test_sizes(init, norm, size):
    check_values(make((3, size), init, norm, ids=True), layouts=("contiguous", "offset"))


@pytest.mark.parametrize(("init", "norm"), KINDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4,), (2, 1, 1, 1), (2, 0, 3, 3), (9, 3, 8, 8)])
def test_shapes(init, norm, shape):
    check_values(make(shape, init, norm))


def test_known_answers():
    """Random123's kat_vectors for philox4x32-10, and the first two through the op itself: zeros
    are the counter of element 0, ones that of the radius, which one element of l2 shows whole."""
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    zeros_out = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    ones_out = 0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD
    pi_out = 0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1
    for seed, counter, expected in (
        (0, (0,) * 4, zeros_out),
        (-1, (ones,) * 4, ones_out),
        (0x299F31D0A4093822, pi, pi_out),
    ):
        words = philox(seed, *(torch.tensor(word) for word in counter))
        assert tuple(int(word) for word in words) == expected
    for isa in ISAS:
        with using_isa(isa):
            noise = ops.random_start(torch.zeros(1, 4), eps=1.0, seed=0)
            expected = (torch.tensor([zeros_out]) >> 8) * 2.0**-23 - 1
            assert torch.equal(noise, expected)
            counter = {"seed": -1, "index": torch.tensor([-1]), "step": ones, "restart": ones}
            radius = ops.random_start(torch.zeros(1, 1), eps=1.0, norm="l2", **counter)
            assert radius.abs().item() == pytest.approx((ones_out[0] + 1) * 2.0**-32, rel=1e-7)


def test_uniform_bits_are_those_of_the_reference():
    case = make((9, 3, 32, 32), ids=True)
    expected = reference(*case.args)
    for isa in ISAS:
        with using_isa(isa):
            assert torch.equal(case.overload(*case.args), expected)


@pytest.mark.skipif(bool(_native.missing), reason="needs the compiled kernels")
@pytest.mark.parametrize(("init", "norm"), KINDS)
def test_bits_are_those_of_the_cpu_kernels(init, norm):
    """Those of every backend but the reference, whose normal draws are fp64."""
    if _library.ops["random_start"].cpu.startswith("reference"):
        pytest.skip("the reference differs in the last bit")
    _, *args = make((2, 3, 40, 41), init, norm, per_sample=True, ids=True, eps=0.5).args
    x = torch.zeros(2, 3, 40, 41)
    for laid in (x, x.contiguous(**NHWC)):
        out = _compiled(laid, *args)
        got = torch.ops.fastadv.random_start(laid, *args)
        assert torch.equal(got, out)
        assert got.stride() == out.stride()


@pytest.mark.parametrize(("init", "norm"), KINDS)
@pytest.mark.parametrize("shape", [(6, 3, 9, 7), (3, 16, 17, 16)])
def test_bits_depend_on_nothing_but_the_counter(init, norm, shape):
    """Instruction set, threads, memory layout, batch order and composition."""
    g = torch.Generator().manual_seed(1)
    x, ids = torch.rand(shape, generator=g), torch.randint(0, 2**31, shape[:1], generator=g)
    order = torch.randperm(len(x), generator=g)

    def start(x, index):
        return ops.random_start(x, 0.25, init, norm, sigma=0.1, seed=5, index=index, step=7)

    with using_isa(ISAS[-1]):
        expected = start(x, ids)
    threads = torch.get_num_threads()
    for isa in ISAS:
        with using_isa(isa):
            for count in (1, 3):
                torch.set_num_threads(count)
                got = start(x, ids), start(x.contiguous(**NHWC), ids), start(x.flatten(1), ids)
                torch.set_num_threads(threads)
                assert all(torch.equal(out.view_as(x), expected) for out in (got[0], got[2]))
                assert torch.equal(got[1], expected)
                assert got[1].stride() == x.contiguous(**NHWC).stride()
            assert torch.equal(start(x[order], ids[order]), expected[order])
            assert torch.equal(start(x[2:3], ids[2:3]), expected[2:3])


def test_normal_draws_are_within_their_ulp():
    """The docstring's 1.2 ulp of the fp64 reference, on 2^20 draws."""
    seed, rest = torch.tensor(11), (None, None, 0.0, "gaussian", "linf", 1.0, 0, 0, -9.0, 9.0)
    exact = reference(torch.zeros(4, 2**18).double(), seed, *rest)
    ulp = torch.nextafter(exact.float().abs(), torch.tensor(math.inf)) - exact.float().abs()
    for isa in ISAS:
        with using_isa(isa):
            got = torch.ops.fastadv.random_start(torch.zeros(4, 2**18), seed, *rest)
            assert ((got - exact).abs() / ulp)[exact.abs() > 1e-12].max() <= 1.2


def draws(shape=(64, 4096), **counter):
    """Uniform in [0, 1): linf noise, and N(0, 1) mapped through its distribution function."""
    zeros = torch.zeros(shape)
    normal = ops.random_start(zeros, 0.0, "gaussian", sigma=1.0, **counter).double()
    uniform = (ops.random_start(zeros, 1.0, **counter).double() + 1) / 2
    return uniform, torch.special.ndtr(normal)


def kolmogorov_smirnov(u):
    """sqrt(n) sup |F_n - F|: above 1.95 once in a thousand honest samples."""
    u = u.flatten().sort().values
    steps = torch.arange(len(u) + 1) / len(u)
    return max((steps[1:] - u).max(), (u - steps[:-1]).max()) * math.sqrt(len(u))


def test_distributions():
    for u in draws(seed=3):
        assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())
        assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / u.numel())
        assert kolmogorov_smirnov(u) < 1.95
    ball = ops.random_start(torch.zeros(4000, 5), 2.0, norm="l2", seed=3).double()
    radius = ball.norm(dim=1)
    assert kolmogorov_smirnov((radius / 2) ** 5) < 1.95  # volume below a radius is uniform
    assert (ball / radius[:, None]).mean(0).abs().max() < 4 / math.sqrt(4000 * 5)


def test_neighbouring_counters_are_uncorrelated():
    """Seeds, steps, restarts and samples one apart, and elements, blocks and samples one along."""
    first, *others = [
        torch.stack(draws(**counter)).flatten(1)
        for counter in (
            {"seed": 3},
            {"seed": 4},
            {"seed": 3, "step": 1},
            {"seed": 3, "restart": 1},
            {"seed": 3, "index": torch.arange(64) + 1},
        )
    ]
    others += [first.roll(1, dims=1), first.roll(4, dims=1), first.roll(4096, dims=1)]
    for other in others:
        for a, b in zip(first - 0.5, other - 0.5, strict=True):
            assert abs((a * b).mean() * 12) < 4 / math.sqrt(a.numel())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 80)),
    eps=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_stays_in_ball_and_box(shape, eps, kind, seed):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed % 1000))
    out = ops.random_start(x, eps, *kind, seed=seed, lo=0.0, hi=1.0)
    assert out.min() >= 0
    assert out.max() <= 1
    if kind[0] == "uniform":
        order = math.inf if kind[1] == "linf" else 2
        assert (out - x).norm(order, dim=1).max() <= eps + 1e-6


def test_seed_comes_from_torchs_generator():
    x = torch.zeros(2, 8)
    torch.manual_seed(1)
    first, second = ops.random_start(x, EPS), ops.random_start(x, EPS)
    torch.manual_seed(1)
    assert torch.equal(ops.random_start(x, EPS), first)
    assert not torch.equal(first, second)
    given = ops.random_start(x, EPS, seed=6)
    assert torch.equal(ops.random_start(x, EPS, seed=torch.tensor([6])), given)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, seed):
        return ops.random_start(x, EPS, seed=seed)

    assert torch.equal(compiled(x, 6), given)
    assert compiled(x, None).abs().max() <= EPS


def test_edges():
    x = torch.rand(2, 5).requires_grad_()
    assert not ops.random_start(x, EPS).requires_grad
    assert torch.equal(ops.random_start(x, EPS, init="zero", lo=0.25, hi=0.5), x.clamp(0.25, 0.5))
    bad = torch.tensor([[math.nan, math.inf, -math.inf, 0.5]] * 2)
    for init, norm in KINDS:
        for laid in (bad, bad.view(2, 2, 2, 1).contiguous(**NHWC)):
            out = ops.random_start(laid, EPS, init, norm, lo=0.0, hi=1.0).flatten(1)
            assert out[:, 0].isnan().all()
            assert torch.equal(out[:, 1:3], torch.tensor([[1.0, 0.0]] * 2))
    assert torch.equal(ops.random_start(x, 0.0, norm="l2"), x)
    assert ops.random_start(x.double(), EPS, seed=6).dtype == torch.float64


def test_bad_arguments_name_themselves():
    x = torch.rand(4, 3, 2, 2)

    def fails(error, match, **changed):
        with pytest.raises(error, match=match):
            ops.random_start(**{"x": x, "eps": EPS} | changed)

    fails(TypeError, "x is torch.bfloat16, must be torch.float32", x=x.bfloat16())
    fails(ValueError, r"x has shape \(\), must be \[B, ...\]", x=torch.tensor(1.0))
    fails(ValueError, "eps is 8, .*did you mean 8/255", eps=8)
    fails(ValueError, r"eps is 3, must be in \[0, 2.0\]", eps=3, lo=-1.0, hi=1.0)
    fails(ValueError, r"eps has shape \(3,\), must be a float or one value", eps=torch.ones(3))
    fails(ValueError, "init is 'normal', must be", init="normal")
    fails(ValueError, "norm is 'l1', must be 'linf' or 'l2'", norm="l1")
    fails(ValueError, "sigma is -1.0, must be at least 0", sigma=-1)
    fails(TypeError, "seed is torch.float32, must be torch.int64", seed=0.5)
    fails(ValueError, r"seed is \(2,\) on cpu, must be one value", seed=torch.arange(2))
    fails(TypeError, "index is torch.int32, must be torch.int64", index=torch.zeros(4).int())
    fails(ValueError, r"index has shape \(3,\), must be \(4,\)", index=torch.arange(3))
    fails(ValueError, r"step is -1, must be in \[0, 2\^32\)", step=-1)
    fails(ValueError, r"restart is 4294967296, must be in", restart=2**32)


def test_the_result_is_laid_out_as_x():
    x = torch.rand(4, 5, 6).permute(2, 0, 1)
    for init in ("uniform", "gaussian", "zero"):
        start = ops.random_start(x, 0.1, init, seed=1)
        assert start.stride() == x.stride()
        assert torch.equal(start, ops.random_start(x.contiguous(), 0.1, init, seed=1))


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_op[True-uniform-linf]",
    "test_known_answers",
    "test_edges",
    "test_uniform_bits_are_those_of_the_reference",
    "test_bits_are_those_of_the_cpu_kernels",
)
REGISTERS = {"shift_kernel": 48, "ball_kernel": 80}
IMAGES, RADII = torch.empty(64, 3, 32, 32), torch.empty(64)
SEEDED = torch.tensor(2**40), torch.empty(64, dtype=torch.int64), RADII, 0.1
BOX = 0.1, 3, 2**32 - 1, 0.0, 1.0
COMPILED = [
    ("shift_kernel uniform", (IMAGES, *SEEDED, "uniform", "linf", *BOX), 2),
    ("shift_kernel gaussian", (IMAGES, *SEEDED, "gaussian", "linf", *BOX), 1),
    ("ball_kernel", (IMAGES, *SEEDED, "uniform", "l2", *BOX), 2),
    (
        "ball_kernel channels_last",
        (IMAGES.contiguous(**NHWC), *SEEDED, "uniform", "l2", *BOX),
        None,
    ),
]
