"""The whole Faster R-CNN against one put together from torchvision's parts.

Its backbone is conv1 to layer3 and its box head layer4, so that it has one map of
stride 16, as the paper's. Both have the same random weights, through a file.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from resnet_jax.detection.boxes import encode, iou
from resnet_jax.detection.faster_rcnn import (
    make_detector,
    prepared,
    proposals_of,
)
from resnet_jax.detection.head import DELTA_WEIGHTS
from resnet_jax.detection.inference import detections_of
from resnet_jax.detection.losses import (
    AnchorSample,
    RegionSample,
    head_losses,
    rpn_losses,
)
from resnet_jax.detection.matching import match
from resnet_jax.detection.rpn import ANCHOR_WEIGHTS
from resnet_jax.detection.weights import read_detector
from resnet_jax.weights.files import write_safetensors
from tests.detection.tiny import SAME
from tests.torch_peers import import_peer, torch

NUM_CLASSES = 3
ANCHOR_SIZES = (16, 32, 64)
# Padded to multiples of 32, as torchvision pads a batch.
SIZE = (96, 128)


def plain_batched_nms(boxes, scores, classes, threshold):
    """Greedy suppression in each class; torchvision's own needs compiled code."""
    iou = sys.modules["torchvision.ops.boxes"].box_iou(boxes, boxes)
    near = (iou > threshold) & (classes[:, None] == classes[None])
    kept = []
    for place in scores.argsort(descending=True, stable=True).tolist():
        if not near[place, kept].any():
            kept.append(place)
    return torch.tensor(kept, dtype=torch.int64)


@pytest.fixture(scope="module")
def peer():
    """torchvision's detector with random weights and statistics."""
    torchvision = import_peer("torchvision")
    detection = import_peer("torchvision.models.detection")
    torch.manual_seed(0)
    ops = torchvision.ops
    net = torchvision.models.resnet18(norm_layer=ops.FrozenBatchNorm2d)
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    backbone = torch.nn.Sequential(*(getattr(net, name) for name in names))
    backbone.out_channels = 256
    anchors = detection.rpn.AnchorGenerator((ANCHOR_SIZES,), ((0.5, 1.0, 2.0),))
    pool = torch.nn.AdaptiveAvgPool2d(1)
    model = detection.FasterRCNN(
        backbone,
        num_classes=None,
        min_size=SIZE[0],
        max_size=SIZE[1],
        rpn_anchor_generator=anchors,
        box_roi_pool=ops.MultiScaleRoIAlign(["0"], 7, 2),
        box_head=torch.nn.Sequential(net.layer4, pool, torch.nn.Flatten()),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(512, NUM_CLASSES + 1),
        rpn_pre_nms_top_n_test=150,
        rpn_post_nms_top_n_test=20,
    )
    for name, array in model.state_dict().items():
        if name.endswith("running_var"):
            array.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            array.normal_(0, 0.1)
        elif name.startswith(("rpn.head", "roi_heads.box_predictor")):
            # So little that no proposal is thin: of a region less than a cell wide,
            # the operator in Python reads samples past the map, the compiled one not.
            array.normal_(0, 0.01)
    return model.eval()


@pytest.fixture(autouse=True)
def python_operators(peer, monkeypatch):
    """torchvision's operators in Python: it is installed without compiled ones."""
    ops, tv = sys.modules["torchvision.ops.roi_align"], "torchvision.ops."

    def roi_align(x, boxes, output_size, spatial_scale, sampling_ratio):
        args = (x, boxes, spatial_scale, *output_size, sampling_ratio, False)
        return ops._roi_align.__wrapped__(*args)

    monkeypatch.setattr(sys.modules[tv + "poolers"], "roi_align", roi_align)
    monkeypatch.setattr(sys.modules[tv + "boxes"], "batched_nms", plain_batched_nms)


