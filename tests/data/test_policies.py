import collections
import importlib
import math
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data import images, policies
from resnet_jax.data.policies import Sampling, Step
from resnet_jax.errors import UserError

RANDAUGMENT = AugmentationConfig(policy="randaugment", policy_magnitude=7.0)
TRIVIALAUGMENT = AugmentationConfig(policy="trivialaugment")
CONFIGS = (RANDAUGMENT, TRIVIALAUGMENT)
BLACK = Sampling(Image.Resampling.NEAREST, (0, 0, 0))
MEAN = (124, 116, 104)


def photograph(height, width, seed):
    """Smooth shapes, an edge, grain and a colour cast: all values, as in a photo."""
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 1, (height, width, 3)).astype(np.float32)
    shapes = cv2.GaussianBlur(grain, (0, 0), 9) * 600 + grain * 6
    shapes[:, width // 3 :] += 40
    cast = np.array([150, 120, 90])
    return np.clip(shapes + cast, 0, 255).astype(np.uint8)


IMAGES = [photograph(90, 120, 0), photograph(113, 71, 1)]
FLAT = np.full((20, 30, 3), (3, 200, 90), np.uint8)


def apply(image, operation, argument=0.0, sampling=BLACK):
    return policies.apply_steps(image, [Step(operation, argument, sampling)])


# Against independent computations.


def luma(image):
    return np.floor(image @ np.array([0.299, 0.587, 0.114]) + 0.5)


def blend(degenerate, image, factor):
    """Pillow computes in float32 and cuts the fraction: one grey level is free."""
    image = image.astype(np.float64)
    return np.clip(degenerate + factor * (image - degenerate), 0, 255)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("factor", [0.01, 0.1, 0.63, 1.0, 1.37, 1.99])
def test_enhancements_blend_with_black_grey_or_blurred(image, factor):
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = image.astype(np.float64)
    smooth[1:-1, 1:-1] = cv2.filter2D(smooth, -1, kernel)[1:-1, 1:-1]
    degenerates = {
        "Brightness": 0.0,
        "Contrast": math.floor(luma(image).mean() + 0.5),
        "Color": luma(image)[..., None],
        "Sharpness": np.floor(smooth + 0.5),
    }
    for operation, degenerate in degenerates.items():
        changed = apply(image, operation, factor)
        expected = blend(degenerate, image, factor)
        # A degenerate's own rounding may fall to the other side of a half.
        room = 1 + abs(1 - factor)
        assert np.abs(changed - expected).max() <= room, operation
        if factor == 1:
            np.testing.assert_array_equal(changed, image)


@pytest.mark.parametrize("image", IMAGES)
def test_solarize_posterize_and_invert_are_tables(image):
    wide = image.astype(int)
    for threshold in (0, 8.5, 77, 128, 246.5, 255, 256):
        expected = np.where(wide < threshold, wide, 255 - wide)
        np.testing.assert_array_equal(apply(image, "Solarize", threshold), expected)
    for bits in range(9):
        kept = wide // 2 ** (8 - bits) * 2 ** (8 - bits)
        np.testing.assert_array_equal(apply(image, "Posterize", bits), kept)
    for amount in (0, 11, 77, 110):
        expected = np.where(wide < 128, np.minimum(wide + amount, 255), wide)
        np.testing.assert_array_equal(apply(image, "SolarizeAdd", amount), expected)
    np.testing.assert_array_equal(apply(image, "Invert"), 255 - wide)
    np.testing.assert_array_equal(apply(image, "Identity"), image)


@pytest.mark.parametrize("image", [*IMAGES, IMAGES[0] // 3 + 50])
def test_autocontrast_stretches_each_channel(image):
    low, high = image.min((0, 1)), image.max((0, 1))
    scale = 255 / (high.astype(float) - low)
    stretched = np.floor(np.round(image * scale - low * scale, 9))
    changed = apply(image, "AutoContrast")
    # In floating point a whole number may come out a hair below itself.
    assert np.abs(changed - stretched).max() <= 1
    assert (changed == stretched).mean() > 0.99


@pytest.mark.parametrize("image", [*IMAGES, IMAGES[0] // 3 + 50])
def test_equalize_follows_each_channels_histogram(image):
    changed = apply(image, "Equalize")
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        below = np.cumsum(counts) - counts
        step = (counts.sum() - counts[np.nonzero(counts)[0][-1]]) // 255
        table = np.minimum((step // 2 + below) // step, 255)
        np.testing.assert_array_equal(changed[..., channel], table[image[..., channel]])


@pytest.mark.parametrize("operation", ["AutoContrast", "Equalize"])
def test_a_flat_image_has_nothing_to_stretch(operation):
    np.testing.assert_array_equal(apply(FLAT, operation), FLAT)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("filter_name", ["NEAREST", "BILINEAR", "BICUBIC"])
@pytest.mark.parametrize("pixels", [-32, -1, 0, 5, 32])
def test_translations_move_whole_pixels(image, filter_name, pixels):
    sampling = Sampling(Image.Resampling[filter_name], MEAN)
    filled = np.broadcast_to(np.array(MEAN, np.uint8), image.shape)
    size = abs(pixels)
    padded = np.concatenate([filled[:, :size], image, filled[:, :size]], 1)
    expected = padded[:, size - pixels : size - pixels + image.shape[1]]
    moved = apply(image, "TranslateX", pixels, sampling)
    np.testing.assert_array_equal(moved, expected)
    share = -pixels / image.shape[1]
    moved = apply(image, "TranslateXRelative", share, sampling)
    # A share need not come to whole pixels in floating point.
    assert np.abs(moved.astype(int) - expected)[:, size : -size or None].max() <= 1
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))
    for operation, argument in (("TranslateY", pixels), ("TranslateYRelative", share)):
        down = apply(turned, operation, argument, sampling).transpose(1, 0, 2)
        across = apply(image, operation.replace("Y", "X"), argument, sampling)
        np.testing.assert_array_equal(down, across)


def test_half_a_pixel_is_the_mean_of_two():
    image = IMAGES[0]
    sampling = Sampling(Image.Resampling.BILINEAR, MEAN)
    moved = apply(image, "TranslateXRelative", 10.5 / image.shape[1], sampling)
    mean = (image[:, 10:-1].astype(float) + image[:, 11:]) / 2
    assert np.abs(moved[:, : mean.shape[1]] - mean).max() <= 1
    np.testing.assert_array_equal(moved[:, -10:], np.broadcast_to(MEAN, (90, 10, 3)))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("filter_name", ["NEAREST", "BILINEAR", "BICUBIC"])
@pytest.mark.parametrize("operation", ["ShearX", "ShearY", "Rotate"])
def test_no_shear_and_no_turn_change_nothing(image, filter_name, operation):
    sampling = Sampling(Image.Resampling[filter_name], MEAN)
    np.testing.assert_array_equal(apply(image, operation, 0.0, sampling), image)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("slope", [-0.99, -0.3, 0.21, 0.5])
def test_shears_shift_rows_in_proportion_to_their_height(image, slope):
    height, width = image.shape[:2]
    expected = np.zeros_like(image)
    for row in range(height):
        # Centres of pixels are at halves.
        source = np.floor(np.arange(width) + 0.5 + slope * (row + 0.5)).astype(int)
        inside = (source >= 0) & (source < width)
        expected[row, inside] = image[row, source[inside]]
    np.testing.assert_array_equal(apply(image, "ShearX", slope), expected)
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))
    sheared = apply(turned, "ShearY", slope).transpose(1, 0, 2)
    np.testing.assert_array_equal(sheared, expected)


def test_rotation_is_against_the_clock_about_the_middle():
    square = IMAGES[0][:, :90]
    np.testing.assert_array_equal(apply(square, "Rotate", 90), np.rot90(square))
    height, width = square.shape[:2]
    rows, columns = np.mgrid[:height, :width] + 0.5 - 45
    angle = math.radians(30)
    across = math.cos(angle) * columns - math.sin(angle) * rows + 45
    down = math.sin(angle) * columns + math.cos(angle) * rows + 45
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    across = np.clip(np.floor(across), 0, width - 1).astype(int)
    down = np.clip(np.floor(down), 0, height - 1).astype(int)
    expected = np.where(inside[..., None], square[down, across], 0)
    assert (apply(square, "Rotate", 30) == expected).mean() > 0.999


# Against the originals.


@pytest.fixture(scope="module")
def torchvision():
    from tests.torch_peers import import_peer

    import_peer("torchvision")
    return importlib.import_module("torchvision.transforms")


@pytest.fixture
def timm(torchvision, monkeypatch):
    """timm's module, with signs that the test sets in ``signs``, not at random."""
    from tests.torch_peers import import_peer

    import_peer("timm")
    module = importlib.import_module("timm.data.auto_augment")
    module.sign = 1
    monkeypatch.setattr(module, "_randomly_negate", lambda value: module.sign * value)
    return module


def torchvision_argument(operation, magnitude):
    """The argument of our operation for a magnitude of torchvision's."""
    if operation in ("Brightness", "Color", "Contrast", "Sharpness"):
        return 1.0 + magnitude
    if operation in ("TranslateX", "TranslateY", "Posterize"):
        return int(magnitude)
    return magnitude


def torchvision_bins(torchvision, operation):
    """Pairs of a bin, its sign put on, and torchvision's magnitude there."""
    original = torchvision.TrivialAugmentWide()
    values, signed = original._augmentation_space(original.num_magnitude_bins)[
        operation
    ]
    assert signed == policies.TRIVIALAUGMENT[operation].signed
    if values.ndim == 0:
        return [(0, 0.0)]
    assert len(values) == policies.LAST_BIN + 1
    signs = (1, -1) if signed else (1,)
    return [
        (sign * place, sign * float(value))
        for place, value in enumerate(values)
        for sign in signs
    ]


def test_trivialaugments_operations_are_torchvisions(torchvision):
    original = torchvision.TrivialAugmentWide()
    space = original._augmentation_space(original.num_magnitude_bins)
    assert list(space) == list(policies.TRIVIALAUGMENT)


@pytest.mark.parametrize("operation", policies.TRIVIALAUGMENT)
def test_trivialaugments_arguments_are_torchvisions(torchvision, operation):
    scale = policies.TRIVIALAUGMENT[operation]
    for place, magnitude in torchvision_bins(torchvision, operation):
        ours = scale.argument(place)
        if operation.startswith("Translate"):
            # torch's linspace rounds as the processor's vectors do: its sixteenth
            # of 31 values to 32 is 16 on some and 15.999999, cut to 15, on others.
            choices = {int(magnitude * (1 - 1e-6)), int(magnitude * (1 + 1e-6))}
            assert ours in choices
        else:
            theirs = torchvision_argument(operation, magnitude)
            assert ours == pytest.approx(theirs, rel=1e-6)
        if operation in ("Rotate", "Solarize", "Posterize"):
            assert ours == magnitude


@pytest.mark.parametrize("image", [*IMAGES, FLAT, IMAGES[0][..., :1]])
@pytest.mark.parametrize("operation", policies.TRIVIALAUGMENT)
def test_trivialaugments_images_are_torchvisions(torchvision, image, operation):
    original = torchvision.TrivialAugmentWide(
        interpolation=torchvision.InterpolationMode.BILINEAR
    )
    pillow = images.to_pillow(image)
    sampling = policies._TRIVIALAUGMENT_SAMPLING
    for _, magnitude in torchvision_bins(torchvision, operation):
        theirs = torchvision.autoaugment._apply_op(
            pillow, operation, magnitude, original.interpolation, original.fill
        )
        argument = torchvision_argument(operation, magnitude)
        np.testing.assert_array_equal(
            apply(image, operation, argument, sampling),
            np.asarray(theirs).reshape(image.shape),
            err_msg=f"magnitude {magnitude}",
        )


def timm_name(operation):
    if operation in ("Posterize", "Solarize", "Color", "Contrast", "Brightness"):
        return operation + "Increasing"
    if operation == "Sharpness":
        return "SharpnessIncreasing"
    return operation.replace("Relative", "Rel")


def test_randaugments_operations_are_timms(timm):
    names = [timm_name(operation) for operation in policies.RANDAUGMENT]
    assert names == timm._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("filter_name", ["BILINEAR", "BICUBIC"])
@pytest.mark.parametrize("image", [*IMAGES, FLAT])
@pytest.mark.parametrize("operation", policies.RANDAUGMENT)
def test_randaugment_is_timms(timm, image, operation, filter_name):
    resampling = Image.Resampling[filter_name]
    scale = policies.RANDAUGMENT[operation]
    hparams = {"img_mean": MEAN, "interpolation": resampling}
    pillow = images.to_pillow(image)
    # At 10 timm posterizes to no bits at all, which Pillow refuses since version 13.
    strongest = 9.99 if operation == "Posterize" else 10.0
    for magnitude in (0.0, 0.4, 1.0, 2.5, 3.0, 5.0, 6.3, 7.0, 9.0, strongest):
        for sign in (1, -1):
            timm.sign = sign
            theirs = timm.AugmentOp(timm_name(operation), 1.0, magnitude, hparams)
            signed = sign * magnitude if scale.signed else magnitude
            step = Step(operation, scale.argument(signed), Sampling(resampling, MEAN))
            np.testing.assert_array_equal(
                policies.apply_steps(image, [step]),
                np.asarray(theirs(pillow)),
                err_msg=f"magnitude {magnitude}, sign {sign}",
            )


def test_timms_recipe_has_our_constants(timm):
    transforms = importlib.import_module("timm.data.transforms_factory")
    chain = transforms.transforms_imagenet_train(
        auto_augment="rand-m7-mstd0.5-inc1", color_jitter=None
    )
    (recipe,) = [part for part in chain.transforms if hasattr(part, "num_layers")]
    assert recipe.num_layers == AugmentationConfig().policy_operations
    assert recipe.choice_weights is None
    for operation in recipe.ops:
        assert operation.prob == policies._PROBABILITY
        assert operation.magnitude == 7
        assert operation.magnitude_std == AugmentationConfig().policy_magnitude_std
        assert operation.magnitude_max is None
        assert operation.kwargs["fillcolor"] == policies._IMAGENET_MEAN
        assert operation.kwargs["resample"] == policies._FILTERS


# Drawing.


def drawn(config, count, seed=0):
    rng = np.random.default_rng(seed)
    return [policies.draw_steps(rng, config) for _ in range(count)]


def assert_uniform(counts, kinds, total):
    """Every kind's count is within five deviations of a binomial's mean."""
    assert len(counts) == kinds
    expected = total / kinds
    deviation = math.sqrt(expected * (1 - 1 / kinds))
    for kind, count in counts.items():
        assert abs(count - expected) < 5 * deviation, kind


def test_randaugment_draws_operations_evenly_and_applies_half():
    number = 20_000
    config = AugmentationConfig(policy="randaugment", policy_operations=3)
    images = drawn(config, number)
    lengths = collections.Counter(len(steps) for steps in images)
    for length in range(4):
        probability = math.comb(3, length) / 8
        deviation = math.sqrt(number * probability * (1 - probability))
        assert abs(lengths[length] - number * probability) < 5 * deviation
    steps = [step for steps in images for step in steps]
    names = collections.Counter(step.operation for step in steps)
    assert_uniform(names, 15, len(steps))
    filters = collections.Counter(step.sampling.resampling for step in steps)
    assert_uniform(filters, 2, len(steps))
    assert {step.sampling.fill for step in steps} == {MEAN}
    # With replacement: the same operation follows itself in one of 15 pairs.
    pairs = [steps for steps in images if len(steps) == 2]
    equal = sum(one.operation == two.operation for one, two in pairs)
    deviation = math.sqrt(len(pairs) * 14 / 15**2)
    assert abs(equal - len(pairs) / 15) < 5 * deviation


def test_randaugments_magnitudes_are_normal_and_cut():
    config = AugmentationConfig(
        policy="randaugment", policy_magnitude=9.5, policy_magnitude_std=0.5
    )
    steps = [step for steps in drawn(config, 40_000) for step in steps]
    turns = np.array([s.argument for s in steps if s.operation == "Rotate"]) / 3
    number = len(turns)
    assert abs((turns > 0).sum() - number / 2) < 5 * math.sqrt(number / 4)
    magnitudes = np.abs(turns)
    assert magnitudes.max() == pytest.approx(10)
    # One deviation above the mean is cut; so are the quantiles of the normal below.
    for level, probability in [(9.9999, 0.84134), (9.5, 0.5), (9.0, 0.15866)]:
        below = (magnitudes < level).sum()
        deviation = math.sqrt(number * probability * (1 - probability))
        assert abs(below - number * probability) < 5 * deviation


def test_without_a_deviation_the_magnitude_is_the_one_given():
    config = AugmentationConfig(
        policy="randaugment", policy_magnitude=5.0, policy_magnitude_std=0.0
    )
    arguments = collections.defaultdict(set)
    for steps in drawn(config, 2000):
        for step in steps:
            arguments[step.operation].add(round(step.argument, 9))
    expected = {
        "Rotate": {15, -15},
        "Posterize": {2},
        "Solarize": {128},
        "SolarizeAdd": {55},
        "TranslateXRelative": {0.225, -0.225},
        "TranslateYRelative": {0.225, -0.225},
    }
    for operation in ("ShearX", "ShearY"):
        expected[operation] = {0.15, -0.15}
    for operation in ("Color", "Contrast", "Brightness", "Sharpness"):
        expected[operation] = {0.55, 1.45}
    for operation in ("AutoContrast", "Equalize", "Invert"):
        expected[operation] = {0}
    assert arguments == expected


def test_no_operations_change_nothing():
    config = AugmentationConfig(policy="randaugment", policy_operations=0)
    image = policies.apply_policy(IMAGES[0], np.random.default_rng(0), config)
    np.testing.assert_array_equal(image, IMAGES[0])
    image = policies.apply_policy(
        IMAGES[0], np.random.default_rng(0), AugmentationConfig()
    )
    np.testing.assert_array_equal(image, IMAGES[0])


def test_trivialaugment_draws_operations_magnitudes_and_signs_evenly():
    number = 40_000
    images = drawn(TRIVIALAUGMENT, number)
    assert all(len(steps) == 1 for steps in images)
    steps = [step for steps in images for step in steps]
    names = collections.Counter(step.operation for step in steps)
    assert_uniform(names, 14, number)
    bilinear = Sampling(Image.Resampling.BILINEAR, (0, 0, 0))
    assert {step.sampling for step in steps} == {bilinear}
    thresholds = [s.argument for s in steps if s.operation == "Solarize"]
    assert_uniform(collections.Counter(thresholds), 31, len(thresholds))
    assert min(thresholds) == 0
    assert max(thresholds) == 255
    turns = [s.argument for s in steps if s.operation == "Rotate"]
    bins = collections.Counter(round(abs(turn) / 4.5) for turn in turns)
    assert_uniform(bins, 31, len(turns))
    turned = [turn for turn in turns if turn]
    signs = collections.Counter(turn > 0 for turn in turned)
    assert_uniform(signs, 2, len(turned))
    bits = collections.Counter(s.argument for s in steps if s.operation == "Posterize")
    # Bins 0 .. 30 fall on 8 .. 2 bits; the ends get half of a middle one's share.
    total = sum(bits.values())
    for kept, share in {8: 3, 7: 5, 6: 5, 5: 5, 4: 5, 3: 5, 2: 3}.items():
        expected = total * share / 31
        assert abs(bits[kept] - expected) < 5 * math.sqrt(expected)
    pixels = {s.argument for s in steps if s.operation == "TranslateX"}
    assert pixels == {sign * (32 * i // 30) for i in range(31) for sign in (1, -1)}


# What callers rely on.


@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_generator_gives_the_same_images(config):
    def run(seed):
        rng = np.random.default_rng(seed)
        return [policies.apply_policy(IMAGES[0], rng, config) for _ in range(20)]

    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = run(3)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.testing.assert_array_equal(first, run(3))
    assert (np.stack(first) != np.stack(run(4))).any()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_dtype_and_layout_stay_and_the_input_too(config, channels):
    # A mirrored window, as after the crop and the flip: a view that is not contiguous.
    image = IMAGES[0][3:67, 60:10:-1, :channels]
    copy = image.copy()
    rng = np.random.default_rng(0)
    for _ in range(100):
        changed = policies.apply_policy(image, rng, config)
        assert changed.shape == image.shape
        assert changed.dtype == np.uint8
        assert changed.flags.c_contiguous
        assert changed.flags.writeable
    np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("operation", policies.OPERATIONS)
def test_a_grey_image_changes_as_the_same_image_in_colour(operation):
    grey = IMAGES[0][..., :1]
    color = np.repeat(grey, 3, 2)
    argument = 0.25 if "Rel" in operation or "Shear" in operation else 1.7
    sampling = Sampling(Image.Resampling.BILINEAR, (90, 90, 90))
    changed = apply(grey, operation, argument, sampling)
    expected = apply(color, operation, argument, sampling)
    np.testing.assert_array_equal(np.repeat(changed, 3, 2), expected)


def test_a_grey_image_is_filled_with_luma():
    sampling = Sampling(Image.Resampling.BILINEAR, MEAN)
    moved = apply(IMAGES[0][..., :1], "TranslateX", 4, sampling)
    assert (moved[:, :4] == 117).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
    ],
)
def test_other_images_are_refused(image):
    with pytest.raises(UserError, match=r"expected uint8 \(h, w, 1 or 3\)"):
        policies.apply_policy(image, np.random.default_rng(0), TRIVIALAUGMENT)


def test_what_is_drawn_can_be_pickled():
    steps = [step for steps in drawn(RANDAUGMENT, 20) for step in steps]
    assert pickle.loads(pickle.dumps(steps)) == steps
    copy = pickle.loads(pickle.dumps(policies.apply_policy))
    assert copy is policies.apply_policy
