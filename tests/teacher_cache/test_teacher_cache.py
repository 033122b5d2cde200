"""TeacherCache: the values that a fresh teacher gives, under a key that leaves nothing out."""

import copy
import multiprocessing
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from fastadv import data, freeze, methods, models
from fastadv.data.dataset import ImageSet
from fastadv.engine.features import forward_features
from fastadv.engine.frozen import Frozen
from fastadv.runs.config import Config
from fastadv.teacher_cache import BLOCK, RESERVE, TeacherCache, store
from fastadv.teacher_cache.__main__ import main
from fastadv.teacher_cache.identity import differences, identity


class Net(nn.Module):
    """DigitsNet that normalises its input: by a buffer that no state dict has, and an attribute."""

    def __init__(self, mean=0.5, scale=4.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = models.get("digits_net", 10, 1, 4)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.scale = scale

    def forward(self, x):
        return self.net((x - self.mean) * self.scale)


def split(count=40, change=lambda images, order: None):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    order = torch.randperm(count + 20, generator=generator)[:count]
    change(images, order)
    return ImageSet(images, torch.arange(count) % 10, order)


def make_loader(images=None, padding=1, flips=2, **options):
    return data.Loader(images or split(), 16, padding=padding, flips=flips, shuffle=True, **options)


def every_view(loader):
    """A batch of all (image, view) pairs."""
    rows = torch.arange(len(loader.images)).repeat_interleave(loader.views)
    return loader.view_batch(rows, torch.arange(loader.views).repeat(len(loader.images)))


def alone(teacher, x, name="logits", names=("logits",)):
    """What the teacher, asked for `names`, says of each image in an otherwise blank block."""
    rows = []
    with torch.no_grad():
        for image in x:
            block = torch.zeros(BLOCK, *x.shape[1:]).contiguous(memory_format=torch.channels_last)
            block[7] = image
            rows.append(forward_features(teacher, block, names)[1][name][7])
    return torch.stack(rows)


def counted(teacher):
    """The list that grows with each forward of the teacher."""
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_misses_and_hits_are_the_fresh_outputs_as_stored(where, dtype, precision, tmp_path):
    teacher, loader = freeze(Net(), precision), make_loader()
    directory = tmp_path / "new" if where == "folder" else None
    cache = TeacherCache(teacher, loader, directory=directory, dtype=dtype)
    x, _, index, view = every_view(loader)
    some = torch.randperm(len(x))[:101]
    fresh = alone(teacher, x[some])
    for name, order in (("misses", some), ("hits", some), ("hits alone", some[:1])):
        found = cache.lookup(index[order], view[order], x[order])["logits"]
        assert found.dtype == torch.float32, name
        assert torch.equal(found, fresh[: len(order)].to(dtype).float()), name
    assert (cache.hits, cache.misses, cache.forwards) == (102, 101, 4)
    mixed = torch.cat([some[:3], torch.tensor([i for i in range(200) if i not in some])])
    expected = alone(teacher, x[mixed]).to(dtype).float()
    assert torch.equal(cache.lookup(index[mixed], view[mixed], x[mixed])["logits"], expected)
    assert torch.equal(cache.compute(x[mixed])["logits"], expected)
    assert cache.hits == 105
    assert (tmp_path / "new").exists() == (where == "folder")


def test_half_precision_is_off_by_its_stated_error():
    teacher, loader = freeze(Net()), make_loader()
    x, _, index, view = every_view(loader)
    half, full = (
        TeacherCache(teacher, loader, dtype=dtype).lookup(index, view, x)["logits"]
        for dtype in (torch.float16, torch.float32)
    )
    error = (half - full).abs()
    assert (error <= (2.0**-11 * full.abs()).clamp(min=2.0**-25)).all()
    assert error.max() > 0


def test_a_second_cache_on_the_folder_needs_no_teacher(tmp_path):
    loader = make_loader()
    x, _, index, view = every_view(loader)
    first = TeacherCache(freeze(Net()), loader, ("logits", "penultimate"), tmp_path)
    out = first.lookup(index, view, x)
    teacher = freeze(Net())
    calls = counted(teacher)
    again = TeacherCache(teacher, loader, ("logits", "penultimate"), str(tmp_path))
    for name, value in again.lookup(index.flip(0), view.flip(0), x.flip(0)).items():
        assert torch.equal(value, out[name].flip(0))
    assert calls == [1]  # the probe of the teacher, as it is opened
    assert again.hits == len(x)
    assert again.misses == again.forwards == 0
    assert again.filled(index, view).all()


def test_forwards_counts_what_the_teacher_does():
    teacher, loader = freeze(Net()), make_loader()
    calls = counted(teacher)
    cache = TeacherCache(teacher, loader)
    before = len(calls)
    x, _, index, view = every_view(loader)
    cache.lookup(index[: BLOCK + 1], view[: BLOCK + 1], x[: BLOCK + 1])
    cache.lookup(index[: BLOCK + 2], view[: BLOCK + 2], x[: BLOCK + 2])
    assert len(calls) - before == cache.forwards == 3
    assert before == 1  # for the shapes


def test_features_keep_their_names_and_shapes(tmp_path):
    teacher, loader = freeze(Net()), make_loader()
    x, _, index, view = loader.view_batch(torch.arange(9), torch.arange(9))
    names = ("penultimate", "conv4", "logits")
    TeacherCache(teacher, loader, names, tmp_path, torch.float32).lookup(index, view, x)
    found = TeacherCache(teacher, loader, names, tmp_path, torch.float32).lookup(index, view, x)
    assert {name: tuple(v.shape[1:]) for name, v in found.items()} == {
        "penultimate": (128,), "conv4": (8, 4, 4), "logits": (10,)
    }  # fmt: skip
    for name, value in found.items():
        assert torch.equal(value, alone(teacher, x, name, names)), name
        assert value.is_contiguous()


def test_a_row_asked_for_twice_is_computed_once():
    teacher, loader = freeze(Net()), make_loader()
    x, _, index, view = loader.view_batch(torch.zeros(80).long(), torch.zeros(80).long())
    cache = TeacherCache(teacher, loader)
    out = cache.lookup(index, view, x)["logits"]
    assert cache.forwards == 1
    assert torch.equal(out, alone(teacher, x[:1]).half().float().expand(80, 10))


def test_an_empty_batch():
    loader = make_loader()
    x, _, index, view = loader.view_batch(torch.zeros(0).long(), torch.zeros(0).long())
    cache = TeacherCache(freeze(Net()), loader)
    assert cache.lookup(index, view, x)["logits"].shape == (0, 10)


STRONG = data.Augmentation(policy="trivialaugment", mixup=1.0, views_per_image=4)


def changed_weights(net):
    with torch.no_grad():
        net.net.fc.bias[3] += 1e-6


def changed_pixel(images, order):
    images[5, 0, 2, 2] ^= 1


def swapped(images, order):
    images[[3, 4]], order[[3, 4]] = images[[4, 3]], order[[4, 3]]


def renamed(images, order):
    order[[3, 4]] = order[[4, 3]]


def teacher_of(change, **options):
    net = Net(**options)
    change(net)
    return freeze(net)


def nothing(net):
    pass


class Norm(nn.BatchNorm2d):
    pass


OTHERS = {
    "same": ({}, set()),
    "seed of the order alone": ({"loader": {"seed": 5}}, set()),
    "weights": ({"change": changed_weights}, {"teacher.parameters"}),
    "statistics": ({"change": lambda net: net.net.bn2.running_mean.add_(1)}, {"teacher.buffers"}),
    "normalisation": ({"net": {"mean": 0.4}}, {"teacher.buffers"}),
    "attribute": ({"net": {"scale": 2.0}}, {"teacher.structure"}),
    "stride": ({"change": lambda n: setattr(n.net.conv3, "padding", 0)}, {"teacher.structure"}),
    "module": ({"change": lambda n: setattr(n.net, "act", nn.ReLU())}, {"teacher.structure"}),
    "type": ({"change": lambda n: setattr(n.net.bn2, "__class__", Norm)}, {"teacher.structure"}),
    "pixel": ({"split": changed_pixel}, {"images.pixels", "augmentation.sample"}),
    "order": ({"split": swapped}, {"images.pixels", "augmentation.sample"}),
    "index": ({"split": renamed}, {"images.pixels"}),
    "padding": (
        {"loader": {"padding": 0}},
        {"augmentation.padding", "augmentation.views", "augmentation.sample"},
    ),
    "flips": (
        {"loader": {"flips": 1}},
        {"augmentation.flips", "augmentation.views", "augmentation.sample"},
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_differs_has_another_key_and_is_named(case, tmp_path):
    other, fields = OTHERS[case]
    loader = make_loader()
    cache = TeacherCache(freeze(Net()), loader, directory=tmp_path)
    x, _, index, view = loader.view_batch(torch.arange(4), torch.arange(4))
    cache.lookup(index, view, x)
    teacher = teacher_of(other.get("change", nothing), **other.get("net", {}))
    images = split(change=other["split"]) if "split" in other else None
    loader = make_loader(images, **other.get("loader", {}))
    new = TeacherCache(teacher, loader, directory=tmp_path)
    found = set(differences(cache.identity, new.identity))
    assert found >= {f for f in fields if f != "augmentation.sample"}
    assert found <= fields
    assert (new.folder == cache.folder) == (not fields)
    if fields:
        assert not new.filled(index, view[:4] % loader.views).any()
        with pytest.raises(ValueError, match=f"something else: .*{min(found)}.*differ"):
            TeacherCache(teacher, loader, directory=cache.folder)
    else:
        assert TeacherCache(teacher, loader, directory=cache.folder).filled(index, view).all()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"seed": 1}, {"augmentation.seed", "augmentation.sample"}),
        ({"augmentation": data.Augmentation(policy="trivialaugment", mixup=0.5, views_per_image=4)},
         {"augmentation.mixup", "augmentation.sample"}),
        ({"augmentation": data.Augmentation(policy="trivialaugment", mixup=1.0, views_per_image=5)},
         {"augmentation.views", "augmentation.views_per_image", "augmentation.sample"}),
    ],
)  # fmt: skip
def test_strong_augmentation_is_part_of_the_key(options, fields):
    base = {"augmentation": STRONG, "num_classes": 10}
    one, other = (
        identity(freeze(Net()), make_loader(**(base | changed)), {}) for changed in ({}, options)
    )
    assert set(differences(one, other)) == fields


