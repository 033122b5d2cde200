import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stand_ins import Wrapped
from torch import nn

from fastadv import evaluate
from fastadv.attacks import PGD
from fastadv.attacks.suite import stages
from fastadv.data.dataset import ImageSet
from fastadv.evaluate import Record, search, validity
from fastadv.evaluate.record import RIGHT, UNKNOWN, WRONG, open_examples
from fastadv.evaluate.search import judge
from fastadv.runs import checkpoint

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


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_examples_beyond_ball_or_box_break_nothing(norm):
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    wrong[1].weight.data.zero_(), wrong[1].bias.data.copy_(torch.tensor([0.0, 2.0]))
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] += 0.1
    x_adv[1, 0, 0, 0] += 0.1 + 2e-5
    x_adv[2, 0, 0, 0], x[2, 0, 0, 0] = 1.01, 0.95
    right, valid, distance, *_ = judge(wrong, x, x_adv, y, 0.1, norm)
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


class Stopped(nn.Module):
    """Interrupted in the third call."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return self.net(x)


def test_no_number_for_images_that_were_not_attacked(model, split):
    record = Record(len(split))
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(Stopped(model), split, stages(["clean"], EPS), batch_size=16, record=record)
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
    with pytest.raises(ValueError, match="^record is of 5 images, split has 80$"):
        evaluate.run(model, split, stages(["fgsm"], EPS), record=Record(5))
    for name in ("labels", "index"):
        short = ImageSet(**vars(split) | {name: getattr(split, name)[:70]})
        with pytest.raises(ValueError, match=f"^split.{name} has 70 rows, split.images 80$"):
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


class Leaving(PGD):
    """Stands in for an attack: moves each image of the split as `moves` says, by its index."""

    def __call__(self, model, x, y, *, index, **_):
        self.bad_gradients = 0
        return x + self.moves[index]


MOVES = ("inside", "ball", "box", "both", "nowhere")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_examples_that_leave_ball_or_box_are_never_broken(model, norm):
    """Of five kinds of examples that all fool the model only those inside count, and are kept."""
    eps, count = 0.1, 25
    kind = torch.arange(count) % 5
    x = torch.full((count, 1, 8, 8), 0.5)
    x[(kind == 2) | (kind == 3), 0, 0, 0] = 0.95
    step = {"inside": 0.09, "ball": 0.2, "box": 0.08, "both": 0.3, "nowhere": 0.0}
    moves = torch.zeros_like(x)
    moves[:, 0, 0, 0] = torch.tensor([step[name] for name in MOVES])[kind]

    class Moved(nn.Module):
        """Class 1 for what was moved by anything, class 0 for the images as they are."""

        def forward(self, v):
            left = ((v[:, 0, 0, 0] - 0.5).abs() > 1e-3) & ((v[:, 0, 0, 0] - 0.95).abs() > 1e-3)
            return torch.stack([0.5 + v.mean((1, 2, 3)) * 0, left.float()], 1)

    split = ImageSet(x, torch.zeros(count, dtype=torch.int64), torch.arange(count))
    attack = Leaving(eps, eps / 4, norm=norm)
    attack.moves = moves
    clean, stage = stages(["pgd-3"], eps, norm)
    examples = x.numpy().copy()
    record = evaluate.run(
        Moved(),
        split,
        [clean, dataclasses.replace(stage, attack=attack)],
        batch_size=7,
        record=Record(count, examples=examples),
    )
    broken, cost = ~record.right(stage.name), record.costs[stage.name]
    assert torch.equal(broken, kind == 0)
    assert cost.invalid == int((kind >= 1).sum() - (kind == 4).sum())
    assert cost.largest == pytest.approx(0.09)
    changed = (torch.from_numpy(examples) != x).flatten(1).any(1)
    assert torch.equal(changed, kind == 0)
    predicted = record.outputs(stage.name)[0].tolist()  # -1 for what does not count
    assert predicted == [{0: 1, 4: 0}.get(k, -1) for k in kind.tolist()]
    (found,) = validity.review(record, [clean, stage])
    assert found.startswith(f"pgd-3 left the ball or the box at {cost.invalid} images")
    with torch.no_grad():
        _, valid, *_ = judge(Moved(), x, x + moves, split.labels, eps, norm)
    assert [bool(valid[i]) for i in range(5)] == [True, False, False, False, True]


def test_a_ball_is_of_its_norm(model):
    """In l2 the pixels add up, in linf they do not; a box has a floor as well."""
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    x_adv = x + 0.08
    x[2], x_adv[2] = 0.05, -0.01
    assert judge(model_of(4), x, x_adv, y, 0.1, "linf")[1].tolist() == [True, True, False]
    assert judge(model_of(4), x, x_adv, y, 0.1, "l2")[1].tolist() == [False, False, False]
    assert judge(model_of(4), x, x_adv, y, 0.161, "l2")[1].tolist() == [True, True, False]


def model_of(pixels):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2))


@pytest.mark.parametrize(
    "wrap", [lambda z: {"logits": z}, lambda z: (z, z[:, :, None]), lambda z: [z]]
)
def test_logits_are_found_in_what_models_return(model, split, wrap):
    suite = stages(["paper", "quick", "pgd-kl-3", "square"], EPS)[:-1]
    found, expected = (evaluate.run(net, split, suite) for net in (Wrapped(model, wrap), model))
    for stage in suite:
        assert torch.equal(found.right(stage.name), expected.right(stage.name)), stage.name
        assert found.costs[stage.name].forwards == expected.costs[stage.name].forwards
    evaluate.check_fits(Wrapped(model, wrap), Data(split, 5), "net")


class Data:
    def __init__(self, split, num_classes):
        self.train, self.num_classes, self.name = split, num_classes, "noise"


def test_what_has_no_logits_is_refused(model, split):
    scores = Wrapped(model, lambda z: {"scores": z})
    for names in (["clean"], ["pgd20"], ["apgd-t"]):
        with pytest.raises(ValueError, match="model returned a dict of 'scores', must return log"):
            evaluate.run(scores, split, stages(names, EPS))
    with pytest.raises(ValueError, match="net returns dict for one image, must be logits"):
        evaluate.check_fits(scores, Data(split, 5), "net")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_verdict_is_in_the_models_own_dtype(model, split, dtype):
    """As the model is: a half is judged as a half, float64 as float64, images in float64 too."""
    net = copy.deepcopy(model).to(dtype)
    clean, attack = stages(["pgd-5"], EPS / 2)
    for images in (split.images, split.images.double() / 255):
        x = images.double() if images.is_floating_point() else images.float() / 255
        whole = ImageSet(images, split.labels, split.index)
        examples = x.numpy().copy()
        record = Record(len(split), examples=examples)
        evaluate.run(net, whole, [clean, attack], record=record)
        with torch.no_grad():
            right = [
                net(v.to(dtype)).argmax(1) == split.labels for v in (x, torch.from_numpy(examples))
            ]
        assert torch.equal(record.right("clean"), right[0])
        assert torch.equal(record.right("pgd-5"), right[1])
        assert 5 < right[1].sum() < right[0].sum()
        assert torch.from_numpy(examples).dtype == x.dtype


def test_stages_that_need_more_classes_are_refused_before_any_work(split):
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    labels = ImageSet(split.images, split.labels % 3, split.index)
    record, asked = Record(len(split)), []
    three.register_forward_hook(lambda module, args, output: asked.append(len(output)))
    with pytest.raises(ValueError, match="aa:apgd-t needs 4 classes, the model has 3: leave it"):
        evaluate.run(three, labels, stages(["clean", "aa"], EPS), record=record)
    assert asked == [1]
    assert not record.verdicts
    with pytest.raises(ValueError, match="quick:apgd-t-20 needs 4 classes, the model has 3"):
        evaluate.correct(three, labels, "quick", eps=EPS)
    with pytest.raises(ValueError, match="apgd-t needs 4 classes, the model has 3"):
        evaluate.accuracies(three, labels, ["clean", "apgd-t"], eps=EPS)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ValueError, match="pgd-dlr-3 needs 3 classes, the model has 2"):
        evaluate.run(two, labels, stages(["pgd-dlr-3"], EPS))
    evaluate.run(three, labels, stages(["pgd-dlr-3", "apgd-dlr"], EPS))


def test_a_model_that_cannot_be_copied_keeps_its_mode_and_statistics(split):
    """Attacked as it is, in eval mode: also where its own output or verdict is asked for."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    net(noise())
    expected = evaluate.run(copy.deepcopy(net), split, stages(["pgd-kl-3", "pgd20"], EPS))
    net.kept = torch.ones(1, requires_grad=True) * 2  # deepcopy refuses it
    before = copy.deepcopy(net.state_dict())
    record = evaluate.run(net, split, stages(["pgd-kl-3", "pgd20"], EPS))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for name in ("pgd-kl-3", "pgd20"):
        assert torch.equal(record.right(name), expected.right(name))


