"""The sizes of a scan, and how many programs its kernels take for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Shape", "strides"]


@dataclass(frozen=True)
class Shape:
    """B batch, L length, H heads, P head dim, G groups, N state size, Q chunk length."""

    batch: int
    L: int
    H: int
    P: int
    G: int
    N: int
    Q: int
    bytes: int
    """Of an element of x."""

    @classmethod
    def of(cls, x_BLHP: Tensor, B_BLGN: Tensor, chunk_size: int) -> "Shape":
        batch, length, heads, head_dim = x_BLHP.shape
        groups, state = B_BLGN.shape[2:]
        return cls(batch, length, heads, head_dim, groups, state, chunk_size, x_BLHP.element_size())

    @property
    def K(self) -> int:
        """Chunks a sequence."""
        return -(-self.L // self.Q)

    @property
    def M(self) -> int:
        """Chunks in all."""
        return self.batch * self.K

    @property
    def R(self) -> int:
        """Heads a group."""
        return self.H // self.G

    @property
    def whole_state(self) -> int:
        """The block that holds a row of a state."""
        return power_of_two(self.N)

    def block_q(self, entry: Mapping[str, Any]) -> int:
        return min(entry["BLOCK_Q"], power_of_two(self.Q))

    def blocks(self, entry: Mapping[str, Any]) -> int:
        """Blocks of tokens a chunk."""
        return -(-self.Q // self.block_q(entry))

    def parts(self, entry: Mapping[str, Any]) -> int:
        """Blocks of P a head."""
        return -(-self.P // min(entry["BLOCK_P"], power_of_two(self.P)))

    def tiles(self, entry: Mapping[str, Any]) -> int:
        """Blocks of a state."""
        return self.parts(entry) * -(-self.N // min(entry["BLOCK_N"], power_of_two(self.N)))

    def fitted(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The entry with its blocks no larger than what they cut; the least that a product takes is 16."""
        sizes = {"BLOCK_Q": self.Q, "BLOCK_P": self.P, "BLOCK_N": self.N}
        small = {name: min(entry[name], power_of_two(size)) for name, size in sizes.items() if name in entry}
        return {**entry, **small}


def power_of_two(size: int) -> int:
    """The least power of two, from 16, that holds it."""
    return max(16, 1 << (size - 1).bit_length())


def strides(tensor_BLxy: Tensor) -> tuple[int, int, int]:
    return tensor_BLxy.stride()[:3]  # pyright: ignore[reportReturnType]
