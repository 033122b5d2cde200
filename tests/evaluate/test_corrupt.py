"""Images that are corrupted here: what each corruption is, and that a batch does not matter."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fastadv import UsageError
from fastadv.evaluate import filters
from fastadv.evaluate.corrupt import CORRUPTIONS, corrupt, fits
from fastadv.evaluate.severities import SEVERITIES

DETERMINED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate"}
DETERMINED |= {"jpeg_compression"}


def pictures(count=4, channels=3, size=24):
    """Smooth images with some noise, of whole levels."""
    rng = np.random.default_rng(0)
    x = rng.random((count, channels, size, size))
    x = 0.7 * ndimage.gaussian_filter(x, (0, 0, 3, 3), mode="wrap") + 0.3 * x
    return (np.rint(x * 255) / 255).astype(np.float32)


def made(x, name, severity=3, seed=5, index=None):
    return corrupt(x, name, severity, seed, range(len(x)) if index is None else index)


def test_there_are_fifteen_at_five_severities():
    assert list(SEVERITIES) == list(CORRUPTIONS)
    assert len(SEVERITIES) == 15
    assert {len(each) for both in SEVERITIES.values() for each in both} == {5}


@pytest.mark.parametrize("name", SEVERITIES)
@pytest.mark.parametrize(("channels", "size"), [(3, 24), (1, 66)])
def test_an_image_depends_on_its_seed_and_index_alone(name, channels, size, monkeypatch):
    """Both tables of constants, to the bit, however the batch is made up and cut into blocks."""
    x = pictures(4, channels, size)
    whole = made(x, name)
    assert whole.dtype == np.float32
    assert whole.shape == x.shape
    assert np.array_equal(np.rint(whole * 255).astype(np.float32) / np.float32(255), whole)
    assert np.abs(whole - x).max() > 0.01
    order = [2, 0, 3]
    assert np.array_equal(made(x[order], name, index=order), whole[order])
    assert np.array_equal(made(x[1:2], name, index=[1]), whole[1:2])
    monkeypatch.setattr("fastadv.evaluate.corrupt.BLOCK", x[:2].size)
    assert np.array_equal(made(x, name), whole)
    same = np.repeat(x[:1], 2, 0)
    drawn = made(same, name, index=[7, 8])
    assert np.array_equal(drawn[0], drawn[1]) == (name in DETERMINED)
    other = made(same[:1], name, seed=6, index=[7])
    assert np.array_equal(drawn[:1], other) == (name in DETERMINED)
    assert not np.array_equal(made(x, name, 1), made(x, name, 5))


BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate")


@pytest.mark.parametrize("name", BLURS)
@pytest.mark.parametrize("size", [24, 70])
def test_what_moves_pixels_leaves_a_plain_image_as_it_is(name, size):
    x = np.full((1, 3, size, size), 100 / 255, np.float32)
    for severity in range(1, 6):
        assert np.array_equal(made(x, name, severity), x)


def test_noises_are_as_strong_as_published():
    grey = np.full((4, 3, 64, 64), np.float32(0.5))
    for severity, scale in enumerate((0.04, 0.06, 0.08, 0.09, 0.1), 1):
        noise = made(grey, "gaussian_noise", severity) - grey
        assert noise.std() == pytest.approx(scale, rel=0.03)
        assert abs(noise.mean()) < 0.002
    for severity, photons in enumerate((500, 250, 100, 75, 50), 1):
        noise = made(grey, "shot_noise", severity) - grey
        assert noise.var() == pytest.approx(0.5 / photons, rel=0.05)
    for severity, share in enumerate((0.01, 0.02, 0.03, 0.05, 0.07), 1):
        found = made(grey, "impulse_noise", severity)
        for value in (0, 1):
            assert (found == value).mean() == pytest.approx(share / 2, rel=0.15)
    large = np.full((1, 3, 128, 128), np.float32(0.5))
    assert (made(large, "gaussian_noise", 1) - large).std() == pytest.approx(0.08, rel=0.03)


def test_brightness_is_of_hsv_and_contrast_about_the_mean():
    x = pictures(1)
    x[0, :, 0, 0] = 0
    found = made(x, "brightness", 2)
    for i, j in np.ndindex(24, 24):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, i, j].tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.1))
        assert found[0, :, i, j] == pytest.approx(expected, abs=0.51 / 255)
    mean = x.mean((2, 3), keepdims=True)
    expected = (x - mean) * 0.15 + mean
    assert np.abs(made(x, "contrast", 5) - expected).max() < 0.51 / 255


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_compresses_and_pixelates(channels):
    x = pictures(1, channels)
    levels = np.rint(x[0] * 255).astype(np.uint8).transpose(1, 2, 0)
    picture, file = Image.fromarray(levels.squeeze()), io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    small = picture.resize((18, 18), Image.Resampling.BOX)
    for name, severity, expected in [
        ("jpeg_compression", 5, Image.open(file)),
        ("pixelate", 4, small.resize((24, 24), Image.Resampling.BOX)),
    ]:
        expected = np.atleast_3d(np.asarray(expected)).transpose(2, 0, 1)
        assert np.array_equal(np.rint(made(x, name, severity)[0] * 255), expected)


def test_defocus_is_a_disk():
    """Of a radius of 1.5 pixels that is nine of them, each a ninth."""
    x = np.zeros((1, 1, 24, 24), np.float32)
    x[0, 0, 10, 12] = 0.9
    found = made(x, "defocus_blur", 5)[0, 0]
    assert found[9:12, 11:14] == pytest.approx(np.full((3, 3), 0.1), abs=1 / 255)
    assert found.sum() == pytest.approx(0.9, abs=0.02)
    large = np.zeros((1, 1, 70, 70), np.float32)
    large[0, 0, 30, 30] = 1
    rows, columns = np.nonzero(made(large, "defocus_blur", 1)[0, 0])
    assert set(np.hypot(rows - 30, columns - 30) <= 3.5) == {True}
    assert len(rows) >= 29


def test_glass_takes_pixels_one_after_the_other():
    rng = np.random.default_rng(1)
    source = np.tile(np.arange(60), (3, 1))
    source[:, 5:55] += rng.integers(-5, 6, (3, 50))
    values = rng.random((3, 60))
    expected = values.copy()
    for row, places in zip(expected, source, strict=True):
        for i in reversed(range(60)):
            row[i] = row[places[i]]
    found = np.take_along_axis(values, filters.followed(source), 1)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, np.take_along_axis(values, source, 1))


def test_glass_moves_pixels_by_a_step():
    """Without a blur to speak of: each value is that of a neighbour above, left, or its own."""
    x = pictures(1, 1)
    levels = np.rint(x[0, 0] * 255)
    found = np.rint(made(x, "glass_blur", 1)[0, 0] * 255)
    moved = found != levels
    assert 0.5 < moved[2:, 2:].mean() < 0.9
    assert not moved[:2].any()
    for i, j in np.argwhere(moved):
        assert found[i, j] in levels[i - 1 : i + 1, j - 1 : j + 1]


def test_motion_is_one_sided_along_an_angle():
    x = np.zeros((1, 21, 21), np.float32)
    x[0, 10, 10] = 1
    line = filters.moved(x, 4, 2.0, 0)[0]
    taps = np.exp(-(np.arange(9) ** 2) / 8)
    assert line[10, 10:1:-1] == pytest.approx(taps / taps.sum(), abs=1e-6)
    assert line.sum() == pytest.approx(1, abs=1e-5)
    steep = filters.moved(x, 4, 2.0, -90)[0]
    assert steep[10:19, 10] == pytest.approx(line[10, 10:1:-1])
    slanted = filters.moved(x, 4, 2.0, 45)[0]
    assert slanted[10, 10] < slanted[9:11, 9:11].sum() < slanted.sum()


def test_filters_are_scipys():
    x = pictures(2, 3, 20).astype(np.float64)
    blurred = ndimage.gaussian_filter(x, (0, 0, 1.1, 1.1), mode="nearest", truncate=4)
    assert filters.filtered(x, filters.gaussian(1.1, 4), "edge") == pytest.approx(blurred)
    kernel = np.random.default_rng(0).random((5, 5))
    expected = ndimage.correlate(x, kernel[None, None], mode="mirror")
    assert filters.correlated(x, kernel) == pytest.approx(expected)
    points = np.random.default_rng(1).uniform(-30, 50, (2, 2, 20, 20))
    found = filters.sampled(x, points)
    for i in range(2):
        expected = ndimage.map_coordinates(x[i, 1], points[i], order=1, mode="reflect")
        assert found[i, 1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("factor", [1, 1.05, 1.25, 2.25])
def test_zooms_are_scipys(factor):
    x = pictures(1, 1, 20)
    part = int(np.ceil(20 / factor))
    top = (20 - part) // 2
    larger = ndimage.zoom(x[0, 0, top : top + part, top : top + part], factor, order=1)
    trim = (len(larger) - 20) // 2
    expected = larger[trim : trim + 20, trim : trim + 20]
    assert filters.zoomed(x, factor)[0, 0] == pytest.approx(expected, abs=1e-6)


def test_an_affine_map_takes_three_points_along():
    source, target = np.random.default_rng(2).random((2, 3, 2))
    found = filters.affine(source, target)
    assert source @ found[:, :2].T + found[:, 2] == pytest.approx(target)


def test_fractals_fill_their_range_and_are_rougher_with_less_decay():
    def of(decay):
        streams = [np.random.default_rng(seed) for seed in range(6)]
        return filters.plasma(streams, (32, 30), decay)

    smooth, rough = of(3), of(1.2)
    assert smooth.shape == (6, 1, 32, 30)
    assert smooth.min() >= 0
    assert smooth.max() <= 1
    assert smooth.std((1, 2, 3)).min() > 0.1
    changes = [np.abs(np.diff(fractal, axis=2)).mean() for fractal in (smooth, rough)]
    assert changes[0] < 0.5 * changes[1]


def test_snow_and_ice_lighten_and_fog_hides():
    x = pictures(4) * np.float32(0.5)
    for name in ("snow", "frost"):
        means = [made(x, name, severity).mean() for severity in (1, 5)]
        assert x.mean() < means[0] < means[1]
    details = [np.abs(np.diff(v)).mean() for v in (x, made(x, "fog", 1), made(x, "fog", 5))]
    assert details[0] > details[1] > 1.5 * details[2]
    colours = made(x, "frost", 5).mean((0, 2, 3))
    assert colours[0] < colours[1] < colours[2]


def test_a_field_moves_smoothly():
    """An affine map, then moves of a smooth field: straight ramps stay nearly so in the middle."""
    ramp = np.tile(np.linspace(0.2, 0.8, 40, dtype=np.float32), (1, 1, 40, 1))
    found = made(ramp, "elastic_transform", 5)
    assert 0.005 < np.abs(found - ramp)[..., 5:-5, 5:-5].max() < 0.1


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 24, 7), (4, 32, 32), (64,)])
def test_images_of_other_shapes_are_refused(shape):
    with pytest.raises(UsageError, match=r"images are \[.*must be \[C, H, W\] of 1 or 3 channels"):
        fits("fog", shape)


def test_small_images_have_fewer():
    assert [name for name in SEVERITIES if not fits(name, (1, 15, 40))] == [
        "motion_blur",
        "zoom_blur",
        "snow",
    ]
    assert all(fits(name, (3, 16, 16)) for name in SEVERITIES)
