"""Draws, policies, cutout and mixing: their laws, and that nothing but the key decides them."""

import math

import pytest
import torch
from scipy import special

from fastadv import ops
from fastadv.data import Augmentation, image_ops, policies
from fastadv.data.augmentation import (
    ATTEMPTS,
    IMAGE,
    MIX,
    PARTNER,
    Key,
    augment_images,
    draw_box,
    draw_mix,
    symmetric_beta,
)

NAMES = list(image_ops.OPERATIONS)


def key(count=5000, seed=3, view=0):
    return Key(seed, torch.arange(count), torch.full((count,), view))


def chi_square(values, bins):
    """Of integers 0 to bins - 1 against the uniform law, as standard deviations from its mean."""
    counts = values.bincount(minlength=bins)
    assert len(counts) == bins
    expected = len(values) / bins
    excess = ((counts - expected) ** 2 / expected).sum() - (bins - 1)
    return float(excess / (2 * (bins - 1)) ** 0.5)


@pytest.mark.parametrize("seed", [0, 5, -1, 2**40 + 1])
def test_uniforms_are_the_words_of_random_start(seed):
    index = torch.tensor([0, 7, 2**31 + 5, 2**32 - 1])
    for view in (0, 9, 2**32 - 1):
        u = Key(seed, index, torch.full((4,), view)).uniforms(MIX, 10)
        middle = torch.full((4, 10), 0.5)
        words = ops.random_start(middle, 0.5, seed=seed, index=index, step=view, restart=MIX)
        assert u.dtype == torch.float64
        assert torch.equal((u * 2**24).floor() / 2**24, words.double())


def test_an_index_counts_modulo_2_to_the_32():
    far = Key(3, torch.arange(20) - 2**33, torch.zeros(20, dtype=torch.int64))
    assert torch.equal(far.uniforms(IMAGE, 9), key(20).uniforms(IMAGE, 9))


def test_uniforms_are_uniform_and_apart():
    first = key().uniforms(IMAGE, 8)
    for column in first.unbind(1):
        assert abs(chi_square((column * 50).long(), 50)) < 5
    others = (key(seed=4), IMAGE), (key(view=1), IMAGE), (key(), PARTNER), (key(), MIX)
    for other, stream in others:
        assert not (other.uniforms(stream, 8) == first).any()
    together = torch.cat([first, *(other.uniforms(stream, 8) for other, stream in others)], dim=1)
    correlation = torch.corrcoef(together.T) - torch.eye(together.shape[1])
    assert correlation.abs().max() < 5 / 5000**0.5


def test_a_longer_draw_begins_with_the_shorter_one():
    long = key(20).uniforms(IMAGE, 9)
    assert all(torch.equal(key(20).uniforms(IMAGE, n), long[:, :n]) for n in range(1, 9))


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 4.0])
def test_quantiles_of_beta(alpha):
    u = torch.cat([torch.linspace(0, 1, 10_001), torch.tensor([1e-7, 2e-4])]).double()
    found = symmetric_beta(u, alpha)
    expected = torch.from_numpy(special.betaincinv(alpha, alpha, u.numpy()))
    assert (found - expected).abs().max() < (1e-15 if alpha == 1 else 2e-6 if alpha < 1 else 1e-4)


def draw(policy, u, size=32, n=2, m=9):
    u = torch.tensor(u, dtype=torch.float64)
    assert u.shape[1] == policies.draws(policy, n)
    layers = policies.layers(policy, u, size, size, n, m)
    return [[(NAMES[o], x) for o, x in zip(op, mag.tolist(), strict=True)] for op, mag in layers]


def test_autoaugment_by_hand():
    first, second = draw(
        "autoaugment",
        [
            [1.5 / 25, 0.69, 0.4, 0.31, 0.0],  # rotate applies, to the left; translate_x does not
            [1.5 / 25, 0.71, 0.4, 0.29, 0.6],
            [14.5 / 25, 0.49, 0.0, 0.0, 0.0],  # solarize; invert with probability 0
            [5.0 / 25, 0.1, 0.6, 0.2, 0.0],
            [0.9999, 0.69, 0.1, 0.89, 0.0],
        ],
    )
    across = pytest.approx(150 / 331 * 32)
    assert first[0] == ("rotate", pytest.approx(-30 * 2 / 9))
    assert second[0][0] == "identity"
    assert (first[1][0], second[1]) == ("identity", ("translate_x", across))
    assert first[2] == ("solarize", pytest.approx(256 * 7 / 9))
    assert second[2][0] == "identity"
    assert first[3] == ("shear_y", pytest.approx(0.3 * 7 / 9))
    assert second[3] == ("posterize", pytest.approx(8 - 4 * 7 / 9))
    assert first[4] == ("translate_y", pytest.approx(-150 / 331 * 32))
    assert second[4][0] == "autocontrast"