def test_precision_names_and_type_are_part_of_the_key(monkeypatch):
    # As on a processor with products of bfloat16.
    monkeypatch.setattr(Frozen, "is_low", lambda self: self.dtype == torch.bfloat16)
    loader, net = make_loader(), Net()
    base = TeacherCache(freeze(net), loader).identity
    for options, field in (
        ({"teacher": freeze(net, torch.bfloat16)}, "teacher.precision"),
        ({"names": ("logits", "penultimate")}, "outputs.names"),
        ({"dtype": torch.float32}, "outputs.dtype"),
    ):
        other = TeacherCache(**({"teacher": freeze(net), "loader": loader} | options)).identity
        assert differences(base, other) == [field]


def test_layout_plays_no_part(tmp_path):
    loader, net = make_loader(), Net()
    first = TeacherCache(freeze(net), loader, directory=tmp_path)
    net.to(memory_format=torch.channels_last)
    assert TeacherCache(freeze(net), loader, directory=tmp_path).folder == first.folder
    assert first.folder.name.startswith("DigitsNet-40x1x8x8-18views-")


def test_a_teacher_that_may_change_is_refused():
    net, loader = Net(), make_loader()
    with pytest.raises(ValueError, match="train mode"):
        TeacherCache(net, loader)
    with pytest.raises(ValueError, match="trainable parameters"):
        TeacherCache(net.eval(), loader)
    teacher = freeze(net)
    cache = TeacherCache(teacher, loader)
    x, _, index, view = loader.view_batch(torch.arange(4), torch.arange(4))
    cache.lookup(index, view, x)
    teacher.refresh()
    cache.lookup(index, view, x)
    net(x).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    with pytest.raises(ValueError, match="has changed"):
        cache.lookup(index, view, x)


