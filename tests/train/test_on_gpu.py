"""The trainer on a GPU: the attack as a CUDA graph, steps that wait for nothing. Without a GPU a
graph is replayed by running its function again."""

import pytest
import torch
from small_runs import config, with_teachers
from stand_ins import Player

from fastadv import methods, models, testing
from fastadv.attacks import APGD, PGD, Captured, graphs
from fastadv.train import loop, optimizer, train
from fastadv.train.build import capturing

SEEDS = "vfd+at", "rslad", "bmtard", "advfunmatch"  # the methods that the project began with
UPDATES = 5  # of an epoch


@pytest.fixture
def player(monkeypatch):
    """Graphs on a CPU, for every run."""
    played = Player()
    monkeypatch.setattr(graphs, "capture", played)
    monkeypatch.setattr(graphs, "on_gpu", lambda x: x.numel() > 0)
    monkeypatch.setattr(loop, "capturing", lambda config, attack: Captured(attack))
    return played


@pytest.mark.parametrize(
    ("name", "schedule"), [*((name, "constant") for name in SEEDS), ("rslad", "linear")]
)
def test_a_run_with_graphs_is_the_run(npz, tmp_path, teacher, name, schedule, request):
    settings = with_teachers({"method": name, "eps_schedule": schedule}, teacher)
    plain = train(config(npz, tmp_path / "plain", **settings))
    player = request.getfixturevalue("player")
    rows = train(config(npz, tmp_path / "graphs", **settings))
    for row, expected in zip(rows, plain, strict=True):
        del row["images_per_s"], expected["images_per_s"]
        assert row == expected
    # All epochs share a graph, but for a radius of their own; the first attack makes none.
    captures = 1 if schedule == "constant" else 3
    assert player.counts == (captures, 3 * UPDATES - captures)


def test_which_attacks_are_replayed(npz, tmp_path):
    cuda = config(npz, tmp_path, device="cuda")
    assert isinstance(capturing(cuda, PGD(0.1, 0.02, 2)), Captured)
    assert capturing(config(npz, tmp_path, device="cuda", cuda_graph="off"), PGD(0.1)) is None
    assert capturing(config(npz, tmp_path), PGD(0.1)) is None
    for other in (PGD(0.1, 0.02, 2, restarts=2), PGD(0.1, 0.02, 2, keep="best"), APGD(0.1)):
        assert capturing(cuda, other) is None
    with pytest.raises(ValueError, match="cuda_graph is 'on', must be auto or off"):
        config(npz, tmp_path, cuda_graph="on")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEEDS)
def test_losses_are_those_of_a_cpu(npz, tmp_path, teacher, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = with_teachers({"method": name, "epochs": 2}, teacher)
    expected = train(config(npz, tmp_path / "cpu", **settings))
    for cuda_graph in ("auto", "off"):
        options = {"device": "cuda", "cuda_graph": cuda_graph}
        found = train(config(npz, tmp_path / cuda_graph, **settings, **options))
        for row, on_cpu in zip(found, expected, strict=True):
            # The sign of a gradient near zero may turn, and move a pixel by a step.
            assert row["loss"] == pytest.approx(on_cpu["loss"], rel=1e-2)


def outer_steps(name, device, dtype):
    """[(loss, [gradients])] of five updates on images that are the same everywhere, on the CPU."""
    torch.manual_seed(0)
    student, *teachers = (models.get("digits_net", 10, 1, width) for width in (4, 8, 6))
    nets = methods.Nets(student, *(teacher.eval() for teacher in teachers))
    method = methods.get(name)
    images = torch.rand(UPDATES, 2, 16, 1, 8, 8)  # x and x_adv
    labels = torch.randint(10, (UPDATES, 16), device=device)
    method.prepare(nets, images[0, 0])
    for module in (student, *teachers, method):
        module.to(device, dtype)
    state = {key: value.to(dtype) for key, value in method.init_state(device).items()}
    weights, steps = [*student.parameters(), *method.parameters()], []
    for (x, x_adv), y in zip(images.to(device, dtype), labels, strict=True):
        batch = methods.Batch(x, y)
        batch.x_adv = x_adv
        loss, state = method.outer(nets, batch, state)
        gradients = torch.autograd.grad(loss, weights)
        steps.append([tensor.detach().cpu() for tensor in (loss, *gradients)])
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.05 * gradient
    return steps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SEEDS)
def test_loss_and_gradients_are_as_exact_as_those_of_a_cpu(name, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = outer_steps(name, device, torch.float32)
    exact = outer_steps(name, "cpu", torch.float64)
    on_cpu = outer_steps(name, "cpu", torch.float32)
    for step in zip(found, exact, on_cpu, strict=True):
        for tensors in zip(*step, strict=True):
            testing.assert_close(name, *tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEEDS)
def test_a_warm_step_does_not_wait_for_the_gpu(npz, tmp_path, teacher, name, monkeypatch):
    settings = with_teachers({"method": name, "epochs": 1, "device": "cuda"}, teacher)
    settings["teacher_cache"] = str(tmp_path / "cache")
    train(config(npz, tmp_path / "cold", **settings))
    step, done = torch.optim.SGD.step, 0

    def counted(*args, **kwargs):
        nonlocal done
        step(*args, **kwargs)
        done += 1  # of 5: the first loss is shown, the second attack captured
        torch.cuda.set_sync_debug_mode("error" if done in (2, 3) else "default")

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    try:
        train(config(npz, tmp_path / "warm", **settings))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done == UPDATES


@pytest.mark.gpu
def test_the_optimiser_is_one_kernel(npz, tmp_path):
    weights = [torch.ones(3, device="cuda", requires_grad=True)]
    made = optimizer.build_optimizer(config(npz, tmp_path), weights)
    assert made.defaults["fused"]
