# SPDX-License-Identifier: BSD-3-Clause
"""Keys of the keyed stream: from a seed and a name to the key of Philox."""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_SEEDS = 1 << 64


class Key:
    """A source of numbers that depend on a seed, a name and the element's place, and nothing else.

    Taken by every function of fastinit wherever it takes `generator=`. No generator of torch's is
    read or moved on.

    Args:
        seed: of 64 bits, as for `torch.manual_seed`; negative ones count from 2^64
        name: of the parameter; two fills by one name get the same numbers. Without, each fill takes
            the next running number as its name.

        >>> import torch, fastinit
        >>> key = fastinit.Key(42)
        >>> w = fastinit.normal_(torch.empty(3), generator=key.named("w"))
        >>> part = fastinit.normal_(torch.empty(2), generator=key.named("w").part((3,), (1,)))
        >>> torch.equal(w[1:], part)
        True
    """

    __slots__ = ("_counter", "global_shape", "name", "offset", "seed")

    def __init__(self, seed: int, name: str | None = None) -> None:
        if isinstance(seed, bool | Tensor):
            raise TypeError(f"a seed is an int, not {type(seed).__name__}")
        try:
            seed = operator.index(seed)
        except TypeError:
            raise TypeError(f"a seed is an int, not {type(seed).__name__}") from None
        if not -(_SEEDS >> 1) <= seed < _SEEDS:
            raise ValueError("a seed is between -2^63 and 2^64 - 1")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"a name is a str, not {type(name).__name__}")
        self.seed = seed % _SEEDS
        self.name = name
        self.global_shape: tuple[int, ...] | None = None  # of the parameter, for a part of it
        self.offset: tuple[int, ...] | None = None  # of the part, in elements per dimension
        self._counter = _Counter(0)

    def named(self, name: str) -> Key:
        """Return the key of one parameter."""
        return Key(self.seed, name)._placed(self.global_shape, self.offset)

    def part(self, global_shape: Sequence[int], offset: Sequence[int]) -> Key:
        """Return the key for a tensor that is a part of a parameter.

        The part gets the numbers that the whole parameter has in its place.

        Args:
            global_shape: of the whole parameter; the fan and the shape of matrices are those of it
            offset: where in the whole the tensor begins, for each dimension

        The functions raise ValueError if a tensor at `offset` does not lie within the whole, or is
        a DTensor, which knows its own place.
        """
        shape, at = (tuple(map(operator.index, x)) for x in (global_shape, offset))
        return self._following()._placed(shape, at)

    def _following(self) -> Key:
        """Return an equal key, which takes its running numbers from the same counter."""
        key = Key(self.seed, self.name)
        key._counter = self._counter
        return key

    def _placed(self, shape: tuple[int, ...] | None, offset: tuple[int, ...] | None) -> Key:
        self.global_shape, self.offset = shape, offset
        return self

    @property
    def philox(self) -> int:
        """The 64-bit key of Philox4x32-10; ValueError without a name."""
        if self.name is None:
            raise ValueError("a Key without a name has another key of Philox for each fill")
        return derived(self.seed, "/" + self.name)

    def take(self) -> tuple[int, str]:
        """Return Philox's key for one fill, and what to call it."""
        if self.name is not None:
            return self.philox, self.name
        label = f"#{self._counter.take()}"
        return derived(self.seed, label), label

    def __copy__(self) -> Key:
        return self  # a copy that began anew would give the same numbers twice

    def __reduce__(self) -> tuple[Any, ...]:
        place = self.global_shape, self.offset
        return _restored, (type(self), self.seed, self.name, self._counter.following, place)

    def __repr__(self) -> str:
        named = f"Key({self.seed})" if self.name is None else f"Key({self.seed}, {self.name!r})"
        return named if self.offset is None else f"{named}.part({self.global_shape}, {self.offset})"


class _Counter:
    """Running numbers, shared by the parts of one key."""

    __slots__ = ("_lock", "following")

    def __init__(self, following: int) -> None:
        self.following = following
        self._lock = threading.Lock()

    def take(self) -> int:
        with self._lock:
            self.following += 1
            return self.following - 1


def _restored(
    kind: type[Key],
    seed: int,
    name: str | None,
    following: int,
    place: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None),
) -> Key:
    key = kind(seed, name)._placed(*place)
    key._counter = _Counter(following)
    return key


def derived(seed: int, label: str) -> int:
    """Return Philox's key of a label: "/" and a name, or "#" and a running number."""
    message = b"fastinit 1\n" + seed.to_bytes(8, "little") + label.encode()
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little")
