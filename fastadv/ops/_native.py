"""The only file that touches the compiled module.

Raw pointers carry no safety of their own. An op's `check` has seen to shapes and devices; each
function here makes sure of dtype and strides (naming the argument at fault), makes no
temporaries, passes torch's thread count and bumps the version counter of what it mutates. The
interpreter lock is released in `csrc/bind.cpp`.

`pgd_step` (linf), `random_start` (uniform linf), `augment` and `softmax_kl` (few classes) take
tensors on a GPU as well: their CUDA kernels go to torch's current stream of that GPU, nothing waits
for them, and a CUDA graph can capture them after a first call outside, as with torch's own ops.
"""

import functools
import os

import torch

try:
    from .. import _C
except ImportError as error:
    _C = None
    missing = f"fastadv._C is not there ({error}); reinstall with a C++ compiler to build it"
else:
    missing = None
    if os.environ.get("FASTADV_CPU_ISA"):
        if os.environ["FASTADV_CPU_ISA"] not in _C.isas():
            raise ValueError(
                f"FASTADV_CPU_ISA is {os.environ['FASTADV_CPU_ISA']!r}, must be one of those that "
                f"this build and machine have: {', '.join(_C.isas())}"
            )
        _C.use_isa(os.environ["FASTADV_CPU_ISA"])

NORMS = {"linf": 0, "l2": 1}
INITS = {"uniform": 0, "gaussian": 1}
DISTANCES = {"mse": 0, "l2": 1, "cosine": 2}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def isas():
    """Instruction sets that this build and machine can run, fastest first; empty without `_C`."""
    return _C.isas() if _C else []


def isa():
    """The instruction set in use."""
    return _C.isa()


def use_isa(name):
    """Use the instruction set `name` from now on (tests and benchmarks)."""
    _C.use_isa(name)


@functools.cache
def cuda_missing():
    """Why the CUDA kernels cannot run here, or None."""
    if missing:
        return missing
    if not hasattr(_C, "cuda_built"):
        return "fastadv._C was built without nvcc 12.8 or newer"
    if not torch.cuda.is_available():
        return "no CUDA device"
    built, driver = _C.cuda_built // 1000, _C.cuda_driver() // 1000
    if driver < built:
        return f"fastadv._C was built with CUDA {built}, the driver is for CUDA {driver}"
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            found = "{}.{}".format(*capability)
            return f"cuda:{device} has compute capability {found}, must be 8.0 or higher"
    return None


