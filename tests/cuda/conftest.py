# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the GPU tests."""

from tests.support.cuda_gpu import gpu
from tests.support.cuda_world import world

__all__ = ["gpu", "world"]
