"""Each method against a plain transcription of its paper: x_adv, loss, gradients, BatchNorm."""

import copy
import math
from functools import partial

import papers
import pytest
import torch
import torch.nn.functional as F
from papers import EPS, STEP, STEPS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastadv import freeze, methods, models
from fastadv.attacks import PGD

CASES = {
    "natural": ("natural", {}, papers.natural),
    "natural smoothed": (
        "natural",
        {"label_smoothing": 0.1},
        partial(papers.natural, smoothing=0.1),
    ),
    "at": ("at", {}, papers.at),
    "at smoothed": ("at", {"label_smoothing": 0.1}, partial(papers.at, smoothing=0.1)),
    "at as Rice et al.": (
        "at",
        {"parity": True, "attack_bn": "train"},
        partial(papers.at, parity=True, mode="train"),
    ),
    "trades": ("trades", {}, papers.trades),
    "trades parity": (
        "trades",
        {"parity": True, "beta": 5},
        partial(papers.trades, beta=5, parity=True),
    ),
    "mart": ("mart", {}, papers.mart),
    "mart smoothed": ("mart", {"label_smoothing": 0.1}, partial(papers.mart, smoothing=0.1)),
    "mart beta 6": ("mart", {"beta": 6.0}, partial(papers.mart, beta=6.0)),
    "ard": ("ard", {}, papers.ard),
    "ard parity": ("ard", {"parity": True}, partial(papers.ard, parity=True)),
    "ard with labels": (
        "ard",
        {"alpha": 0.9, "temperature": 5.0},
        partial(papers.ard, alpha=0.9, temperature=5.0),
    ),
    "iad1 early": ("iad1", {}, papers.iad1),
    "iad1": ("iad1", {"begin": 0}, partial(papers.iad1, begin=0)),
    "iad1 early parity": ("iad1", {"parity": True}, partial(papers.iad1, parity=True)),
    "iad1 parity": (
        "iad1",
        {"begin": 0, "parity": True},
        partial(papers.iad1, begin=0, parity=True),
    ),
    "iad2 early": ("iad2", {}, papers.iad2),
    "iad2": ("iad2", {"begin": 0, "temperature": 2}, partial(papers.iad2, begin=0, temperature=2)),
    "rslad": ("rslad", {}, papers.rslad),
    "absld": ("absld", {}, papers.absld),
    "mtard": ("mtard", {}, papers.mtard),
    "bmtard": ("bmtard", {}, papers.bmtard),
    "adaad": ("adaad", {}, papers.adaad),
    "adaad parity": ("adaad", {"parity": True}, partial(papers.adaad, parity=True)),
    "adaad CIFAR-100": (
        "adaad",
        {"alpha": 0.7, "reduction": "batchmean"},
        partial(papers.adaad, alpha=0.7, share=1),
    ),
    "funmatch": ("funmatch", {"temperature": 2.0}, partial(papers.funmatch, temperature=2.0)),
    "advfunmatch": ("advfunmatch", {}, papers.advfunmatch),
    "advfunmatch clean": (
        "advfunmatch",
        {"clean_weight": 0.25, "temperature": 3.0},
        partial(papers.advfunmatch, clean_weight=0.25, temperature=3.0),
    ),
    "vfd+at": ("vfd+at", {}, papers.vfd_at),
    "vfd+at weights": (
        "vfd+at",
        {"lambda_adv": 2.0, "lambda_clean": 0.0},
        partial(papers.vfd_at, weights=(2.0, 0.0)),
    ),
    "vfd+trades": ("vfd+trades", {}, papers.vfd_trades),
    "saad": ("saad", {}, papers.saad),
    "saad late": ("saad", {"epochs": 1}, partial(papers.saad, share=1)),
    "saad parity": (
        "saad",
        {"parity": True, "entropy_scale": 2.0, "inner_weight": 0.5},
        partial(papers.saad, parity=True, scale=2.0, inner=0.5),
    ),
    "saad clean, Renyi": (
        "saad",
        {"beta": 0.7, "entropy_order": 2.0, "igdm_weight": 10.0},
        partial(papers.saad, beta=0.7, order=2.0, igdm=10.0),
    ),
    "igdm+rslad": ("igdm+rslad", {}, papers.igdm_rslad),
    "igdm+adaad": (
        "igdm+adaad",
        {"igdm_weight": 30.0, "epochs": 10},
        partial(papers.igdm_adaad, weight=3.0),
    ),
    "ikl": ("ikl", {}, papers.IKL()),
    "ikl weights": (
        "ikl",
        {"alpha": 1.0, "beta": 3.0, "gamma": 0.5},
        papers.IKL(alpha=1.0, beta=3.0, gamma=0.5),
    ),
}