@pytest.fixture(scope="module")
def ours(peer, tmp_path_factory):
    """Our net with the peer's weights: (net, read detector)."""
    read = through_a_file(peer.state_dict(), tmp_path_factory.mktemp("weights"))
    detector = dataclasses.replace(
        read.config.detector,
        anchor_sizes=ANCHOR_SIZES,
        roi_size=7,
        test_candidates=150,
        test_proposals=20,
        smallest_proposal=1e-3,
    )
    config = dataclasses.replace(read.config, detector=detector)
    return make_detector(config, read.num_classes), read


def through_a_file(tensors, folder):
    """A state dict, read as a detector of ours."""
    path = folder / "torchvision.safetensors"
    write_safetensors(path, {name: array.numpy() for name, array in tensors.items()})
    return read_detector(path)


def images_of(statistics):
    """Two images: (normalised, their sizes, for torchvision)."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 12, 16, 3), np.uint8)
    images = coarse.repeat(8, 1).repeat(8, 2)
    theirs = [torch.tensor(image).permute(2, 0, 1) / 255 for image in images]
    return prepared(images, statistics), jnp.array([SIZE, SIZE]), theirs


def test_the_file_says_what_the_net_is(ours):
    _, read = ours
    assert read.config.model.name == "resnet18"
    assert read.config.model.stride_version is None
    assert read.num_classes == NUM_CLASSES
    assert read.config.detector.rpn_features == 256
    np.testing.assert_allclose(np.ravel(read.statistics.mean), [0.485, 0.456, 0.406])


def test_proposals_and_detections(peer, ours):
    model, read = ours
    images, sizes, theirs = images_of(read.statistics)
    with torch.no_grad():
        batch, _ = peer.transform(theirs)
        maps = peer.backbone(batch.tensors)
        proposals, _ = peer.rpn(batch, {"0": maps})
        detections = peer(theirs)

    @jax.jit
    def run(variables):
        net = model.bind(variables)
        our_maps = net.features(images, sizes)
        found = detections_of([model], [variables], [SAME], [(images, sizes)])
        return our_maps, proposals_of(net, our_maps, sizes), found

    our_maps, our_proposals, found = run(read.variables)
    np.testing.assert_allclose(our_maps, maps.permute(0, 2, 3, 1), atol=1e-4)
    for place in range(2):
        assert our_proposals.valid[place].all()
        np.testing.assert_allclose(
            our_proposals.boxes[place], proposals[place], atol=1e-3
        )
        expected, valid = detections[place], found.valid[place]
        assert valid.sum() == len(expected["boxes"]) > 10
        boxes, scores = found.boxes[place][valid], found.scores[place][valid]
        np.testing.assert_allclose(scores, expected["scores"], atol=1e-4)
        np.testing.assert_allclose(boxes, expected["boxes"], atol=2e-3)
        np.testing.assert_array_equal(
            found.classes[place][valid] + 1, expected["labels"]
        )


BOXES = np.array(
    [
        [[10, 10, 50, 40], [60, 30, 120, 90], [30, 50, 62, 82]],
        [[5, 40, 40, 90], [70, 5, 100, 60], [64, 64, 80, 80]],
    ],
    np.float32,
)
CLASSES = np.array([[0, 1, 2], [2, 0, 1]])


def first_samples(positives, size):
    """A sampler of torchvision's kind that takes the first ones, and keeps them."""

    def sample(labels):
        masks = []
        for of_image in labels:
            positive = torch.where(of_image >= 1)[0][:positives]
            negative = torch.where(of_image == 0)[0]
            step = len(negative) // size
            negative = negative[::step][: size - len(positive)]
            masks.append([torch.zeros(len(of_image), dtype=torch.uint8) for _ in "pn"])
            masks[-1][0][positive], masks[-1][1][negative] = 1, 1
        sample.drawn = [positive + negative for positive, negative in masks]
        return tuple(zip(*masks))

    return sample


