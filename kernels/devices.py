"""What vendors' data sheets give of GPUs, and which part of it the model of a kernel's speed counts on."""

from dataclasses import dataclass

__all__ = ["GPU", "GPUS"]

OF_BANDWIDTH = 0.9
OF_PRODUCTS = 0.8
"""What good kernels get: the roofline that `make gpu` measures stands beside these in its report."""


@dataclass(frozen=True)
class GPU:
    name: str
    arch: str
    terabytes: float
    """Of memory traffic a second."""
    teraflops: float
    """Of dense bf16 products a second."""

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """The longer of the two, of what good kernels get."""
        return max(
            bytes_moved / (self.terabytes * 1e12 * OF_BANDWIDTH),
            flops / (self.teraflops * 1e12 * OF_PRODUCTS),
        )


GPUS = {
    "a100": GPU("A100 SXM 80 GB", "sm_80", 2.039, 312),
    "h100": GPU("H100 SXM", "sm_90", 3.35, 989),
    "h200": GPU("H200 SXM", "sm_90", 4.8, 989),
    "b200": GPU("B200 SXM", "sm_100", 8.0, 2250),
    "mi300x": GPU("MI300X", "gfx942", 5.3, 1307),
}