def test_what_cannot_be_kept_is_refused():
    teacher, loader = freeze(Net()), make_loader()
    with pytest.raises(ValueError, match="dtype is torch.bfloat16"):
        TeacherCache(teacher, loader, dtype=torch.bfloat16)
    for names in (("layer9",), ("logits", "logit")):
        with pytest.raises(ValueError, match=f"^names: .*'{names[-1]}', must be"):
            TeacherCache(teacher, loader, names)
    for names in ("logits", None, (), (1,)):
        with pytest.raises(TypeError, match="^names is .*, must be a tuple of outputs"):
            TeacherCache(teacher, loader, names)
    endless = make_loader(augmentation=data.Augmentation(policy="autoaugment"))
    with pytest.raises(ValueError, match="views_per_image is None"):
        TeacherCache(teacher, endless)
    cache = TeacherCache(teacher, loader)
    x, _, index, view = loader.view_batch(torch.arange(4), torch.arange(4))
    unknown = min(set(range(60)) - set(loader.index.tolist()))
    for bad, message in (
        ((index, view + 15), "view has a number outside \\[0, 18\\)"),
        ((index, view - 1), "view has a number"),
        ((index + 60, view), "index has a number"),
        ((torch.full_like(index, unknown), view), "does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.lookup(*bad, x)
    assert cache.misses == 0


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_outputs_that_half_precision_cannot_hold_are_refused(value):
    teacher = teacher_of(lambda net: net.net.fc.bias.data.fill_(value))
    loader = make_loader()
    x, _, index, view = loader.view_batch(torch.arange(4), torch.arange(4))
    cache = TeacherCache(teacher, loader)
    with pytest.raises(ValueError, match="logits have NaN, or numbers too large for torch.float16"):
        cache.lookup(index, view, x)
    assert not cache.filled(index, view).any()


def test_prefetch_changes_nothing_but_who_reads(tmp_path, monkeypatch):
    loader = make_loader()
    plain, ahead = (TeacherCache(freeze(Net()), loader, directory=d) for d in (None, tmp_path))
    readers, read = [], store.Table.read

    def recorded(table, ids):
        readers.append(threading.current_thread() is threading.main_thread())
        return read(table, ids)

    batches = [batch for epoch in (0, 0, 1, 2) for batch in loader.epoch(epoch)]
    for batch in batches:
        readers.clear()
        monkeypatch.setattr(store.Table, "read", read)
        expected = plain.lookup(batch.index, batch.view, batch.x)["logits"]
        monkeypatch.setattr(store.Table, "read", recorded)
        opened = ahead.folder.exists()
        ahead.prefetch(batch.index, batch.view)
        assert torch.equal(ahead.lookup(batch.index, batch.view, batch.x)["logits"], expected)
        assert readers[:1] == [False] * opened
        assert True not in readers
    assert (plain.hits, plain.misses, plain.forwards) == (ahead.hits, ahead.misses, ahead.forwards)
    ahead.prefetch(batches[0].index, batches[0].view)
    other = batches[-1]
    found = ahead.lookup(other.index, other.view, other.x)["logits"]
    assert torch.equal(found, plain.lookup(other.index, other.view, other.x)["logits"])


@pytest.mark.parametrize("mixed", [False, True])
def test_strong_augmentation_is_replayed_from_a_finite_pool(mixed, tmp_path):
    options = {"augmentation": STRONG, "num_classes": 10} if mixed else {}
    options |= (
        {} if mixed else {"augmentation": data.Augmentation("randaugment", views_per_image=4)}
    )
    cache = TeacherCache(freeze(Net()), make_loader(**options), directory=tmp_path)
    for epoch in range(6):
        for x, _, index, view in make_loader(**options).epoch(epoch):
            found = cache.lookup(index, view, x)["logits"]
            assert torch.equal(found, cache.compute(x)["logits"])
    assert cache.misses <= 4 * 40 < cache.hits + cache.misses == 6 * 40
    assert cache.hits > 60


@pytest.mark.parametrize(("padding", "flips"), [(0, 2), (1, 1)])
def test_hit_rates_follow_the_closed_form(padding, flips):
    loader = data.Loader(split(400), 100, padding=padding, flips=flips, shuffle=True, seed=3)
    cache = TeacherCache(freeze(Net()), loader)
    views = loader.views
    for epoch in range(8):
        before = cache.hits
        for x, _, index, view in loader.epoch(epoch):
            cache.lookup(index, view, x)
        rate = 1 - ((views - 1) / views) ** epoch
        noise = (rate * (1 - rate) / 400) ** 0.5
        assert abs((cache.hits - before) / 400 - rate) <= 4 * noise, epoch
    assert cache.hits + cache.misses == 8 * 400


@pytest.mark.parametrize("name", ["ard", "iad1", "rslad", "absld", "funmatch"])
def test_a_batch_with_cached_outputs_trains_as_with_fresh_ones(name):
    loader = make_loader()
    cache = TeacherCache(freeze(Net()), loader, dtype=torch.float32)
    results = []
    for source in ("fresh", "missed", "hit", "teacher"):
        torch.manual_seed(4)
        teacher = freeze(Net())
        nets = methods.Nets(student=models.get("digits_net", 10, 1, 4), teacher=teacher)
        method = methods.get(name)
        batch = methods.Batch(*next(loader.epoch(0)))
        method.prepare(nets, batch.x)
        if source != "teacher":
            lookup = cache.lookup(batch.index, batch.view, batch.x)
            found = cache.compute(batch.x) if source == "fresh" else lookup
            batch.memo |= {("teacher", "x", key): value for key, value in found.items()}
        calls = counted(teacher)
        state = method.init_state("cpu")
        batch.x_adv = method.perturb(nets, batch, state)
        loss, _ = method.outer(nets, batch, state)
        results.append((loss.item(), len(calls)))
    assert results[0] == results[1] == results[2]
    assert results[2][1] == results[3][1] - 1


def look_up_all(cache, loader):
    torch.set_num_threads(1)  # the pool of threads does not survive a fork
    x, _, index, view = every_view(loader)
    found = cache.lookup(index, view, x)["logits"]
    cache.prefetch(index, view)
    assert torch.equal(cache.lookup(index, view, x)["logits"], found)
    return cache.forwards, found.numpy()


def open_and_look_up(directory, results):
    loader = make_loader()
    results.put(look_up_all(TeacherCache(freeze(Net()), loader, directory=directory), loader))


def look_up_inherited(cache, loader, results):
    results.put(look_up_all(cache, loader))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_share_the_folder(start, tmp_path, monkeypatch):
    loader = make_loader()
    cache = TeacherCache(freeze(Net()), loader, directory=tmp_path)
    x, _, index, view = every_view(loader)
    expected = cache.lookup(index, view, x)["logits"]
    read = store.Table.read
    monkeypatch.setattr(store.Table, "read", lambda *args: time.sleep(0.3) or read(*args))
    cache.prefetch(index, view)  # its thread is busy, and does not exist in a fork
    context = multiprocessing.get_context(start)
    results = context.Queue()
    job = (look_up_inherited, cache, loader) if start == "fork" else (open_and_look_up, tmp_path)
    process = context.Process(target=job[0], args=(*job[1:], results))
    process.start()
    forwards, found = results.get(timeout=120)
    process.join()
    assert process.exitcode == 0
    assert forwards == (cache.forwards if start == "fork" else 0)  # inherited
    assert np.array_equal(found, expected.numpy())


@pytest.fixture
def digits_teacher(tmp_path):
    torch.manual_seed(0)
    torch.save(models.get("digits_net", 10, 1).state_dict(), tmp_path / "teacher.pt")
    return ["--teacher", "digits_net", "--teacher-checkpoint", str(tmp_path / "teacher.pt"),
            "--data", "digits"]  # fmt: skip


def test_fill_resumes_and_verify_info_and_prune_tell_the_truth(tmp_path, digits_teacher, capsys):
    caches = str(tmp_path / "caches")
    main(["fill", caches, "--views", "2", *digits_teacher])
    assert "2 of 9 views filled, 2000 rows computed" in capsys.readouterr().out
    main(["info", caches])
    shown = capsys.readouterr().out
    assert "DigitsNet, float32" in shown
    assert "1000 of 1x8x8" in shown
    assert "logits [10], float16" in shown
    assert "filled 2000 of 9000 rows (22.2%)" in shown

    run = tmp_path / "run"
    run.mkdir()
    config = Config(data="digits", teacher="digits_net", teacher_checkpoint=digits_teacher[3])
    (run / "config.json").write_text(config.to_json())
    main(["fill", caches, "--run", str(run)])
    assert "9 of 9 views filled, 7000 rows computed" in capsys.readouterr().out
    main(["verify", caches, "--run", str(run), "--sample", "300"])
    shown = capsys.readouterr().out
    assert "9000 rows filled, 0 damaged" in shown
    assert "300 rows recomputed, 0 differ" in shown
    with pytest.raises(ValueError, match="no rows of this teacher"):
        main(["verify", caches, "--run", str(run), "--names", "penultimate"])

    (folder,) = store.caches(caches)
    row = 9 * int(data.load("digits").train.index[7]) + 4
    with open(folder / "rows.bin", "r+b") as file:
        file.seek(20 * row)
        file.write(bytes(20))
    with pytest.raises(ValueError, match="1 problems"):
        main(["verify", caches])
    assert "9000 rows filled, 1 damaged" in capsys.readouterr().out
    main(["prune", caches])
    assert "cleared 1 damaged rows" in capsys.readouterr().out
    main(["fill", caches, "--run", str(run)])
    assert " 1 rows computed" in capsys.readouterr().out
    main(["verify", caches])

    main(["fill", caches, "--views", "1", "--teacher-cache-dtype", "float32", *digits_teacher])
    with pytest.raises(ValueError, match="--keep names no cache of .*: typo"):
        main(["prune", caches, "--keep", folder.name, "typo"])
    main(["prune", caches, "--keep", f"{folder}/"])
    assert capsys.readouterr().out.count("removed") == 1
    assert store.caches(caches) == [folder]
    (folder / "marks.bin").write_bytes(b"")
    main(["info", caches])
    assert "marks.bin: has 0 bytes" in capsys.readouterr().out
    main(["prune", caches])
    assert store.caches(caches) == []


def test_verify_tells_a_wrong_row_from_a_damaged_one(
    tmp_path, digits_teacher, capsys, monkeypatch, terminal
):
    caches = str(tmp_path / "caches")
    compute = TeacherCache._compute
    with monkeypatch.context() as patch:
        patch.setattr(TeacherCache, "_compute", lambda self, x: compute(self, x) + np.float16(1))
        main(["fill", caches, "--views", "1", *digits_teacher])
    with pytest.raises(ValueError, match="50 problems"):
        main(["verify", caches, *digits_teacher, "--sample", "50"])
    assert "1000 rows filled, 0 damaged" in capsys.readouterr().out
    (folder,) = store.caches(caches)
    for text in (folder.name, "search", "verify"):
        assert f"{text}:   0%" in terminal.getvalue()


def test_prune_touches_nothing_but_caches(tmp_path, capsys):
    for name in ("data", "9views-0123456789abcdef", "8views-0123456789abcdef"):
        (tmp_path / name).mkdir()
    for name in ("header.json", "data/header.json", "8views-0123456789abcdef/notes"):
        (tmp_path / name).write_text("{}")
    for directory in (tmp_path, tmp_path / "data"):
        main(["prune", str(directory)])
    assert capsys.readouterr().out == ""
    assert len(list(tmp_path.rglob("*"))) == 6
    (tmp_path / "8views-0123456789abcdef" / "header.json").write_text("{}")
    (tmp_path / "9views-0123456789abcdef" / "rows.bin").touch()
    (tmp_path / "9views-0123456789abcdef" / ".header.json.12.tmp").touch()
    main(["prune", str(tmp_path)])
    assert capsys.readouterr().out.count("removed") == 2
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"header.json", "data", "data/header.json", "8views-0123456789abcdef",
                    "8views-0123456789abcdef/notes"}  # fmt: skip


def test_flags_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="--run takes the run's own settings: --data"):
        main(["fill", str(tmp_path), "--run", "x", "--data", "digits"])
    with pytest.raises(
        OSError, match="^--run is x, which has no config.json: must be the folder of"
    ):
        main(["fill", str(tmp_path), "--run", "x"])
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path), "--data", "digits"])


