import collections
import dataclasses
import itertools
import types

import pytest
import torch
from torch import nn

from fastadv.engine.query import ask, cast_to, dtype_of, logits_of

LOGITS, FEATURES = torch.rand(4, 10), torch.rand(4, 64)
Named = collections.namedtuple("Named", ("logits", "features"))
Reversed = collections.namedtuple("Reversed", ("features", "logits"))


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As Hugging Face has it: attributes, and a mapping of those that are there."""

    logits: torch.Tensor | None = None
    hidden: tuple = ()

    def __post_init__(self):
        self.update({k: v for k, v in vars(self).items() if v is not None})


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        nn.Parameter(LOGITS),
        (LOGITS,),
        [LOGITS],
        (LOGITS, None),
        (LOGITS, torch.rand(4, 64, 8, 8)),
        (LOGITS, [FEATURES, FEATURES]),
        (LOGITS, torch.tensor(0.5), {"features": FEATURES}),
        Named(LOGITS, FEATURES),
        Reversed(FEATURES, LOGITS),
        {"logits": LOGITS},
        {"features": FEATURES, "logits": LOGITS},
        collections.OrderedDict(loss=torch.tensor(1.0), logits=LOGITS),
        types.MappingProxyType({"logits": LOGITS}),
        Output(LOGITS, (FEATURES,)),
        types.SimpleNamespace(logits=LOGITS, loss=None),
    ],
    ids=itertools.count(),
)
def test_logits_are_found(output):
    found = logits_of(output)
    assert found is (output if isinstance(output, torch.Tensor) else LOGITS)


@pytest.mark.parametrize(
    ("output", "described"),
    [
        ((LOGITS, FEATURES), r"a tuple of \[4, 10\], \[4, 64\]"),
        ([LOGITS, LOGITS], r"a list of \[4, 10\], \[4, 10\]"),
        ((torch.rand(4, 64, 8, 8), LOGITS), r"a tuple of \[4, 64, 8, 8\], \[4, 10\]"),
        ((None, LOGITS), r"a tuple of NoneType, \[4, 10\]"),
        ((torch.rand(10),), r"a tuple of \[10\]"),
        (((LOGITS, FEATURES),), "a tuple of tuple"),
        ((), "a tuple of nothing"),
        ({"scores": LOGITS, "features": FEATURES}, "a dict of 'scores', 'features'"),
        ({"logits": None}, "a dict of 'logits'"),
        ({"logits": [LOGITS]}, "a dict of 'logits'"),
        ({}, "a dict of nothing"),
        (Output(None, (FEATURES,)), "a Output of 'hidden'"),
        (types.SimpleNamespace(logits=LOGITS.tolist()), "a SimpleNamespace"),
        (LOGITS.numpy(), "a ndarray"),
        (None, "a NoneType"),
        (1.5, "a float"),
    ],
    ids=itertools.count(),
)
def test_anything_else_is_refused_by_its_name(output, described):
    with pytest.raises(TypeError, match=f"^model returned {described}, must return logits: "):
        logits_of(output)


def test_images_are_cast_and_their_gradient_is_not():
    """A model in another dtype sees it, the caller does not."""
    x = torch.rand(4, 6, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3)).to(dtype)
        logits = ask(model, x)
        assert logits.dtype == dtype == dtype_of(model)
        (grad,) = torch.autograd.grad(logits.sum(), x)
        assert grad.dtype == torch.float32
    assert cast_to(nn.Linear(2, 2), x) is x


def test_a_dtype_is_that_of_floating_point_parameters():
    counts = nn.Module()
    counts.rows = nn.Parameter(torch.arange(3), requires_grad=False)
    double = torch.rand(4, 6, dtype=torch.float64)
    for model in (nn.Flatten(), counts, torch.relu):
        assert cast_to(model, double) is double  # which has none of its own
        assert dtype_of(model) == torch.float32
        assert dtype_of(model, None) is None
    assert cast_to(nn.BatchNorm1d(6, affine=False), double).dtype == torch.float32  # a buffer's
    mixed = nn.Sequential(counts, nn.Linear(6, 2).double())
    assert cast_to(mixed, torch.rand(4, 6)).dtype == torch.float64


def test_tokens_stay_integers():
    tokens = torch.randint(9, (4, 7))
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(21, 2))
    assert ask(model, tokens).shape == (4, 2)
    assert cast_to(model, tokens) is tokens
