"""The appendix's localisation: its error in closed form, and nets that learn it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.data.order import Order
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection.anchors import Anchors
from resnet_jax.detection.annotations import decode
from resnet_jax.detection.localization import (
    evaluate_localizer,
    localization_error,
    localize,
    train_localizer,
)
from resnet_jax.detection.localization.crops import Crops
from resnet_jax.detection.localization.net import (
    LocalizationNet,
    best_boxes,
    localization_loss,
)
from resnet_jax.detection.sources.voc import open_voc
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.protocols import Center
from resnet_jax.models import create_model
from tests.detection.layouts import needs_real_data, real

ANCHORS = Anchors(sizes=(8, 16), ratios=(0.5, 1, 2), stride=4)


def tiny_net(name="cifar_resnet8", **options):
    """An untrained net, as ``load_net`` would return it."""
    model = create_model(name, num_classes=10, **options)
    image = jnp.zeros((1, 32, 32, 3))
    return TrainedNet(
        source="test",
        name=name,
        options={},
        model=model,
        variables=jax.jit(model.init)(jax.random.key(0), image),
        statistics=PixelStatistics(*np.full((2, 1, 1, 3), 0.5, np.float32)),
        protocol=Center(32),
        class_names=None,
    )


def rectangles(count, seed=0):
    """Dim noise with a red and a blue rectangle; the class says which is meant."""
    rng = np.random.default_rng(seed)
    images, boxes = [], []
    classes = rng.integers(0, 2, count)
    for kind in classes:
        height, width = rng.integers(32, 41), rng.integers(44, 57)
        image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        left = rng.permutation([0, width // 2])  # of the red and of the blue half
        for color in (0, 2):
            h, w = rng.integers(12, 21, 2)
            y = rng.integers(0, height - h + 1)
            x = left[color // 2] + rng.integers(0, width // 2 - w + 1)
            image[y : y + h, x : x + w] = 40
            image[y : y + h, x : x + w, color] = 230
            if color == 2 * kind:
                boxes.append(np.array([[x, y, x + w, y + h]], np.float32))
        images.append(image)
    return images, boxes, classes


@pytest.fixture(scope="module")
def learned():
    return train_localizer(
        tiny_net(),
        *rectangles(64),
        2,
        steps=200,
        learning_rate=optax.cosine_decay_schedule(0.05, 200),
        batch_size=16,
        size=32,
        shorter_sides=(32, 40),
        anchors=ANCHORS,
    )


WHOLE = {"shorter_sides": (32,), "crop": None}


def test_bright_rectangles_are_learned(learned):
    assert learned.losses[-10:].mean() < learned.losses[0] / 8
    result = evaluate_localizer(learned, *rectangles(64), **WHOLE)
    assert result["localization_error"] == 0


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"shorter_sides": (32,), "crop": 32}, 0.35),  # Some are cut off.
        (WHOLE, 0.1),
        ({"shorter_sides": (32, 36, 40), "crop": None}, 0.1),
    ],
)
def test_bright_rectangles_are_found_in_new_images(learned, options, most):
    result = evaluate_localizer(learned, *rectangles(60, seed=1), **options)
    assert result["localization_error"] <= most
    assert result["classification_error"] == 0


def test_each_guess_is_localized_by_its_own_class(learned):
    images, boxes, classes = rectangles(20, seed=2)
    both = np.tile([1, 0], (20, 1))
    found, _ = localize(learned, images, both, **WHOLE)
    result = evaluate_localizer(learned, images, boxes, classes, both, **WHOLE)
    assert result == localization_error(found, both, boxes, classes)
    assert (result["images"], result["guesses"]) == (20, 2)
    assert result["localization_error"] <= 0.1
    wrong = evaluate_localizer(
        learned, images, boxes, classes, 1 - classes[:, None], **WHOLE
    )
    assert wrong["localization_error"] == wrong["classification_error"] == 1
    # The other class's box is the other rectangle, even if it is called this class's.
    swapped = localization_error(found[:, ::-1], both, boxes, classes)
    assert swapped["localization_error"] == 1


def test_views_and_batches_change_nothing(learned):
    """Padding has no effect, views are placed, and small batches find the same."""
    images, _, classes = rectangles(6, seed=3)
    asked = classes[:, None]
    together, scores = localize(learned, images, asked, **WHOLE, batch_size=16)
    for index, image in enumerate(images):
        alone = localize(learned, [image], asked[[index]], **WHOLE, batch_size=8)
        np.testing.assert_allclose(alone[0][0], together[index], atol=0.01)
        np.testing.assert_allclose(alone[1][0], scores[index], atol=1e-4)
    # A crop of the whole of square images is the images.
    squares = [np.ascontiguousarray(image[:32, :32]) for image in images]
    crop = localize(learned, squares, asked, shorter_sides=(32,), crop=32)
    whole = localize(learned, squares, asked, **WHOLE)
    np.testing.assert_allclose(crop[0], whole[0], atol=0.01)
    # Twice the pixels: the same box, twice as large.
    large = [np.kron(image, np.ones((2, 2, 1), np.uint8)) for image in squares]
    found, _ = localize(learned, large, asked, **WHOLE)
    np.testing.assert_allclose(found, 2 * whole[0], atol=4)


def test_training_depends_on_the_seed_alone():
    def losses(**options):
        given = {"steps": 2, "learning_rate": 0.01, "batch_size": 8, "size": 32}
        given |= {"shorter_sides": (32, 40), "anchors": ANCHORS} | options
        return train_localizer(NET, *rectangles(10), 2, **given).losses

    first = losses(num_threads=1)
    np.testing.assert_array_equal(first, losses(num_threads=4))
    assert (first != losses(seed=1)).all()


NET = tiny_net()


def test_the_error_by_hand():
    true = [np.array([[0, 0, 10, 10], [20, 20, 30, 30]])] * 4
    found = np.zeros((4, 2, 4), np.float32)
    found[0, 1] = [20, 20, 30, 25]  # the class, and an IoU of exactly 0.5
    found[1, 1] = [20, 20, 30, 24.9]  # just below
    found[2, 0] = [0, 0, 10, 10]  # the box with another class
    found[3, 0] = [0, 0, 10, 10]  # the class, and the box with another class
    guesses = np.array([[5, 7], [5, 7], [5, 7], [7, 5]])
    classes = np.array([7, 7, 7, 7])
    result = localization_error(found, guesses, true, classes)
    assert result["localization_error"] == 0.5
    assert result["classification_error"] == 0
    classes = np.array([7, 5, 6, 5])
    result = localization_error(found, guesses, true, classes)
    assert result["localization_error"] == 0.75
    assert result["classification_error"] == 0.25
    result = localization_error(found, guesses, true, classes, threshold=0.51)
    assert result["localization_error"] == 1


def test_a_crop_shows_its_boxes():
    """The corners of a rectangle are where its pixels are, flipped or not."""
    image = np.zeros((60, 90, 3), np.uint8)
    image[20:44, 30:66] = 255
    boxes = [np.array([[30, 20, 66, 44], [0, 0, 2, 2]], np.float32)]
    data = Crops([image], boxes, np.array([3]), 48, (48, 60), Order(1, 0))
    shown = 0
    for place in range(40):
        crop = data.crop(place)
        assert crop["images"].shape == (48, 48, 3)
        assert crop["classes"] == 3
        # The second box is too small to be seen, but its share of area counts.
        if not crop["present"][0]:
            continue
        shown += 1
        bright = np.argwhere(crop["images"][..., 0] > 127)
        top, left = bright.min(axis=0)
        bottom, right = bright.max(axis=0) + 1
        expected = [left, top, right, bottom]
        np.testing.assert_allclose(crop["boxes"][0], expected, atol=1)
    assert 10 < shown <= 40


def outputs_of(net, variables, images):
    return (np.array(each, np.float64) for each in net.apply(variables, images))


@pytest.fixture(scope="module")
def random_outputs():
    """A net with random heads, images, and the scores and deltas of all anchors."""
    trained = tiny_net()
    backbone = trained.model.clone(num_classes=None)
    net = LocalizationNet(backbone, 3, ANCHORS.per_cell)
    rng = np.random.default_rng(5)
    images = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = net.init(jax.random.key(1), images)
    variables["params"] = variables["params"] | {
        name: {
            "kernel": rng.normal(0, 0.1, variables["params"][name]["kernel"].shape),
            "bias": rng.normal(0, 0.1, variables["params"][name]["bias"].shape),
        }
        for name in ("cls", "reg")
    }
    scores, deltas = outputs_of(net, variables, images)
    return net, variables, images, scores.reshape(4, -1, 3), deltas.reshape(4, -1, 3, 4)


def decoded(delta, anchor):
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = (anchor[:2] + anchor[2:]) / 2 + delta[:2] * (w, h)
    w, h = np.exp(delta[2:]) * (w, h)
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def test_the_best_box_is_that_of_the_highest_score(random_outputs):
    net, variables, images, scores, deltas = random_outputs
    sizes = np.array([[32, 32], [32, 20], [16, 32], [24, 24]], np.int32)
    classes = np.array([[0, 1], [2, 0], [1, 1], [2, 1]], np.int32)
    boxes, logits = best_boxes(net, ANCHORS, variables, images, sizes, classes)
    for index, (height, width) in enumerate(sizes):
        alone = images[[index], :height, :width]
        scores, deltas = outputs_of(net, variables, alone)
        scores, deltas = scores.reshape(-1, 3), deltas.reshape(-1, 3, 4)
        grid = ANCHORS.grid(height // 4, width // 4)
        for asked, kind in enumerate(classes[index]):
            best = scores[:, kind].argmax()
            expected = decoded(deltas[best, kind], grid[best])
            expected = expected.clip(0, [width, height] * 2)
            np.testing.assert_allclose(boxes[index, asked], expected, atol=1e-3)
            assert logits[index, asked] == pytest.approx(scores[best, kind], abs=1e-4)


def test_the_loss_by_hand(random_outputs):
    """With an anchor of the box's own shape, the sample is known up to negatives."""
    net, variables, images, scores, deltas = random_outputs
    classes = np.array([0, 1, 2, 1])
    absent = np.zeros((4, 1), bool)
    boxes = np.zeros((4, 1, 4), np.float32)
    keys = [jax.random.key(number) for number in range(200)]
    loss = jax.jit(
        lambda key, boxes, present: localization_loss(
            net, ANCHORS, variables, key, images, boxes, present, classes
        )
    )
    # Without objects, every anchor is a negative of the class: the mean over samples.
    own = scores[np.arange(4), :, classes]
    negatives = np.log1p(np.exp(own))
    found = np.mean([loss(key, boxes, absent) for key in keys])
    assert found == pytest.approx(negatives.mean(), rel=0.02)
    # One box that is an anchor: one positive, seven negatives of far anchors.
    grid = ANCHORS.grid(8, 8)
    place = 6 * 27 + 4
    boxes = np.tile(grid[place], (4, 1, 1))
    overlaps = np.array(
        [max_iou(anchor, grid[place]) for anchor in grid.astype(np.float64)]
    )
    far = overlaps < 0.3
    assert (overlaps >= 0.7).sum() == 1
    positive = np.log1p(np.exp(-own[:, place]))
    size = np.abs(deltas[np.arange(4), place, classes])
    smooth = np.where(size < 1, size**2 / 2, size - 0.5).sum(-1)
    expected = (positive + smooth + 7 * negatives[:, far].mean(1)) / 8
    found = np.mean([loss(key, boxes, ~absent) for key in keys])
    assert found == pytest.approx(expected.mean(), rel=0.02)


