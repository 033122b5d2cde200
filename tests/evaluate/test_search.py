import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadv import checkpoint, evaluate
from fastadv.attacks import PGD
from fastadv.attacks.suite import stages
from fastadv.data.dataset import ImageSet
from fastadv.evaluate import Record, search
from fastadv.evaluate.record import RIGHT, UNKNOWN, WRONG, open_examples
from fastadv.evaluate.search import judge

EPS = 16 / 255


@pytest.fixture
def model():
    """Five classes about equally likely on noise, and easy to leave."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()
    net = nn.Sequential(*conv, nn.Flatten(), nn.Linear(72, 5))
    with torch.no_grad():
        logits = net(noise())
        net[-1].bias -= logits.mean(0)
    return net


def noise():
    return torch.randint(0, 256, (80, 1, 8, 8), generator=torch.Generator().manual_seed(1)) / 255


@pytest.fixture
def split(model):
    """80 images of noise under the labels that the model gives them, eight of them wrong."""
    with torch.no_grad():
        y = model(noise()).argmax(1)
    y[::10] = (y[::10] + 1) % 5
    return ImageSet((noise() * 255).round().to(torch.uint8), y, torch.arange(80))


def test_cw_is_the_published_attack(model, split):
    x, y = split.images.float() / 255, split.labels
    x_adv = x.clone()
    for _ in range(30):
        logits = model.eval()(x_adv.requires_grad_())
        real = logits.gather(1, y[:, None])[:, 0]
        other = logits.scatter(1, y[:, None], -1e4).max(1).values
        loss = -(real - other + 50).clamp(min=0).sum()
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + EPS / 4 * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    expected = model(x_adv).argmax(1) == y
    assert torch.equal(evaluate.correct(model, split, "cw", eps=EPS), expected)
    assert 0 < expected.float().mean() < 1


class NaNGradient(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5] + (0 * x).norm().sqrt()


def test_evaluation_certifies_nothing_that_could_not_be_attacked(model, split):
    with pytest.raises(ValueError, match="pgd20: .* gradients of the model had NaN"):
        evaluate.correct(NaNGradient(), split, "pgd20", eps=0.1)
    soft = torch.nn.Sequential(model, torch.nn.Softmax(1))
    wrong = ImageSet(split.images, split.labels + 4, split.index)
    for attack in ("clean", "cw"):
        with pytest.raises(ValueError, match="model returned probabilities"):
            evaluate.correct(soft, split, attack, eps=0.1)
        with pytest.raises(ValueError, match="y has labels from"):
            evaluate.correct(model, wrong, attack, eps=0.1)


def test_evaluation_leaves_the_random_state_alone(model, split):
    before = torch.get_rng_state()
    evaluate.accuracies(model, split, ("pgd20",), eps=EPS)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="attack is 'ab', must be one of clean"):
        evaluate.accuracies(model, split, ("ab",), eps=EPS)


class Brighter(nn.Module):
    """A twin that errs: it sees brighter images than the network."""

    def __init__(self, net):
        super().__init__()
        self.net = net.eval()

    def forward(self, x):
        return self.net(x + 0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_verdict_is_the_models_own(model, split, monkeypatch, precision):
    """What only the twin misclassifies is attacked again on the model itself."""
    monkeypatch.setattr(search, "freeze", lambda model, dtype: Brighter(model))
    record = evaluate.run(model, split, stages(["pgd20"], EPS / 4), precision=precision)
    x, y = split.images.float() / 255, split.labels

    def attacked(net):
        torch.manual_seed(0)
        return PGD(EPS / 4, EPS / 16, 20)(net, x, y, index=split.index)

    found, own = attacked(Brighter(model)), attacked(model)
    with torch.no_grad():
        right, fooled = model(found).argmax(1) == y, Brighter(model)(found).argmax(1) != y
        itself = model(own).argmax(1) == y
    disputed = right & fooled
    assert record.costs["pgd20"].disputed == disputed.sum() > 5
    assert 0 < itself[disputed].sum() < disputed.sum()
    assert torch.equal(record.right("pgd20"), torch.where(disputed, itself, right))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_examples_beyond_ball_or_box_break_nothing(norm):
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    wrong[1].weight.data.zero_(), wrong[1].bias.data.copy_(torch.tensor([0.0, 2.0]))
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] += 0.1
    x_adv[1, 0, 0, 0] += 0.1 + 2e-5
    x_adv[2, 0, 0, 0], x[2, 0, 0, 0] = 1.01, 0.95
    right, valid, distance = judge(wrong, x, x_adv, y, 0.1, norm)
    assert right.tolist() == [False] * 3
    assert valid.tolist() == [True, False, False]
    assert distance[0] == pytest.approx(0.1)


def test_suites_attack_what_is_left_in_full_batches(model, split):
    asked = []

    class Asked(nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return model(x)

    suite = stages(["quick"], EPS)
    record = evaluate.run(Asked(), split, suite, batch_size=16)
    clean, ce, targeted = (record.right(stage.name) for stage in suite)
    assert record.costs["clean"].images == len(split)
    assert record.costs["quick:apgd-ce-20"].images == clean.sum()
    assert record.costs["quick:apgd-t-20"].images == ce.sum()
    assert targeted.sum() < ce.sum() < clean.sum() < len(split)
    assert (ce <= clean).all()
    assert (targeted <= ce).all()
    assert max(asked) == 16


def test_batches_and_order_change_nothing(model, split):
    suite = stages(["pgd20", "pgd-5-3", "quick"], EPS)
    a = evaluate.run(model, split, suite, batch_size=80, seed=3)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    b = evaluate.run(model, split.take(order), suite, batch_size=7, seed=3)
    for stage in suite:
        assert torch.equal(a.right(stage.name)[order], b.right(stage.name)), stage.name


def test_passes_are_counted(model, split):
    record = evaluate.run(model, split, stages(["clean", "pgd20", "pgd-5-3"], EPS))
    n = len(split)
    counted = {k: (c.images, c.forwards, c.backwards) for k, c in record.costs.items()}
    right = {name: int(record.right(name).sum()) for name in counted}
    assert counted["clean"] == (n, n, 0)
    assert counted["pgd20"] == (n, 21 * n + right["pgd20"], 20 * n)  # 20, verdict, twin's verdict
    left = right["clean"]
    assert counted["pgd-5-3"] == (left, (3 * 6 + 1) * left + right["pgd-5-3"], 3 * 5 * left)


def test_no_number_for_images_that_were_not_attacked(model, split):
    class Stopped(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return model(x)

    record = Record(len(split))
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(Stopped(), split, stages(["clean"], EPS), batch_size=16, record=record)
    with pytest.raises(ValueError, match="clean: 48 of 80 images were not attacked yet"):
        record.right("clean")
    assert (record.stage("clean")[0][:32] != UNKNOWN).all()


def test_bad_models_and_data_are_named(model, split):
    class Failing(nn.Module):
        def forward(self, x):
            if len(x) == 16:
                return model(x)
            raise IndexError("out of luck")

    pick, run = stages(["clean"], EPS), evaluate.run
    with pytest.raises(ValueError, match="clean, images 64 to 73: model raised IndexError: out of"):
        run(Failing(), split.take(torch.arange(74)), pick, batch_size=16)
    nan = nn.Sequential(model, nn.Hardtanh(float("-inf"), float("inf")), NaN())
    with pytest.raises(ValueError, match="clean, images 0 to 79: .*NaN or infinite logits"):
        run(nan, split, pick)
    with pytest.raises(ValueError, match="there are no images"):
        run(model, split.take(torch.arange(0)), pick)
    with pytest.raises(ValueError, match="precision is 'fp16', must be one of fp32, bf16"):
        run(model, split, pick, precision="fp16")
    with pytest.raises(ValueError, match="transfer-pgd20 needs a source"):
        run(model, split, stages(["transfer-pgd20"], EPS))


class NaN(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_transferred_examples_follow_the_source(model, split):
    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    record = evaluate.run(model, split, stages(["transfer-pgd20"], EPS), source=other)
    clean = record.right("clean")
    x, y = split.images.float() / 255, split.labels
    torch.manual_seed(0)
    x_adv = PGD(EPS, EPS / 4, 20)(other, x, y, index=split.index)
    with torch.no_grad():
        right = clean & (model(x_adv).argmax(1) == y)
        assert torch.equal(right, record.right("transfer-pgd20"))


def test_records_keep_the_first_example_of_each_image(model, split):
    examples = (split.images.float() / 255).numpy()
    clean = examples.copy()
    suite = stages(["clean", "fgsm", "pgd20"], EPS)
    record = evaluate.run(model, split, suite, record=Record(len(split), examples=examples))
    first = torch.zeros(len(split), dtype=torch.int64)
    for name in ("clean", "fgsm", "pgd20"):
        first[(first == 0) & ~record.right(name)] = {"clean": 1, "fgsm": 2, "pgd20": 3}[name]
    moved = torch.from_numpy(np.abs(examples - clean)).flatten(1).amax(1)
    assert (moved[first <= 1] == 0).all()  # robust, or wrong as it is
    assert (moved[first >= 2] > 0).all()
    levels = (torch.from_numpy(examples - clean)[first == 2].abs() / EPS).flatten()
    inside = (levels > 1e-3) & (levels < 1 - 1e-3)
    assert inside.float().mean() < 0.2  # one step of full length, but for the box


def test_a_record_survives_its_file(tmp_path):
    record = Record(3, {"eps": 0.1}, tmp_path / "r")
    record.stage("a")[0][:2] = torch.tensor([RIGHT, WRONG], dtype=torch.uint8)
    record.costs["a"].images = 2
    record.save(force=True)
    again = Record(3, {"eps": 0.1}, tmp_path / "r")
    assert again.stage("a")[0].tolist() == [RIGHT, WRONG, UNKNOWN]
    assert again.costs["a"].images == 2
    path = tmp_path / "r/state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="state.safetensors"):
        Record(3, {"eps": 0.1}, tmp_path / "r")
    checkpoint.save(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="state.safetensors is not an evaluation's"):
        Record(3, {"eps": 0.1}, tmp_path / "r")


def test_the_loss_of_pgd_kl_is_towards_the_clean_output(model, split):
    record = evaluate.run(model, split, stages(["pgd-kl-10"], EPS))
    x, y = split.images.float() / 255, split.labels
    torch.manual_seed(0)
    attack = PGD(EPS, EPS / 4, 10, keep="best")
    with torch.no_grad():
        z = model(x)
    x_adv = attack(model, x, y, target_logits=z, loss="kl", index=split.index)
    with torch.no_grad():
        p, q = (F.log_softmax(model(v), 1) for v in (x_adv, x))
        right = (p.argmax(1) == y) & record.right("clean")
        assert torch.equal(right, record.right("pgd-kl-10"))
    assert F.kl_div(p, q, log_target=True, reduction="sum") > 0


def test_what_is_broken_at_x_stays_broken(model, split):
    """Only the papers' attacks look again at what the model misclassifies as it is."""
    record = evaluate.run(model, split, stages(["pgd20", "pgd-kl-20", "apgd-ce"], EPS / 16))
    clean = record.right("clean")
    for name in ("pgd-kl-20", "apgd-ce"):
        assert not (record.right(name) & ~clean).any()
        assert record.costs[name].images == clean.sum() < len(split)
    assert record.costs["pgd20"].images == len(split)