@pytest.fixture
def setup():
    """Student, robust teacher, clean teacher, x, y and an attack's start, in float64."""
    torch.manual_seed(0)
    nets = [models.get("resnet18", width=width) for width in (4, 8, 4)]
    for net in nets:
        for _ in range(3):
            net(torch.rand(64, 3, 8, 8))
    x, y = torch.rand(8, 3, 8, 8).double(), torch.randint(10, (8,))
    student, *teachers = (net.double().eval() for net in nets)
    return student, *teachers, x, y, x + 1e-3 * torch.randn_like(x)


def ours(name, options, student, teacher, clean_teacher, x):
    """(method, nets, state) ready for the first step."""
    method = methods.get(name, attack=PGD(EPS, STEP, STEPS), **options)
    nets = methods.Nets(student.train(), teacher, clean_teacher, freeze(student))
    method.prepare(nets, x)
    state = method.init_state("cpu")
    state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    return method, nets, state


def same_step(method, nets, state, plain, paper, x, y, start):
    """The state after a step of the method, which must be that of the paper's loop on `plain`: in
    x_adv, loss, gradients and BatchNorm statistics."""
    plain_x_adv, plain_loss = paper(plain, nets.teacher, nets.clean_teacher, x, y, start)
    plain_loss.backward()
    batch = methods.Batch(x=x, y=y)
    batch.x_adv = method.perturb(nets, batch, state, start=start)
    assert all(m.training for m in nets.student.modules())
    loss, state = method.outer(nets, batch, state)
    loss.backward()
    torch.testing.assert_close(batch.x_adv, plain_x_adv, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-7, atol=1e-9)
    for (key, a), b in zip(nets.student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9, msg=key)
    for (key, a), b in zip(nets.student.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    return state


@pytest.mark.parametrize("case", CASES)
def test_follows_the_paper(setup, case):
    """In float64, where rounding cannot flip a sign."""
    name, options, paper = CASES[case]
    student, teacher, clean_teacher, x, y, start = setup
    plain = copy.deepcopy(student).train()
    method, nets, state = ours(name, options, student, teacher, clean_teacher, x)
    same_step(method, nets, state, plain, paper, x, y, start)
    assert all(p.grad is None for net in (teacher, clean_teacher) for p in net.parameters())


def test_every_method_has_a_transcription():
    tested = {name for name, _, _ in CASES.values()}
    assert set(methods.METHODS) <= tested


def sgd(net, lr=0.5):
    return torch.optim.SGD(net.parameters(), lr)


@pytest.mark.parametrize("name", ["mtard", "bmtard"])
def test_dynamic_weights_and_temperatures_over_steps(setup, name):
    """Five steps of training; the temperature rate is raised so that it shows."""
    student, teacher, clean_teacher, x, y, start = setup
    plain = copy.deepcopy(student).train()
    rate = 0.2 if name == "bmtard" else 0.0
    paper = papers.BMTARD(temperature_rate=rate)
    options = {"temperature_rate": rate} if rate else {}
    method, nets, state = ours(name, options, student, teacher, clean_teacher, x)
    optimizers = sgd(student), sgd(plain)
    seen = set()
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        state = same_step(method, nets, state, plain, paper, x, y, start)
        assert state["weights"].tolist() == pytest.approx(list(paper.weight.values()), abs=1e-12)
        if rate:
            assert state["temperatures"].tolist() == pytest.approx(list(paper.tau.values()))
        seen.add((*paper.weight.values(), *paper.tau.values()))
        for optimizer in optimizers:
            optimizer.step()
    assert len(seen) == 5  # they do move


@pytest.mark.parametrize("rate", [0.0, 0.025, 1.0])
@pytest.mark.parametrize("name", ["mtard", "bmtard"])
def test_the_weights_of_teachers_are_shares_at_every_rate(name, rate):
    """Also where one loss is all there is, for as long as it takes."""
    method = methods.get(name, weight_rate=rate)
    state = method.balanced(torch.tensor([2.0, 0.5]), method.init_state("cpu"))
    for pair in 200 * [[1.0, 0.0]] + 200 * [[0.0, 1.0]] + 200 * [[0.3, 0.9], [7.0, 1e-7]]:
        state = method.balanced(torch.tensor(pair), state)
        assert (state["weights"] >= 0).all()
        assert float(state["weights"].sum()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="weight_rate is 1.01, must be in .0, 1."):
        methods.get(name, weight_rate=1.01)


def test_dynamic_rates_drop_at_the_milestones():
    method = methods.get("mtard", milestones=(1, 3))
    state, rates = method.init_state("cpu"), []
    for _ in range(4):
        rates.append(float(method.decayed(0.025, state)))
        state = method.end_epoch(state)
    assert rates == pytest.approx([0.025, 0.0025, 0.0025, 0.00025])


def test_absld_temperatures_over_epochs(setup):
    student, teacher, clean_teacher, x, y, start = setup
    plain = copy.deepcopy(student).train()
    paper = papers.ABSLD(drops=(2,))
    options = {"milestones": (2,)}
    method, nets, state = ours("absld", options, student, teacher, clean_teacher, x)
    optimizers = sgd(student), sgd(plain)
    for step in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        state = same_step(method, nets, state, plain, paper, x, y, start)
        for optimizer in optimizers:
            optimizer.step()
        if step % 2:
            paper.end_epoch()
            state = method.end_epoch(state)
            expected = [paper.tau["adv"], paper.tau["nat"]]
            torch.testing.assert_close(state["temperatures"].tolist(), expected)
    assert (state["temperatures"][0] - state["temperatures"][1]).abs().max() > 1e-4
    assert state["errors"].count_nonzero() == 0


@pytest.mark.parametrize("name", ["saad", "igdm+rslad", "ikl"])
def test_weights_and_priors_over_epochs(setup, name):
    """Six steps of training, an epoch each two."""
    student, teacher, clean_teacher, x, y, start = setup
    plain, epochs = copy.deepcopy(student).train(), 3
    options = {"gamma": 0.7, "beta": 0.5} if name == "ikl" else {"igdm_weight": 5.0}
    method, nets, state = ours(
        name, options | {"epochs": epochs}, student, teacher, clean_teacher, x
    )
    lr = 0.02 if name == "ikl" else 0.5  # its gradient is ten times as large
    ikl, optimizers = papers.IKL(gamma=0.7, beta=0.5), (sgd(student, lr), sgd(plain, lr))
    for step in range(6):
        share = (step // 2 + 1) / epochs
        paper = {
            "saad": partial(papers.saad, igdm=5.0, share=share),
            "igdm+rslad": partial(papers.igdm_rslad, weight=5.0 * share),
            "ikl": ikl,
        }[name]
        for optimizer in optimizers:
            optimizer.zero_grad()
        labels = (y + step) % 7  # never all classes
        state = same_step(method, nets, state, plain, paper, x, labels, start)
        for optimizer in optimizers:
            optimizer.step()
        if step % 2:
            state = method.end_epoch(state)
            ikl.end_epoch()
            if name == "ikl":
                torch.testing.assert_close(state["prior"], ikl.prior)
                torch.testing.assert_close(state["prior"].sum(1), torch.ones(10).double())
                assert state["sums"].count_nonzero() == 0
    if name == "ikl":
        assert (state["prior"][9] - 0.1).abs().max() < 1e-8  # not seen
        assert (state["prior"][:7] - 0.1).abs().max() > 1e-3
    else:
        assert state["epoch"] == epochs


def test_iad_begins_to_trust_itself_at_its_epoch(setup):
    student, teacher, clean_teacher, x, y, _ = setup
    method, nets, state = ours("iad1", {"begin": 2}, student, teacher, clean_teacher, x)
    asked = []
    for _ in range(4):
        batch = methods.Batch(x=x, y=y, x_adv=(x + 0.03).clamp(0, 1))
        method.outer(nets, batch, state)
        asked.append(("teacher", "x_adv", "logits") in batch.memo)
        state = method.end_epoch(state)
    assert asked == [False, False, True, True]


@pytest.mark.parametrize("name", ["trades", "mart", "iad1"])
def test_the_clean_target_is_not_detached(setup, name):
    student, teacher, clean_teacher, x, y, _ = setup
    options = {"begin": 0} if name == "iad1" else {}
    method, nets, state = ours(name, options, student, teacher, clean_teacher, x)
    batch = methods.Batch(x=x, y=y, x_adv=(x + 0.03).clamp(0, 1))
    outputs = {}

    def keep(module, args, output):
        output.retain_grad()
        outputs["clean" if args[0] is x else "adv"] = output

    student.register_forward_hook(keep)
    loss, _ = method.outer(nets, batch, state)
    if name == "trades":
        loss = loss - F.cross_entropy(outputs["clean"], y)
    if name == "mart":  # less the gradient of its weight
        p = outputs["clean"].softmax(1)[range(8), y]
        divergence = papers.rows(outputs["clean"], outputs["adv"]).detach()
        loss = loss - method.beta * ((1 - p) * divergence).mean()
    loss.backward()
    assert outputs["clean"].grad.abs().max() > 1e-6


@pytest.mark.parametrize("attack_bn", ["eval", "train"])
def test_attack_bn_decides_whether_the_attack_moves_the_statistics(setup, attack_bn):
    student, _, _, x, y, _ = setup
    student.float().train()
    method = methods.get("at", attack=PGD(EPS, STEP, STEPS), attack_bn=attack_bn)
    method.perturb(methods.Nets(student), methods.Batch(x.float(), y), {})
    assert student.bn1.num_batches_tracked == (3 if attack_bn == "eval" else 3 + STEPS)
    assert all(m.training for m in student.modules())
    assert all(p.grad is None for p in student.parameters())


def test_the_papers_own_starts_and_modes():
    table = {
        name: (method.attack.init, method.attack.clip_start, method.attack_bn)
        for name, method in ((name, methods.get(name)) for name in methods.METHODS)
    }
    plain = ("gaussian", None, "eval")
    assert table.pop("at") == ("uniform", None, "eval")
    for name in ("ard", "iad1", "iad2"):
        assert table.pop(name) == ("uniform", False, "train")
    assert set(table.values()) == {plain}


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("rslad", ["teacher x"]),
        ("absld", ["teacher x"]),
        ("ard", ["teacher x"]),
        ("funmatch", ["teacher x"]),
        ("mtard", ["teacher x_adv", "clean_teacher x"]),
        ("iad2", ["teacher x_adv", "clean_teacher x_adv"]),
        ("vfd+rslad", ["teacher x", "clean_teacher x"]),
    ],
)
def test_teachers_run_once_per_batch_without_gradient(setup, name, calls):
    student, teacher, clean_teacher, x, y, _ = setup
    student, teacher, clean_teacher = student.float(), teacher.float(), clean_teacher.float()
    method = methods.get(name, attack=PGD(EPS, STEP, 2))
    nets = methods.Nets(student, teacher, clean_teacher)
    batch = methods.Batch(x.float(), y)
    method.prepare(nets, batch.x)
    seen = []

    def note(which, module, args, output):
        assert not output.requires_grad
        seen.append(f"{which} {'x' if args[0] is batch.x else 'x_adv'}")

    teacher.register_forward_hook(partial(note, "teacher"))
    clean_teacher.register_forward_hook(partial(note, "clean_teacher"))
    state = method.init_state("cpu")
    batch.x_adv = method.perturb(nets, batch, state)
    method.outer(nets, batch, state)
    assert sorted(seen) == sorted(calls)


