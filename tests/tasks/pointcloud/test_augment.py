import numpy as np
import pytest

from latentgnn.errors import UserError
from latentgnn.tasks.pointcloud.augment import augment
from latentgnn.tasks.pointcloud.config import AugmentConfig

NAMES = ("log_intensity", "red", "green", "blue", "normal_x", "normal_y", "normal_z", "height")
STILL = {"rotate": False, "flip": 0.0, "scale": None}


def _crop(number=300):
    """Points on a sphere of 5 m, whose normals are their directions, 7 m above the ground at the middle."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((number, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    points = 5 * normal
    features = np.concatenate([rng.random((number, 4)), normal, points[:, 2:] + 7], axis=1)
    return points, features.astype(np.float32)


def _changed(seed=0, **settings):
    points, features = _crop()
    return augment(points, features, NAMES, AugmentConfig(**{**STILL, **settings}), np.random.default_rng(seed))


def test_nothing_changes_unasked():
    points, features = _crop()
    changed = _changed()
    np.testing.assert_array_equal(changed.points, points)
    np.testing.assert_array_equal(changed.features, features)
    np.testing.assert_array_equal(changed.kept, np.arange(300))


def test_the_input_stays_as_it_is():
    points, features = _crop()
    before = points.copy(), features.copy()
    settings = AugmentConfig(jitter=0.1, drop=0.5, color_drop=1.0, color_jitter=0.1)
    augment(points, features, NAMES, settings, np.random.default_rng(0))
    np.testing.assert_array_equal(points, before[0])
    np.testing.assert_array_equal(features, before[1])


@pytest.mark.parametrize(
    "settings", [{"rotate": True}, {"flip": 0.5}, {"scale": (0.5, 2.0)}, {"rotate": True, "flip": 1.0}]
)
def test_rigid_changes_and_scales(settings):
    points, features = _crop()
    seen = set()
    for seed in range(8):
        changed = _changed(seed, **settings)
        factor = np.linalg.norm(changed.points[0]) / 5
        seen.add(tuple(changed.points[0].round(6)))
        # Distances stay, but for the factor; so does the vertical axis.
        np.testing.assert_allclose(
            np.linalg.norm(changed.points - changed.points[7], axis=1),
            factor * np.linalg.norm(points - points[7], axis=1),
            atol=1e-9,
        )
        np.testing.assert_allclose(changed.points[:, 2], factor * points[:, 2], atol=1e-9)
        # Normals still point outwards, and heights fit the coordinates.
        np.testing.assert_allclose(changed.features[:, 4:7], changed.points / (5 * factor), atol=1e-6)
        np.testing.assert_allclose(changed.features[:, 7], factor * (points[:, 2] + 7), rtol=1e-6)
        np.testing.assert_array_equal(changed.features[:, :4], features[:, :4])
        if "scale" in settings:
            assert 0.5 <= factor <= 2
        else:
            assert factor == pytest.approx(1)
    assert len(seen) > 2


def test_mirror_images_turn_the_other_way():
    points, _ = _crop()
    before = np.linalg.det(points[:3])
    signs = [np.sign(np.linalg.det(_changed(seed, flip=0.5).points[:3]) / before) for seed in range(40)]
    assert 8 < signs.count(-1) < 32
    assert all(np.linalg.det(_changed(seed, rotate=True).points[:3]) / before > 0 for seed in range(10))


def test_jitter():
    points, _ = _crop()
    shift = _changed(jitter=0.02).points - points
    assert shift.std() == pytest.approx(0.02, rel=0.1)
    assert np.abs(shift).max() <= 0.06 + 1e-12


def test_drop():
    points, features = _crop()
    numbers = []
    for seed in range(30):
        changed = _changed(seed, drop=0.4)
        numbers.append(len(changed.kept))
        np.testing.assert_array_equal(changed.points, points[changed.kept])
        np.testing.assert_array_equal(changed.features, features[changed.kept])
    assert 180 <= min(numbers) < 210
    assert 270 < max(numbers) <= 300
    lonely = augment(points[:1], features[:1], NAMES, AugmentConfig(drop=0.99), np.random.default_rng(0))
    assert len(lonely.points) == 1


def test_colours():
    _, features = _crop()
    changed = _changed(color_jitter=0.05)
    shift = (changed.features - features)[:, 1:4]
    assert 0.03 < shift.std() < 0.06
    assert 0 <= changed.features[:, 1:4].min() < changed.features[:, 1:4].max() <= 1
    np.testing.assert_array_equal(np.delete(changed.features, [1, 2, 3], 1), np.delete(features, [1, 2, 3], 1))
    dark = [not _changed(seed, color_drop=0.3).features[:, 1:4].any() for seed in range(100)]
    assert 15 < sum(dark) < 45


def test_the_same_seed_does_the_same():
    settings = {"rotate": True, "flip": 0.5, "scale": (0.9, 1.1), "jitter": 0.01, "drop": 0.2, "color_drop": 0.5}
    a, b, c = (_changed(seed, **settings) for seed in (3, 3, 4))
    for first, second in zip(a, b, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(a.kept, c.kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, r"flip: expected a probability from 0 to 1; got 1\.5"),
        ({"drop": 1.0}, r"drop: expected 0 or more and less than 1; got 1\.0"),
        ({"jitter": -0.1}, r"jitter: expected 0 or more"),
        ({"scale": (1.1, 0.9)}, r"scale: expected two ascending factors above 0, or null; got \[1\.1, 0\.9\]"),
        ({"color_jitter": float("nan")}, "color_jitter"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        AugmentConfig(**settings)
