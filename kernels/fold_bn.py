"""fold_bn_ in Triton: BatchNorm folded into the weights of many convolutions by one launch.

    scale = gamma / sqrt(var + eps)
    weight_out[o, t, i] = weight[o, i, t] scale[o];  bias_out[o] = bias[o] scale + beta - mean scale

The tensors are found by tables of their addresses, which are made anew when one of them changes.
No FMA contraction.
"""

import functools

import torch
import triton
import triton.language as tl

from .host import mutated

# Provisional: chosen from the compiled code, not yet timed on a GPU.
CONFIG = {"BLOCK": 1024, "num_warps": 4}
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

# Of a tensor's entry: addresses, 0 for None, then weight's strides and extents, then the first of
# its programs.
(WEIGHT_OUT, BIAS_OUT, WEIGHT, BIAS, MEAN, VAR, GAMMA, BETA) = map(tl.constexpr, range(8))
(OUT_STRIDE, IN_STRIDE, TAP_STRIDE, IN_CHANNELS, TAPS, FIRST) = map(tl.constexpr, range(8, 14))
FIELDS = tl.constexpr(14)


@triton.jit
def _value(entry, field: tl.constexpr, channel, otherwise):
    """The channel's value, fp32, of the tensor in this field; `otherwise` where there is none."""
    address = tl.load(entry + field)
    return tl.load(address.to(tl.pointer_type(tl.float32)) + channel, address != 0, otherwise)


@triton.jit
def fold_bn_kernel(entries, eps, tensor_of, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """One output channel of one tensor. entries: int64 [tensors, FIELDS]; eps: fp32 [tensors];
    tensor_of: int32 [programs]; OUT: type of what is written. Where the addresses point: weight_out
    OUT [O, taps, in], bias_out OUT [O], weight fp32 [O, in, taps] with its strides, bias, mean,
    var, gamma, beta fp32 [O]."""
    tensor = tl.load(tensor_of + tl.program_id(0))
    entry = entries + tensor * FIELDS
    channel = tl.program_id(0) - tl.load(entry + FIRST)
    bias, mean = _value(entry, BIAS, channel, 0.0), _value(entry, MEAN, channel, 0.0)
    var, gamma = _value(entry, VAR, channel, 1.0), _value(entry, GAMMA, channel, 1.0)
    beta = _value(entry, BETA, channel, 0.0)
    scale = tl.div_rn(gamma, tl.sqrt_rn(var + tl.load(eps + tensor)))
    bias_out = tl.load(entry + BIAS_OUT)
    shift = bias * scale + (beta - mean * scale)
    tl.store(bias_out.to(tl.pointer_type(OUT)) + channel, shift.to(OUT), bias_out != 0)

    ins = tl.load(entry + IN_CHANNELS).to(tl.int32)
    size = ins * tl.load(entry + TAPS).to(tl.int32)
    in_stride, tap_stride = tl.load(entry + IN_STRIDE), tl.load(entry + TAP_STRIDE)
    out = tl.load(entry + WEIGHT_OUT).to(tl.pointer_type(OUT)) + channel * size
    weight = tl.load(entry + WEIGHT).to(tl.pointer_type(tl.float32))
    weight += channel * tl.load(entry + OUT_STRIDE)
    first = tl.cast(0, tl.int32)
    while first < size:  # no range: interpreters before 3.9 take no tensor for its end
        at = first + tl.arange(0, BLOCK)
        read = at % ins * in_stride + at // ins * tap_stride
        w = tl.load(weight + read, at < size, 0.0)
        tl.store(out + at, (w * scale).to(OUT), at < size)
        first += BLOCK


@functools.lru_cache(maxsize=16)
def _tables(rows, eps, channels, device):
    """(entries, eps, tensor_of) of the kernel; rows: all but the last field of each entry."""
    first = torch.tensor(channels).cumsum(0) - torch.tensor(channels)
    entries = torch.cat([torch.tensor(rows, dtype=torch.int64), first[:, None]], 1)
    tensor_of = torch.arange(len(rows), dtype=torch.int32)
    tensor_of = tensor_of.repeat_interleave(torch.tensor(channels))
    tables = entries, torch.tensor(eps, dtype=torch.float32), tensor_of
    return tuple(table.to(device) for table in tables)


def fold_bn_(weights_out, biases_out, weights, biases, norms):
    """Arguments as for the op."""
    rows, eps, kept = [], [], []
    for out, bias_out, weight, bias, norm in zip(
        weights_out, biases_out, weights, biases, norms, strict=True
    ):
        weight = weight.reshape(*weight.shape[:2], -1)
        *values, epsilon = norm or (None, None, None, None, 0.0)
        values = [v if v is None else v.contiguous() for v in (bias, *values)]
        kept.append((weight, values))  # copies, until the launch
        tensors = out, bias_out, weight, *values
        addresses = (0 if t is None else t.data_ptr() for t in tensors)
        rows.append((*addresses, *weight.stride(), *weight.shape[1:]))
        eps.append(epsilon)
    channels = tuple(map(len, weights_out))
    tables = _tables(tuple(rows), tuple(eps), channels, weights_out[0].device)
    with torch.cuda.device_of(weights_out[0]):
        fold_bn_kernel[(sum(channels),)](
            *tables, DTYPES[weights_out[0].dtype], **CONFIG, enable_fp_fusion=False
        )
    mutated(*weights_out, *biases_out)
