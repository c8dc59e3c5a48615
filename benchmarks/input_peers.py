"""The input pipelines that ``input_pipeline`` compares, each in its own process.

    python -m benchmarks.input_peers NAME IMAGES BATCH_SIZE

For each line N of standard input it makes N batches and answers with one line of JSON:
images, seconds, and peak memory in MiB. All pipelines take a random Inception crop
(area 8 to 100 %, aspect 3:4 to 4:3) of every JPEG under IMAGES, in random order, resize
it to 224 x 224 and mirror half of them.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZE = 224
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MANY = 1000  # times that the folder is repeated in one iterator


def jpeg_files(images: str) -> list[str]:
    """The files of a folder of class folders."""
    found = (path for path in Path(images).rglob("*") if path.is_file())
    return sorted(str(path) for path in found)


def ours(images: str, batch_size: int) -> Iterator[Any]:
    """This library's, on a folder of files or on prepared data."""
    from resnet_jax.config import default_config, resolve
    from resnet_jax.data.chunks import Layout, TrainingChunks
    from resnet_jax.data.feeds import host_batches, training_order
    from resnet_jax.data.sources import open_collection
    from resnet_jax.data.split import Split

    config = default_config()
    config.data.path = str(Path(images).parent)
    config.data.image_size = SIZE
    config.data.normalization = "imagenet"
    config.augmentation.crop_area = AREA
    config.augmentation.crop_aspect = ASPECT
    config.augmentation.flip = True
    config.training.steps = 1
    run = resolve(config)
    source = open_collection(run.data).source(Path(images).name)
    split = Split("train", source, run.data)
    order = training_order(len(split), 0, batch_size, run.data, run.augmentation)
    layout = Layout.of(batch_size, SIZE * SIZE * 3)
    chunks = TrainingChunks(split, run.augmentation, order, 0, layout, skips=False)
    return host_batches(chunks, run.data)


def _tensorflow_crops(images: str, batch_size: int, finish: Any, wide: bool) -> Any:
    """tf.data in the shape of Flax's ImageNet example; ``finish`` resizes."""
    import tensorflow as tf

    # That example's window must overlap a box that is the whole image.
    whole = tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4])

    def example(file):
        encoded = tf.io.read_file(file)
        shape = tf.io.extract_jpeg_shape(encoded)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            bounding_boxes=whole,
            min_object_covered=0.1,
            aspect_ratio_range=ASPECT,
            area_range=AREA,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        top, left, _ = tf.unstack(begin)
        height, width, _ = tf.unstack(size)
        window = tf.stack([top, left, height, width])
        image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
        return finish(tf, image)

    files = tf.data.Dataset.from_tensor_slices(jpeg_files(images))
    options = tf.data.Options()
    if wide:
        options.threading.private_threadpool_size = 48
    return (
        files.with_options(options)
        .repeat(_MANY)
        .shuffle(16 * batch_size, seed=0)
        .map(example, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size, drop_remainder=True)
        .prefetch(10)
        .as_numpy_iterator()
    )


def flax_tf(images: str, batch_size: int) -> Iterator[Any]:
    """Flax's ImageNet example: bicubic without antialiasing, float32, normalised."""

    def finish(tf, image):
        image = tf.image.resize(image, [SIZE, SIZE], method="bicubic")
        image = tf.image.random_flip_left_right(image)
        image -= tf.constant(MEAN, shape=[1, 1, 3]) * 255.0
        return image / (tf.constant(STD, shape=[1, 1, 3]) * 255.0)

    return _tensorflow_crops(images, batch_size, finish, wide=True)


def tf_uint8(images: str, batch_size: int) -> Iterator[Any]:
    """tf.data, antialiased bilinear resizing, uint8."""

    def finish(tf, image):
        image = tf.image.resize(image, [SIZE, SIZE], antialias=True)
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.round(image), tf.uint8)

    return _tensorflow_crops(images, batch_size, finish, wide=False)


def tf_uint8_aliased(images: str, batch_size: int) -> Iterator[Any]:
    """The same without antialiasing."""

    def finish(tf, image):
        image = tf.image.resize(image, [SIZE, SIZE])
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.round(image), tf.uint8)

    return _tensorflow_crops(images, batch_size, finish, wide=False)


class PillowImages:
    """torchvision's RandomResizedCrop and flip by its own Pillow calls, for torch.

    Written out because torchvision's package need not match the torch at hand.
    """

    def __init__(self, files: list[str], as_float: bool):
        self.files, self.as_float = files, as_float

    def __len__(self) -> int:
        return len(self.files) * _MANY

    def __getitem__(self, index: int) -> Any:
        import numpy as np
        import torch
        from PIL import Image

        with open(self.files[index % len(self.files)], "rb") as file:
            image = Image.open(file).convert("RGB")
        top, left, height, width = self._window(image.height, image.width)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if not self.as_float:
            return pixels
        unit = pixels.to(torch.float32).div(255)
        mean = torch.tensor(MEAN).view(-1, 1, 1)
        return unit.sub_(mean).div_(torch.tensor(STD).view(-1, 1, 1))

    def _window(self, height: int, width: int) -> tuple[int, int, int, int]:
        import math

        import torch

        for _ in range(10):
            area = height * width * float(torch.empty(1).uniform_(*AREA))
            low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
            ratio = math.exp(float(torch.empty(1).uniform_(low, high)))
            wide, high_ = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high_ <= height:
                top = int(torch.randint(0, height - high_ + 1, (1,)))
                left = int(torch.randint(0, width - wide + 1, (1,)))
                return top, left, high_, wide
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side


def _torch_pillow(images: str, batch_size: int, as_float: bool) -> Iterator[Any]:
    import torch

    torch.set_num_threads(1)
    return iter(
        torch.utils.data.DataLoader(
            PillowImages(jpeg_files(images), as_float),  # type: ignore[arg-type]
            batch_size=batch_size,
            shuffle=True,
            num_workers=len(os.sched_getaffinity(0)),
            drop_last=True,
        )
    )


def torch_pillow(images: str, batch_size: int) -> Iterator[Any]:
    """Torch's DataLoader and torchvision's Pillow calls: float32, normalised."""
    return _torch_pillow(images, batch_size, as_float=True)


def torch_pillow_uint8(images: str, batch_size: int) -> Iterator[Any]:
    """The same, left as uint8."""
    return _torch_pillow(images, batch_size, as_float=False)


PEERS = {
    "resnet_jax": ours,
    "flax_tf": flax_tf,
    "tf_uint8": tf_uint8,
    "tf_uint8_aliased": tf_uint8_aliased,
    "torch_pillow": torch_pillow,
    "torch_pillow_uint8": torch_pillow_uint8,
}


def main() -> None:
    """Answers each line of standard input; ends with it."""
    name, images, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    batches = PEERS[name](images, batch_size)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        answer = {
            "images": count * batch_size,
            "seconds": time.perf_counter() - start,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(answer), flush=True)
    # Do not wait for the worker threads of tf.data and grain.
    os._exit(0)


if __name__ == "__main__":
    main()