def test_a_model_is_not_asked_about_no_images(split):
    """One that cannot take an empty batch is evaluated where every image is wrong as it is."""

    class Viewed(nn.Module):
        def forward(self, x):
            assert len(x)
            z = x.flatten(1)[:, :5] * 0
            return z + torch.tensor([9.0, 0, 0, 0, 0])

    labels = ImageSet(split.images, split.labels * 0 + 1, split.index)
    record = evaluate.run(Viewed(), labels, stages(["pgd20", "quick"], EPS))
    assert not record.right("pgd20").any()
    assert record.costs["quick:apgd-ce-20"].images == 0


def test_labels_of_any_integer_type(model, split):
    expected = evaluate.correct(model, split, "pgd20", eps=EPS)
    for dtype in (torch.uint8, torch.int32):
        labels = ImageSet(split.images, split.labels.to(dtype), split.index.to(torch.int32))
        assert torch.equal(evaluate.correct(model, labels, "pgd20", eps=EPS), expected)


def test_arguments_of_the_wrong_kind_are_named(model, split):
    good = stages(["clean"], EPS)

    def part(**changed):
        columns = {"images": split.images, "labels": split.labels, "index": split.index}
        return ImageSet(**columns | changed)

    for (net, images, suite, options), error, match in (
        ((None, split, good, {}), TypeError, "model is None, must be a torch.nn.Module"),
        (
            (model.forward, split, good, {}),
            TypeError,
            "model is a method, must be a torch.nn.Modul",
        ),
        ((model, split, ["clean"], {}), TypeError, "stages has 'clean', must be made by suite"),
        (
            (model, split, "clean", {}),
            TypeError,
            "stages has 'clean', must be made by suite.stages",
        ),
        ((model, split, None, {}), TypeError, "stages is None, must be a list of stages"),
        ((model, split, [PGD()], {}), TypeError, "stages has PGD.*, must be made by suite.stages"),
        ((model, (1, 2), good, {}), ValueError, "split item 0 is a int, must be a pair"),
        (
            (model, part(labels=[1, 2]), good, {}),
            TypeError,
            "split.labels is a list, must be a ten",
        ),
        (
            (model, part(images=split.images.numpy()), good, {}),
            TypeError,
            "split.images is a ndarra",
        ),
        ((model, part(labels=split.labels.float()), good, {}), ValueError, "y is torch.float32"),
        ((model, split, good, {"source": "net"}), TypeError, "source is 'net', must be a torch.nn"),
        (
            (model, split, good, {"precision": ["fp32"]}),
            ValueError,
            "precision is a list, must be o",
        ),
        (
            (model, split, good, {"batch_size": 2.5}),
            TypeError,
            "batch_size is 2.5, must be a whole",
        ),
        (
            (model, split, good, {"batch_size": True}),
            TypeError,
            "batch_size is True, must be a who",
        ),
        ((model, split, good, {"seed": "0"}), TypeError, "seed is '0', must be a whole number"),
        ((model, split, good, {"seed": 2**63}), ValueError, r"seed is 92\d+, must be in \[0, 2.63"),
        ((model, split, good, {"record": {}}), TypeError, "record is a dict, must be a Record"),
        (
            (model, split, good, {"device": "gpu"}),
            ValueError,
            "device is 'gpu', which cannot be use",
        ),
    ):
        with pytest.raises(error, match=match):
            evaluate.run(net, images, suite, **options)
    with pytest.raises(TypeError, match="attacks is 'clean', must be a list of names"):
        evaluate.accuracies(model, split, "clean", eps=EPS)
    for options, error, match in (
        ({"count": 2.5}, TypeError, "count is 2.5, must be a whole number"),
        ({"count": 0}, ValueError, "there are no images"),
        ({"count": 2, "examples": [1, 2]}, TypeError, "examples is a list, must be a numpy array"),
        (
            {"count": 2, "examples": np.ones(3)},
            ValueError,
            r"examples has shape \(3,\), must be \[2",
        ),
    ):
        with pytest.raises(error, match=match):
            Record(**options)
    with pytest.raises(TypeError, match="path is None, must be a file or a run's folder"):
        evaluate.from_run(None)
    with pytest.raises(ValueError, match="model-from is 3, must be module:function"):
        evaluate.from_code(3)


def test_a_folder_has_everything_as_soon_as_a_run_ends(model, split, tmp_path):
    """However short it was."""
    suite = stages(["clean", "fgsm", "pgd20"], EPS)
    record = Record(len(split), folder=tmp_path)
    evaluate.run(model, split, suite, record=record)
    again = Record(len(split), folder=tmp_path)
    for stage in suite:
        assert torch.equal(again.right(stage.name), record.right(stage.name))
        assert again.costs[stage.name] == record.costs[stage.name]


def test_a_run_that_fails_keeps_what_it_has(model, split, tmp_path):
    record = Record(len(split), folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(Stopped(model), split, stages(["clean"], EPS), batch_size=16, record=record)
    verdicts, _ = Record(len(split), folder=tmp_path).stage("clean")
    assert (verdicts != UNKNOWN).sum() == 32