def test_fill_takes_the_outputs_that_the_method_reads(tmp_path, digits_teacher, capsys):
    clean = [flag.replace("--teacher", "--clean-teacher") for flag in digits_teacher]
    clean += ["--which", "clean_teacher", "--views", "1"]
    with pytest.raises(ValueError, match="method rslad reads no clean_teacher of x alone"):
        main(["fill", str(tmp_path / "caches"), *clean])
    for method, its in (("at", "none"), ("rslad", "teacher"), ("vfd+at", "clean_teacher")):
        out = tmp_path / method
        out.mkdir()
        (out / "config.json").write_text(Config(method=method).to_json())
        which = "teacher" if method != "rslad" else "clean_teacher"
        told = rf"method {re.escape(method)} has no {which}; --which names .*: {its}$"
        with pytest.raises(ValueError, match=told):
            main(["fill", str(tmp_path / "caches"), "--run", str(out), "--which", which])
    vfd = ["--method", "vfd+mtard", "--set", "layers=conv4,penultimate"]
    main(["fill", str(tmp_path / "caches"), *clean, *vfd])
    main(["info", str(tmp_path / "caches")])
    assert "conv4 [64, 4, 4], logits [10], penultimate [1024]" in capsys.readouterr().out


class Activated(nn.Module):
    """A network whose activation no hash of weights and plain attributes can see."""

    def __init__(self, activation):
        super().__init__()
        self.linear, self.activation = nn.Linear(64, 10), activation

    def forward(self, x):
        return self.activation(self.linear(x.flatten(1)))


