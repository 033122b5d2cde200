"""ikl: improved KL divergence from raw logits, with both gradients in the same pass.

    p = softmax(a), q = softmax(n), a constant,  d = n - a,  S_i = sum_c w_ic
    SCE_i = -sum_c q_c log p_c
    N_i = sum_jk w_ij w_ik [(n_ij - n_ik) - (a_ij - a_ik)]^2 = 2 S_i sum_c w_ic (d_ic - m_i)^2,
    m_i = sum_c w_ic d_ic / S_i, the weighted mean
    loss = alpha / B sum_i SCE_i + beta / 4 sum_i N_i / sum_i S_i^2
    d/dn = g = beta S_i w (d - m_i) / sum_i S_i^2,  d/da = alpha / B (p - q) - g

adv_logits a, clean_logits n: [B, C]; weight w: [B, C] or None, which is all alike; gradients:
contiguous, each in its input's dtype. The sum over pairs needs no memory of [B, C, C].
"""

import torch

from . import _native
from ._library import define, expect, expect_constant, gradients_from_forward
from ._logits import check_logits, loss_dtype, row_strided
from ._reference import at_least_fp32


def _check(adv, clean, weight, alpha, beta, *wanted):
    check_logits(adv, name="adv_logits")
    expect("clean_logits", clean, dtype=adv.dtype, like=adv, shape=adv.shape)
    if weight is not None:
        expect("weight", weight, dtype=loss_dtype(adv.dtype), like=adv, shape=adv.shape)
    for name, factor in (("alpha", alpha), ("beta", beta)):
        if not 0 <= factor < float("inf"):
            raise ValueError(f"{name} is {factor}, must be at least 0 and finite")


def _wrong(weight):
    """Where a weight is negative, infinite or NaN."""
    return ~((weight >= 0) & (weight < float("inf")))


def _check_weight(weight):
    if weight is not None and (wrong := _wrong(weight)).any():
        row, column = wrong.nonzero()[0].tolist()
        found = f"{weight[row, column].item()} at row {row}, class {column}"
        raise ValueError(f"weight is {found}, must be at least 0 and finite")


def reference(adv, clean, weight, alpha, beta, adv_grad, clean_grad):
    """alpha mean_i SCE_i + beta / 4 sum_i N_i / sum_i S_i^2, with p, q = softmax(adv),
    softmax(clean), SCE_i = -sum_c q_c log p_c, N_i = 2 S_i sum_c w_c (d_c - m_i)^2, d = clean -
    adv, S_i = sum_c w_c and m_i = sum_c w_c d_c / S_i; the gradients alpha (p - q) / B - g and
    g = beta S_i w (d - m_i) / sum_i S_i^2, q being a constant.

    adv, clean, weight [B, C]. A class with q_c = 0 counts 0 in SCE_i, one with w_c = 0 in N_i, and
    0 / 0 is 0. A weight that is negative or not finite: NaN.
    """
    a, n = at_least_fp32(adv), at_least_fp32(clean)
    weight = torch.ones_like(a) if weight is None else weight.masked_fill(_wrong(weight), torch.nan)
    log_p, q = a.log_softmax(dim=1), n.detach().softmax(dim=1)
    first = -(q * log_p.masked_fill(q == 0, 0)).sum(dim=1)

    d = n - a
    d = d.masked_fill((weight == 0) & ~d.isfinite(), 0)
    mass = weight.sum(dim=1, keepdim=True)
    apart = d - (weight * d).sum(dim=1, keepdim=True) / mass.masked_fill(mass == 0, 1)
    mass = mass.double()  # whose squares may be out of fp32's range
    total = mass.square().sum()
    share = (mass / total.masked_fill(total == 0, 1)).to(a.dtype)
    second = share[:, 0] * (weight * apart.square()).sum(dim=1)

    alpha = alpha / max(len(adv), 1)
    loss = (alpha * first + beta / 2 * second).sum()
    slope = beta * share * (weight * apart).masked_fill(weight == 0, 0)
    gradients = (adv_grad, alpha * (log_p.exp() - q) - slope), (clean_grad, slope)
    return loss, *(
        g.to(adv.dtype).contiguous() if wanted else adv.new_empty(0) for wanted, g in gradients
    )


def _checked(adv, clean, weight, *args):
    if adv.is_cpu:  # on a GPU a look at the values would wait for the device
        _check_weight(weight)
    return reference(adv, clean, weight, *args)


def _outputs(adv, clean, weight, alpha, beta, *wanted):
    """Memory for (loss, grad_adv, grad_clean); [0] for one not wanted."""
    loss = _native.empty((), adv, loss_dtype(adv.dtype))
    return loss, *(_native.empty(adv.shape if want else (0,), adv) for want in wanted)


def _fake(*args):
    _check(*args)
    return _outputs(*args)


def _compiled(adv, clean, weight, alpha, beta, *wanted):
    if adv.dtype == torch.float64:
        return _checked(adv, clean, weight, alpha, beta, *wanted)
    outputs = _outputs(adv, clean, weight, alpha, beta, *wanted)
    adv, clean = row_strided(adv), row_strided(clean)
    weight = weight if weight is None else row_strided(weight)
    wrong = _native.run(
        "ikl",
        _native.CPU,
        *(output.data_ptr() for output in outputs),
        *_native.addresses(_native.CPU, adv.dtype, adv_logits=adv, clean_logits=clean),
        *_native.addresses(_native.CPU, torch.float32, weight=weight),
        *adv.shape,
        adv.stride(0),
        clean.stride(0),
        0 if weight is None else weight.stride(0),
        alpha,
        beta,
        _native.DTYPES[adv.dtype],
    )
    if wrong:
        _check_weight(weight)
    return outputs


def _triton():
    from ..kernels.ikl import ikl

    return ikl


_ikl = define(
    "ikl(Tensor adv_logits, Tensor clean_logits, Tensor? weight, float alpha, float beta, "
    "bool adv_grad, bool clean_grad) -> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=_checked,
    native=_compiled,
    triton=_triton,
    fake=_fake,
    decomposition=reference,
)
gradients_from_forward(_ikl, inputs=(0, 1))


def ikl(
    adv_logits,
    clean_logits,
    weight=None,
    alpha=4.0,
    beta=20.0,
    adv_grad=False,
    clean_grad=False,
):
    """(loss, grad_adv, grad_clean) of the improved KL divergence in one call.

    The op under `losses.ikl`, which has the arguments, errors and edge cases; of use alone where
    the gradient of the logits is wanted without autograd. A gradient not asked for is empty, [0].
    """
    if weight is not None:
        expect_constant("weight", weight, instead="")
    return _ikl(adv_logits, clean_logits, weight, alpha, beta, adv_grad, clean_grad)
