import os
import platform
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

import fastadv
from fastadv import info
from fastadv.ops import _library


def test_report_names_every_op_and_its_backend():
    lines = info.report().splitlines()
    for name, backends in _library.ops.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert backends.cpu in line
        assert line.endswith(backends.cuda)
    (header,) = [line for line in lines if line.startswith("op ")]
    table = lines[lines.index(header) :][: 1 + len(_library.ops)]
    for column in ("on cpu", "on cuda"):
        at = header.index(column)
        assert {line[at - 2 : at] for line in table} == {"  "}
        assert not [line for line in table if line[at] == " "]


def test_the_command_takes_no_flags(capsys):
    info.main([])
    assert capsys.readouterr().out == info.report() + "\n"
    for flag, status, said in (("--help", 0, "A bug report"), ("--all", 2, "error: unrecognized")):
        with pytest.raises(SystemExit) as ended:
            info.main([flag])
        assert ended.value.code == status
        assert said in "".join(capsys.readouterr())


def test_report_begins_with_what_a_bug_report_needs():
    """Names and values in two columns, so that it is read at a glance."""
    lines = info.report().splitlines()
    head = lines[: lines.index("")]
    assert not [line for line in head if ":" not in line[:15] or line[15] != " " or line[16] == " "]
    facts = {line[:15].rstrip(" :"): line[16:] for line in head}
    assert facts["fastadv"] == f"{fastadv.__version__} in {Path(fastadv.__file__).parent}"
    assert facts["Python"] == f"{platform.python_version()} on {platform.platform()}"
    assert facts["torch"] == f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    named = f"numpy {np.__version__}, safetensors {safetensors.__version__}, triton "
    assert facts["others"].startswith(named)
    assert f"{os.cpu_count()} cores, {torch.get_num_threads()} threads" in facts["CPU"]
    assert {"CPU kernels", "attack engine", "CUDA kernels", "Triton kernels", "GPU"} <= set(facts)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor\t: 1\n", "Some CPU @ 2 GHz"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n", platform.machine()),  # ARM
        (None, platform.machine()),
    ],
)
def test_a_cpu_is_named_where_linux_tells_it(monkeypatch, text, name):
    def read(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert info.cpu() == name


def test_a_package_that_is_not_there_has_no_version():
    assert info.version("numpy") == np.__version__
    assert info.version("fastadv-of-another-name") == "none"