@pytest.mark.parametrize("name", methods.METHODS)
def test_soft_labels_of_one_class_are_its_label(setup, name):
    student, teacher, clean_teacher, x, y, start = setup
    options = {"ard": {"alpha": 0.5}, "iad1": {"begin": 0}, "iad2": {"begin": 0}}.get(name, {})
    results = []
    for labels in (y, F.one_hot(y, 10).double()):
        net = copy.deepcopy(student)
        method, nets, state = ours(name, options, net, teacher, clean_teacher, x)
        batch = methods.Batch(x=x, y=labels)
        batch.x_adv = method.perturb(nets, batch, state, start=start)
        results.append(method.outer(nets, batch, state)[0])
    torch.testing.assert_close(*results)


def test_errors_name_what_is_wrong(setup):
    student, _, _, x, y, _ = setup
    with pytest.raises(ValueError, match="method is 'rsald', must be one of natural, at, trades,"):
        methods.get("rsald")
    with pytest.raises(ValueError, match="method is 'vfd\\+', must be one of"):
        methods.get("vfd+")
    with pytest.raises(ValueError, match="method rslad has no option beta; it has adv_weight=0.83"):
        methods.get("rslad", beta=6)
    with pytest.raises(ValueError, match="nets.teacher is None"):
        methods.get("rslad").perturb(methods.Nets(student), methods.Batch(x, y), {})
    with pytest.raises(ValueError, match="attack_bn is 'frozen', must be 'eval' or 'train'"):
        methods.get("at", attack_bn="frozen")
    with pytest.raises(ValueError, match="call prepare"):
        methods.get("absld").init_state("cpu")


