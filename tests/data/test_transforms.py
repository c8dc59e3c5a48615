import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import parallel
from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data import transforms
from resnet_jax.data.transforms import PixelStatistics

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (64, 6, 5, 3), dtype=np.uint8)


def test_flip_mirrors_about_half_and_leaves_the_rest():
    flipped = np.asarray(transforms.flip(jax.random.key(0), jnp.asarray(IMAGES)))
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, IMAGES)]
    untouched = [np.array_equal(a, b) for a, b in zip(flipped, IMAGES)]
    assert all(a != b for a, b in zip(mirrored, untouched))
    assert 16 < sum(mirrored) < 48


def test_pad_and_crop_cuts_every_window_of_the_padded_image():
    images = np.broadcast_to(IMAGES[:1], (2000, 6, 5, 3)).astype(np.float32)
    crops = transforms.pad_and_crop(jax.random.key(1), jnp.asarray(images), 2)
    padded = np.pad(images[0], ((2, 2), (2, 2), (0, 0)))
    windows = {
        padded[top : top + 6, left : left + 5].tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    places = [windows[np.asarray(crop).tobytes()] for crop in np.asarray(crops)]
    # 25 places, 80 each on average; five standard deviations are 44.
    counts = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counts) == 25
    assert counts.min() > 36
    assert counts.max() < 124


def test_color_noise_shifts_along_the_published_axes():
    images = jnp.zeros((20_000, 1, 1, 3))
    shifts = transforms.add_color_noise(jax.random.key(2), images, 0.1)
    covariance = np.cov(np.asarray(shifts)[:, 0, 0].T)
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [
            [-0.5675, 0.7192, 0.4009],
            [-0.5808, -0.0045, -0.8140],
            [-0.5836, -0.6948, 0.4203],
        ]
    )
    expected = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
    np.testing.assert_allclose(covariance, expected, atol=0.05 * expected.max())


def test_color_noise_moves_an_image_as_a_whole():
    images = jnp.asarray(RNG.random((4, 6, 5, 3)), jnp.float32)
    shift = transforms.add_color_noise(jax.random.key(3), images, 0.1) - images
    np.testing.assert_allclose(
        shift, shift[:, :1, :1].repeat(6, 1).repeat(5, 2), atol=1e-6
    )


def test_without_options_only_the_normalisation_is_left():
    mean = RNG.random((6, 5, 3)).astype(np.float32)
    std = RNG.random((1, 1, 3)).astype(np.float32) + 0.5
    out = transforms.augment(
        jax.random.key(0),
        jnp.asarray(IMAGES),
        PixelStatistics(mean, std),
        AugmentationConfig(),
    )
    np.testing.assert_allclose(out, (IMAGES / 255.0 - mean) / std, atol=1e-5)


def test_padding_is_the_mean_pixel():
    statistics = PixelStatistics(np.full((6, 5, 3), 0.3, np.float32), np.float32(1))
    config = AugmentationConfig(pad=6)
    out = transforms.augment(jax.random.key(4), jnp.asarray(IMAGES), statistics, config)
    padding = np.asarray(out) == 0
    pixels = (np.asarray(out)[~padding] + 0.3) * 255
    np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-3)
    # A pixel is 0.3 itself only where 76.5 were a byte: every zero is padding.
    assert padding.mean() > 0.2


def random_images(count=6, height=7, width=5):
    return RNG.random((count, height, width, 3)).astype(np.float32)


def grey_of(image):
    return image @ np.array([0.299, 0.587, 0.114], np.float32)


