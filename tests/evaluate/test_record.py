import pytest
import torch
from torch import nn

from fastadv import evaluate
from fastadv.attacks.suite import stages
from fastadv.data.dataset import ImageSet
from fastadv.errors import UsageError
from fastadv.evaluate.record import Record
from fastadv.runs import checkpoint


@pytest.mark.parametrize(
    "metadata",
    [
        {"epoch": 3},
        {"key": {}, "asked": {}, "costs": 3},
        {"key": [], "asked": {}, "costs": {}},
        {"key": {}, "asked": [], "costs": {}},
        {"key": {}, "asked": {}, "costs": {"clean": {"unheard": 1}}},
        {"key": {}, "asked": {}, "costs": {"clean": 1}},
        {"key": {}, "asked": {}},
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path, metadata):
    checkpoint.save(tmp_path / "state.safetensors", {"clean": torch.zeros(3)}, metadata)
    with pytest.raises(UsageError, match="state.safetensors is not an evaluation's state"):
        Record(3, folder=tmp_path)


def test_a_stage_goes_on_by_the_attack_that_it_was_begun_with(tmp_path):
    split = ImageSet(torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    evaluate.run(model, split, stages("pgd20", 0.1), record=Record(4, folder=tmp_path))
    evaluate.run(model, split, stages("pgd20", 0.1), record=Record(4, folder=tmp_path))
    with pytest.raises(UsageError, match=r"record has pgd20 by PGD\(eps=0.1.*, must be by"):
        evaluate.run(model, split, stages("pgd20", 0.2), record=Record(4, folder=tmp_path))