@pytest.mark.parametrize("name", ["iad1", "iad2", "absld", "mtard", "bmtard", "vfd+bmtard"])
def test_a_stateful_step_never_waits_for_the_device(name):
    """Fake tensors have no values: reading one on the host raises."""
    method = methods.get(name, attack=PGD(EPS, STEP, 1), milestones=(1,))
    with FakeTensorMode():
        student, *teachers = (models.get("resnet18", width=4) for _ in range(3))
        nets = methods.Nets(student, *(net.eval() for net in teachers))
        x = torch.rand(8, 3, 8, 8)
        method.prepare(nets, x)
        state = method.init_state("cpu") | {"epoch": 100}  # which lies on the host
        batch = methods.Batch(x, torch.zeros(8, dtype=torch.int64), x_adv=x + 0.01)
        loss, after = method.outer(nets, batch, state)
        loss.backward()
        after = method.end_epoch(after)
        assert after.pop("epoch") == state.pop("epoch") + 1
        assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in state.items()}
        with pytest.raises(DataDependentOutputException):
            loss.item()


CACHEABLE = [
    *((name, {}) for name in methods.METHODS),
    ("adaad", {"alpha": 0.5}),
    ("advfunmatch", {"clean_weight": 0.5}),
    ("vfd+at", {"layers": ("layer3", "penultimate")}),
    ("vfd+mtard", {}),
    ("igdm+rslad", {}),
    ("vfd+igdm+mtard", {}),
]