def test_a_teacher_with_other_code_is_refused(tmp_path):
    loader = make_loader()
    torch.manual_seed(0)
    one = Activated(torch.relu)
    other = Activated(torch.tanh)
    other.load_state_dict(one.state_dict())
    x, _, index, view = loader.view_batch(torch.arange(4), torch.arange(4))
    TeacherCache(freeze(one), loader, directory=tmp_path).lookup(index, view, x)
    with pytest.raises(ValueError, match="a teacher with other logits, though its weights"):
        TeacherCache(freeze(other), loader, directory=tmp_path)
    TeacherCache(freeze(copy.deepcopy(one)), loader, directory=tmp_path)


@pytest.mark.parametrize("change", ["replaced", "trained", "in train mode"])
def test_a_change_of_the_teacher_is_seen(change):
    loader, net = make_loader(), Net().eval().requires_grad_(False)
    cache = TeacherCache(net, loader)
    x, _, index, view = loader.view_batch(torch.arange(4), torch.arange(4))
    cache.lookup(index, view, x)
    weight = next(net.parameters())
    if change == "replaced":
        weight.data = weight.data.clone()
    elif change == "trained":
        weight.add_(1)
    else:
        net.train()
    with pytest.raises(ValueError, match="the teacher has changed since its cache was opened"):
        cache.lookup(index, view, x)


