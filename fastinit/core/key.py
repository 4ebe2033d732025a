# SPDX-License-Identifier: BSD-3-Clause
"""Keys of the keyed stream: from a seed and a name to the key of Philox."""

from __future__ import annotations

import hashlib
import operator
import threading
from typing import Any

from torch import Tensor

_SEEDS = 1 << 64


class Key:
    """Numbers that depend on a seed, a name and the place of an element, and on nothing else.

    Taken by every function of fastinit wherever it takes `generator=`. No generator of torch's is
    read or moved on.

    Args:
        seed: of 64 bits, as for `torch.manual_seed`; negative ones count from 2^64
        name: of the parameter; two fills by one name get the same numbers. Without, each fill takes
            the next running number as its name.

        >>> import torch, fastinit
        >>> key = fastinit.Key(42)
        >>> w = fastinit.normal_(torch.empty(3), generator=key.named("w"))
        >>> part = torch.empty(2)
        >>> _ = fastinit.normal_(part, generator=key.named("w"), global_shape=(3,), offset=(1,))
        >>> torch.equal(w[1:], part)
        True
    """

    __slots__ = ("_lock", "_next", "name", "seed")

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
        self._next = 0
        self._lock = threading.Lock()

    def named(self, name: str) -> Key:
        """The key of one parameter."""
        return Key(self.seed, name)

    @property
    def philox(self) -> int:
        """The 64-bit key of Philox4x32-10; ValueError without a name."""
        if self.name is None:
            raise ValueError("a Key without a name has another key of Philox for each fill")
        return derived(self.seed, "/" + self.name)

    def take(self) -> tuple[int, str]:
        """For one fill: Philox's key, and what to call it."""
        if self.name is not None:
            return self.philox, self.name
        with self._lock:
            label = f"#{self._next}"
            self._next += 1
        return derived(self.seed, label), label

    def __copy__(self) -> Key:
        return self  # a copy that began anew would give the same numbers twice

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.seed, self.name, self._next)

    def __repr__(self) -> str:
        return f"Key({self.seed})" if self.name is None else f"Key({self.seed}, {self.name!r})"


def _restored(kind: type[Key], seed: int, name: str | None, following: int) -> Key:
    key = kind(seed, name)
    key._next = following
    return key


def derived(seed: int, label: str) -> int:
    """`label`: "/" and a name, or "#" and a number."""
    message = b"fastinit 1\n" + seed.to_bytes(8, "little") + label.encode()
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little")
