# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn.init, faster, with the same numbers.

Every public name of `torch.nn.init` is here with the same signature and gives the same bits from
the same generator state. In `with fused():` whatever is initialised is written once, at the end, in
one threaded pass.
"""

import sys as _sys

__version__ = "0.8.0"
try:
    from fastinit import init as _init
    from fastinit.capture.report import Report
    from fastinit.capture.rules import reset_parameters
    from fastinit.core.key import Key
    from fastinit.core.switch import set_orthogonal
    from fastinit.fused import fused
    from fastinit.init import *  # noqa: F403  (the names of torch.nn.init)
    from fastinit.init import orthogonal_batched_
    from fastinit.install import install, installed, uninstall
    from fastinit.model import init_model_, materialize_
    from fastinit.plan import Plan, record
except ImportError:
    if _sys.argv[1:] != ["info"] or not _sys.argv[0].endswith(("-m", "fastinit")):
        raise  # but `fastinit info` says itself what is missing
else:
    __all__ = ["Key", "Plan", "Report", "fused", "init_model_", "install", "installed"]
    __all__ += [
        "materialize_",
        "orthogonal_batched_",
        "record",
        "reset_parameters",
        "set_orthogonal",
    ]
    __all__ += ["uninstall"]
    __all__ += _init.__all__