class Colour(nn.Module):
    """A network of colour images that notes how they come."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.seen = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), []

    def forward(self, x):
        self.seen.append((x.stride(), len(x)))
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_a_row_is_the_same_under_autocast_and_in_any_layout():
    """Its block has one size, layout and precision, whatever the caller's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    loader = make_loader(ImageSet(images, torch.arange(40) % 10, torch.arange(40)))
    teacher = Colour().eval().requires_grad_(False)
    x, _, index, view = loader.view_batch(torch.arange(40), torch.zeros(40, dtype=torch.int64))
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                cache = TeacherCache(teacher, loader, dtype=torch.float32)
                given = x.contiguous(memory_format=layout)
                results.append(cache.lookup(index, view, given)["logits"])
    assert all(torch.equal(result, results[0]) for result in results)
    assert set(teacher.seen) == {((3 * 8 * 8, 1, 3 * 8, 3), BLOCK)}


def test_a_disk_that_is_nearly_full_is_left_to_others(tmp_path, monkeypatch):
    loader = make_loader()
    x, _, index, view = every_view(loader)
    cache = TeacherCache(freeze(Net()), loader, directory=tmp_path)
    first = cache.lookup(index[:4], view[:4], x[:4])["logits"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=RESERVE))
    with pytest.warns(UserWarning, match="stores no more: .*is left 1024 MB"):
        rest = cache.lookup(index[4:8], view[4:8], x[4:8])["logits"]
    assert not cache.writable
    assert torch.equal(cache.lookup(index[:4], view[:4], x[:4])["logits"], first)
    assert torch.equal(cache.lookup(index[4:8], view[4:8], x[4:8])["logits"], rest)
    assert cache.filled(index[:8], view[:8]).tolist() == [True] * 4 + [False] * 4


