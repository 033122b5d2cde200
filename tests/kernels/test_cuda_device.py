"""The CUDA kernels on a GPU: the CPU kernels' bits, torch's streams and devices, graph capture."""

import math

import pytest
import torch

from fastadv import losses, ops, testing
from fastadv.ops import _library, _native
from fastadv.ops.softmax_kl import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_native.cuda_missing()), reason=str(_native.cuda_missing())),
    pytest.mark.skipif(
        not _library.ops["pgd_step"].cuda.startswith("cuda"), reason="CUDA C++ is not chosen"
    ),
]
EPS, STEP = 8 / 255, 2 / 255
SHAPES = [(0, 3, 4, 4), (1, 1), (3, 33), (64, 3, 32, 32), (5, 3, 7, 9), (2, 3, 224, 224)]


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def misaligned(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


LAYOUTS = torch.Tensor.contiguous, last, misaligned


def same(on_gpu, on_cpu):
    return on_gpu.is_cuda and torch.equal(on_gpu.cpu(), on_cpu)


@pytest.fixture(autouse=True)
def synchronised():
    """What a kernel does wrong shows in its own test."""
    yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_pgd_step_has_the_bits_of_the_cpu(shape, per_sample):
    x = random(*shape)
    x_adv = x + 0.1 * (random(*shape, seed=1) - 0.5)
    grad = random(*shape, seed=2) - 0.5
    grad[grad > 0.4], grad[grad.abs() < 0.1] = math.nan, 0
    eps = torch.linspace(0.01, 0.1, shape[0]) if per_sample else EPS
    expected = ops.pgd_step(x_adv, grad, x, eps, STEP)
    for layout in LAYOUTS:
        args = [layout(t.cuda()) for t in (x_adv, grad, x)]
        radius = eps.cuda() if per_sample else eps
        assert same(ops.pgd_step(*args, radius, STEP), expected)
        before = args[0]._version
        ops.pgd_step_(*args, radius, STEP)
        assert same(args[0], expected)
        assert args[0]._version > before


@pytest.mark.parametrize("shape", SHAPES)
def test_random_start_has_the_bits_of_the_cpu(shape):
    x, index = random(*shape), torch.arange(shape[0]) * 10**10
    options = {"seed": -5, "restart": 3, "lo": 0.1, "hi": 0.9}
    expected = ops.random_start(x, EPS, index=index, **options)
    for layout in LAYOUTS:
        got = ops.random_start(layout(x.cuda()), EPS, index=index.cuda(), **options)
        assert same(got, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (64, 3, 32, 32), (3, 1, 7, 15), (2, 3, 4, 5)])
def test_augment_has_the_bits_of_the_cpu(shape, channels_last):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    dy, dx = torch.randint(-3, 12, (2, shape[0]), generator=g)
    args = images, dy, dx, dy % 2 == 0
    expected = ops.augment(*args, channels_last=channels_last)
    got = ops.augment(*(t.cuda() for t in args), channels_last=channels_last)
    assert same(got, expected)
    assert got.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("classes", [1, 10, 64])