@pytest.mark.parametrize(("name", "options"), CACHEABLE)
def test_what_a_method_may_cache_is_what_it_reads_of_x(setup, name, options):
    student, teacher, clean_teacher, x, y, start = setup
    method, nets, state = ours(name, options, student, teacher, clean_teacher, x)
    batch = methods.Batch(x=x, y=y)
    batch.x_adv = method.perturb(nets, batch, state, start=start)
    method.outer(nets, batch, state)
    read = {}
    for which, on, feature in batch.memo:
        if on == "x":
            read.setdefault(which, set()).add(feature)
    declared = {which: set(names) for which, names in method.cacheable().items()}
    if name == "saad":  # asks for a gradient, with which t(x) comes
        declared["teacher"] = set()
    # Logits come with every forward pass, asked for or not.
    assert {k: v | {"logits"} for k, v in declared.items()} == read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": "abc"}, "beta of method trades is 'abc', must be a number of at least 0"),
        ({"beta": -1}, "beta of method trades is -1, must be a number of at least 0"),
        ({"beta": float("nan")}, "beta of method trades is nan, must be a number of at least 0"),
        ({"parity": "maybe"}, "parity of method trades is 'maybe', must be true or false"),
        ({"parity": 1.0}, "parity of method trades is 1.0, must be true or false"),
        ({"label_smoothing": 1.5}, "label_smoothing of method trades is 1.5, must be a number in"),
    ],
)
def test_a_value_unlike_the_default_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        methods.get("trades", **options)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("rslad", "adv_weight"),
        ("ard", "alpha"),
        ("adaad", "alpha"),
        ("advfunmatch", "clean_weight"),
    ],
)
def test_shares_are_in_0_1(name, option):
    """Beyond 1 the other term's weight would be negative: the student is driven from its target."""
    for share in (0, 0.5, 1):
        assert getattr(methods.get(name, **{option: share}), option) == share
    for share in (1.001, 2, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"{option} of method {name} is .* in \[0, 1\]"):
            methods.get(name, **{option: share})


@pytest.mark.parametrize("reduction", ["none", "sum", "nope"])
def test_the_reduction_of_adaad_is_one_of_the_authors(reduction):
    with pytest.raises(ValueError, match=f"reduction is '{reduction}', must be 'mean' or 'batchm"):
        methods.get("adaad", reduction=reduction)


def test_a_teacher_in_train_mode_is_refused(setup):
    student, teacher, *_ = setup
    with pytest.raises(ValueError, match="teacher is in train mode, must be in eval mode"):
        methods.Nets(student, teacher.train())