def test_a_disk_that_does_not_read_ends_the_cache_and_not_the_run(tmp_path, monkeypatch):
    loader = make_loader()
    x, _, index, view = loader.view_batch(torch.arange(4), torch.arange(4))
    cache = TeacherCache(freeze(Net()), loader, directory=tmp_path)
    first = cache.lookup(index, view, x)["logits"]

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.warns(UserWarning, match="stores no more: .*Input/output error"):
        assert torch.equal(cache.lookup(index, view, x)["logits"], first)
    assert torch.equal(cache.lookup(index, view, x)["logits"], first)


def test_a_cache_is_of_the_model_as_it_is_now():
    """Its twin may be older; the next refresh must not mix two networks in one table."""
    loader, net = make_loader(), Net()
    teacher = freeze(net)
    with torch.no_grad():
        next(net.parameters()).add_(1)
    cache = TeacherCache(teacher, loader)
    x, _, index, view = loader.view_batch(torch.arange(4), torch.arange(4))
    found = cache.lookup(index, view, x)["logits"]
    teacher.refresh()
    torch.testing.assert_close(found, teacher(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(cache.lookup(index, view, x)["logits"], found)


def test_a_teacher_whose_changes_nobody_counts_is_refused():
    with torch.inference_mode():
        net = Net()
    for teacher in (freeze(net), net.eval().requires_grad_(False)):
        with pytest.raises(ValueError, match="teacher has tensors of torch.inference_mode"):
            TeacherCache(teacher, make_loader())


def test_a_cache_is_of_a_network_and_a_loader():
    for wrong in ("wrn34_10", None):
        with pytest.raises(TypeError, match=f"^teacher is {wrong!r}, must be a torch.nn.Module"):
            TeacherCache(wrong, make_loader())
    with pytest.raises(TypeError, match="^loader is a ImageSet, must be a data.Loader"):
        TeacherCache(freeze(Net()), split())


def test_rows_are_of_the_precision_that_the_processor_has(monkeypatch):
    """A twin in bfloat16 computes in float32 where there are no products of bfloat16."""
    loader, found = make_loader(), []
    for low in (True, False):
        monkeypatch.setattr(Frozen, "is_low", lambda _, low=low: low)
        teacher = freeze(Net(), torch.bfloat16)
        found.append(identity(teacher, loader, {}))
    assert [one["teacher"]["precision"] for one in found] == ["bfloat16", "float32"]
    assert differences(*found) == ["teacher.precision"]