def test_a_suites_accuracy_is_its_worst_case(model, split):
    each = [evaluate.correct(model, split, name, eps=EPS / 4) for name in evaluate.PAPER]
    whole = evaluate.correct(model, split, "paper", eps=EPS / 4)
    assert torch.equal(whole, torch.stack(each).all(0))
    assert whole.sum() < min(right.sum() for right in each[1:3])


def test_records_are_of_one_attack_and_one_split(model, split):
    record = evaluate.run(model, split, stages(["fgsm"], EPS))
    with pytest.raises(ValueError, match="record has fgsm by PGD.eps=0.06.*by PGD.eps=0.03"):
        evaluate.run(model, split, stages(["fgsm"], EPS / 2), record=record)
    with pytest.raises(ValueError, match=r"split and record have \[80, 80, 80, 5\] images"):
        evaluate.run(model, split, stages(["fgsm"], EPS), record=Record(5))
    short = ImageSet(split.images, split.labels[:70], split.index)
    with pytest.raises(ValueError, match=r"split and record have \[80, 70, 80, 70\] images"):
        evaluate.run(model, short, stages(["fgsm"], EPS))
    for options, match in (({"batch_size": 0}, "batch_size is 0"), ({"seed": -1}, "seed is -1")):
        with pytest.raises(ValueError, match=match):
            evaluate.run(model, split, stages(["fgsm"], EPS), **options)


def test_a_model_that_cannot_be_copied_is_attacked_as_it_is(model, split, caplog):
    stubborn = copy.deepcopy(model)
    stubborn.kept = torch.ones(1, requires_grad=True) * 2  # deepcopy refuses it
    steps = stages(["pgd20"], EPS)
    found, expected = (evaluate.run(net, split, steps).right("pgd20") for net in (stubborn, model))
    assert torch.equal(found, expected)
    assert "Sequential is attacked as it is, slower: " in caplog.text


def test_examples_are_of_their_evaluation(tmp_path):
    path, images = tmp_path / "adversarial.npy", torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)
    examples = open_examples(path, images, begun=False)
    assert (examples == np.float32(0.2)).all()
    examples[1] = 1
    examples.flush()
    assert (open_examples(path, images, begun=True)[1] == 1).all()
    with pytest.raises(ValueError, match="adversarial.npy: missing or damaged"):
        open_examples(path, images[:2], begun=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="adversarial.npy: missing or damaged"):
        open_examples(path, images, begun=True)
    assert (open_examples(path, images, begun=False) == np.float32(0.2)).all()
