"""The numeric rules that every op is held to: `OpCase` says what to run, `check_op` runs it.

The rule is twice: an implementation may err from the fp64 reference by at most twice what plain
torch errs in the same dtype, plus two units in the last place.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .ops import _library, _native
from .ops._logits import kernels, outputs
from .ops._torch import has_autograd

GUARD = 64  # elements of sentinel on each side of a guarded tensor
LAYOUTS = ("contiguous", "channels_last", "permuted", "offset", "strided")


@dataclass(frozen=True)
class OpCase:
    """One call of torch.ops.fastadv.<op>. `args` follow the schema; tensors are on the CPU.

    public: the differentiable function over the op, of the tensors at positions `inputs` of
    `args`; plain: the same in torch's own ops, whose autograd is the oracle of the gradients.
    """

    op: str
    args: tuple
    public: Callable | None = None
    plain: Callable | None = None
    inputs: tuple[int, ...] = ()

    @property
    def overload(self):
        return getattr(torch.ops.fastadv, self.op).default

    def mapped(self, function):
        """The case with `function` applied to every tensor."""
        args = tuple(function(a) if isinstance(a, torch.Tensor) else a for a in self.args)
        return replace(self, args=args)


def assert_close(name, got, exact, same_dtype):
    """Fails unless |got - exact| <= 2 max|same_dtype - exact| + 2 ulp(exact) for every element, the
    maximum being that of the whole tensor.

    exact: the fp64 reference; same_dtype: the reference in got's dtype. NaN is close to nothing
    but NaN, an infinity to nothing but itself; integers must be equal.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if not got.dtype.is_floating_point:
        assert torch.equal(got, exact.to(got.dtype)), f"{name}: integers differ"
        return
    assert got.dtype == same_dtype.dtype, f"{name}: {got.dtype}, not {same_dtype.dtype}"
    got, exact, same_dtype = got.double(), exact.double(), same_dtype
    ulp = torch.finfo(same_dtype.dtype).eps * exact.abs()
    finite = exact.isfinite()
    error = (same_dtype.double() - exact)[finite].abs()
    bound = 2 * (error.max() if error.numel() else 0.0) + 2 * ulp
    # Written so that a NaN on either side makes the comparison false.
    close = torch.where(finite, (got - exact).abs() <= bound, got == exact)
    close |= got.isnan() & exact.isnan()
    if not close.all():
        worst = (got - exact).abs().nan_to_num(nan=torch.inf).masked_fill(close, -1).argmax()
        raise AssertionError(
            f"{name}: {(~close).sum()} of {close.numel()} elements differ, the worst at flat "
            f"index {worst}: {got.flatten()[worst]} instead of {exact.flatten()[worst]}"
        )


def laid_out(tensor, layout):
    """The same values in another memory layout; the tensor itself where it does not apply."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "offset":
        buffer = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
        return buffer[3:].view(tensor.shape).copy_(tensor)
    if layout == "strided" and tensor.dim():
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
    return tensor.contiguous()


@contextlib.contextmanager
def guarded_memory():
    """Poisons every tensor the ops allocate and checks the sentinels around it on exit."""
    buffers = []

    def guarded(empty):
        poison = torch.nan if empty.dtype.is_floating_point else torch.iinfo(empty.dtype).max
        buffer = empty.new_full((empty.numel() + 2 * GUARD,), poison)
        buffer[:GUARD] = buffer[-GUARD:] = 77
        buffers.append(buffer)
        return buffer.as_strided(empty.shape, empty.stride(), GUARD)

    plain_like, plain = torch.empty_like, torch.empty
    torch.empty_like = lambda *args, **kwargs: guarded(plain_like(*args, **kwargs))
    torch.empty = lambda *args, **kwargs: guarded(plain(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty_like, torch.empty = plain_like, plain
    for buffer in buffers:
        assert (buffer[:GUARD] == 77).all(), "wrote before the start of an output"
        assert (buffer[-GUARD:] == 77).all(), "wrote past the end of an output"


def run(function, case):
    """The outputs of one call as a list: its results, or the arguments that it mutates."""
    args = case.args
    writes = [
        a.alias_info is not None and a.alias_info.is_write for a in case.overload._schema.arguments
    ]
    copies = [_clone(arg) if write else arg for arg, write in zip(args, writes, strict=True)]
    result = function(*copies)
    if result is None:
        return [copy for copy, write in zip(copies, writes, strict=True) if write]
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _clone(tensor):
    """A copy with the same strides, between sentinels that `check_values` looks at."""
    buffer = tensor.new_full((_span(tensor) + 2 * GUARD,), 77)
    return buffer.as_strided(tensor.shape, tensor.stride(), GUARD).copy_(tensor)


def _span(tensor):
    """From its first element in memory to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _assert_guards(outputs):
    for output in outputs:
        if output._base is not None and output.storage_offset() == GUARD:
            whole = output._base.flatten()
            assert (whole[:GUARD] == 77).all(), "wrote before the start of an argument"
            assert (whole[-GUARD:] == 77).all(), "wrote past the end of an argument"


