"""The optimiser, the learning rates against torch's own schedulers, accumulation and early stop."""

import pytest
import torch
from small_runs import config
from torch.optim import SGD, lr_scheduler

from fastadv.errors import UsageError
from fastadv.runs import checkpoint
from fastadv.runs.config import Config
from fastadv.train import loop, train
from fastadv.train.cli import parse
from fastadv.train.optimizer import build_optimizer, learning_rate

EPOCHS, STEPS = 10, 7
UPDATES = EPOCHS * STEPS


def torchs(make, updates=UPDATES):
    """The learning rate of each update by one of torch's schedulers."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], 0.1)
    schedule, rates = make(optimizer), []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def ours(updates=UPDATES, **settings):
    chosen = Config(lr=0.1, epochs=EPOCHS, **{"milestones": (), **settings})
    return [learning_rate(chosen, update, updates) for update in range(updates)]


def test_rates_are_those_of_torchs_schedulers():
    drops = [4 * STEPS, 6 * STEPS]
    for settings, make in (
        ({"milestones": (4, 6)}, lambda o: lr_scheduler.MultiStepLR(o, drops)),
        ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, UPDATES)),
        ({"schedule": "linear"}, lambda o: lr_scheduler.LinearLR(o, 1, 0, UPDATES)),
        (
            {"schedule": "onecycle"},
            lambda o: lr_scheduler.OneCycleLR(o, 0.1, UPDATES, cycle_momentum=False),
        ),
        (
            {"schedule": "onecycle", "warmup": 1},
            lambda o: lr_scheduler.OneCycleLR(
                o, 0.1, UPDATES, pct_start=1 / EPOCHS, cycle_momentum=False
            ),
        ),
    ):
        assert ours(**settings) == pytest.approx(torchs(make), rel=1e-9, abs=1e-12), settings
    for count in (1, 2, 3, 4):
        few = torchs(lambda o, n=count: lr_scheduler.OneCycleLR(o, 0.1, n), count)
        assert ours(count, schedule="onecycle") == pytest.approx(few), count


@pytest.mark.parametrize("schedule", ["step", "cosine", "linear"])
def test_rates_rise_in_equal_steps_first(schedule):
    rates = ours(schedule=schedule, warmup=2.0, milestones=(5,))
    rise = 2 * STEPS
    assert rates[:rise] == pytest.approx([0.1 * (i + 1) / rise for i in range(rise)])
    assert rates[rise] == pytest.approx(0.1)
    assert rates[-1] < 0.02
    if schedule == "step":  # milestones count from the start
        assert rates[5 * STEPS - 1 : 5 * STEPS + 1] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("schedule", ["step", "cosine", "linear", "onecycle"])
@pytest.mark.parametrize("warmup", [0, 0.5, 1, 9.9])
@pytest.mark.parametrize("updates", [1, 2, 3, EPOCHS])
def test_runs_of_few_updates_have_rates_too(schedule, warmup, updates):
    assert all(0 < rate <= 0.1 for rate in ours(updates, schedule=schedule, warmup=warmup))


def test_norms_and_biases_keep_their_size_when_asked():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    parameters, chosen = list(net.parameters()), Config(norm_decay=False, nesterov=True)
    decayed, rest = build_optimizer(chosen, parameters).param_groups
    assert [p.dim() for p in decayed["params"]] == [4]
    assert [p.dim() for p in rest["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (5e-4, 0)
    assert decayed["nesterov"]
    (every,) = build_optimizer(Config(optimizer="adamw", weight_decay=0.1), parameters).param_groups
    assert (len(every["params"]), every["weight_decay"]) == (4, 0.1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in parameters]
    build_optimizer(Config(norm_decay=False, weight_decay=0.1), parameters).step()
    same = [torch.equal(p, b) for p, b in zip(parameters, before, strict=True)]
    assert same == [False, True, True, True]


def test_gradients_of_several_steps_are_averaged(npz, tmp_path, monkeypatch):
    """Five batches make updates of two, two and one; a mean over equal gradients is that gradient,
    so what the optimiser sees has the size of one batch's."""
    seen, step = [], SGD.step

    def note(self, *args, **kwargs):
        parameter = self.param_groups[0]["params"][0]
        seen.append(parameter.grad.clone())
        parameter.grad.zero_()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SGD, "step", note)
    settings = {"epochs": 1, "method": "natural", "lr": 1e-30, "weight_decay": 0.0, "momentum": 0.0}
    train(config(npz, tmp_path / "one", **settings))
    single, seen = seen, []
    train(config(npz, tmp_path / "two", accumulate=2, **settings))
    assert len(single) == 5
    means = [(single[0] + single[1]) / 2, (single[2] + single[3]) / 2, single[4]]
    assert len(seen) == 3
    for found, expected in zip(seen, means, strict=True):
        torch.testing.assert_close(found, expected)


def test_training_ends_where_validation_gets_no_better(npz, tmp_path, monkeypatch, capsys):
    robust = iter((0.3, 0.5, 0.4, 0.5, 0.6))
    monkeypatch.setattr(loop, "accuracies", lambda *_, **__: {"clean": 0.9, "pgd20": next(robust)})
    rows = train(config(npz, tmp_path / "run", epochs=9, milestones=(), patience=2))
    assert [row["robust_acc"] for row in rows] == [0.3, 0.5, 0.4, 0.5]
    assert "run ends: the last 2 validations were no better" in capsys.readouterr().out
    assert (tmp_path / "run/curves.png").exists()
    assert checkpoint.load(tmp_path / "run/best.safetensors")[1]["epoch"] == 1
    assert train(*parse(["--resume", str(tmp_path / "run")])) == rows
    assert "run: training ended with epoch 4, none is left" in capsys.readouterr().out


def test_flags():
    line = "--nesterov --no-norm-decay --schedule cosine --warmup 5 --out x"
    chosen, _ = parse(line.split())
    assert (chosen.nesterov, chosen.norm_decay) == (True, False)
    assert (chosen.schedule, chosen.warmup) == ("cosine", 5.0)
    assert Config.from_json(chosen.to_json()) == chosen


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam', must be sgd or adamw"),
        ({"schedule": "poly"}, "schedule is 'poly', must be step, cosine, linear or onecycle"),
        ({"optimizer": "adamw", "nesterov": True}, "which optimizer adamw does not have"),
        ({"optimizer": "adamw", "momentum": 0.5}, "momentum is 0.5 and nesterov False, which"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov is given, but momentum is 0"),
        ({"nesterov": 1}, "nesterov is 1, must be true or false"),
        ({"warmup": 200}, "warmup is 200, must be below epochs"),
        ({"warmup": -1}, "warmup is -1, must be at least 0"),
        ({"accumulate": 0}, "accumulate is 0, must be at least 1"),
        ({"accumulate": 2, "awp_gamma": 0.01}, "accumulate is 2, must be 1 with awp_gamma"),
        ({"patience": 0}, "patience is 0, must be at least 1"),
        ({"save_every": 0}, "save_every is 0, must be positive"),
    ],
)
def test_what_no_run_can_have_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        Config(**settings)
