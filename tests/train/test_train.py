import itertools
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from small_runs import config, with_teachers

from fastadv import data, evaluate, methods
from fastadv.attacks import APGD, PGD
from fastadv.runs import checkpoint, folder, log
from fastadv.runs.folder import Run
from fastadv.teacher_cache import TeacherCache
from fastadv.train import train
from fastadv.train.build import build_loader
from fastadv.train.cli import parse


class OwnAttack(methods.AT):
    def __init__(self, attack=None, **options):
        super().__init__(attack=attack, **options)
        self.attack = APGD(eps=0.1)


def test_a_run_leaves_its_whole_record(npz, tmp_path):
    rows = train(config(npz, tmp_path / "run"))
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "best.safetensors",
        "last.safetensors",
        "curves.png",
    }
    assert rows == log.read(tmp_path / "run/metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.05, 0.005])
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["bad_gradients"] == 0
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["step_size"] == pytest.approx(0.025)
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    _, metadata = checkpoint.load(tmp_path / "run/best.safetensors")
    best = max(row["robust_acc"] for row in rows)
    assert metadata["best"] == best
    assert metadata["epoch"] == next(r["epoch"] for r in rows if r["robust_acc"] == best)


@pytest.mark.parametrize(("seconds", "drawings"), [(0, 3), (10**6, 1)])
def test_curves_are_drawn_at_times_and_at_the_end(npz, tmp_path, monkeypatch, seconds, drawings):
    drawn = []
    monkeypatch.setattr(folder, "REDRAWN", seconds)
    monkeypatch.setattr(log, "plot", lambda path, curves, title: drawn.append(len(curves[""])))
    train(config(npz, tmp_path / "run"))
    assert drawn == [1, 2, 3][-drawings:]


RUNS = {
    "at": {"method": "at"},
    "natural": {"method": "natural"},
    "rslad": {"method": "rslad"},
    "ema, clipped": {"method": "trades", "ema": 0.9, "clip_grad": 1.0},
    "swa": {"method": "mart", "swa_start": 1},
    "awp": {"method": "at", "awp_gamma": 0.01, "awp_warmup": 1},
    "growing radius": {
        "method": "saad",
        "eps_schedule": "linear",
        "swa_start": 1,
        "recompute_bn": True,
    },
    "prior": {"method": "ikl"},
    "weights and temperatures": {"method": "bmtard"},
    "temperatures by class": {"method": "absld"},
    "autoaugment, mixup": {"method": "iad1", "policy": "autoaugment", "mixup": 1.0},
    "within an epoch": {"method": "trades", "ema": 0.9, "save_every": 1e-9},
    "adamw, accumulated": {
        "method": "at",
        "optimizer": "adamw",
        "norm_decay": False,
        "schedule": "onecycle",
        "accumulate": 2,
        "save_every": 1e-9,
    },
    "projector": {
        "method": "vfd+at",
        "student_width": 3,
        "method_options": {"layers": ("conv4", "penultimate")},
    },
}


@pytest.mark.parametrize("run", RUNS)
def test_resume_continues_bit_for_bit(npz, tmp_path, teacher, run, monkeypatch):
    options = with_teachers(RUNS[run], teacher)
    train(config(npz, tmp_path / "whole", **options))

    optimizer = torch.optim.AdamW if "optimizer" in options else torch.optim.SGD
    together, updates = options.get("accumulate", 1), 0

    def dies(*args, **kwargs):
        nonlocal updates
        updates += 1
        if updates == (8 if together == 1 else 5):  # in the middle of the second epoch
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    step = optimizer.step
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(config(npz, tmp_path / "cut", **options))
    assert [row["epoch"] for row in log.read(tmp_path / "cut/metrics.jsonl")] == [0]
    _, metadata = checkpoint.load(tmp_path / "cut/last.safetensors")
    assert (metadata["epoch"], metadata["step"]) == (0, 2 if "save_every" in options else 0)
    torch.manual_seed(999)  # whatever the new process does before
    resumed, resume = parse(["--resume", str(tmp_path / "cut")])
    assert resume
    train(resumed, resume)

    for name in ("last.safetensors", "best.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    drop = ("images_per_s", "teacher_cached", "clean_teacher_cached")
    rows = [
        [
            {k: v for k, v in row.items() if k not in drop}
            for row in log.read(tmp_path / run / "metrics.jsonl")
        ]
        for run in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("method", [*methods.METHODS, *(f"vfd+{m}" for m in methods.METHODS)])
def test_every_method_trains(npz, tmp_path, teacher, method):
    """From the command line's own parser; how well is for the slow tests to say."""
    line = f"--method {method} --data npz --student digits_net --student-width 4 --eps 0.1"
    lr = 0.05 / max(1, methods.named(method).loss_scale)
    line += f" --steps 2 --epochs 2 --batch-size 16 --lr {lr} --eval-every 2"
    settings = with_teachers({"method": method}, teacher)
    for flag in settings.keys() - {"method"}:
        line += f" --{flag.replace('_', '-')} {settings[flag]}"
    if method.endswith("saad"):
        line += " --set igdm_weight=0"  # a term that grows from epoch to epoch
    line += f" --teacher-cache {tmp_path / 'cache'}"
    config, _ = parse([*line.split(), "--data-dir", str(npz), "--out", str(tmp_path / "run")])
    rows = train(config)
    assert rows[-1]["bad_gradients"] == 0
    assert rows[1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_takes_mixed_images(npz, tmp_path, teacher, method):
    settings = with_teachers({"method": method}, teacher)
    strong = {"policy": "randaugment", "mixup": 1.0, "cutmix": 1.0, "views_per_image": 8}
    rows = train(config(npz, tmp_path / "run", epochs=4, eps=0.02, **settings, **strong))
    assert rows[3]["loss"] < rows[0]["loss"]


def average_by_hand(rows, config):
    """The weights that EMA or SWA should hold, from those after each epoch of one step each."""
    total, count = None, 0
    for epoch, weights in enumerate(rows):
        if config.ema is None and epoch < config.swa_start:
            continue
        keep = count / (count + 1) if config.ema is None else config.ema
        total = weights if total is None else keep * total + (1 - keep) * weights
        count += 1
    return total


CACHED = {
    "rslad": {"method": "rslad"},
    "mtard": {"method": "mtard"},
    "vfd": {"method": "vfd+absld", "method_options": {"layers": ("conv4", "penultimate")}},
    "strong": {"method": "funmatch", "policy": "randaugment", "cutmix": 1.0, "views_per_image": 2},
}


@pytest.mark.parametrize("case", CACHED)
def test_a_second_run_asks_no_teacher_and_ends_in_the_same_bits(
    npz, tmp_path, teacher, case, monkeypatch
):
    settings = with_teachers(CACHED[case], teacher)
    cache = {"teacher_cache": str(tmp_path / "cache")}
    first = train(config(npz, tmp_path / "first", **settings, **cache))
    assert any(row[key] > 0 for row in first for key in row if key.endswith("_cached"))

    def refuse(*args):
        raise AssertionError("a teacher was asked")

    monkeypatch.setattr(TeacherCache, "_compute", refuse)
    rows = train(config(npz, tmp_path / "second", **settings, **cache))
    shares = {key: value for row in rows for key, value in row.items() if key.endswith("_cached")}
    assert set(shares.values()) == {1.0}
    a, b = (load_file(tmp_path / run / "last.safetensors") for run in ("first", "second"))
    assert all(torch.equal(a[key], b[key]) for key in a)


EXACT = {
    **{name: {} for name in ("ard", "iad1", "rslad", "absld", "mtard", "bmtard", "funmatch")},
    **{name: {} for name in ("vfd+at", "vfd+mtard", "vfd+rslad")},
    "adaad": {"alpha": 0.5},
    "advfunmatch": {"clean_weight": 0.5},
}


@pytest.mark.parametrize("method", EXACT)
def test_a_cached_run_trains_as_an_uncached_one_but_for_rounding(npz, tmp_path, teacher, method):
    settings = {"method": method, "method_options": EXACT[method], "epochs": 1, "steps": 0}
    settings = with_teachers(settings, teacher)
    cases = {
        "off": {"teacher_cache": "off"},
        "float16": {},
        "float32": {"teacher_cache_dtype": "float32"},
    }
    losses = {
        name: train(config(npz, tmp_path / name, **settings | case))[0]["loss"]
        for name, case in cases.items()
    }
    assert losses["off"] == pytest.approx(losses["float32"], rel=1e-5)
    assert losses["off"] == pytest.approx(losses["float16"], rel=2e-2)
    assert losses["float16"] != losses["float32"]


def test_the_next_rows_are_read_ahead_and_each_epoch_is_synced(npz, tmp_path, teacher, monkeypatch):
    seen = []

    def noted(name, original):
        def method(self, *args):
            seen.append((name, *(ids.tolist() for ids in args[:2])))
            return original(self, *args)

        monkeypatch.setattr(TeacherCache, name, method)

    for name in ("lookup", "prefetch", "sync"):
        noted(name, getattr(TeacherCache, name))
    settings = with_teachers({"method": "rslad", "epochs": 2, "batch_size": 60}, teacher)
    train(config(npz, tmp_path / "run", **settings))
    assert [c[0] for c in seen] == 2 * [*2 * ["lookup", "prefetch"], "lookup", "sync"]
    for one, following in itertools.pairwise(seen):
        assert one[0] != "prefetch" or one[1:] == following[1:]


def test_no_cache_where_no_view_comes_twice(npz, tmp_path, teacher, capsys):
    settings = with_teachers({"method": "funmatch", "policy": "autoaugment"}, teacher)
    rows = train(config(npz, tmp_path / "run", epochs=1, **settings))
    assert "teacher_cached" not in rows[0]
    assert "teacher cache: off, because without --views-per-image no view comes twice" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("options", [{"ema": 0.8}, {"swa_start": 1}])
def test_averages_of_weights_are_what_is_evaluated_and_saved(npz, tmp_path, options, monkeypatch):
    settings = config(npz, tmp_path / "run", epochs=4, batch_size=200, **options)
    rows = []
    end_epoch = Run.end_epoch

    def note(run, row):
        rows.append(run.student.fc.weight.detach().clone())
        end_epoch(run, row)
        averaged = row["epoch"] >= (settings.swa_start or 0)
        assert run.model is (run.average.module if averaged else run.student)

    monkeypatch.setattr(Run, "end_epoch", note)
    train(settings)
    saved = load_file(tmp_path / "run/last.safetensors")
    torch.testing.assert_close(saved["model.fc.weight"], average_by_hand(rows, settings))
    assert torch.equal(saved["student.fc.weight"], rows[-1])
    model, _ = evaluate.from_run(tmp_path / "run/last.safetensors")
    assert torch.equal(model.fc.weight, saved["model.fc.weight"])
    split = data.load("npz", npz).val
    rate = evaluate.accuracies(model, split, ("clean",), eps=settings.eps)["clean"]
    assert rate == log.read(tmp_path / "run/metrics.jsonl")[-1]["clean_acc"]


def test_statistics_of_averaged_weights_are_those_of_the_training_images(npz, tmp_path):
    plain = {"epochs": 3, "swa_start": 1, "batch_size": 40, "steps": 1}
    for name, recompute in (("plain", False), ("anew", True)):
        train(config(npz, tmp_path / name, recompute_bn=recompute, **plain))
    saved = [load_file(tmp_path / name / "last.safetensors") for name in ("plain", "anew")]
    different = {key for key in saved[0] if not torch.equal(saved[0][key], saved[1][key])}
    assert {key.split(".")[0] for key in different} == {"model", "average"}
    assert all(key.rpartition(".")[2].startswith(("running_", "num_")) for key in different)
    model, settings = evaluate.from_run(tmp_path / "anew/last.safetensors")
    loader = build_loader(settings, data.load("npz", npz))
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].transpose(0, 1).flatten(1)))
    with torch.no_grad():
        for batch in loader.epoch(2):
            model(batch.x)
    mean = torch.stack([part.mean(1) for part in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    var = torch.stack([part.var(1) for part in seen]).mean(0)
    torch.testing.assert_close(norm.running_var, var)


def test_a_linear_schedule_grows_radius_and_step(npz, tmp_path, monkeypatch):
    used, ascend = [], PGD.ascend

    def note(attack, *args, **options):
        used.append((attack.eps, attack.step_size, attack.steps))
        return ascend(attack, *args, **options)

    monkeypatch.setattr(PGD, "ascend", note)
    train(config(npz, tmp_path / "run", epochs=4, eps_schedule="linear", batch_size=144))
    expected = [(0.025 * k, 0.00625 * k, 2) for k in (1, 2, 3, 4)]
    assert used == [tuple(pytest.approx(v) for v in row) for row in expected]


def test_weights_are_perturbed_after_their_warmup(npz, tmp_path):
    cases = {"without": {}, "all": {"awp_gamma": 0.05}}
    cases["warm"] = cases["all"] | {"awp_warmup": 1}
    losses = {
        name: [row["loss"] for row in train(config(npz, tmp_path / name, epochs=2, **case))]
        for name, case in cases.items()
    }
    assert losses["warm"][0] == losses["without"][0] < losses["all"][0]
    assert losses["warm"][1] > losses["without"][1]


def test_each_step_has_the_rate_of_its_epoch(npz, tmp_path, monkeypatch):
    """And trains a student in train mode, whatever validation did."""
    rates, modes = [], []
    step, outer = torch.optim.SGD.step, methods.AT.outer

    def note(self, *args, **kwargs):
        rates.extend(group["lr"] for group in self.param_groups)
        return step(self, *args, **kwargs)

    def see(self, nets, *args):
        modes.extend(module.training for module in nets.student.modules())
        return outer(self, nets, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    monkeypatch.setattr(methods.AT, "outer", see)
    rows = train(config(npz, tmp_path / "run", milestones=(1, 2), batch_size=72))
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    assert [row["lr"] for row in rows] == pytest.approx(rates[::2])
    assert all(modes)


def test_broken_gradients_are_counted_and_said(npz, tmp_path, monkeypatch, capsys):
    perturb = methods.Method.perturb

    def broken(self, *args, **kwargs):
        x_adv = perturb(self, *args, **kwargs)
        self.attack.bad_gradients += 3
        return x_adv

    monkeypatch.setattr(methods.Method, "perturb", broken)
    rows = train(config(npz, tmp_path / "run", epochs=1, batch_size=72))
    assert rows[0]["bad_gradients"] == 6
    assert "warning: 6 attack gradients had NaN or infinity" in capsys.readouterr().out


def test_a_row_is_on_the_disk_when_it_is_logged(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def spy(descriptor):
        synced.append((tmp_path / "metrics.jsonl").read_text())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    log.append(tmp_path / "metrics.jsonl", {"epoch": 0})
    assert synced == ['{"epoch": 0}\n']


def test_the_last_epoch_is_always_validated(npz, tmp_path):
    rows = train(config(npz, tmp_path / "run", epochs=5, eval_every=2))
    assert [row["epoch"] for row in rows if "robust_acc" in row] == [1, 3, 4]
    _, metadata = checkpoint.load(tmp_path / "run/best.safetensors")
    assert metadata["epoch"] in (1, 3, 4)


def test_gradients_are_clipped(npz, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.SGD.step

    def note(self, *args, **kwargs):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack(grads).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    train(config(npz, tmp_path / "run", epochs=1, clip_grad=0.1))
    assert max(norms) == pytest.approx(0.1, rel=1e-3)


def test_seed_decides_the_run(npz, tmp_path):
    first, same, other = (
        train(config(npz, tmp_path / name, epochs=1, seed=seed))[0]["loss"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == same
    assert first != other


def test_bfloat16_trains(npz, tmp_path, teacher):
    half = dict.fromkeys(("precision_attack", "precision_outer", "precision_teacher"), "bf16")
    rows = train(
        config(npz, tmp_path / "run", method="rslad", teacher_checkpoint=str(teacher), **half)
    )
    assert rows[-1]["loss"] < rows[0]["loss"]
    weights = load_file(tmp_path / "run/last.safetensors")
    assert weights["model.fc.weight"].dtype == torch.float32


def test_a_folder_with_a_run_is_refused(npz, tmp_path):
    train(config(npz, tmp_path / "run", epochs=1))
    before = (tmp_path / "run/last.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run: go on with it .--resume"):
        train(config(npz, tmp_path / "run", epochs=1))
    assert (tmp_path / "run/last.safetensors").read_bytes() == before


def test_a_full_disk_leaves_the_last_good_checkpoint(npz, tmp_path, monkeypatch):
    calls = 0
    save = checkpoint.save

    def full(path, *args):
        nonlocal calls
        calls += 1
        if calls > 2:  # the first epoch wrote best and last

            def no_space(descriptor):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr("os.fsync", no_space)
        save(path, *args)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(config(npz, tmp_path / "run"))
    monkeypatch.undo()
    _, metadata = checkpoint.load(tmp_path / "run/last.safetensors")
    assert metadata["epoch"] == 0
    assert not list((tmp_path / "run").glob(".*.tmp"))
    train(*parse(["--resume", str(tmp_path / "run")]))
    assert len(log.read(tmp_path / "run/metrics.jsonl")) == 3


def test_divergence_is_an_error(npz, tmp_path):
    with pytest.raises(ValueError, match="loss is (nan|inf) in epoch .*lower lr"):
        train(config(npz, tmp_path / "run", lr=1e30))


def test_unusable_settings_name_themselves(npz, tmp_path, teacher, monkeypatch):
    def fails(match, **changed):
        with pytest.raises(ValueError, match=match):
            train(config(npz, tmp_path / "none", **changed))
        assert not (tmp_path / "none").exists()

    fails("teacher_checkpoint is missing, which method rslad needs", method="rslad")
    fails("method is 'pgd', must be one of", method="pgd")
    fails("method at has no teacher", teacher_checkpoint=str(teacher))
    fails("student: model is 'vgg', must be one of digits_net, ", student="vgg")
    fails("eps is 8, .*did you mean 8/255", eps=8)
    fails("method at has no option beta; it has", method_options={"beta": 1})
    fails("data_dir is missing", data="cifar10", data_dir=None)
    fails(
        "precision_attack is bf16, must be precision_outer",
        attack_bn="train",
        precision_attack="bf16",
    )
    fails("policy is 'cutout', must be one of none, autoaugment,", policy="cutout")
    fails("cutout is 3, must be even", cutout=3)
    fails("cutout is 10, must be at most 8", cutout=10)
    fails("teacher is given, but method at has no teacher", teacher="resnet18")
    fails(
        "attack_bn is no option of a method alone: use --attack-bn", method_options={"attack_bn": 1}
    )
    fails("beta of method trades is 'x'", method="trades", method_options={"beta": "x"})
    fails("mixup is 1000, must be in", mixup=1000)
    with pytest.raises(
        ValueError, match="awp_warmup is 1, must be below epochs .3. and have awp_g"
    ):
        config(npz, tmp_path, awp_warmup=1)
    with pytest.raises(ValueError, match="teacher_cache_dtype is 'half', must be float16 or"):
        config(npz, tmp_path, teacher_cache_dtype="half")
    with pytest.raises(ValueError, match="randaugment_n or _m is given, but policy is 'none'"):
        config(npz, tmp_path, randaugment_n=3)
    with pytest.raises(ValueError, match="crop_scale is 0.3, but crop is 'padded'"):
        config(npz, tmp_path, crop_scale=0.3)
    with pytest.raises(ValueError, match="recompute_bn is given, but neither ema nor swa_start"):
        config(npz, tmp_path, recompute_bn=True)
    with pytest.raises(ValueError, match="eps_schedule is 'cosine', must be constant or linear"):
        config(npz, tmp_path, eps_schedule="cosine")
    with monkeypatch.context() as patch:
        patch.setitem(methods.METHODS, "at", OwnAttack)
        fails("eps_schedule is 'linear', .* own attack, a APGD: only a PGD", eps_schedule="linear")
    fails("device is 'gpu', which cannot be used here", device="gpu")
    fails("student_width is 0, must be at least 1", student_width=0)
    with pytest.raises(ValueError, match="epochs is 0, must be at least 1"):
        config(npz, tmp_path, epochs=0)
    with pytest.raises(ValueError, match="precision_attack is 'fp16', must be fp32 or bf16"):
        config(npz, tmp_path, precision_attack="fp16")