def unchecked(op, logits, y, *args):
    """(loss, gradient) of logits [B, C] and labels y [B] as the kernel in use gives them, or the
    reference: without the look at labels of the CPU's ops, which is taken on no GPU."""
    if _library.ops[op].cpu == "native" and logits.dtype != torch.float64:
        loss, gradient = (t.fill_(77) for t in outputs(logits, True))
        kernels[op](loss, gradient, logits, y, *args)
        return loss, gradient
    triton = _library.backend() == "triton"
    run = getattr(torch.ops.fastadv, op) if triton else _library.plain[op]
    return run(logits, y, *args, True)


def check_values(case, layouts=LAYOUTS):
    """Every instruction set and layout, and the GPU where there is one, against the fp64 reference;
    thread count changes nothing, nor does a CUDA graph."""
    plain = _library.plain[case.op]
    exact = run(plain, case.mapped(lambda t: t.double() if t.is_floating_point() else t))
    same = run(plain, case.mapped(lambda t: t.contiguous()))

    def compare(where, variant):
        with guarded_memory():
            got = run(case.overload, variant)
            _assert_guards(got)
        for i, (found, *expected) in enumerate(zip(got, exact, same, strict=True)):
            assert_close(f"{case.op}[{i}] {where}", found.cpu(), *expected)

    for isa in isas():
        with using_isa(isa):
            for layout, variant in _variants(case, layouts):
                compare(f"{isa} {layout}", variant)
            _check_repeatable(case)
    if torch.cuda.is_available():
        for layout, variant in _variants(case, layouts):
            compare(f"cuda {layout}", on_gpu(variant))
        _check_capturable(on_gpu(case))


def _variants(case, layouts):
    """(layout, the case in it) for all tensors and for the first alone, each layout once."""
    seen = set()
    for layout in layouts:
        laid = case.mapped(lambda t, layout=layout: laid_out(t, layout))
        for variant in (laid, replace(laid, args=(laid.args[0], *case.args[1:]))):
            tensors = [a for a in variant.args if isinstance(a, torch.Tensor)]
            strides = tuple((t.stride(), t.storage_offset()) for t in tensors)
            if strides not in seen:
                seen.add(strides)
                yield layout, variant


def isas():
    """The instruction sets to test; where the ops run on another backend, its name alone."""
    native = _library.backend() in ("auto", "native") and _native.isas()
    return native or [_library.backend()]


def on_gpu(case):
    """The case with its tensors on the GPU, strides and offsets kept; a seed stays on the CPU."""

    def moved(tensor):
        end = tensor.storage_offset() + _span(tensor)
        buffer = torch.zeros(end, dtype=tensor.dtype, device="cuda")
        strided = buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return strided.copy_(tensor)

    names = [argument.name for argument in case.overload._schema.arguments]
    args = [
        moved(arg) if isinstance(arg, torch.Tensor) and name != "seed" else arg
        for name, arg in zip(names, case.args, strict=True)
    ]
    return replace(case, args=tuple(args))


def _check_capturable(case):
    """A CUDA graph of the call, which a host sync or a foreign stream would break, gives its
    result."""
    expected = run(case.overload, case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(case.overload, case)
    graph.replay()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.nan_to_num(nan=123.0), b.nan_to_num(nan=123.0)), "a graph differs"


def _check_repeatable(case):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case.overload, case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(nan=123.0), b.nan_to_num(nan=123.0)), "threads matter"


@contextlib.contextmanager
def using_isa(isa):
    """Runs the native ops with one instruction set."""
    if isa not in _native.isas():
        yield
        return
    before = _native.isa()
    _native.use_isa(isa)
    try:
        yield
    finally:
        _native.use_isa(before)