def test_randaugment_by_hand():
    at = [(k + 0.5) / 14 for k in range(14)]
    (up,) = draw("randaugment", [[u, 0.6] for u in at], n=1, m=15)
    (down,) = draw("randaugment", [[u, 0.4] for u in at], n=1, m=15)
    reach = 75 / 331 * 32
    assert [name for name, _ in up] == NAMES[:14]
    signed = [0.15, 0.15, reach, reach, 15, 1.45, 1.45, 1.45, 1.45]
    assert [x for _, x in up[1:]] == pytest.approx([*signed, 6, 128, 0, 0])
    mirrored = [-0.15, -0.15, -reach, -reach, -15, 0.55, 0.55, 0.55, 0.55]
    assert [x for _, x in down[1:]] == pytest.approx([*mirrored, 6, 128, 0, 0])
    layers = draw("randaugment", [[0.0, 0.0, 1.5 / 14, 0.9, 0.9999, 0.0]], n=3, m=30)
    assert [layer[0] for layer in layers] == [("identity", 0), ("shear_x", 0.3), ("equalize", 0)]


def test_trivialaugment_by_hand():
    at = [(k + 0.5) / 14 for k in range(14)]
    (wide,) = draw("trivialaugment", [[u, 0.9999, 0.6] for u in at])
    assert [name for name, _ in wide] == NAMES[:14]
    factors = [1.99] * 4
    assert [x for _, x in wide[1:]] == pytest.approx(
        [0.99, 0.99, 32, 32, 135, *factors, 2, 0, 0, 0]
    )
    (small,) = draw("trivialaugment", [[u, 0.9999, 0.4] for u in at[3:5]], size=8)
    assert [x for _, x in small] == pytest.approx([-8, -8])
    (large,) = draw("trivialaugment", [[u, 0.9999, 0.4] for u in at[3:5]], size=224)
    assert [x for _, x in large] == pytest.approx([-32, -32])
    (levels,) = draw("trivialaugment", [[at[5], (k + 0.5) / 31, 0.6] for k in range(31)])
    assert [x for _, x in levels] == pytest.approx([135 * k / 30 for k in range(31)])


@pytest.mark.parametrize("policy", policies.FILL)
def test_strength_0_changes_nothing(policy):
    base = policies.ranges(policy, 32, 32)[:, 0]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(40, 200, (len(NAMES), 3, 32, 32), generator=generator).byte()
    found = image_ops.transform(images, torch.arange(len(NAMES)), base)
    changed = (found != images).flatten(1).any(1)
    assert [NAMES[i] for i in changed.nonzero()] == ["autocontrast", "equalize", "invert"]


def test_sub_policies_and_operations_are_equally_likely():
    u = key(14_000).uniforms(IMAGE, 11)[:, 5:]
    for op, _ in policies.layers("randaugment", u, 32, 32, 3, 9):
        assert abs(chi_square(op, 14)) < 5
    (op, _), _ = policies.layers("autoaugment", u[:, :5], 32, 32, 2, 9)
    share = (op == NAMES.index("color")).double().mean()
    assert abs(share - (0.4 + 0.7 + 0.9) / 25) < 0.01


