"""The benchmarks: steps and attacks on tiny networks, and those that train, minutes long."""

import contextlib
import html
import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv import evaluate, freeze, methods
from fastadv.attacks import suite
from fastadv.data.dataset import ImageSet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
METHODS = BENCHMARKS / "methods.py"


@pytest.fixture
def bench(monkeypatch):
    """name -> module of the benchmarks, where torch.compile takes no time."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    return importlib.import_module


def test_the_fold_benchmark_is_of_all_norms_of_a_network(bench):
    rows = bench("run").measure(bench("bench_fold_bn").case("resnet18"), 0)
    assert [row["provider"] for row in rows] == ["eager", "fastadv"]


@pytest.mark.slow  # the dry run of the suite for GPUs has the same case
def test_the_attack_benchmark_on_a_tiny_network(bench):
    case = bench("bench_attack").case("resnet18", batch=2, samples=1, width=4)
    rows = {row["provider"]: row for row in bench("run").measure(case, 0)}
    left_out = rows["published"].get("left out", "")
    low = "torch in bf16" not in left_out
    names = ["published", "published_backward", "compiled", *["published_bf16", "recipe"] * low]
    assert [*rows][: 5 + 2 * low] == [*names, "fastadv_fp32", "fastadv_bf16"]
    assert [*rows][-1 - low :] == ["conv_fp32", "conv_bf16"][: 1 + low]
    assert any("torchattacks" in name for name in rows) != ("torchattacks" in left_out)
    for row in rows.values():
        assert row["images/s"] == pytest.approx(2e6 / row["us"], rel=0.05)
        assert row["speedup"] == pytest.approx(rows["published"]["us"] / row["us"], abs=0.02)
    bf16 = rows["fastadv_bf16"]
    ours, floor = rows["fastadv_fp32"], rows["conv_fp32"]
    assert ours["x floor"] == pytest.approx(ours["us"] / floor["us"], abs=0.01)
    assert 0.5 < bf16["equal signs"] <= 1
    assert bf16["peak MB"] >= 0
    assert rows["published"]["peak MB"] > 0


def test_the_recipe_is_the_published_loop_up_to_rounding(bench, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    model = bench("bench_attack").network("mobilenet_v2", width=4)
    logits = bench("published").recipe(model)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(logits(x), model(x), rtol=1e-3, atol=1e-5)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # the model itself is kept


def test_the_attack_benchmark_refuses_a_wrong_attack(bench, monkeypatch):
    module = bench("bench_attack")
    monkeypatch.setattr(module, "STEP_SIZE", 1 / 255)
    with pytest.raises(AssertionError):
        module.case("resnet18", batch=2, width=4).gate()


SMALL = ("mnist_cnn", "resnet20", "densenet_bc_40")


@pytest.mark.parametrize("name", SMALL)
def test_the_networks_benchmark_on_two_images(bench, name):
    (size,) = {size for net, _, size in bench("bench_networks").NETWORKS if net == name}
    case = bench("bench_networks").case(name, 2, size)
    rows = {row["provider"]: row for row in bench("run").measure(case, 0)}
    low = [] if "torch in bf16" in rows["published"].get("left out", "") else ["bf16 autocast"]
    assert [*rows] == ["published", "channels_last", *low, "fastadv_fp32", "fastadv_bf16"]


@pytest.mark.slow
def test_the_engine_computes_part_of_all_networks_but_the_transformer(bench):
    module = bench("bench_networks")
    for name, _, size in module.NETWORKS:
        case = module.case(name, 2, size)
        case.gate()
        trunk = freeze(module.network(name, size)).trunk
        assert (trunk is None) == (name == "vit_tiny"), name


def test_the_networks_benchmark_refuses_a_wrong_twin(bench, monkeypatch):
    module = bench("bench_networks")
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    monkeypatch.setattr(module, "freeze", lambda *_: wrong)
    with pytest.raises(AssertionError):
        module.case("mnist_cnn", 2, 32).gate()


class Convolutions(TorchDispatchMode):
    """Counts them by operator, shapes, options and, backward, the gradients asked for."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten.convolution,
            torch.ops.aten.convolution_backward,
        ):
            shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
            self.counts[f"{func} {shapes}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_floor_is_the_convolutions_of_an_attack(bench, name):
    module = bench("bench_attack")
    model, (x, y) = module.network(name, width=4), module.images(2)
    calls = module.convolutions(model, x, torch.float32), module.attacks(model, x, y)["published"]
    counts = []
    for call in calls:
        with Convolutions() as seen:
            call()
        counts.append(seen.counts)
    assert counts[0] == counts[1]
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert counts[0].total() == 2 * 10 * convs


@pytest.mark.parametrize(
    "name", [pytest.param("rslad", marks=pytest.mark.slow), "adaad", "advfunmatch"]
)  # the dry run of the suite for GPUs has rslad
def test_the_train_step_benchmark_on_tiny_networks(bench, name):
    module = bench("bench_train_step")
    rival = name == "rslad"
    case = module.case(name, "resnet18", "wrn10_1", batch=4, samples=1, rival=rival, width=4)
    rows = {row["provider"]: row for row in bench("run").measure(case, 0)}
    assert ("published, fp32 compiled" in rows) == rival
    left_out = rows["published, fp32 eager"].get("left out", "")
    assert ("compiled" in left_out) != rival
    steps = [row for provider, row in rows.items() if provider.startswith("fastadv")]
    assert len(steps) == (4 if name == "rslad" else 1)
    for row in steps:
        assert sum(row[section] for section in module.SECTIONS) == pytest.approx(1, abs=1e-3)
    least = min(steps, key=lambda row: row["teacher"])
    assert least["teacher"] > 0 or name == "rslad"
    assert name != "rslad" or "no teacher" in least["provider"]


class Namespaces(TorchDispatchMode):
    """Collects those of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_nothing_of_fastadv_is_in_the_published_code(bench):
    small = {"batch": 4, "width": 4}
    cases = (
        bench("bench_train_step").case("rslad", "resnet18", "wrn10_1", rival=True, **small),
        (bench("bench_attack").case("resnet18", **small)),
    )
    for case in cases:
        for provider, call in case.providers.items():
            if provider == "lookup alone" or "conv" in provider:
                continue
            with Namespaces() as run:
                call()
            assert ("fastadv" in run.seen) == provider.startswith("fastadv"), provider


def test_the_train_step_benchmark_refuses_another_loss(bench, monkeypatch):
    module, published = bench("bench_train_step"), bench("published")

    def other(*nets, **options):
        x_adv, loss = published.rslad(*nets, **options)
        return x_adv, 1.01 * loss

    monkeypatch.setitem(published.METHODS, "rslad", other)
    with pytest.raises(AssertionError):
        module.case("rslad", "resnet18", "wrn10_1", batch=4, width=4).gate()


class Slow(torch.autograd.Function):
    """x; moves the hands of a clock by `seconds` on the way forward, twice that on the way back."""

    @staticmethod
    def forward(ctx, x, seconds, hands):
        ctx.seconds, ctx.hands = seconds, hands
        hands.append(hands[-1] + seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.hands.append(ctx.hands[-1] + 2 * ctx.seconds)
        return gradient, None, None


class SlowTeacher(nn.Module):
    def __init__(self, hands):
        super().__init__()
        self.hands = hands

    def forward(self, x):
        return Slow.apply(x, 10, self.hands)


def test_the_clock_tells_the_teacher_from_the_attack_around_it(bench, monkeypatch):
    module, hands = bench("bench_train_step"), [0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: hands[-1]))
    clock, teacher, x = module.Clock(), SlowTeacher(hands), torch.zeros(1, requires_grad=True)
    with clock.teacher(teacher), clock.section("attack"):
        torch.autograd.grad((Slow.apply(x, 1, hands) + teacher(x)).sum(), x)
    assert clock.seconds == {"attack": 3, "teacher": 30}
    assert clock.shares() == {"data": 0, "teacher": 0.9091, "attack": 0.0909, "outer": 0}
    assert not clock.running
    assert "forward" not in vars(teacher)


def test_a_table_has_the_columns_with_values(bench):
    row = {"op": "o", "shape": "s", "provider": "p", "us": 2e6, "p20": 1e6, "p80": 3e6}
    rows = [row | {"speedup": 1.0, "GB/s": None}, row | {"speedup": 2.0, "images/s": 5.5}]
    assert bench("tables").markdown(rows) == [
        "| op | shape | provider | median ms | p20-p80 | speed-up | images/s |",
        "|---|---|---|---|---|---|---|",
        "| o | s | p | 2000.0 | 1000.0-3000.0 | 1.00x |  |",
        "| o | s | p | 2000.0 | 1000.0-3000.0 | 2.00x | 5.5 |",
    ]


def test_each_kind_of_machine_has_its_newest_rows(bench, monkeypatch, tmp_path):
    tables = bench("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row = {"op": "o", "shape": "s", "cpu": "C", "isa": "avx2", "gpu": "G", "time": "1"}
    here, again, other = row, row | {"time": "2"}, row | {"isa": "amx"}
    cuda, triton = row | {"part": "ops_cuda"}, row | {"part": "ops_triton"}
    rows = [here, again, other, cuda, triton]
    (tmp_path / "gpu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert tables.newest("gpu") == {
        ("C", "avx2"): [again],
        ("C", "amx"): [other],
        ("G", "ops_cuda"): [cuda],
        ("G", "ops_triton"): [triton],
    }


def test_the_published_tables_are_those_of_the_rows(bench, monkeypatch, tmp_path):
    tables, agreement, methods = bench("tables"), bench("agreement"), bench("methods")
    for name in ("PAGE", "README"):
        copy = tmp_path / getattr(tables, name).name
        copy.write_text(getattr(tables, name).read_text())
        monkeypatch.setattr(tables, name, copy)
    monkeypatch.setattr(agreement, "PAGE", tables.PAGE)
    tables.write()
    agreement.table()
    assert tables.PAGE.read_text() == (tables.ROOT / "docs" / "benchmarks.md").read_text()
    assert tables.README.read_text() == (tables.ROOT / "README.md").read_text()
    rows = methods.newest(methods.RESULTS / "methods.jsonl")
    assert "\n".join(methods.table(rows)) in tables.PAGE.read_text()


def test_the_picture_is_that_of_the_rows(bench):
    """It carries what it draws."""
    picture = bench("picture")
    text = picture.PICTURE.read_text()
    drawn = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)[1]
    assert html.unescape(drawn) == picture.data()


def test_only_names_a_module_or_a_network(bench, monkeypatch):
    run, attack = bench("run"), bench("bench_attack")
    cases = [attack.Case("PGD-10", f"{name}, 2x3x32x32", {}, None) for name in ("a", "b")]
    monkeypatch.setattr(attack, "cases", lambda: cases)
    assert [*run.chosen("attack", None)] == [*run.chosen("attack", "attack")] == cases
    assert [*run.chosen("attack", "b")] == cases[1:]
    assert [*run.chosen("attack", "pgd-10")] == cases
    with pytest.raises(SystemExit, match="zz"):
        run.run("attack", "zz", 0)


@pytest.mark.slow
def test_every_method_becomes_robust_on_the_digits(tmp_path):
    """One seed; the natural student keeps a few percent under PGD-20."""
    command = [sys.executable, METHODS, "--seeds", "0", "--out", tmp_path]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (tmp_path / "methods.jsonl").read_text().splitlines()]
    rates = {row["method"]: row for row in rows}
    assert rates["natural"]["pgd20"] < 0.1
    for name, row in rates.items():
        assert row["clean"] > 0.9, name
        if name not in ("natural", "funmatch"):
            assert row["pgd20"] > rates["natural"]["pgd20"] + 0.5, name


def test_agreement_is_of_counts_and_pixels(bench):
    agrees = bench("agreement").agrees
    row = {"attack": "aa", "images": 300, "official": 100, "ours": 102}
    assert agrees(row)
    assert not agrees(row | {"ours": 103})
    assert agrees(row | {"ours": 98})
    assert not agrees(row | {"ours": 97})
    for again, within in ((104, range(98, 107)), (97, range(95, 103))):
        found = [ours for ours in range(90, 110) if agrees(row | {"ours": ours, "again": again})]
        assert found == [*within]
    assert agrees(row | {"images": 1000, "ours": 103})
    assert agrees(row | {"pixels": 0.0009})
    assert not agrees(row | {"pixels": 0.001})
    row = {"norm": "l2", "official": 1.0, "ours": 1.029, "official found": 9, "ours found": 9}
    assert agrees(row)
    assert not agrees(row | {"ours": 1.031})
    assert not agrees(row | {"ours": None})
    assert agrees(row | {"official": None, "ours": 0.1})
    assert not agrees(row | {"ours found": 8})
    assert agrees(row | {"ours found": 10})


def test_the_evaluation_benchmark_on_a_tiny_network(bench, monkeypatch):
    """With fastadv itself in the official code's place, which is not installed here."""
    agreement, module = bench("agreement"), bench("bench_evaluate")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    split = ImageSet(images, net(images / 255).argmax(1), torch.arange(6))
    monkeypatch.setattr(module, "network", lambda: (net, split))
    monkeypatch.setattr(module, "official_right", agreement.right)
    monkeypatch.setattr(suite, "CASCADES", {"aa": ("apgd-ce", "apgd-t")})
    (case,) = module.cases()
    rows = {row["provider"]: row for row in bench("run").measure(case, 0)}
    assert [*rows] == ["official", "fastadv_fp32", "fastadv_bf16"]
    stages = suite.stages(["aa"], module.EPS)
    robust = evaluate.run(net, split, stages).right("aa:apgd-t").sum()
    assert [row["robust"] for row in rows.values()] == [robust] * 3
    monkeypatch.setattr(module, "official_right", lambda *args: torch.ones(6) > 0)
    (case,) = module.cases()
    with pytest.raises(AssertionError):
        case.gate()


def test_a_teacher_asked_less_often_is_timed_beside_the_exact_method(bench, monkeypatch):
    module, asked = bench("teacher_every"), []
    monkeypatch.setattr(module, "step", lambda name, every, _: lambda: asked.append((name, every)))
    rows = list(module.times("adaad", {}, 0))
    assert [row["teacher_every"] for row in rows] == [1, 2, 5]
    assert all(row["epoch_s"] >= 0 and row["method"] == "adaad" for row in rows)
    assert {*asked} == {("adaad", 1), ("adaad", 2), ("adaad", 5)}


def test_choices_of_vfd_are_compared_with_the_default_by_seed(bench, monkeypatch, tmp_path):
    module, asked = bench("vfd"), []

    def measure(method, seed, folder, checkpoints, split, **options):
        asked.append((method, split, options))
        return {"clean": 0.9, "pgd20": 0.5 + 0.1 * seed + (0.02 + 0.02 * seed) * bool(options)}

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "teachers", lambda folder: {})
    line = ["vfd.py", "--only", "default,l2", "--seeds", "0,1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", line)
    module.main()
    assert asked == [("vfd+at", "val", {}), ("vfd+at", "val", {"distance": "l2"})] * 2
    rows = [json.loads(row) for row in (tmp_path / "vfd.jsonl").read_text().splitlines()]
    assert [(row["choice"], row["seed"]) for row in rows] == [
        ("default", 0),
        ("l2", 0),
        ("default", 1),
        ("l2", 1),
    ]
    assert module.table(rows)[2:] == [
        "| default | 90.0 ± 0.0 | 55.0 ± 7.1 | - |",
        "| l2 | 90.0 ± 0.0 | 58.0 ± 8.5 | +3.0 ± 1.0 |",
    ]
    assert all(methods.get("vfd+at", **options) for options in module.CHOICES.values())


