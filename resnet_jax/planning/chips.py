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
      bfloat16_tflops: peak of dense matrix products, 10^12 operations a second, a
        multiply-add being two.
      float32_tflops: what JAX's default precision makes of float32 products: TF32 on
        NVIDIA's; one pass of bfloat16 on TPUs, whose peak it is then.
      memory_gb: 10^9 bytes.
      memory_gb_per_second: bandwidth of that memory, 10^9 bytes a second.
      interconnect_gb_per_second: to other chips, both directions together, 10^9 bytes
        a second: TPUs' inter-chip interconnect within a slice, NVLink within a node.
      source: where the figures stand.
    """

    name: str
    bfloat16_tflops: float
    float32_tflops: float
    memory_gb: float
    memory_gb_per_second: float
    interconnect_gb_per_second: float
    source: str

    def peak(self, dtype: str) -> float:
        """Operations a second of products of a dtype."""
        bfloat16 = dtype == "bfloat16"
        return 1e12 * (self.bfloat16_tflops if bfloat16 else self.float32_tflops)


CHIPS = {
    chip.name: chip
    for chip in (
        # 2400 Gbps of interconnect.
        Chip("tpu_v4", 275, 275, 32, 1228, 300, f"{_CLOUD}/v4"),
        Chip("tpu_v5e", 197, 197, 16, 819, 400, f"{_CLOUD}/v5e"),
        # 4800 Gbps of interconnect.
        Chip("tpu_v5p", 459, 459, 95, 2765, 600, f"{_CLOUD}/v5p"),
        Chip("tpu_v6e", 918, 918, 32, 1638, 800, f"{_CLOUD}/v6e"),
        # Tensor cores: the data sheets' figures "with sparsity" are halved.
        Chip("a100_40gb", 312, 156, 40, 1555, 600, f"{_NVIDIA}/a100"),
        Chip("a100_80gb", 312, 156, 80, 2039, 600, f"{_NVIDIA}/a100"),
        Chip("h100_sxm", 989, 494, 80, 3350, 900, f"{_NVIDIA}/h100"),
        Chip("h200_sxm", 989, 494, 141, 4800, 900, f"{_NVIDIA}/h200"),
        # An eighth of a DGX B200: 1,440 GB at 64 TB/s, 14.4 TB/s of NVLink.
        Chip("b200", 2250, 1125, 180, 8000, 1800, f"{_NVIDIA}/dgx-b200"),
    )
}


def find_chips(names: Sequence[str]) -> list[Chip]:
    """The chips of these names; all of them without any.

    Raises:
      UserError: there is none of a name.
    """
    for name in names:
        if name not in CHIPS:
            raise UserError(f"unknown chip {name!r}; {_hint(name)}")
    return [CHIPS[name] for name in names or CHIPS]


def _hint(name: str) -> str:
    """Chips whose names hold this one, or the nearest."""
    longer = [known for known in CHIPS if name.lower() in known]
    return f"did you mean {' or '.join(longer)}?" if longer else nearest(name, CHIPS)