def test_images_are_cropped_then_transformed_then_cut():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 3, 12, 12), generator=generator).byte()
    settings, keys = Augmentation("randaugment", cutout=4, randaugment_m=25), key(30)
    found = augment_images(images, keys, PARTNER, settings, 2, 2)
    u = keys.uniforms(PARTNER, 9)
    for i, draws in enumerate(u.tolist()):
        dy, dx = (torch.tensor([int(draws[k] * 5)]) for k in (0, 1))
        image = ops.augment(images[i : i + 1], dy, dx, torch.tensor([draws[2] >= 0.5]), 2)
        image = (image * 255).round().byte()
        for op, magnitude in policies.layers("randaugment", u[i : i + 1, 5:], 12, 12, 2, 25):
            image = image_ops.transform(image, op, magnitude, fill=128)
        y, x = (int(draws[k] * 12) for k in (3, 4))
        image[:, :, max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 128
        assert torch.equal(found[i : i + 1], image)


def test_resized_crops_have_the_law_of_random_resized_crop():
    u = key(20_000).uniforms(IMAGE, 2 + 2 * ATTEMPTS)
    top, left, tall, wide = draw_box(u[:, :2], u[:, 2:], 0.25, 400, 400)
    share, ratio = tall * wide / 400**2, (wide / tall).log() / math.log(4 / 3)
    assert share.min() > 0.248
    assert share.max() <= 1
    assert ratio.abs().max() < 1.02
    for start, side in ((top, tall), (left, wide)):
        assert start.min() == 0
        assert (start + side).max() == 400
    # A box of less than 3/4 of the area always fits, so there the law is the one that was drawn.
    small = share < 0.75
    assert abs(chi_square(((share[small] - 0.25) * 40).long().clamp(0, 19), 20)) < 5
    assert abs(chi_square(((ratio[small] + 1) * 10).long().clamp(0, 19), 20)) < 5
    places = (top[small] / (400 - tall[small] + 1) * 10).long()
    assert abs(chi_square(places, 10)) < 5


def test_an_attempt_that_does_not_fit_is_made_again():
    u, place = torch.full((4, 2 * ATTEMPTS), 0.9999).double(), torch.full((4, 2), 0.9999).double()
    u[:2, 6:8] = torch.tensor([0.0, 0.5])  # the fourth attempt fits: a square of a quarter
    square = [200, 200, 200, 200]
    whole = [0, 0, 400, 400]
    assert torch.stack(draw_box(place, u, 0.25, 400, 400), 1).tolist() == [square] * 2 + [whole] * 2
    u[:] = 0.9999  # nor does any in images far from square: their centre, 4/3 of the short side
    assert torch.stack(draw_box(place, u, 0.25, 30, 300), 1).tolist() == [[0, 130, 30, 40]] * 4
    assert torch.stack(draw_box(place, u, 0.25, 300, 30), 1).tolist() == [[130, 0, 40, 30]] * 4
    one = draw_box(place, torch.zeros_like(u), 1e-9, 30, 30)
    assert torch.stack(one, 1).tolist() == [[0, 0, 30, 30]] * 4  # no box without pixels


def test_images_are_cut_out_resized_and_flipped():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 3, 12, 16), generator=generator).byte()
    settings, keys = Augmentation("randaugment", crop="resized", crop_scale=0.3), key(30)
    found = augment_images(images, keys, IMAGE, settings, 2, 2)
    u = keys.uniforms(IMAGE, 9 + 2 * ATTEMPTS)
    box = draw_box(u[:, :2], u[:, 9:], 0.3, 12, 16)
    expected = image_ops.resized_crop(images, *box, u[:, 2] >= 0.5)
    for op, magnitude in policies.layers("randaugment", u[:, 5:9], 12, 16, 2, 9):
        expected = image_ops.transform(expected, op, magnitude, fill=128)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("flips", [1, 2])
def test_half_are_flipped_where_flips_are_allowed(flips):
    ramp = torch.arange(8).byte().expand(400, 1, 8, 8)
    found = augment_images(ramp, key(400), IMAGE, Augmentation(views_per_image=1), 0, flips)
    flipped = found[:, 0, 0, 0] == 7
    assert torch.equal(found, torch.where(flipped[:, None, None, None], ramp.flip(3), ramp))
    assert flipped.sum() == 0 if flips == 1 else 150 < flipped.sum() < 250


def test_fill_is_the_policys():
    white = torch.full((200, 1, 32, 32), 255, dtype=torch.uint8)
    for policy, fill in {"autoaugment": 128, "trivialaugment": 0}.items():
        (op, _), *_ = policies.layers(policy, key(200).uniforms(IMAGE, 11)[:, 5:10], 32, 32, 2, 9)
        moved = (op > 0) & (op < 6)
        found = augment_images(white, key(200), IMAGE, Augmentation(policy), 0, 1)
        if policy == "trivialaugment":  # one operation: white, or what it left outside
            assert set(found[moved].unique().tolist()) == {0, 255}
        assert (found[moved] == fill).any()