def test_the_data_benchmark_on_a_few_files(bench, monkeypatch):
    module, threads = bench("bench_data"), torch.get_num_threads()
    monkeypatch.setattr(module, "PER_CLASS", 5)
    monkeypatch.setattr(module, "SIZES", ((32, (32, 32), 8), (64, (90, 70), 8)))
    wrong = torch.zeros(3, 64, 64).byte().numpy()
    for case in module.cases():
        rows = bench("run").measure(case, 0)
        assert [row["provider"] for row in rows] == [
            "decode each epoch",
            "packed",
            "packed, resized",
        ]
        assert case.images == 18  # a tenth is held out
        with monkeypatch.context() as patch:
            patch.setattr(module.pictures, "decode", lambda _, size: wrong[:, :size, :size])
            with pytest.raises(AssertionError):
                case.gate()
    assert torch.get_num_threads() == threads


def test_the_parallel_benchmark_on_a_tiny_network(bench, monkeypatch):
    module, threads = bench("bench_parallel"), torch.get_num_threads()
    monkeypatch.setattr(module, "NETWORK", "resnet20")
    monkeypatch.setattr(module, "PROCESSES", 2)
    ddp = "DistributedDataParallel"
    with contextlib.closing(module.cases()) as cases:
        case = next(cases)
        rows = bench("run").measure(case, 0)
        assert [row["provider"] for row in rows] == ["one all-reduce", ddp, f"{ddp}, defaults"]
        assert rows[0]["images/s"] == pytest.approx(8e6 / rows[0]["us"], rel=0.05)
        mean_ = module.parallel.mean_
        monkeypatch.setattr(module.parallel, "mean_", lambda t: (mean_(t), t[0].mul_(1.01)))
        with pytest.raises(AssertionError):
            case.gate()
    assert not torch.distributed.is_initialized()
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_a_soak_of_a_minute(bench, tmp_path):
    module = bench("soak")
    row, samples = module.soak(tmp_path, 300, 2)
    assert row["steps"] == 6
    assert len(row["images/s"]) == 2
    assert all(fields["RssAnon"] > 0 for _, fields in samples)