def is_dense(tensor):
    """Whether the elements fill one block of memory, one sample after another."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def same_layout(tensor, *others):
    """Whether all are dense with equal strides, so that one flat index means one element."""
    strides = tensor.stride()
    return is_dense(tensor) and all(other.stride() == strides for other in others)


def empty_like(tensor, dtype=None):
    """Where every op gets its output memory; `fastadv.testing` puts guarded memory here."""
    return torch.empty_like(tensor, dtype=dtype)


def empty(shape, like, dtype=None, memory_format=torch.contiguous_format):
    """`empty_like` for another shape."""
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format
    )


def _address(name, tensor, dtype=torch.float32, device=-1):
    """The address of a tensor of this dtype on this GPU, or on the CPU if -1; 0 for None."""
    if tensor is None:
        return 0
    there = tensor.is_cpu if device < 0 else tensor.is_cuda and tensor.get_device() == device
    if tensor.dtype != dtype or not there:
        place = "cpu" if device < 0 else f"cuda:{device}"
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, must be {dtype} on {place}")
    return tensor.data_ptr()


def _run(kernel, device, *args):
    """Calls a kernel on torch's threads or, where device is a GPU, on torch's stream of it."""
    if device < 0:
        getattr(_C, kernel)(*args, torch.get_num_threads())
        return
    stream = torch.cuda.current_stream(device).cuda_stream
    error = getattr(_C, f"cuda_{kernel}")(*args, device, stream)
    if error:
        raise RuntimeError(f"{kernel} on cuda:{device}: {error}")


def _row(name, tensor):
    """`tensor`, made sure to be contiguous (None passes)."""
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")
    return tensor


def _mutated(tensor):
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def pgd_step(out, x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """Writes the step into `out`, which may be `x_adv`. fp32, one shape, one dense layout."""
    if not same_layout(x_adv, out, grad, x):
        raise ValueError("out, x_adv, grad and x must be dense with equal strides")
    batch, device = x_adv.shape[0] if x_adv.dim() else 1, x_adv.get_device()
    _run(
        "pgd_step",
        device,
        _address("out", out, device=device),
        _address("x_adv", x_adv, device=device),
        _address("grad", grad, device=device),
        _address("x", x, device=device),
        _address("eps", _row("eps", eps_per_sample), device=device),
        batch,
        x_adv.numel() // max(batch, 1),
        eps,
        step_size,
        NORMS[norm],
        lo,
        hi,
    )
    if out is x_adv:
        _mutated(out)


def apgd_step(
    x_adv,
    x_old,
    x_best,
    grad_best,
    x_found,
    bad_gradients,
    grad,
    x,
    step_size,
    better_best,
    better_found,
    restart,
    eps_per_sample,
    eps,
    weight,
    norm,
    lo,
    hi,
):
    """Overwrites the first six. Images and gradients are fp32 of one shape and dense layout."""
    mutated = x_adv, x_old, x_best, grad_best, x_found
    if not same_layout(*mutated, grad, x):
        raise ValueError(
            "x_adv, x_old, x_best, grad_best, x_found, grad and x must be dense with equal strides"
        )
    batch = step_size.numel()
    _C.apgd_step(
        _address("x_adv", x_adv),
        _address("x_old", x_old),
        _address("x_best", x_best),
        _address("grad_best", grad_best),
        _address("x_found", x_found),
        _address("bad_gradients", bad_gradients, torch.int64),
        _address("grad", grad),
        _address("x", x),
        _address("step_size", _row("step_size", step_size)),
        _address("better_best", _row("better_best", better_best), torch.bool),
        _address("better_found", _row("better_found", better_found), torch.bool),
        _address("restart", _row("restart", restart), torch.bool),
        _address("eps", _row("eps", eps_per_sample)),
        batch,
        x_adv.numel() // max(batch, 1),
        eps,
        weight,
        NORMS[norm],
        lo,
        hi,
        torch.get_num_threads(),
    )
    for tensor in (*mutated, bad_gradients):
        _mutated(tensor)


def random_start(
    out, x, seed, index, eps_per_sample, eps, init, norm, sigma, step, restart, lo, hi
):
    """Writes x + noise into `out`. fp32, one dense layout with samples outermost."""
    if not same_layout(x, out):
        raise ValueError("out and x must be dense with equal strides")
    batch, channels = x.shape[0], 1 if x.is_contiguous() else x.shape[1]
    device = x.get_device()
    _run(
        "random_start",
        device,
        _address("out", out, device=device),
        _address("x", x, device=device),
        _address("seed", seed, torch.int64),
        _address("index", _row("index", index), torch.int64, device),
        _address("eps", _row("eps", eps_per_sample), device=device),
        batch,
        channels,
        x.numel() // max(batch * channels, 1),
        eps,
        INITS[init],
        NORMS[norm],
        sigma,
        step,
        restart,
        lo,
        hi,
    )


def augment(out, images, dy, dx, flip, padding, channels_last):
    """Writes the views of uint8 [B, C, H, W] into `out`, fp32, channels_last or contiguous."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if out.shape != images.shape or not out.is_contiguous(memory_format=layout):
        raise ValueError(f"out has strides {out.stride()}, must be {layout} of images' shape")
    device = images.get_device()
    _run(
        "augment",
        device,
        _address("out", out, device=device),
        _address("images", _row("images", images), torch.uint8, device),
        _address("dy", _row("dy", dy), torch.int64, device),
        _address("dx", _row("dx", dx), torch.int64, device),
        _address("flip", _row("flip", flip), torch.bool, device),
        *images.shape,
        padding,
        channels_last,
    )


def margin(loss, grad, logits, y):
    """Writes loss fp32 [B] and grad like logits [B, C] (none where it is empty). Contiguous.
    Returns how many labels are outside [0, C)."""
    return _labelled(_C.margin, loss, grad, logits, y)


def dlr(loss, grad, logits, y):
    """As `margin`."""
    return _labelled(_C.dlr, loss, grad, logits, y)


def mart_bce(loss, grad, logits, y):
    """As `margin`."""
    return _labelled(_C.mart_bce, loss, grad, logits, y)


def _labelled(kernel, loss, grad, logits, y):
    dtype = logits.dtype
    return kernel(
        _address("loss", _row("loss", loss)),
        _address("grad", _row("grad", grad), dtype) if grad.numel() else 0,
        _address("logits", _row("logits", logits), dtype),
        _address("y", _row("y", y), torch.int64),
        *logits.shape,
        DTYPES[dtype],
        torch.get_num_threads(),
    )