def max_iou(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = np.prod(np.maximum(sides, 0))
    return both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


IMAGES, BOXES, CLASSES = rectangles(4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": CLASSES[:3]}, "4 images, 4 arrays of boxes and 3 classes"),
        ({"classes": CLASSES + 1}, "classes must be integers from 0 to 1, not int64"),
        ({"classes": CLASSES[:, None]}, r"classes must be \(4\), not \(4, 1\)"),
        ({"boxes": [*BOXES[:3], np.zeros((0, 4))]}, "image 3 must be .* leave images"),
        ({"boxes": [BOXES[0][:, ::-1], *BOXES[1:]]}, "image 0 must be finite x1"),
        ({"batch_size": 12}, "batch_size=12 does not divide over 8 devices"),
        ({"anchors": Anchors()}, "stride of 16 pixels, but the last map of cifar_"),
        ({"learning_rate": 1e20}, "the loss of step 1 is not finite: learn more"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, sentence):
    given = {"images": IMAGES, "boxes": BOXES, "classes": CLASSES, "num_classes": 2}
    given |= {"steps": 2, "learning_rate": 0.01, "batch_size": 8, "size": 32}
    given |= {"shorter_sides": (32, 40), "anchors": ANCHORS}
    with pytest.raises(UserError, match=sentence):
        train_localizer(NET, **given | changes)


def test_what_cannot_be_localized_is_refused(learned):
    with pytest.raises(UserError, match="a crop of 224 needs shorter sides of at"):
        localize(learned, IMAGES, CLASSES[:, None], shorter_sides=(32,))
    with pytest.raises(UserError, match=r"classes must be \(4, k\), not \(4,\)"):
        localize(learned, IMAGES, CLASSES, **WHOLE)


def blood_cells(source, photos):
    """Each photograph twice: where are the white cells, and where the red ones?"""
    images, boxes, classes = [], [], []
    for index in photos:
        found = source.annotation(index)
        for label, name in enumerate(("WBC", "RBC")):
            chosen = found.classes == source.class_names.index(name)
            if chosen.any():
                images.append(decode(source, index))
                boxes.append(found.boxes[chosen])
                classes.append(label)
    return images, boxes, np.array(classes)


@pytest.mark.slow
@needs_real_data
def test_cells_on_photographs_are_found():
    """Twelve photographs of blood teach a small net where cells are in new ones."""
    source = open_voc(real("BCCD"), "trainval")
    localizer = train_localizer(
        NET,
        *blood_cells(source, range(12)),
        2,
        steps=200,
        learning_rate=optax.cosine_decay_schedule(0.02, 200),
        batch_size=16,
        size=64,
        shorter_sides=(64, 72),
        anchors=Anchors(sizes=(14, 28), stride=4),
    )
    images, boxes, classes = blood_cells(source, range(60, 100))
    asked = classes[:, None]
    found, _ = localize(localizer, images, asked, shorter_sides=(64, 72), crop=None)
    result = localization_error(found, asked, boxes, classes)
    white = localization_error(
        found[classes == 0],
        asked[classes == 0],
        [each for each, kind in zip(boxes, classes, strict=True) if kind == 0],
        classes[classes == 0],
    )
    assert result["images"] == len(classes) > 70
    assert result["localization_error"] <= 0.5
    assert white["localization_error"] <= 0.3
