# SPDX-License-Identifier: BSD-3-Clause
"""DTensors without a seed: torch does their operators, and this rank's part of them comes back.

What an operator on a DTensor means is torch's to say, and differs between versions: which words a
rank draws, from which generator, what is uneven, empty or refused, which warning. A mode that
declines the operator is asked once more for each operator that DTensor then runs on this rank's
plain tensors, which wait, are dropped and are written like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fastinit.capture import operators


def comes_back(func: Any, types: Sequence[type], args: Any) -> bool:
    """Return whether DTensor will do an operator by operators on plain tensors that a mode sees.

    `types`: those of the operator's tensors that have a __torch_dispatch__ of their own.
    """
    module = sys.modules.get("torch.distributed.tensor")  # an import would take a second
    if not types or module is None or module.DTensor not in types:
        return False
    return not (operators.is_random(func) and why_not(args[0]))


def why_not(t: Any) -> str:
    """Return why torch itself has to draw for a DTensor; "" if it need not.

    On GPUs every rank moves the generator to an offset of its own and then to one behind the whole
    tensor, in torch 2.13 by an operator that no mode can look into.
    """
    kind = t.device.type
    return "" if kind == "cpu" else f"torch draws for DTensors on {kind} at offsets of its own"
