# SPDX-License-Identifier: BSD-3-Clause
"""Parameters of the element-wise laws that round, overflow or reject in ways of their own."""

from __future__ import annotations

import math

import torch

from tests.support.compare import DTYPES

LARGEST = {d: torch.finfo(d).max for d in DTYPES}
UNIFORM_BOUNDS = [
    (0.0, 1.0),
    (-1.0, 1.0),
    (-0.0441941738, 0.0441941738),
    (-1 / math.sqrt(300), 1 / math.sqrt(300)),
    (-1e-3, 1e-3),
    (-1e-30, 1e-30),  # underflows in float16
    (1e-45, 3e-45),  # denormal in float32
    (-1.0, 0.0),
    (-1e-6, 0.0),  # float16 rounds 3 % of it up to `to`, which must become `from`
    (-0.0, 0.0),
    (0.0, -0.0),
    (1.0, 1.0 + 2**-8),  # two bfloat16 neighbours: half of all draws round up to `to`
    (1.0, 1.001),  # both ends equal in bfloat16
    (3.0, 3.0),
    (0.1, 0.1),
    (0.1, 0.3),
    (1000.0, 1001.0),
    (-5.0, 30000.0),
    (0.0, 65504.0),  # the largest float16
    (0.0, 60000.7),
    (-math.pi, math.e),
    (0, 1),
    (False, True),
]

NORMAL_PARAMETERS = [
    (0.0, 1.0),
    (0.0, 0.02),
    (0.0, 0.0),
    (-0.0, 0.0),
    (3.5, 0.0),
    (0.1, 0.3),
    (-2.0, 1e-3),
    (1000.0, 1.0),
    (0.0, 1e-8),
    (0.0, 1e-42),
    (0.0, 1e4),  # overflows float16
    (0.0, 1e38),  # overflows float32
    (0.0, 1e300),  # infinite already as a float32 parameter
    (1e39, 1.0),
    (math.inf, 1.0),
    (0.0, math.inf),
    (math.nan, 1.0),
    (0, 1),
    (True, False),
]

TRUNC_PARAMETERS = [
    (0.0, 1.0, -2.0, 2.0),
    (0.0, 0.02, -2.0, 2.0),  # a hundred standard deviations away: nothing is ever redrawn
    (0.0, 0.02, -0.04, 0.04),
    (0.0, 1.0, -1.0, 1.0),
    (0.0, 1.0, -0.4, 0.4),  # probability 0.311: rejection, many rounds
    (0.0, 1.0, -0.38, 0.38),  # probability 0.296: the other algorithm
    (0.0, 1.0, -0.01, 0.01),
    (0.0, 1.0, 1.5, 2.0),
    (0.0, 1.0, 0.0, math.inf),
    (0.0, 1.0, -math.inf, 0.25),
    (0.0, 1.0, -math.inf, math.inf),
    (0.0, 1.0, -6.0, 6.0),  # just beyond what 24-bit uniforms can reach
    (0.0, 1.0, -5.0, 5.0),
    (0.5, 0.25, 0.0, 1.0),
    (1.0, 0.5, 0.1, 1.9),  # bounds that bfloat16 cannot hold
    (1.0, 1.0, -0.3, 0.9999),
    (-3.0, 2.0, -4.0, 0.0),
    (0, 1, -2, 2),
]

CONSTANTS = [0.0, -0.0, 1.0, 0.1, -3.75, 1e-45, 1e-7, 65504.0, 3, True, math.inf, -math.inf]
