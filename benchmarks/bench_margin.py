"""margin: the CW objective of a batch and its gradient, against masked fill and max."""

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases

from fastadv import losses


def published(logits, y):
    own = F.one_hot(y, logits.shape[1]).bool()
    other = logits.masked_fill(own, -torch.inf).max(dim=1).values
    return other - logits.gather(1, y[:, None])[:, 0]


def case(batch, classes, dtype=torch.float32):
    logits = torch.randn(batch, classes).to(dtype).requires_grad_()
    y = torch.randint(classes, (batch,))
    compiled = torch.compile(published)

    def both(loss):
        return loss, torch.autograd.grad(loss.sum(), logits)[0]

    def gate():
        (loss, gradient), (expected, wanted) = (
            both(f(logits, y)) for f in (losses.margin, published)
        )
        torch.testing.assert_close(loss, expected.float(), atol=0, rtol=torch.finfo(dtype).eps)
        ties = logits.topk(2).values.diff()[:, 0] == 0  # torch's max may take another of equals
        assert torch.equal(gradient[~ties], wanted[~ties])

    shape = f"{batch}x{classes}" + (" bf16" if dtype == torch.bfloat16 else "")
    return Case(
        "margin",
        shape,
        {
            "eager": lambda: both(published(logits, y)),
            "compile": lambda: both(compiled(logits, y)),
            "fastadv": lambda: both(losses.margin(logits, y)),
        },
        gate,
        nbytes=2 * logits.nbytes + y.nbytes + 4 * batch,
    )


def cases():
    return [case(128, 10), case(128, 100), case(128, 1000), case(128, 1000, torch.bfloat16)]


test_margin = pytest_cases(cases)
