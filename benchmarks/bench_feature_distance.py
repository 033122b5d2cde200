"""feature_distance: loss over a feature map and the student's gradient, against torch's losses."""

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases

from fastadv import losses

PUBLISHED = {
    "mse": F.mse_loss,
    "l2": lambda s, t: (s - t).flatten(1).norm(dim=1).mean(),
    "cosine": lambda s, t: (1 - F.cosine_similarity(s.flatten(1), t.flatten(1))).mean(),
}


def case(distance, *shape, dtype=torch.float32):
    student = torch.randn(shape).to(dtype).requires_grad_()
    teacher = torch.randn(shape).to(dtype)
    published = PUBLISHED[distance]
    compiled = torch.compile(published)

    def both(loss):
        return loss, torch.autograd.grad(loss, student)[0]

    def gate():
        (loss, gradient), (expected, wanted) = (
            both(f(student, teacher)) for f in (fused, published)
        )
        torch.testing.assert_close(loss, expected.float(), rtol=4 * torch.finfo(dtype).eps, atol=0)
        scale = wanted.abs().max()
        torch.testing.assert_close(gradient / scale, wanted / scale)

    def fused(student, teacher):
        return losses.feature(student, teacher, distance)

    shape = "x".join(map(str, shape)) + (" bf16" if dtype == torch.bfloat16 else "")
    return Case(
        "feature_distance",
        f"{shape} {distance}",
        {
            "eager": lambda: both(published(student, teacher)),
            "compile": lambda: both(compiled(student, teacher)),
            "fastadv": lambda: both(fused(student, teacher)),
        },
        gate,
        nbytes=3 * student.nbytes,
    )


def cases():
    maps = [case(distance, 128, 512, 4, 4) for distance in PUBLISHED]
    large = [case(distance, 2, 200_000) for distance in ("mse", "cosine")]
    return [*maps, *large, case("mse", 128, 512, 4, 4, dtype=torch.bfloat16)]


test_feature_distance = pytest_cases(cases)
