import pytest
import torch

from fastadv.errors import UsageError
from fastadv.evaluate.record import Record
from fastadv.runs import checkpoint


@pytest.mark.parametrize(
    "metadata",
    [
        {"epoch": 3},
        {"key": [], "costs": 3},
        {"key": {}, "costs": {"clean": {"unheard": 1}}},
        {"key": {}, "costs": {"clean": 1}},
        {"key": {}},
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path, metadata):
    checkpoint.save(tmp_path / "state.safetensors", {"clean": torch.zeros(3)}, metadata)
    with pytest.raises(UsageError, match="state.safetensors is not an evaluation's state"):
        Record(3, folder=tmp_path)