def cross_entropy(loss, grad, logits, target, smoothing, ignore_index, reduction):
    """Writes loss fp32, [B] or reduced, and grad like logits [B, C] (none where it is empty).
    target: int64 [B] or fp32 [B, C]. Contiguous. Returns how many labels are neither in [0, C) nor
    ignored."""
    dtype, labels = logits.dtype, target.dtype == torch.int64
    return _C.cross_entropy(
        _address("loss", _row("loss", loss)),
        _address("grad", _row("grad", grad), dtype) if grad.numel() else 0,
        _address("logits", _row("logits", logits), dtype),
        _address("target", _row("target", target), torch.int64) if labels else 0,
        0 if labels else _address("target", _row("target", target)),
        *logits.shape,
        smoothing,
        ignore_index,
        REDUCTIONS[reduction],
        DTYPES[dtype],
        torch.get_num_threads(),
    )


def batch_norm(y, mean, var, x, weight, bias, residual, eps, relu):
    """Writes y like x [B, C, H, W], mean and var [C]. x, residual and y are channels_last."""
    maps = [y, x] if residual is None else [y, x, residual]
    dtype, channels = _same_maps(maps), x.shape[1]
    factors, sums = _batch_norm_memory(x)
    _C.batch_norm(
        _address("y", y, dtype),
        _address("mean", _row("mean", mean)),
        _address("var", _row("var", var)),
        factors.data_ptr(),
        sums.data_ptr(),
        _address("x", x, dtype),
        _address("residual", residual, dtype),
        _address("weight", _row("weight", weight)),
        _address("bias", _row("bias", bias)),
        x.numel() // channels,
        channels,
        eps,
        relu,
        DTYPES[dtype],
        torch.get_num_threads(),
    )


def batch_norm_backward(grads, residual_grad, grad, y, x, weight, bias, mean, var, eps):
    """Writes grads, those of x, weight and bias, and residual_grad (none if None). The maps are
    channels_last. ReLU is where y (after a residual) or bias (without one) is not None."""
    x_grad, weight_grad, bias_grad = grads
    dtype = _same_maps([t for t in (x_grad, residual_grad, grad, y, x) if t is not None])
    channels = x.shape[1]
    factors, sums = _batch_norm_memory(x)
    _C.batch_norm_backward(
        _address("x_grad", x_grad, dtype),
        _address("residual_grad", residual_grad, dtype),
        _address("weight_grad", _row("weight_grad", weight_grad)),
        _address("bias_grad", _row("bias_grad", bias_grad)),
        factors.data_ptr(),
        sums.data_ptr(),
        _address("grad", grad, dtype),
        _address("y", y, dtype),
        _address("x", x, dtype),
        _address("weight", _row("weight", weight)),
        _address("bias", _row("bias", bias)),
        _address("mean", _row("mean", mean)),
        _address("var", _row("var", var)),
        x.numel() // channels,
        channels,
        eps,
        DTYPES[dtype],
        torch.get_num_threads(),
    )


def _batch_norm_memory(x):
    """What BatchNorm of x works in: factors and sums."""
    channels = x.shape[1]
    size = _C.batch_norm_chunks, 2, (channels + 15) // 16 * 16
    return empty((3, channels), x, torch.float32), empty(size, x, torch.float64)


def _same_maps(maps):
    """The dtype of channels_last maps of one shape."""
    shape = maps[0].shape
    for tensor in maps:
        if tensor.shape != shape or not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError("maps of BatchNorm must be channels_last and of one shape")
    return maps[0].dtype


def feature_distance(loss, student_grad, teacher_grad, student, teacher, distance):
    """Writes loss fp32 [B] and the gradients (none where one is empty). One dense layout."""
    grads = [grad if grad.numel() else None for grad in (student_grad, teacher_grad)]
    if not same_layout(student, teacher, *(grad for grad in grads if grad is not None)):
        raise ValueError("student, teacher and their gradients must be dense with equal strides")
    dtype, batch = student.dtype, student.shape[0]
    _C.feature_distance(
        _address("loss", _row("loss", loss)),
        _address("student_grad", grads[0], dtype),
        _address("teacher_grad", grads[1], dtype),
        _address("student", student, dtype),
        _address("teacher", teacher, dtype),
        batch,
        student.numel() // max(batch, 1),
        DISTANCES[distance],
        DTYPES[dtype],
        torch.get_num_threads(),
    )


def softmax_entropy(loss, grad, logits, temperature, offset):
    """Writes loss fp32 [B] and grad like logits [B, C] (none where it is empty). Contiguous."""
    dtype = logits.dtype
    _C.softmax_entropy(
        _address("loss", _row("loss", loss)),
        _address("grad", _row("grad", grad), dtype) if grad.numel() else 0,
        _address("logits", _row("logits", logits), dtype),
        *logits.shape,
        temperature,
        offset,
        DTYPES[dtype],
        torch.get_num_threads(),
    )