def test_cutout_centres_and_sizes():
    white = torch.full((8192, 1, 8, 8), 255, dtype=torch.uint8)
    found = augment_images(white, key(8192), IMAGE, Augmentation(cutout=4), 0, 1)
    hole = found[:, 0] == 128
    assert set(found.unique().tolist()) == {128, 255}
    rows, columns = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), rows * columns)  # a rectangle
    # Centres 0 to 7 leave 2, 3, 4 (five times) and 3 rows.
    for sides in (rows, columns):
        shares = sides.bincount(minlength=5) / 8192
        assert torch.allclose(shares, torch.tensor([0, 0, 1, 2, 5]) / 8, atol=0.03)


def test_mixup_shares():
    partner, weight, share = draw_mix(key(20_000), Augmentation(mixup=1.0), 40, 4, 6)
    assert abs(chi_square(partner, 40)) < 5
    assert abs(chi_square(((share - 0.5) * 40).long().clamp(max=19), 20)) < 5  # uniform above 1/2
    assert torch.equal(weight, share[:, None, None, None].expand(-1, 1, 4, 6))
    _, _, low = draw_mix(key(20_000), Augmentation(mixup=0.2), 40, 4, 6)
    b = torch.from_numpy(
        special.betaincinv(0.2, 0.2, torch.linspace(0.5, 1, 20_001).double().numpy())
    )
    assert torch.allclose(low.double().sort().values, b[:-1], atol=0.02)


def test_cutmix_boxes():
    keys = key(20_000)
    partner, weight, share = draw_mix(keys, Augmentation(cutmix=1.0), 40, 20, 10)
    assert abs(chi_square(partner, 40)) < 5
    box = weight[:, 0] == 0
    assert torch.equal(box, weight[:, 0] != 1)
    assert torch.allclose(share, 1 - box.float().mean((1, 2)))
    u = keys.uniforms(MIX, 5)
    side = (1 - u[:, 2]).sqrt()
    for i in range(0, 20_000, 137):
        half = int(side[i] * 20) // 2, int(side[i] * 10) // 2
        y, x = int(u[i, 3] * 20), int(u[i, 4] * 10)
        expected = torch.zeros(20, 10, dtype=torch.bool)
        expected[max(0, y - half[0]) : y + half[0], max(0, x - half[1]) : x + half[1]] = True
        assert torch.equal(box[i], expected)


def test_mixup_and_cutmix_take_turns():
    settings = Augmentation(mixup=1.0, cutmix=1.0)
    both = draw_mix(key(2000), settings, 40, 8, 8)
    mixup = draw_mix(key(2000), Augmentation(mixup=1.0), 40, 8, 8)
    cutmix = draw_mix(key(2000), Augmentation(cutmix=1.0), 40, 8, 8)
    cut = (both[1] == cutmix[1]).flatten(1).all(1)
    assert 900 < cut.sum() < 1100
    assert abs(chi_square(both[0][cut], 40)) < 5  # whichever it is, any partner
    for mixed, smooth, boxed in zip(both, mixup, cutmix, strict=True):
        assert torch.equal(mixed[cut], boxed[cut])
        assert torch.equal(mixed[~cut], smooth[~cut])


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "augmix"},
        {"cutout": 3},
        {"cutout": -2},
        {"mixup": -0.1},
        {"cutmix": float("nan")},
        {"views_per_image": 0},
        {"views_per_image": 2**32 + 1},
        {"randaugment_n": 0},
        {"randaugment_m": 31},
        {"crop": "random"},
        {"crop": None},
        {"crop_scale": 0.0},
        {"crop_scale": 1.5},
        {"crop_scale": "0.08"},
        {"cutout": "4"},
        {"mixup": None},
        {"cutmix": True},
        {"views_per_image": 2.5},
        {"randaugment_n": 1.5},
        {"policy": None},
    ],
)
def test_settings_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}, must be"):
        Augmentation(**wrong)
