from fastadv import info
from fastadv.ops import _library


def test_report_names_every_op_and_its_backend():
    lines = info.report().splitlines()
    for name, backends in _library.ops.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert backends.cpu in line
        assert line.endswith(backends.cuda)
