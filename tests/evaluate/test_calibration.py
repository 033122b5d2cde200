import numpy as np
import pytest
import torch
from torch import nn

from fastadv import evaluate
from fastadv.attacks.suite import stages
from fastadv.data.dataset import ImageSet
from fastadv.evaluate import Record
from fastadv.evaluate.calibration import BINS, calibration, confusion, worst_outputs


def test_calibration_is_guos():
    """By its definition, bin by bin; a bin has its upper end in it."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator).double() ** 0.3
    edges = [0.0, 1.0, 0.2, 0.4]  # 0.2 is 3 / 15
    confidence[:4] = torch.tensor(edges, dtype=torch.float64)
    right = torch.rand(500, generator=generator) < confidence**2
    error, bins = calibration(confidence, right)
    expected, sure = 0, confidence.double().numpy()
    for m in range(15):
        inside = (sure > m / 15) & (sure <= (m + 1) / 15)
        if m == 0:
            inside |= sure == 0
        count = int(inside.sum())
        assert bins[m][0] == count
        if count:
            apart = sure[inside].mean() - right.numpy()[inside].mean()
            assert bins[m][1] - bins[m][2] == pytest.approx(apart)
            expected += count / 500 * abs(apart)
        else:
            assert bins[m][1:] == (None, None)
    assert sum(count for count, *_ in bins) == 500
    assert len(bins) == BINS == 15
    assert error == pytest.approx(expected)
    assert error > 0.05


def test_a_sure_and_wrong_network_errs_by_all_of_it():
    error, _ = calibration(torch.ones(4), torch.tensor([False, False, False, True]))
    assert error == 0.75


def test_confusion_counts_pairs():
    labels, predicted = torch.tensor([0, 2, 2, 2, 1]), torch.tensor([0, 1, 2, 1, 2])
    assert confusion(predicted.int(), labels) == {0: {0: 1}, 1: {2: 1}, 2: {1: 2, 2: 1}}


def record_of(found):
    """{stage: [(verdict, predicted, confidence) of each image]}."""
    record = Record(len(next(iter(found.values()))))
    for name, rows in found.items():
        columns = record.stage(name)[0], *record.outputs(name)
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            column[:] = torch.tensor(values)
    return record


def test_the_worst_example_is_the_first_that_breaks_else_the_least_sure():
    """Image by image: wrong already, broken by the first attack, by the second, by both, by none,
    and by none with an example that was not valid."""
    suite = stages(["fgsm", "pgd20"], 0.1)
    right = (1, 0, 0.9)
    found = {
        "clean": [(2, 4, 0.8), *[right] * 5],
        "fgsm": [(2, 5, 0.3), (2, 1, 0.4), (1, 0, 0.5), (2, 1, 0.6), (1, 0, 0.7), (1, -1, 0.2)],
        "pgd20": [(2, 6, 0.2), (1, 0, 0.1), (2, 2, 0.9), (2, 3, 0.2), (1, 0, 0.75), (1, 0, 0.95)],
    }
    record = record_of(found)
    order = [stage for name in found for stage in stages([name], 0.1) if stage.name == name]
    assert {stage.name for stage in suite} <= {stage.name for stage in order}
    predicted, confidence = worst_outputs(record, order)
    assert predicted.tolist() == [4, 1, 2, 1, 0, 0]
    assert confidence.tolist() == pytest.approx([0.8, 0.4, 0.9, 0.6, 0.7, 0.9])
    record.outputs("clean")[0][0] = -1
    assert worst_outputs(record, order) is None
    record.outputs("clean")[0][0] = 4
    record.outputs("fgsm")[0][1] = -1  # it is broken, by nobody knows what
    assert worst_outputs(record, order) is None


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))

    def forward(self, x):
        return self.net(x)


def test_the_models_own_outputs_are_kept():
    """Class and confidence on the examples, of a suite's later stages too."""
    torch.manual_seed(0)
    model = Linear()
    x = torch.rand(40, 1, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 5
    split, suite = ImageSet(x, y, torch.arange(40)), stages(["quick", "pgd20"], 0.05)
    record = Record(40, examples=x.numpy().copy())
    evaluate.run(model, split, suite, record=record, batch_size=16)
    with torch.no_grad():
        logits = model(x).softmax(1)
    predicted, confidence = record.outputs("clean")
    assert torch.equal(predicted.long(), logits.argmax(1))
    assert torch.allclose(confidence, logits.amax(1))
    for stage in suite:
        right = record.right(stage.name)
        assert 0 < right.sum() < 36
        assert torch.equal(record.outputs(stage.name)[0] == y, right)
    last = record.outputs("quick:apgd-t-20")
    early = ~record.right("quick:apgd-ce-20")
    for a, b in zip(last, record.outputs("quick:apgd-ce-20"), strict=True):
        assert torch.equal(a[early], b[early])
    worst = worst_outputs(record, suite)
    broken = ~evaluate.report.worst_case(record, suite)
    with torch.no_grad():
        logits = model(torch.from_numpy(record.examples)).softmax(1)
    assert torch.equal(worst[0][broken].long(), logits.argmax(1)[broken])
    assert torch.allclose(worst[1][broken], logits.amax(1)[broken], atol=1e-6)
    assert torch.equal(worst[0] == y, ~broken)
    counts = confusion(worst[0], y)
    assert sum(counts[c].get(c, 0) for c in counts) == int((~broken).sum())
    assert np.all([sum(row.values()) == int((y == c).sum()) for c, row in counts.items()])