def check_op(case):
    """`check_values`, and torch's demands on an op: opcheck, fullgraph compile, gradients of both
    orders, torch.func."""
    check_values(case)
    torch.library.opcheck(case.overload, case.args)
    if torch.cuda.is_available():
        torch.library.opcheck(case.overload, on_gpu(case).args)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args: case.overload(*args), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(run(case.overload, case), run(compiled, case), strict=True):
        assert torch.equal(a, b), f"{case.op}: torch.compile changes the result"
    assert has_autograd(case.overload) == bool(case.public), (
        f"{case.op}: `public` is for what has a gradient"
    )
    if case.public:
        check_gradients(case)
        check_second_order(case)
        check_transforms(case)


def check_gradients(case):
    """Of `case.public`: gradcheck in fp64; in fp32 the 2x rule, all inputs and each alone."""
    doubles, singles = _leaves(case)
    assert torch.autograd.gradcheck(case.public, doubles)
    exact, same = _gradients(case.plain, doubles), _gradients(case.plain, singles)
    compiled = torch.compile(case.public, fullgraph=True, backend="aot_eager")
    for kind, function in (("", case.public), ("compiled ", compiled)):
        _assert_all_close(f"{case.op} {kind}gradient", _gradients(function, singles), exact, same)
    for i in range(len(singles)):
        alone = [t.detach().requires_grad_(j == i) for j, t in enumerate(singles)]
        (gradient,) = _gradients(case.public, alone)
        assert_close(f"{case.op} gradient {i} alone", gradient, exact[i], same[i])


def check_second_order(case):
    """Of `case.public`: gradgradcheck in fp64, and the gradient of the squared gradient, where one
    that comes out of the forward pass must not count as a constant."""
    doubles, singles = _leaves(case)
    assert torch.autograd.gradgradcheck(case.public, doubles)

    def second(function, inputs):
        first = _gradients(function, inputs, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        if not penalty.requires_grad:  # linear pieces, such as those of a margin
            return [torch.zeros_like(t) for t in inputs]
        return torch.autograd.grad(penalty, inputs, materialize_grads=True)

    exact = second(case.plain, doubles)
    for inputs in (doubles, singles):
        _assert_near(f"{case.op} second order", second(case.public, inputs), exact)


def check_transforms(case):
    """Of `case.public` under torch.func: grad, vmap and jvp."""
    doubles, singles = ([t.detach() for t in tensors] for tensors in _leaves(case))
    tangents = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in singles]

    def grad(function, inputs):
        every = tuple(range(len(inputs)))
        return torch.func.grad(lambda *v: _weighted(function(*v)), every)(*inputs)

    def vmap(function, inputs):
        return [torch.vmap(function)(*[torch.stack([t, 0.5 * t]) for t in inputs])]

    def jvp(function, inputs):
        moved = tuple(t.to(v.dtype) for t, v in zip(tangents, inputs, strict=True))
        return torch.func.jvp(function, tuple(inputs), moved)

    for transform in (grad, vmap, jvp):
        exact = transform(case.plain, doubles)
        for inputs in (doubles, singles):
            _assert_near(f"{case.op}, {transform.__name__}", transform(case.public, inputs), exact)


def _assert_all_close(name, got, exact, same_dtype):
    for i, values in enumerate(zip(got, exact, same_dtype, strict=True)):
        assert_close(f"{name} {i}", *values)


def _assert_near(name, got, exact):
    """Fails unless values that torch's own ops compute are those of the fp64 oracle to rounding.
    The order of operations differs from the oracle's, so that the 2x rule does not apply."""
    for i, (values, wanted) in enumerate(zip(got, exact, strict=True)):
        error, scale = (values - wanted).abs().max(), wanted.abs().max()
        bound = (1e-12 if values.dtype == torch.float64 else 2e-5) * max(scale.item(), 1.0)
        assert error <= bound, f"{name} {i}: differs by {error:.3g}, of values up to {scale:.3g}"


def _leaves(case):
    """The inputs in fp64 and in fp32, to be differentiated."""
    dtypes, inputs = (torch.float64, torch.float32), [case.args[i].detach() for i in case.inputs]
    return [[t.to(dtype, copy=True).requires_grad_() for t in inputs] for dtype in dtypes]


def _weighted(output):
    """The sum of an output, weighted unevenly, so that gradients cannot cancel."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum()


def _gradients(function, inputs, **options):
    """Those of the weighted output to the inputs that require one."""
    wanted = [t for t in inputs if t.requires_grad]
    return torch.autograd.grad(_weighted(function(*inputs)), wanted, **options)
