from dataclasses import asdict

import pytest
import torch

from fastadv.errors import UsageError
from fastadv.evaluate.networks import from_run
from fastadv.runs import Config, checkpoint


@pytest.mark.parametrize("field", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", ["ten", None, -3, 0, 2.5, True])
def test_a_header_without_whole_sizes_is_no_runs(tmp_path, field, value):
    path = tmp_path / "best.safetensors"
    header = {"config": asdict(Config(student="digits_net")), "num_classes": 10, "in_channels": 1}
    checkpoint.save(path, {"model.weight": torch.zeros(2)}, header | {field: value})
    with pytest.raises(UsageError, match=f"header is not that of a run .{field} is .*, must be"):
        from_run(path)
