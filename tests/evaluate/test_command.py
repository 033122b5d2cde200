import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastadv import UsageError, data, evaluate
from fastadv.evaluate.__main__ import folder, main
from fastadv.runs import checkpoint


def only_report(out):
    """The report of the one network that was evaluated there."""
    (path,) = out.glob("*/report.json")
    return json.loads(path.read_text())


def test_evaluate_command(npz, teacher, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastadv.evaluate",
        "--checkpoint",
        str(teacher),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pgd20_003" in done.stdout
    result = only_report(tmp_path / "out")
    attacks = {name: float(cost["accuracy"]) / 100 for name, cost in result["attacks"].items()}
    assert attacks["clean"] >= attacks["fgsm"] >= attacks["pgd20"] - 0.05
    model, run = evaluate.from_run(teacher)
    split = data.load("npz", npz).test
    rates = evaluate.accuracies(model, split, ("clean", "pgd20"), eps=run.eps, batch_size=7)
    assert rates["clean"] == pytest.approx(attacks["clean"])
    assert rates["pgd20"] == pytest.approx(attacks["pgd20"])  # batch size changes nothing

    missing = subprocess.run(
        [*command[:4], str(tmp_path / "no.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "no.safetensors" in missing.stderr


def test_evaluate_refuses_before_it_works(npz, teacher, tmp_path):
    line = ["--checkpoint", str(teacher)]
    for extra, match in [
        (["--attacks", "clean,pdg20"], "attack is 'pdg20', must be .*did you mean 'pgd20'"),
        (["--eps", "0"], r"eps is 0.0, must be in \(0, 1.0\]$"),
        (["--eps", "nan"], r"eps is nan, must be in \(0, 1.0\]$"),
        (["--norm", "l2"], "^--eps is missing, which --norm l2 needs"),
        (["--attacks", "transfer-cw"], "^--source is missing"),
        (["--save-adversarial"], "^--save-adversarial needs --out"),
        (["--batch-size", "0"], "^--batch-size is 0, must be at least 1"),
        (
            ["--model", "resnet18", "--model-from", "a:b"],
            "^--model and --model-from are both given",
        ),
        (["--model", "resnet18"], "^--data is missing"),
        (["--checkpoint", str(teacher), str(teacher)], "^--checkpoint has one twice"),
        (["--eps", "8"], "eps is 8.0, must be .*did you mean"),
        (["--limit", "-3"], "^--limit is -3, must be at least 1"),
        (["--seed", "-1"], "^--seed is -1, must be in"),
        (["--data", "svhn", "--data-from", "a:b"], "^--data and --data-from are both given"),
        (["--model", "digits_net", "--data", "digits"], "run is a folder, must be a file"),
        (["--device", "cuda:7"], "device is 'cuda:7', which cannot be used here"),
    ]:
        path = teacher.parent if "is a folder" in match else teacher
        with pytest.raises(ValueError, match=match):
            main(["--checkpoint", str(path), *extra])
    other = tmp_path / "other.npz"
    with np.load(npz) as file:
        np.savez(other, **{k: v + 2 if k.endswith("labels") else v for k, v in file.items()})
    with pytest.raises(ValueError, match="has 3 classes, other 5"):
        main([*line, "--data-dir", str(other)])
    with pytest.raises(FileNotFoundError, match="no such file .a run's is DIR/best.safetensors"):
        main(["--checkpoint", str(tmp_path)])
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match="w.pt is not of a run, must be a run's folder or a .safetensors"
    ):
        main(["--checkpoint", str(tmp_path / "w.pt")])
    checkpoint.save(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="its header is not that of a run"):
        main(["--checkpoint", str(tmp_path / "x.safetensors")])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"lr": -1.0}, "lr is -1.0, must be positive"),
        ({"colour": 1}, "config has unknown fields: colour"),
        ({"eps": "x"}, r"eps is 'x', must be a number, in \(0, 1\]"),
    ],
)
def test_a_header_of_no_run_names_its_file(teacher, tmp_path, fields, match):
    tensors, metadata = checkpoint.load(teacher)
    metadata["config"] |= fields
    checkpoint.save(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(UsageError, match=rf"x\.safetensors: its header is not .* \({match}"):
        evaluate.from_run(tmp_path / "x.safetensors")


def test_other_data_have_a_folder_of_their_own(npz, teacher):
    """Not that of the run, which has the images of its own data set."""
    line = ["--checkpoint", str(teacher), "--attacks", "clean", "--data"]
    with pytest.raises(
        UsageError, match="data_dir is missing, must be the folder of train_32x32.mat"
    ):
        main([*line, "svhn"])
    main([*line, "npz"])


def test_a_run_folder_means_its_best_checkpoint(teacher):
    (a, _), (b, _) = evaluate.from_run(teacher), evaluate.from_run(teacher.parent)
    assert torch.equal(a.fc.weight, b.fc.weight)


KILLED = """
import os, signal, sys
from fastadv.evaluate import record
from fastadv.evaluate.__main__ import folder, main

record.SAVE_EVERY = 0
save, saves = record.checkpoint.save, []

def save_or_die(*args):
    saves.append(save(*args))
    if len(saves) == 7:
        os.kill(os.getpid(), signal.SIGKILL)

record.checkpoint.save = save_or_die
main(sys.argv[1:])
"""


def test_a_killed_evaluation_goes_on_where_it_was(teacher, tmp_path):
    """The verdicts are those of an undisturbed run, and no image is attacked twice."""
    line = ["--checkpoint", str(teacher), "--attacks", "clean,pgd20,quick", "--batch-size", "16"]
    whole, killed = (["--out", str(tmp_path / name)] for name in ("whole", "killed"))
    main([*line, *whole])
    done = subprocess.run([sys.executable, "-c", KILLED, *line, *killed], check=False)
    assert done.returncode == -9
    assert not list((tmp_path / "killed").rglob("report.json"))
    (state,) = (tmp_path / "killed").rglob("state.safetensors")
    verdicts, _ = checkpoint.load(state)
    assert (verdicts["clean"] > 0).all()
    assert 0 < (verdicts["pgd20"] > 0).sum() < 80
    main([*line, *killed])
    a, b = (only_report(tmp_path / name) for name in ("whole", "killed"))
    for stage, cost in a["attacks"].items():
        for field in ("accuracy", "images", "forwards", "backwards", "largest"):
            assert b["attacks"][stage][field] == cost[field], (stage, field)
    assert a["robust_acc"] == b["robust_acc"]


def test_a_folder_is_of_one_evaluation(teacher, tmp_path):
    line = ["--checkpoint", str(teacher), "--out", str(tmp_path)]
    line += ["--attacks", "fgsm", "--eps", "8/255"]
    main(line)
    main(line)
    assert list(only_report(tmp_path)["attacks"]) == ["clean", "fgsm"]
    for other, match in [
        (["--eps", "10/255"], "has an evaluation with eps 0.03137.*has 0.0392.*--out"),
        (["--seed", "1"], "has an evaluation with seed 0, this one has 1"),
        (["--limit", "9"], "has an evaluation with images 80, this one has 9"),
        (["--attacks", "clean"], "has an evaluation with attacks 'fgsm', this one has 'clean'"),
        (["--save-adversarial"], "has an evaluation with saved False, this one has True"),
        (["--precision", "bf16"], "has an evaluation with precision 'fp32'"),
    ]:
        with pytest.raises(ValueError, match=match):
            main([*line, *other])


@pytest.mark.parametrize("mixed", [True, False])
def test_a_limit_takes_images_of_all_classes(teacher, npz, tmp_path, monkeypatch, capsys, mixed):
    """The images of a folder lie class by class: the first N would be of one class."""
    read = data.load("npz", npz)
    order = read.test.labels.argsort(stable=True)
    given = replace(read, test=read.test.take(order), mixed=mixed)
    monkeypatch.setattr(data, "load", lambda *args, **options: given)
    line = f"--checkpoint {teacher} --attacks clean --limit 21 --out {tmp_path}"
    main(line.split())
    chosen = given.test.take(torch.arange(21)) if mixed else given.test.sample(21)
    assert len(chosen.labels.unique()) == (1 if mixed else 3)
    model, _ = evaluate.from_run(teacher)
    right = evaluate.accuracies(model, chosen, ("clean",), eps=0.1)["clean"]
    report = only_report(tmp_path)
    assert float(report["attacks"]["clean"]["accuracy"]) / 100 == pytest.approx(right, abs=1e-4)
    words = "first 21 of 80 images" if mixed else "21 of 80 images, drawn by a fixed seed"
    assert report["chosen"] == words
    assert words in capsys.readouterr().out


def test_reports_have_robustbenchs_fields_and_the_examples(npz, teacher, tmp_path):
    natural = teacher.parent.with_name("natural") / "best.safetensors"
    line = ["--checkpoint", str(teacher), str(natural), "--attacks", "clean,fgsm,transfer-pgd20"]
    line += ["--source", str(natural), "--eps", "16/255", "--out", str(tmp_path)]
    main([*line, "--save-adversarial", "--precision", "bf16"])
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    paths = sorted(tmp_path.glob("*/report.json"))
    assert len(paths) == 2
    split = data.load("npz", npz).test
    clean = split.images.float() / 255
    for path in paths:
        result = json.loads(path.read_text())
        assert result["eps"] == "16/255"
        assert result["dataset"] == "stripes"
        assert result["architecture"] == "digits_net"
        assert result["number_forward_passes"] == "1"
        assert result["clean_acc"] == result["attacks"]["clean"]["accuracy"]
        assert "autoattack_acc" not in result
        examples = torch.from_numpy(np.load(path.with_name("adversarial.npy")))
        model, _ = evaluate.from_run(natural if "natural" in str(path) else teacher)
        with torch.no_grad():
            survives = model(examples).argmax(1) == split.labels
        assert f"{100 * survives.double().mean():.2f}" == result["robust_acc"]
        assert (examples - clean).abs().max() == pytest.approx(16 / 255, abs=1e-6)
        assert (path.with_name("adversarial.png")).read_bytes()[:4] == b"\x89PNG"
    apart = [json.loads(path.read_text())["robust_acc"] for path in paths]
    assert float(apart[0]) != float(apart[1])


def test_a_network_of_ones_own(npz, teacher, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
        "def number():\n    return 3\n"
        "def picky(a):\n    return 3\n"
        "class Pair(nn.Module):\n    def forward(self, x):\n        return x, x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = ["--data", "npz", "--data-dir", str(npz), "--attacks", "clean", "--model-from"]
    main([*line, "own:net", "--out", str(tmp_path / "out")])
    assert only_report(tmp_path / "out")["architecture"] == "own:net"
    for name, match in [
        ("own", "model-from is 'own', must be module:function"),
        ("own:nothing", "model-from is 'own:nothing': .*has no attribute"),
        ("nowhere:net", "model-from is 'nowhere:net': No module named"),
        ("own:picky", r"own:picky\(\) raised TypeError: .*1 required positional argument"),
        ("own:Pair", "own:Pair returns tuple for one image, must be logits"),
        ("own:number", r"own:number\(\) is a int, must be a torch.nn.Module"),
    ]:
        with pytest.raises(ValueError, match=match):
            main([*line, name])
    with pytest.raises(ValueError, match="^--checkpoint is missing"):
        main(line[:-1])


def test_probabilities_are_attacked_as_logits_and_said(npz, teacher, tmp_path, monkeypatch, capsys):
    (tmp_path / "soft.py").write_text(
        "import torch\nfrom fastadv.evaluate import from_run\n"
        f"def net():\n    model = from_run({str(teacher)!r})[0]\n"
        "    return torch.nn.Sequential(model, torch.nn.Softmax(1)).train()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = ["--data", "npz", "--data-dir", str(npz), "--attacks", "clean,pgd20", "--eps", "16/255"]
    main([*line, "--checkpoint", str(teacher), "--out", str(tmp_path / "hard")])
    main([*line, "--model-from", "soft:net", "--out", str(tmp_path / "soft")])
    hard, soft = (only_report(tmp_path / name) for name in ("hard", "soft"))
    assert not hard["unreliable"]
    assert soft["unreliable"]
    assert [w[:30] for w in soft["warnings"]] == ["the model returns probabilitie"]
    assert hard["robust_acc"] == soft["robust_acc"]
    assert "warning: the model returns probabilities" in capsys.readouterr().out


def test_runs_on_other_data_are_not_compared(npz, teacher, tmp_path):
    other = tmp_path / "other.npz"
    other.write_bytes(npz.read_bytes())
    tensors, fields = checkpoint.load(teacher)
    fields["config"]["data_dir"] = str(other)
    checkpoint.save(tmp_path / "b.safetensors", tensors, fields)
    line = ["--checkpoint", str(teacher), str(tmp_path / "b.safetensors"), "--attacks", "clean"]
    with pytest.raises(
        ValueError, match="^--data is missing: the runs were trained on .*other.npz"
    ):
        main(line)
    main([*line, "--data-dir", str(npz)])


def test_each_checkpoint_has_a_folder(tmp_path):
    labels = ["runs/at-0.1", "runs/at-0.2", "runs/at/best.safetensors", "../a/m.pt", "own:net"]
    names = [folder(tmp_path, label).name for label in labels]
    assert names == ["runs-at-0.1", "runs-at-0.2", "runs-at-best", "a-m", "own-net"]