def losses_of_peer(peer, images):
    """Its losses and gradients, the sampled anchors, and the sampled regions."""
    peer.rpn.fg_bg_sampler = first_samples(4, 32)
    peer.roi_heads.fg_bg_sampler = first_samples(4, 16)
    choose, regions = peer.roi_heads.select_training_samples, []

    def select(*args):
        regions.append(choose(*args))
        return regions[-1]

    peer.roi_heads.select_training_samples = select
    targets = [
        {"boxes": torch.tensor(boxes), "labels": torch.tensor(classes) + 1}
        for boxes, classes in zip(BOXES, CLASSES)
    ]
    peer.train()
    losses = peer(images, targets)
    sum(losses.values()).backward()
    peer.eval()
    anchors = np.stack([mask.numpy() > 0 for mask in peer.rpn.fg_bg_sampler.drawn])
    boxes, _, labels, targets = (torch.stack(part).numpy() for part in regions[0])
    return losses, anchors, RegionSample(boxes, labels, targets)


def our_samples(anchors, drawn, regions):
    """What our functions make of the anchors and regions that the peer has drawn."""
    samples = []
    for place, (boxes, classes) in enumerate(zip(BOXES, CLASSES)):
        labels, index = match(iou(boxes, anchors), np.ones(3, bool), 0.3, 0.7, True)
        chosen = np.flatnonzero(drawn[place])
        targets = encode(boxes[index[chosen]], anchors[chosen], ANCHOR_WEIGHTS)
        of_anchors = AnchorSample(jnp.array(chosen), labels[chosen], targets)
        region = jnp.asarray(regions.boxes[place])
        labels, index = match(iou(boxes, region), np.ones(3, bool), 0.5, 0.5)
        is_object = labels == 1
        assert is_object.sum() >= 3
        labels = jnp.where(is_object, classes[index], NUM_CLASSES)
        np.testing.assert_array_equal((labels + 1) % 4, regions.labels[place])
        targets = encode(boxes[index], region, DELTA_WEIGHTS)
        np.testing.assert_allclose(
            targets[is_object], regions.targets[place][is_object], atol=1e-4
        )
        samples.append((of_anchors, RegionSample(region, labels, targets)))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *samples)


def test_losses_and_gradients(peer, ours, tmp_path):
    model, read = ours
    images, sizes, theirs = images_of(read.statistics)
    expected, drawn, regions = losses_of_peer(peer, theirs)
    anchors = jnp.asarray(model.anchors.grid(SIZE[0] // 16, SIZE[1] // 16))
    of_anchors, of_regions = our_samples(anchors, drawn, regions)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_fn(params):
        net = model.bind({**read.variables, "params": params})
        maps = net.features(images, sizes)
        rpn = jax.vmap(rpn_losses)(*net.rpn_of(maps, sizes), of_anchors)
        logits, deltas = net.classify(maps, of_regions.boxes, sizes)
        # torchvision's boxes of regions bend where those of anchors do.
        losses = functools.partial(head_losses, beta=1 / 9)
        head = jax.vmap(losses)(logits, deltas, of_regions)
        terms = [term.mean() for term in (*rpn, *head)]
        return sum(terms), terms

    (_, terms), gradients = loss_fn(read.variables["params"])
    names = ("objectness", "rpn_box_reg", "classifier", "box_reg")
    for name, term in zip(names, terms):
        theirs = float(expected[f"loss_{name}"].detach())
        np.testing.assert_allclose(term, theirs, rtol=1e-4, err_msg=name)
        assert theirs > 1e-3

    # Gradients have the names of their parameters, so the same file carries them.
    # torchvision's frozen normalisations have no parameters.
    tensors = {name: torch.zeros_like(t) for name, t in peer.state_dict().items()}
    tensors |= {name: p.grad for name, p in peer.named_parameters()}
    theirs = through_a_file(tensors, tmp_path).variables["params"]
    theirs, gradients = (
        traverse_util.flatten_dict(tree, sep="/") for tree in (theirs, gradients)
    )
    compared = [name for name in theirs if "norm" not in name]
    assert len(compared) == 30
    for name in compared:
        largest = abs(theirs[name]).max()
        assert largest > 0
        np.testing.assert_allclose(
            gradients[name], theirs[name], atol=1e-4 * largest, err_msg=name
        )
