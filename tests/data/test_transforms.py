import jax
import jax.numpy as jnp
import numpy as np

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
