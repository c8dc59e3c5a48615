"""Accelerators as their vendors describe them."""

import dataclasses
from collections.abc import Sequence

from resnet_jax.errors import UserError, nearest

_CLOUD = "https://cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of one chip.

    Attributes:
      name: as ``--chip`` takes it.
      bfloat16_tflops: dense peak, 10^12 operations per second; a multiply-add is two.
      float32_tflops: the same at JAX's default precision: TF32 on GPUs, one pass of
        bfloat16 on TPUs.
      memory_gb: 10^9 bytes.
      memory_gb_per_second: bandwidth of that memory, 10^9 bytes per second.
      source: page with the figures.
    """

    name: str
    bfloat16_tflops: float
    float32_tflops: float
    memory_gb: float
    memory_gb_per_second: float
    source: str

    def peak(self, dtype: str) -> float:
        """Operations per second in products of a dtype."""
        bfloat16 = dtype == "bfloat16"
        return 1e12 * (self.bfloat16_tflops if bfloat16 else self.float32_tflops)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("tpu_v4", 275, 275, 32, 1228, f"{_CLOUD}/v4"),
        Chip("tpu_v5e", 197, 197, 16, 819, f"{_CLOUD}/v5e"),
        Chip("tpu_v5p", 459, 459, 95, 2765, f"{_CLOUD}/v5p"),
        Chip("tpu_v6e", 918, 918, 32, 1638, f"{_CLOUD}/v6e"),
        # Data sheets give GPUs' peaks "with sparsity"; these are half of that.
        Chip("a100_40gb", 312, 156, 40, 1555, f"{_NVIDIA}/a100"),
        Chip("a100_80gb", 312, 156, 80, 2039, f"{_NVIDIA}/a100"),
        Chip("h100_sxm", 989, 494, 80, 3350, f"{_NVIDIA}/h100"),
        Chip("h200_sxm", 989, 494, 141, 4800, f"{_NVIDIA}/h200"),
        # An eighth of a DGX B200: 1,440 GB at 64 TB/s.
        Chip("b200", 2250, 1125, 180, 8000, f"{_NVIDIA}/dgx-b200"),
    )
}


def find_chips(names: Sequence[str]) -> list[Chip]:
    """The chips with these names; without names, all chips.

    Raises:
      UserError: an unknown name.
    """
    for name in names:
        if name not in CHIPS:
            similar = [known for known in CHIPS if name.lower() in known]
            hint = f"did you mean {' or '.join(similar)}?" if similar else None
            raise UserError(f"unknown chip {name!r}; {hint or nearest(name, CHIPS)}")
    return [CHIPS[name] for name in names or CHIPS]