def jittered(image, factors, order):
    """By the definition of each operation, one image at a time."""
    brightness, contrast, saturation = factors
    for kind in order:
        if kind == 0:
            image = brightness * image
        elif kind == 1:
            image = contrast * image + (1 - contrast) * grey_of(image).mean()
        else:
            grey = grey_of(image)[..., None]
            image = saturation * image + (1 - saturation) * grey
    return image


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_jitter_blends_as_published_in_whatever_order(order):
    images = random_images()
    factors = RNG.uniform(0.2, 1.8, (len(images), 3)).astype(np.float32)
    found = transforms.jitter_colors(images, jnp.asarray(factors))
    expected = [jittered(*each, order) for each in zip(images, factors)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_jitter_draws_factors_uniformly_and_apart():
    """Grey images show brightness times a constant; their contrast, both factors."""
    images = np.ones((4000, 1, 2, 3), np.float32) * [[0.25], [0.75]]
    only_brightness = transforms.color_jitter(jax.random.key(0), images, (0.4, 0, 0))
    factors = np.asarray(only_brightness)[:, 0, 0, 0] / 0.25
    assert 0.6 < factors.min() < 0.61
    assert 1.39 < factors.max() < 1.4
    np.testing.assert_allclose(factors.std(), 0.8 / np.sqrt(12), rtol=0.05)
    # Of grey images saturation changes nothing, nor does contrast the mean.
    rest = transforms.color_jitter(jax.random.key(1), images, (0, 0.4, 0.4))
    np.testing.assert_allclose(np.mean(rest, (1, 2, 3)), 0.5, atol=1e-5)
    contrasts = np.ptp(np.asarray(rest)[..., 0], axis=2)[:, 0] / 0.5
    np.testing.assert_allclose(contrasts.mean(), 1, atol=0.02)
    np.testing.assert_allclose(contrasts.std(), 0.8 / np.sqrt(12), rtol=0.05)
    both = transforms.color_jitter(jax.random.key(2), images, (0.4, 0.4, 0))
    means = np.mean(both, (1, 2, 3))
    contrasts = np.ptp(np.asarray(both)[..., 0], axis=2)[:, 0] / means
    assert abs(np.corrcoef(means, contrasts)[0, 1]) < 0.06


def test_jitter_of_strength_zero_changes_nothing():
    images = random_images()
    found = transforms.color_jitter(jax.random.key(0), images, (0.0, 0.0, 0.0))
    np.testing.assert_allclose(found, images, atol=1e-6)


erase = jax.jit(transforms.erase)


def erased_pixels(images, found):
    """Where an image of pixels other than zero was set to zero."""
    assert np.array_equal(found[found != 0], images[found != 0])
    return (np.asarray(found) == 0).all(-1)


def test_erasing_takes_a_rectangle_of_the_published_size():
    images = 1 + random_images(2000, 40, 30)
    found = np.asarray(erase(jax.random.key(0), images, 1.0))
    erased = erased_pixels(images, found)
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    # All of each bounding box is erased: it is a rectangle.
    np.testing.assert_array_equal(erased.sum((1, 2)), rows * columns)
    share = rows * columns / (40 * 30)
    # Rounding to whole pixels moves the ends a little.
    assert 0.012 < share.min() < 0.03
    assert 0.31 < share.max() < 0.35
    # A few high or wide ones do not fit and are drawn again.
    np.testing.assert_allclose(share.mean(), 0.175, atol=0.01)
    aspects = rows / columns
    assert np.quantile(aspects, 0.01) < 0.35
    assert np.quantile(aspects, 0.99) > 2.8
    # The logarithm is symmetric about 1 but for what does not fit.
    assert 0.8 < np.median(aspects) < 1.25


def test_erasing_reaches_every_border_and_place():
    images = np.ones((2000, 12, 12, 1), np.float32)
    found = erase(jax.random.key(5), images, 1.0)
    often = (np.asarray(found)[..., 0] == 0).mean(0)
    assert often.min() > 0.01
    np.testing.assert_allclose(often, often[::-1], atol=0.07)
    np.testing.assert_allclose(often, often[:, ::-1], atol=0.07)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_erasing_is_done_with_its_probability(probability):
    images = 1 + random_images(2000, 40, 30)
    found = np.asarray(erase(jax.random.key(1), images, probability))
    share = erased_pixels(images, found).any((1, 2)).mean()
    tolerance = 0 if probability in (0, 1) else 0.05
    assert abs(share - probability) <= tolerance


def test_erasing_leaves_images_alone_in_which_nothing_fits():
    images = np.ones((50, 1, 1, 1), np.float32)
    np.testing.assert_array_equal(erase(jax.random.key(0), images, 1.0), images)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_adds_the_flipped_batch(share):
    images = random_images(5)
    found = transforms.mixup(images, jnp.float32(share))
    expected = share * images + (1 - share) * np.flip(images, 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("share", "center", "box"),
    [
        # Of 8 x 12 pixels: the sides are sqrt(1 - share) of them, rounded down.
        (0.75, (4, 6), (2, 3, 6, 9)),
        (0.75, (0, 0), (0, 0, 2, 3)),
        (0.75, (7, 11), (5, 8, 8, 12)),
        (0.5, (4, 6), (2, 2, 7, 10)),
        (1.0, (4, 6), (4, 6, 4, 6)),
        (0.0, (4, 6), (0, 0, 8, 12)),
        (0.0, (0, 0), (0, 0, 4, 6)),
    ],
)
def test_cutmix_cuts_its_box_at_the_borders(share, center, box):
    found = transforms.cutmix_box(jnp.float32(share), jnp.array(center), 8, 12)
    assert tuple(map(int, found)) == box


@pytest.mark.parametrize("box", [(2, 3, 6, 9), (0, 0, 2, 3), (4, 6, 4, 6)])
def test_cutmix_pastes_the_flipped_batch_and_corrects_the_share(box):
    images = random_images(4, 8, 12)
    found, share = transforms.cutmix(images, jnp.array(box))
    top, left, bottom, right = box
    expected = images.copy()
    expected[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
    np.testing.assert_array_equal(found, expected)
    assert float(share) == pytest.approx(1 - (bottom - top) * (right - left) / 96)


def test_targets_have_the_shares_of_the_images():
    targets = transforms.mixed_targets(jnp.array([0, 2, 1]), jnp.float32(0.7), 4)
    expected = [[0.7, 0.3, 0, 0], [0, 0, 1, 0], [0.3, 0.7, 0, 0]]
    np.testing.assert_allclose(targets, expected, atol=1e-6)


def mixtures(mixup_alpha, cutmix_alpha, count=2000):
    """Images of ones and zeros, half of each, mixed; and the shares."""
    images = jnp.concatenate([jnp.ones((1, 8, 8, 1)), jnp.zeros((1, 8, 8, 1))])
    mixed = jax.vmap(lambda key: transforms.mix(key, images, mixup_alpha, cutmix_alpha))
    found, shares = jax.jit(mixed)(jax.random.split(jax.random.key(0), count))
    # Whatever was done, an image of ones holds its own share on average.
    np.testing.assert_allclose(found[:, 0].mean((1, 2, 3)), shares, atol=1e-5)
    np.testing.assert_allclose(found[:, 1].mean((1, 2, 3)), 1 - shares, atol=1e-5)
    pasted = np.isin(np.asarray(found[:, 0]), (0, 1)).all((1, 2, 3))
    return np.asarray(shares), pasted


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_mixup_draws_lambda_from_the_beta_distribution(alpha):
    shares, _ = mixtures(alpha, 0.0)
    expected = 1 / (4 * (2 * alpha + 1))  # the variance of Beta(alpha, alpha)
    np.testing.assert_allclose(shares.mean(), 0.5, atol=0.04)
    np.testing.assert_allclose(shares.var(), expected, rtol=0.1)


def test_cutmix_alone_always_pastes():
    shares, pasted = mixtures(0.0, 1.0)
    assert pasted.all()
    # Boxes are cut at the borders: more than half of an image is its own.
    assert 0.55 < shares.mean() < 0.75


def test_with_both_each_batch_takes_one():
    shares, pasted = mixtures(5.0, 1.0)
    assert 0.45 < pasted.mean() < 0.55
    assert shares[~pasted].std() == pytest.approx((1 / 44) ** 0.5, rel=0.1)


def test_mixing_is_the_same_on_eight_devices():
    images = jnp.asarray(random_images(16, 8, 8))
    config = AugmentationConfig(
        color_jitter=(0.4, 0.4, 0.4),
        erasing_probability=0.5,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
    )
    pixels = PixelStatistics(np.float32(0.5), np.float32(0.2))

    run = jax.jit(lambda key, x: transforms.augment_and_mix(key, x, pixels, config))

    def prepared(devices, seed):
        sharding = parallel.batch_sharding(parallel.data_mesh(devices))
        return run(jax.random.key(seed), jax.device_put(images, sharding))

    for seed in range(3):
        (one, share), (eight, same_share) = prepared(1, seed), prepared(8, seed)
        np.testing.assert_allclose(eight, one, atol=1e-4)
        assert float(share) == pytest.approx(float(same_share))


def test_new_operations_leave_the_numbers_of_older_ones():
    """Flip and crop draw the same whether an image is erased or not."""
    images = jnp.asarray(IMAGES)
    pixels = PixelStatistics(np.float32(0), np.float32(1))
    key = jax.random.key(7)
    plain = AugmentationConfig(pad=1, flip=True)
    more = dataclasses.replace(plain, erasing_probability=1.0)
    augment = jax.jit(transforms.augment, static_argnums=3)
    before = np.asarray(augment(key, images, pixels, plain))
    after = np.asarray(augment(key, images, pixels, more))
    assert np.array_equal(after[after != 0], before[after != 0])
    assert (after != before).any()