def test_softmax_kl(classes, reduction, dtype):
    for batch in (0, 1, 128, 250):
        student, teacher = (6 * random(batch, classes, seed=s).to(dtype) for s in (0, 1))
        args = student, teacher, random(batch, seed=2), 2.0, reduction, True, True, True
        exact = reference(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
        plain = reference(*args)
        on_gpu = [t.cuda() if isinstance(t, torch.Tensor) else t for t in args]
        got, again = ops.softmax_kl(*on_gpu), ops.softmax_kl(*on_gpu)
        for i, (a, b, *expected) in enumerate(zip(got, again, exact, plain, strict=True)):
            testing.assert_close(f"softmax_kl[{i}]", a.cpu(), *expected)
            assert torch.equal(a, b)


def test_gradients_of_a_loss():
    student, teacher = (6 * random(128, 10, seed=s) for s in (0, 1))
    grads = []
    for device in ("cpu", "cuda"):
        s = student.to(device).requires_grad_()
        losses.kl(s, teacher.to(device), temperature=3.0).backward()
        grads.append(s.grad.cpu())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def test_what_cuda_does_not_take_is_still_right():
    x, grad = random(4, 3, 8, 8), random(4, 3, 8, 8, seed=1) - 0.5
    expected = ops.pgd_step(x, grad, x, 0.5, 0.1, norm="l2")
    got = ops.pgd_step(x.cuda(), grad.cuda(), x.cuda(), 0.5, 0.1, norm="l2")
    torch.testing.assert_close(got.cpu(), expected)
    double = ops.pgd_step(x.cuda().double(), grad.cuda().double(), x.cuda().double(), EPS, STEP)
    assert same(double, ops.pgd_step(x.double(), grad.double(), x.double(), EPS, STEP))
    every_other = x.cuda()[..., ::2]
    got = ops.pgd_step(every_other, every_other, every_other, EPS, STEP)
    assert same(got, ops.pgd_step(x[..., ::2], x[..., ::2], x[..., ::2], EPS, STEP))


def test_current_stream_is_used():
    """The step waits for what is before it on its stream, and for nothing else."""
    x, ahead = random(64, 3, 32, 32), torch.rand(4096, 4096, device="cuda")
    x_gpu, grad = x.cuda(), torch.ones_like(x).cuda()  # a copy from the CPU would wait
    late = torch.zeros_like(grad)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            ahead @ ahead
        late.copy_(x_gpu)
        got = ops.pgd_step(late, grad, late, EPS, STEP)
        torch.cuda.current_stream().synchronize()
    assert same(got, ops.pgd_step(x, torch.ones_like(x), x, EPS, STEP))


def test_nothing_waits_for_the_gpu():
    x, z = random(8, 3, 8, 8).cuda(), random(8, 10).cuda()
    pixels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8, device="cuda")
    offsets = torch.zeros(8, dtype=torch.int64, device="cuda")
    flip = torch.zeros(8, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.pgd_step_(x.clone(), x, x, EPS, STEP)
        ops.random_start(x, EPS, seed=0)
        ops.augment(pixels, offsets, offsets, flip)
        ops.softmax_kl(z, z, reduction="batchmean", student_grad=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture():
    x, grad = random(64, 3, 32, 32).cuda(), random(64, 3, 32, 32, seed=1).cuda() - 0.5
    teacher = random(64, 10).cuda()
    student = torch.zeros_like(teacher)
    x_adv = torch.empty_like(x)

    def attack():
        x_adv.copy_(ops.random_start(x, EPS, seed=1))
        ops.pgd_step_(x_adv, grad, x, EPS, STEP)
        return ops.softmax_kl(student, teacher, None, 1.0, "batchmean", True)[:2]

    attack()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attack()
    x.copy_(random(64, 3, 32, 32, seed=5))
    student.copy_(random(64, 10, seed=6))
    graph.replay()
    found, replayed = x_adv.clone(), [t.clone() for t in captured]
    expected = attack()
    assert torch.equal(found, x_adv)
    assert all(map(torch.equal, replayed, expected))


def test_mixed_devices_raise():
    x = random(2, 3, 4, 4)
    with pytest.raises(ValueError, match="grad is on cpu, must be on cuda:0"):
        ops.pgd_step(x.cuda(), x, x.cuda(), EPS, STEP)
    with pytest.raises(ValueError, match="x is on cuda:0, must be on cpu"):
        ops.pgd_step(x, x, x.cuda(), EPS, STEP)
    z = random(2, 10)
    with pytest.raises(ValueError, match="teacher_logits is on cpu, must be on cuda:0"):
        ops.softmax_kl(z.cuda(), z)
    with pytest.raises(ValueError, match="index is on cpu, must be on cuda:0"):
        ops.random_start(x.cuda(), EPS, index=torch.arange(2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_other_gpu():
    x = random(8, 3, 8, 8)
    expected = ops.pgd_step(x, x, x, EPS, STEP)
    other = x.to("cuda:1")
    assert same(ops.pgd_step(other, other, other, EPS, STEP), expected)
    assert torch.cuda.current_device() == 0
    assert torch.ones(1, device="cuda").get_device() == 0
    with pytest.raises(ValueError, match="grad is on cuda:0, must be on cuda:1"):
        ops.pgd_step(other, x.to("cuda:0"), other, EPS, STEP)
