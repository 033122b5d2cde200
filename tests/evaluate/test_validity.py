import pytest
import torch
from torch import nn

from fastadv import evaluate
from fastadv.attacks.suite import stages
from fastadv.data.dataset import ImageSet
from fastadv.evaluate import validity

EPS = 16 / 255


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(60, 1, 8, 8, generator=generator), torch.randint(
        5, (60,), generator=generator
    )


def linear(classes=5, scale=1.0):
    """A linear classifier with distinct classes on uniform noise."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    with torch.no_grad():
        net[1].bias.copy_(-0.5 * net[1].weight.sum(1))
        net[1].weight *= scale
        net[1].bias *= scale
    return net.eval()


def labelled(net, x):
    """The images with the labels that the network gives them."""
    with torch.no_grad():
        return ImageSet(x, net(x).argmax(1), torch.arange(len(x)))


def warned(net, x, y, names=("pgd20",)):
    return validity.probe(net, x, y, stages(names, EPS))[2]


def test_a_sound_network_has_no_warnings(batch):
    x, y = batch
    net = linear()
    model, left, found = validity.probe(net, x, y, stages(["paper", "aa"], EPS))
    assert model is net
    assert left == stages(["paper", "aa"], EPS)
    assert found == []
    split = labelled(net, x)
    record = evaluate.run(net, split, stages(["paper", "quick"], EPS))
    assert validity.review(record, stages(["paper", "quick"], EPS)) == []


class Randomised(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 0.01 * torch.randn_like(x))


def test_randomised_networks_are_told(batch):
    (found,) = warned(Randomised(linear()).eval(), *batch)
    assert found.startswith("randomised forward pass: two passes of the same images differ by")
    assert found.endswith("aa-rand does")
    assert warned(Randomised(linear()).eval(), *batch, names=("aa-rand",)) == []


def test_averaging_what_is_not_random_is_told(batch):
    (found,) = warned(linear(), *batch, names=("aa-rand",))
    assert found.startswith("the forward pass is not random: aa-rand averages equal passes")


def test_train_mode_is_told_and_kept(batch):
    net = nn.Sequential(linear(), nn.Dropout(0.5)).train()
    (found,) = warned(net, *batch)
    assert found == "the model was in train mode: it is evaluated in eval mode"
    assert net.training


def test_probabilities_are_told_and_attacked_through_their_logarithm(batch):
    x, y = batch
    soft = nn.Sequential(linear(scale=9.0), nn.Softmax(1)).eval()
    model, _, found = validity.probe(soft, x, y, stages(["clean"], EPS))
    assert [text[:30] for text in found] == ["the model returns probabilitie"]
    logits = model(x)
    assert torch.allclose(logits.softmax(1), soft(x), atol=1e-6)
    hard = nn.Sequential(linear(scale=1e4), nn.Softmax(1)).eval()
    assert validity.probe(hard, x, y, stages(["clean"], EPS))[0](x).isfinite().all()


def test_too_few_classes(batch):
    x, y = batch
    for classes, left in [(2, ["clean", "aa:apgd-ce"]), (3, ["clean", "aa:apgd-ce", "apgd-dlr"])]:
        _, kept, found = validity.probe(linear(classes), x, y % 2, stages(["aa", "apgd-dlr"], EPS))
        names = [stage.name for stage in kept]
        assert [name for name in names if name not in ("aa:fab-t", "aa:square")] == left
        assert f"aa:apgd-t left out: needs 4 classes, not {classes}" in found
        assert all("aa:apgd-t" not in stage.after for stage in kept)
    with pytest.raises(ValueError, match=r"model returned \(60, 1\), must be logits"):
        validity.probe(linear(1), x, y * 0, [])
    with pytest.raises(ValueError, match="y has labels from 0 to 4, must be in"):
        validity.probe(linear(4), x, y, [])


class Steps(nn.Module):
    """A network of images in 8 levels: it has no gradient, and small steps change nothing."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x * 8).round() / 8)