def softmax_kl(
    loss,
    grad_student,
    grad_teacher,
    grad_weight,
    student,
    teacher,
    weight,
    temperature,
    factor,
    reduced,
):
    """Loss and the gradients whose tensor is not empty. Logits of one dtype, unit class stride."""
    (batch, classes), dtype = student.shape, student.dtype
    for name, logits in (("student", student), ("teacher", teacher)):
        if classes > 1 and logits.stride(1) != 1:
            raise ValueError(f"{name} has strides {logits.stride()}, must have unit class stride")
    device = student.get_device()
    _run(
        "softmax_kl",
        device,
        _address("loss", loss, device=device),
        _address("grad_student", grad_student, dtype, device),
        _address("grad_teacher", grad_teacher, dtype, device),
        _address("grad_weight", grad_weight, device=device),
        _address("student", student, dtype, device),
        _address("teacher", teacher, dtype, device),
        _address("weight", _row("weight", weight), device=device),
        batch,
        classes,
        student.stride(0),
        teacher.stride(0),
        temperature,
        factor,
        reduced,
        DTYPES[dtype],
    )


def convolution(blocks, images, weight, taps, out_blocks, *, depthwise=False, dtype, **finish):
    """A convolution of blocks [G, P, C, 16, 32] of so many images, and its finish; see
    `Convolution` and `Finish` in csrc/table.h. taps: (start int32 [out pixels + 1], pairs int32
    [n, 2], taps of the kernel)."""
    start, pairs, kernel = taps
    in_pixels, in_blocks = blocks.shape[1:3]
    (_C.depthwise if depthwise else _C.convolution)(
        _address("blocks", _row("blocks", blocks), dtype),
        _address("weight", _row("weight", weight), torch.float32 if depthwise else dtype),
        _address("start", _row("start", start), torch.int32),
        _address("pairs", _row("pairs", pairs), torch.int32),
        images,
        in_pixels,
        len(start) - 1,
        in_blocks,
        out_blocks,
        kernel,
        DTYPES[dtype],
        *_finish(dtype, **finish),
        torch.get_num_threads(),
    )


def _finish(
    dtype,
    *,
    backward=False,
    activation="none",
    cap=float("inf"),
    out=None,
    active=None,
    slope=None,
    before=None,
    after=None,
    bias=None,
    scale=None,
    shift=None,
):
    slope_dtype = torch.int32 if activation == "relu" else dtype
    return (
        backward,
        ACTIVATIONS[activation],
        cap,
        *(_address(n, _row(n, t), dtype) for n, t in (("out", out), ("active", active))),
        _address("slope", _row("slope", slope), slope_dtype),
        *(_address(n, _row(n, t), dtype) for n, t in (("before", before), ("after", after))),
        *(_address(n, _row(n, t)) for n, t in (("bias", bias), ("scale", scale), ("shift", shift))),
    )


def fold(forward, backward, weight, scale):
    """Writes both layouts of a convolution's weight [O, I, taps], fp32, times scale [O] or None."""
    _C.fold(
        _address("forward", _row("forward", forward), forward.dtype),
        _address("backward", _row("backward", backward), forward.dtype),
        _address("weight", weight),
        _address("scale", _row("scale", scale)),
        *weight.shape,
        *weight.stride(),
        DTYPES[forward.dtype],
        torch.get_num_threads(),
    )


def patches(out, x, offsets, scale, shift):
    """Writes the patches [G, P, S / 32, 16, 32] of x [B, ...]; offsets int32 [P, S], S = 32 n."""
    _C.patches(
        _address("out", _row("out", out), out.dtype),
        _address("x", x),
        _address("offsets", _row("offsets", offsets), torch.int32),
        _address("scale", _row("scale", scale)),
        _address("shift", _row("shift", shift)),
        len(x),
        *offsets.shape,
        x.stride(0),
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )


def patches_backward(grad, patches, offsets, scale):
    """Writes grad [B, E], the sum of its patches' elements; offsets int32 [terms, E]."""
    _C.patches_backward(
        _address("grad", _row("grad", grad)),
        _address("patches", _row("patches", patches), patches.dtype),
        _address("offsets", _row("offsets", offsets), torch.int32),
        len(grad),
        offsets.shape[1],
        offsets.shape[0],
        patches.shape[1] * patches.shape[2] * patches.shape[4],
        _address("scale", _row("scale", scale)),
        DTYPES[patches.dtype],
        torch.get_num_threads(),
    )
