import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastadv import checkpoint, evaluate
from fastadv.attacks import APGD


def test_evaluate_command(npz, teacher, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastadv.evaluate",
        "--checkpoint",
        str(teacher),
        "--json",
        str(tmp_path / "r.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pgd20_003" in done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["clean"] >= result["fgsm"] >= result["pgd20"] - 0.05
    model, run = evaluate.from_run(teacher)
    split = evaluate.data.load("npz", npz).test
    rates = evaluate.accuracies(model, split, ("clean", "pgd20"), eps=run.eps, batch_size=7)
    assert rates["clean"] == pytest.approx(result["clean"])
    assert rates["pgd20"] == pytest.approx(result["pgd20"])  # batch size changes nothing

    missing = subprocess.run(
        [*command[:4], str(tmp_path / "no.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "no.safetensors" in missing.stderr


def test_evaluation_protocols():
    """PGD_SAT, PGD_TRADES and CW_inf as the robust distillation papers have them, at 8/255."""
    eps = 8 / 255
    attacks = {name: evaluate.adversary(name, eps) for name in evaluate.PAPER}
    settings = {
        name: (pgd.steps, pytest.approx(pgd.step_size), pgd.init, keywords.get("loss", "ce"))
        for name, (pgd, keywords) in attacks.items()
    }
    assert settings == {
        "clean": (0, 2 / 255, "zero", "ce"),
        "fgsm": (1, 8 / 255, "zero", "ce"),
        "pgd20": (20, 2 / 255, "uniform", "ce"),
        "pgd20_003": (20, 0.003, "uniform", "ce"),
        "cw": (30, 2 / 255, "zero", "cw"),
    }
    assert all(pgd.eps == eps and pgd.norm == "linf" for pgd, _ in attacks.values())


def test_evaluation_knows_auto_pgd(npz, teacher):
    model, run = evaluate.from_run(teacher)
    split = evaluate.data.load("npz", npz).test
    auto = {name: evaluate.adversary(name, 8 / 255)[0] for name in evaluate.ATTACKS}
    for name, loss in (("apgd-ce", "ce"), ("apgd-dlr", "dlr"), ("apgd-t", "targeted")):
        assert auto[name] == APGD(8 / 255, steps=100, restarts=1, loss=loss, target_classes=9)
    pgd20, apgd = (
        evaluate.correct(model, split, name, eps=run.eps).sum() for name in ("pgd20", "apgd-ce")
    )
    assert apgd <= pgd20 + 1
    default = evaluate.arguments(["--checkpoint", "x"]).attacks
    assert default == "clean,fgsm,pgd20,pgd20_003,cw"


def test_cw_is_the_published_attack(npz, teacher):
    model, run = evaluate.from_run(teacher)
    split = evaluate.data.load("npz", npz).test
    x, y = split.images.float() / 255, split.labels
    x_adv = x.clone()
    for _ in range(30):
        logits = model.eval()(x_adv.requires_grad_())
        real = logits.gather(1, y[:, None])[:, 0]
        other = logits.scatter(1, y[:, None], -1e4).max(1).values
        loss = -(real - other + 50).clamp(min=0).sum()
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + run.eps / 4 * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - run.eps), x + run.eps).clamp(0, 1)
    expected = model(x_adv).argmax(1) == y
    assert torch.equal(evaluate.correct(model, split, "cw", eps=run.eps), expected)
    assert 0 < expected.float().mean() < 1


class NaNGradient(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] + (0 * x).norm().sqrt()


def test_evaluation_certifies_nothing_that_could_not_be_attacked(npz, teacher):
    split = evaluate.data.load("npz", npz).test
    with pytest.raises(ValueError, match="pgd20: .* gradients of the model had NaN"):
        evaluate.correct(NaNGradient(), split, "pgd20", eps=0.1)
    model, _ = evaluate.from_run(teacher)
    soft = torch.nn.Sequential(model, torch.nn.Softmax(1))
    wrong = evaluate.data.ImageSet(split.images, split.labels + 2, split.index)
    for attack in ("clean", "cw"):
        with pytest.raises(ValueError, match="model returned probabilities"):
            evaluate.correct(soft, split, attack, eps=0.1)
        with pytest.raises(ValueError, match="y has labels from"):
            evaluate.correct(model, wrong, attack, eps=0.1)


def test_evaluate_refuses_before_it_works(npz, teacher, tmp_path):
    line = ["--checkpoint", str(teacher)]
    for extra, match in [
        (["--attacks", "clean,aa"], "attack is 'aa', must be one of"),
        (["--eps", "8"], "eps is 8.0, must be .*did you mean"),
        (["--limit", "-3"], "limit is -3, must be at least 1"),
        (["--json", str(tmp_path / "no/r.json")], "whose folder does not exist"),
        (["--device", "cuda:7"], "device is 'cuda:7', which cannot be used here"),
    ]:
        with pytest.raises(ValueError, match=match):
            evaluate.main([*line, *extra])
    other = tmp_path / "other.npz"
    with np.load(npz) as file:
        np.savez(other, **{k: v + 2 if k.endswith("labels") else v for k, v in file.items()})
    with pytest.raises(ValueError, match="has 3 classes, other 5"):
        evaluate.main([*line, "--data-dir", str(other)])
    with pytest.raises(FileNotFoundError, match="no such file .a run's is DIR/best.safetensors"):
        evaluate.main(["--checkpoint", str(tmp_path)])
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not a run's .safetensors"):
        evaluate.main(["--checkpoint", str(tmp_path / "w.pt")])
    checkpoint.save(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="its header is not that of a run"):
        evaluate.main(["--checkpoint", str(tmp_path / "x.safetensors")])


def test_a_run_folder_means_its_best_checkpoint(teacher):
    (a, _), (b, _) = evaluate.from_run(teacher), evaluate.from_run(teacher.parent)
    assert torch.equal(a.fc.weight, b.fc.weight)


def test_eps_zero_is_the_clean_accuracy(teacher, tmp_path):
    line = ["--checkpoint", str(teacher), "--eps", "0", "--json", str(tmp_path / "r.json")]
    evaluate.main([*line, "--attacks", "clean,pgd20"])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["eps"] == 0
    assert result["clean"] == result["pgd20"]


def test_evaluation_leaves_the_random_state_alone(npz, teacher):
    model, run = evaluate.from_run(teacher)
    split = evaluate.data.load("npz", npz).val
    before = torch.get_rng_state()
    evaluate.accuracies(model, split, ("pgd20",), eps=run.eps)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="attack is 'aa', must be one of clean"):
        evaluate.accuracies(model, split, ("aa",), eps=run.eps)
