"""Small data sets in the layouts of VOC and COCO: bright rectangles on black."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REAL = os.environ.get("RESNET_JAX_DETECTION_DATA")
needs_real_data = pytest.mark.skipif(
    REAL is None,
    reason="RESNET_JAX_DETECTION_DATA does not name a folder with real annotations",
)


def real(name: str) -> Path:
    """A folder of real annotations."""
    return Path(str(REAL)) / name


def picture(width, height, boxes):
    """A black image with a white rectangle in each box x1, y1, x2, y2."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = 255
    return Image.fromarray(pixels)


def found_box(image):
    """The box x1, y1, x2, y2 around the bright pixels of an image (h, w, 3)."""
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def voc_object(name, box, difficult=0):
    """The XML of an object; ``box`` counts from 0 and ends before x2, y2."""
    x1, y1, x2, y2 = box
    corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
    inner = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners.items())
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        f"<bndbox>{inner}</bndbox></object>"
    )


def voc_annotation(width, height, *objects):
    """The XML of an image."""
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{''.join(objects)}</annotation>"
    )


def write_voc(root, split, images):
    """Writes images ``{name: (width, height, [(class, box), ...])}`` and their list."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, (width, height, objects) in images.items():
        xml = voc_annotation(width, height, *(voc_object(*each) for each in objects))
        (root / "Annotations" / f"{name}.xml").write_text(xml)
        image = picture(width, height, [each[1] for each in objects])
        image.save(root / "JPEGImages" / f"{name}.png")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(images))
    return root


def coco_content(images, categories):
    """COCO's JSON of images as for ``write_voc``, whose ids are 10, 20, ..."""
    names = {name: number for number, name in categories.items()}
    entries, annotations = [], []
    for place, (name, (width, height, objects)) in enumerate(images.items(), 1):
        entries.append(
            {"id": 10 * place, "file_name": name, "width": width, "height": height}
        )
        for kind, (x1, y1, x2, y2) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * place,
                    "category_id": names[kind],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1) / 2,
                    "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, x2, y2]],
                }
            )
    return {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }


def write_coco(root, split, images, categories):
    """Writes the images and the JSON of a split."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for name, (width, height, objects) in images.items():
        picture(width, height, [each[1] for each in objects]).save(root / split / name)
    write_instances(root, split, coco_content(images, categories))
    return root


def write_instances(root, split, content):
    """Writes the JSON of a split."""
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "annotations" / f"instances_{split}.json").write_text(text)
