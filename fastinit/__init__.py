# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn.init, faster, with the same numbers.

Every public name of `torch.nn.init` is here with the same signature and gives the same bits from
the same generator state. In `with fused():` whatever is initialised is written once, at the end, in
one threaded pass.
"""

from fastinit import init as _init
from fastinit.capture.report import Report
from fastinit.core.key import Key
from fastinit.fused import fused
from fastinit.init import *  # noqa: F403  (the names of torch.nn.init)
from fastinit.init import orthogonal_batched_
from fastinit.install import install, installed, uninstall
from fastinit.model import init_model_, materialize_
from fastinit.plan import Plan, record

__all__ = ["Key", "Plan", "Report", "fused", "init_model_", "install", "installed", "materialize_"]
__all__ += ["orthogonal_batched_", "record", "uninstall"]
__all__ += _init.__all__
__version__ = "0.6.0"
