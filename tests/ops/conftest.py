import os

import numpy as np
import pytest
import torch

from fastadv.testing import isas, using_isa


@pytest.fixture(params=isas())
def isa(request):
    """Each instruction set that runs here, in turn."""
    with using_isa(request.param):
        yield


def convert_bfloat16_as_gpus_do():
    """Triton's interpreter truncates fp32 to bfloat16, and misreads bfloat16's subnormals."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, source, target, mode)

    interpreter._convert_float = converted


if os.environ.get("TRITON_INTERPRET") == "1":
    convert_bfloat16_as_gpus_do()
