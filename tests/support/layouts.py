# SPDX-License-Identifier: BSD-3-Clause
"""Every arrangement of elements in memory that the functions may meet."""

from __future__ import annotations

from collections.abc import Callable

import torch


def box(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, 13.0, dtype=dtype)


def apart(numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((numel,), 13.0, dtype=dtype)


# About n elements in every arrangement that memory allows; the rest of the storage holds 13.
LAYOUTS: dict[str, Callable[[int, torch.dtype], torch.Tensor]] = {
    "contiguous": lambda n, d: apart(n, d),
    "matrix": lambda n, d: apart(n // 7 * 7, d).view(-1, 7),
    "transposed": lambda n, d: apart(n // 7 * 7, d).view(-1, 7).t(),
    "permuted": lambda n, d: apart(n // 12 * 12, d).view(3, 4, -1).permute(1, 2, 0),
    "channels_last": lambda n, d: apart(n // 30 * 30, d).view(-1, 2, 5, 3).permute(0, 3, 1, 2),
    "channels_last_3d": lambda n, d: (
        apart(n // 60 * 60, d).view(-1, 2, 2, 5, 3).permute(0, 4, 1, 2, 3)
    ),
    "channels_last_1x1": lambda n, d: (
        apart(n // 8 * 8, d).view(-1, 8, 1, 1).to(memory_format=torch.channels_last)
    ),
    "columns": lambda n, d: apart(n // 3 * 8, d).view(-1, 8)[:, 2:5],
    "one_column": lambda n, d: apart(n * 3, d).view(-1, 3)[:, 1],
    "every_second_row": lambda n, d: apart(n // 6 * 12, d).view(-1, 6)[::2],
    "every_third": lambda n, d: apart(3 * n, d)[::3],
    "offset_1": lambda n, d: apart(n + 1, d)[1:],
    "offset_3": lambda n, d: apart(n + 5, d)[3:-2],
    "rows_inside": lambda n, d: apart(n // 9 * 9 + 27, d).view(-1, 9).narrow(0, 1, n // 9),
    "three_dims_apart": lambda n, d: apart(n // 4 * 16, d).view(4, -1, 4)[::2, :, 1:3],
    "five_dims_apart": lambda n, d: apart(n // 8 * 256, d).view(4, 4, 4, 4, -1)[
        ::2, 1::2, ::2, ::2, ::2
    ],
    "ones_with_odd_strides": lambda n, d: apart(n, d).as_strided((1, n, 1), (5, 1, 77)),
    "ones_with_zero_strides": lambda n, d: apart(n, d).as_strided((1, n, 1), (0, 1, 0)),
    "as_strided": lambda n, d: apart(n // 4 * 5 + 9, d).as_strided((4, n // 4), (1, 5), 7),
    "as_strided_far": lambda n, d: apart(2 * n + 8, d).as_strided((2, n // 2), (n + 1, 2), 1),
    "parameter": lambda n, d: torch.nn.Parameter(apart(n, d)),
    "view_of_parameter": lambda n, d: torch.nn.Parameter(apart(n + 2, d)).detach()[2:],
    "data": lambda n, d: torch.nn.Parameter(apart(n, d)).data,
    "detached": lambda n, d: torch.nn.Parameter(apart(n // 7 * 7, d).view(7, -1).t()).detach(),
    "shared_memory": lambda n, d: apart(n, d).share_memory_(),
}