def test_gradients_that_are_not_there_are_counted(batch):
    x, _ = batch
    saturated = linear(scale=1e5)
    split = labelled(saturated, x)
    (found,) = warned(saturated, x, split.labels)
    assert found.startswith("zero gradient of the cross-entropy at ")
    assert int(found.split(" at ")[1].split()[0]) > 30
    levels = Steps(linear()).eval()
    (found,) = warned(levels, x, labelled(levels, x).labels)
    assert found.startswith("zero gradient of the cross-entropy at 60 of 60 images")

    class Broken(nn.Module):
        def forward(self, x):
            return linear()(x) + (0 * x).norm().sqrt()

    y = labelled(linear(), x).labels
    (found,) = warned(Broken().eval(), x, y)
    assert found == "gradients with NaN or infinity at 60 of 60 images"
    record = evaluate.run(Broken(), ImageSet(x, y, torch.arange(60)), stages(["pgd20"], EPS))
    assert validity.review(record, stages(["pgd20"], EPS)) == [
        "pgd20 met 1200 gradients with NaN or infinity"
    ]


def test_a_masked_gradient_fools_pgd_but_not_the_suite(batch):
    """Saturated logits: the cross-entropy has no gradient in float32, DLR does not care."""
    x, _ = batch
    masked, plain = linear(scale=1e5), linear()
    split = labelled(plain, x)
    names = ["pgd20", "pgd-50-10", "aa"]
    honest, fooled = (evaluate.run(net, split, stages(names, EPS)) for net in (plain, masked))
    truth, last = honest.right("pgd20").sum(), stages(["aa"], EPS)[-1].name
    assert truth < 15
    assert fooled.right("pgd20").sum() > truth + 20
    assert fooled.right("pgd-50-10").sum() > truth + 10
    assert fooled.right(last).sum() <= honest.right(last).sum() <= truth


def test_square_beats_masked_gradients_and_is_believed(batch):
    """Without a gradient anywhere only the black-box attack finds what is there."""
    x, _ = batch
    net = Steps(linear())
    suite = stages(["pgd20", "aa"], EPS)
    record = evaluate.run(net, labelled(net, x), suite)
    assert record.right("aa:square").sum() < record.right("aa:fab-t").sum() - 10
    found = validity.review(record, suite)
    assert any(
        "aa:square, which does not follow the model's gradient, breaks" in text for text in found
    )


def test_weaker_attacks_that_win_are_suspicious():
    suite = stages(["clean", "fgsm", "pgd20", "transfer-pgd20"], EPS)
    record = evaluate.Record(100)
    for stage, broken in zip(suite, (0, 30, 20, 40), strict=True):
        record.stage(stage.name)[0][:] = 1
        record.stage(stage.name)[0][:broken] = 2
    transfer, one_step = validity.review(record, suite)
    assert transfer.startswith("transfer-pgd20, which does not follow the model's gradient, breaks")
    assert "10 images more than the attacks that do (fgsm)" in transfer
    assert one_step.startswith("one step (fgsm) breaks more images than 20 (pgd20)")
    record.costs["pgd20"].invalid = 3
    assert validity.review(record, suite)[0].startswith("pgd20 left the ball or the box at 3 image")


def test_batches_that_decide_an_images_logits_are_told(batch):
    x, y = batch

    class Centred(nn.Module):
        def forward(self, x):
            return linear()(x - x.mean(0))

    (found,) = warned(Centred().eval(), x, y)
    assert found.startswith("an image's logits depend on the rest of its batch, by ")


