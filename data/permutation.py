"""Keyed permutations in plain integer arithmetic: the same on every platform, Python and numpy.

Nothing here draws from a library's generator, because their streams may change between versions and
the order of a run must not.
"""

import hashlib
import math

import numpy as np

__all__ = ["Permutation", "derive_key", "mix64", "shuffled"]

MASK = (1 << 64) - 1
ROUNDS = 6


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from whatever names its use, by BLAKE2b over the parts' reprs."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix64(x: int) -> int:
    """A bijection of 64-bit integers whose output bits each depend on all input bits.

    Two rounds of xor-shift and multiplication with the constants of Stafford's 13th variant.
    """
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class Permutation:
    """A keyed bijection of 0 … n - 1, one value at a time: O(1) memory, O(1) time on average.

    A Feistel network over pairs (left, right) of numbers below a = ceil(sqrt(n)), with
    (left, right) -> (right, left + f(right) mod a) in each of six rounds, is a bijection of
    0 … a^2 - 1. Values that fall on or above n are sent through again ("cycle walking"), which
    keeps it a bijection of 0 … n - 1; since a^2 < n + 2 sqrt(n) + 1, that is rare for large n.
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} things")
        self.n = n
        self.radix = math.isqrt(n - 1) + 1
        self.keys = tuple(derive_key(key, "round", i) for i in range(ROUNDS))

    def __call__(self, index: int) -> int:
        """Where ``index`` goes; both lie in 0 … n - 1."""
        if not 0 <= index < self.n:
            raise IndexError(f"{index} is not in 0 … {self.n - 1}")
        value = self._rounds(index)
        while value >= self.n:
            value = self._rounds(value)
        return value

    def _rounds(self, value: int) -> int:
        left, right = divmod(value, self.radix)
        for key in self.keys:
            left, right = right, (left + mix64(right ^ key)) % self.radix
        return left * self.radix + right


def shuffled(n: int, key: int) -> np.ndarray:
    """0 … n - 1 in a keyed random order, all at once: int64 (n,), 16 bytes an entry while it sorts."""
    x = np.arange(n, dtype=np.uint64)
    # Distinct inputs of a bijection have distinct images, so the sort has no ties to break.
    return np.argsort(_mix64(_mix64(x) ^ np.uint64(key)), kind="stable").astype(np.int64, copy=False)


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
