"""ikl: the improved KL divergence and the gradients of both logits, against the sum over all pairs
of classes of the authors' code ("published"), and against its closed form in torch.

"peak MB" is the memory that one call adds to a fresh process at its peak.
"""

import sys

import torch
import torch.nn.functional as F
from timing import Case, memory_added, peak_of, pytest_cases

from fastadv import losses


def soft(adv, clean):
    return F.cross_entropy(adv, clean.detach().softmax(1))


def published(adv, clean, weight):
    weight = weight[:, :, None] * weight[:, None]
    gaps = [logits[:, :, None] - logits[:, None] for logits in (clean, adv)]
    squares = ((gaps[0] - gaps[1]).square() * weight).sum() / weight.sum()
    return 4 * soft(adv, clean) + 20 * squares / 4


def closed(adv, clean, weight):
    d, total = clean - adv, weight.sum(1, keepdim=True)
    apart = d - (weight * d).sum(1, keepdim=True) / total
    squares = 2 * (total * weight * apart.square()).sum() / total.square().sum()
    return 4 * soft(adv, clean) + 20 * squares / 4


def steps(batch, classes):
    """{provider: (loss, both gradients) of the same logits, made by a call}."""
    torch.manual_seed(0)
    logits = [torch.randn(batch, classes, requires_grad=True) for _ in range(2)]
    weight = torch.randn(batch, classes).softmax(1)

    def step(function):
        def call():
            loss = function(*logits, weight)
            return loss, *torch.autograd.grad(loss, logits)

        return call

    functions = {"published": published, "eager": closed, "fastadv": losses.ikl}
    return {name: step(f) for name, f in functions.items()} | {
        "compile": step(torch.compile(closed))
    }


def case(batch, classes, memory=True):
    """memory: with peak memory."""
    providers = steps(batch, classes)

    def gate():
        expected = providers["published"]()
        for name in ("eager", "fastadv"):
            for got, wanted in zip(providers[name](), expected, strict=True):
                torch.testing.assert_close(got, wanted)

    def facts():
        if not memory:
            return {}
        names = [name for name in providers if name != "compile"]  # the compiler's is no op's
        return {name: peak_of(__file__, name, batch, classes) for name in names}

    return Case(
        "ikl",
        f"{batch}x{classes}",
        providers,
        gate,
        # Logits and weights read, two gradients written, then read and written by autograd.
        nbytes=9 * 4 * batch * classes,
        facts=facts,
        calls=2,
        samples=3,
    )


def cases():
    return [case(128, 10), case(128, 100), case(128, 1000)]


if __name__ == "__main__":
    provider, *shape = sys.argv[1:]
    print(memory_added(steps(*map(int, shape))[provider]))
else:
    test_ikl = pytest_cases(cases)