def test_without_a_gradient_what_needs_none_is_left(batch):
    x, y = batch

    class Opaque(nn.Module):
        def forward(self, x):
            return linear()(x).detach()

    names = ["pgd20", "square", "transfer-pgd20"]
    _, left, found = validity.probe(Opaque().eval(), x, y, stages(names, EPS))
    assert [stage.name for stage in left] == ["clean", "square", "transfer-pgd20"]
    assert found[0].startswith("the model has no gradient to its input: ")
    assert found[1] == "pgd20 left out: needs a gradient"


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (nn.Identity(), r"model returned \(60, 1, 8, 8\), must be logits"),
        (nn.LSTM(8, 8), "model raised .*Error: "),
        (nn.Sequential(linear(2), nn.Threshold(9, float("nan"))), "model returned NaN or infinite"),
    ],
)
def test_models_that_return_no_logits_are_refused(batch, net, match):
    x, y = batch
    with pytest.raises(ValueError, match=match):
        validity.probe(net.eval(), x, y % 2, stages(["clean"], EPS))
    with pytest.raises(ValueError, match="no attack is left: apgd-t left out: needs 4 classes"):
        validity.probe(linear(2), x, y % 2, stages(["apgd-t"], EPS)[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_probabilities_of_any_dtype_are_attacked_as_logits(batch, dtype):
    x, _ = batch
    soft = nn.Sequential(linear(), nn.Softmax(1)).to(dtype).eval()
    y = labelled(linear(), x).labels
    net, _, found = validity.probe(soft, x, y, stages(["pgd20"], EPS))
    assert found[0].startswith("the model returns probabilities: their logarithms were attacked")
    with torch.no_grad():
        logits = net(x)
        assert logits.isfinite().all()
        assert torch.equal(logits.argmax(1), soft(x.to(dtype)).argmax(1))
    certain = nn.Sequential(linear(scale=1e4), nn.Softmax(1)).to(dtype).eval()
    net, _, _ = validity.probe(certain, x, y, stages(["pgd20"], EPS))
    assert net(x).isfinite().all()


def test_what_a_probe_cannot_judge_is_named(batch):
    x, y = batch
    suite = stages(["pgd20"], EPS)

    class Short(nn.Module):
        def forward(self, v):
            return linear()(v)[:2]

    for (net, images, labels, chosen), error, match in (
        ((linear(), x[:0], y[:0], suite), ValueError, "x has no images, must have one at least"),
        ((None, x, y, suite), TypeError, "model is None, must be a torch.nn.Module"),
        ((linear(), x.tolist(), y, suite), TypeError, "x is a list, must be a tensor"),
        ((linear(), x + 1, y, suite), ValueError, r"x is in \[.*, must be in \[0.0, 1.0\]"),
        ((linear(), x, y.float(), suite), ValueError, "y is torch.float32"),
        ((linear(), x, y, ["pgd20"]), TypeError, "stages has 'pgd20', must be made by suite"),
        ((Short(), x, y, suite), ValueError, r"model returned \(2, 5\), must be logits \[60, 2"),
    ):
        with pytest.raises(error, match=match):
            validity.probe(net, images, labels, chosen)


def review_of(broken, count=100):
    """The warnings on {stage: images that it breaks}."""
    suite = [stage for stage in stages(list(broken), EPS) if stage.name in broken]
    record = evaluate.Record(count)
    for stage in suite:
        record.stage(stage.name)[0][:] = 1
        record.stage(stage.name)[0][: broken[stage.name]] = 2
    return validity.review(record, suite)


def test_one_image_more_or_less_is_no_sign():
    assert review_of({"clean": 0, "pgd20": 20, "transfer-pgd20": 21}) == []
    assert len(review_of({"clean": 0, "pgd20": 20, "transfer-pgd20": 22})) == 1
    assert review_of({"clean": 0, "fgsm": 21, "pgd20": 20}) == []
    assert len(review_of({"clean": 0, "fgsm": 22, "pgd20": 20})) == 1
    assert review_of({"clean": 0, "pgd20": 20, "square": 24}, 2000) == []
    assert len(review_of({"clean": 0, "pgd20": 20, "square": 25}, 2000)) == 1


def test_images_that_an_attack_mends_are_no_sign():
    """Papers' attacks begin at wrong images too, of which some come out right."""
    assert review_of({"clean": 30, "pgd20": 20}) == []


def test_pixels_without_a_gradient_are_no_sign(batch):
    x, _ = batch

    class Half(nn.Module):
        def forward(self, v):
            return linear()(torch.cat([v[:, :, :4], 0 * v[:, :, 4:]], 2))

    assert warned(Half().eval(), x, labelled(Half(), x).labels) == []


def test_gradients_are_looked_at_where_the_model_is_right(batch):
    x, _ = batch
    levels = Steps(linear()).eval()
    y = labelled(levels, x).labels
    y[:10] = (y[:10] + 1) % 5
    (found,) = warned(levels, x, y)
    assert found.startswith("zero gradient of the cross-entropy at 50 of 50 images")
