# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn.init, faster, with the same numbers.

Every public name of `torch.nn.init` is here with the same signature and gives the same bits from
the same generator state. In `with fused():` whatever is initialised is written once, at the end, in
one threaded pass.
"""

from fastinit.capture.report import Report as Report
from fastinit.core.key import Key as Key
from fastinit.fused import fused as fused
from fastinit.init import __all__ as __all__
from fastinit.init import calculate_gain as calculate_gain
from fastinit.init import constant as constant
from fastinit.init import constant_ as constant_
from fastinit.init import dirac as dirac
from fastinit.init import dirac_ as dirac_
from fastinit.init import eye as eye
from fastinit.init import eye_ as eye_
from fastinit.init import kaiming_normal as kaiming_normal
from fastinit.init import kaiming_normal_ as kaiming_normal_
from fastinit.init import kaiming_uniform as kaiming_uniform
from fastinit.init import kaiming_uniform_ as kaiming_uniform_
from fastinit.init import normal as normal
from fastinit.init import normal_ as normal_
from fastinit.init import ones_ as ones_
from fastinit.init import orthogonal as orthogonal
from fastinit.init import orthogonal_ as orthogonal_
from fastinit.init import orthogonal_batched_ as orthogonal_batched_
from fastinit.init import sparse as sparse
from fastinit.init import sparse_ as sparse_
from fastinit.init import trunc_normal_ as trunc_normal_
from fastinit.init import uniform as uniform
from fastinit.init import uniform_ as uniform_
from fastinit.init import xavier_normal as xavier_normal
from fastinit.init import xavier_normal_ as xavier_normal_
from fastinit.init import xavier_uniform as xavier_uniform
from fastinit.init import xavier_uniform_ as xavier_uniform_
from fastinit.init import zeros_ as zeros_
from fastinit.install import install as install
from fastinit.install import installed as installed
from fastinit.install import uninstall as uninstall
from fastinit.model import init_model_ as init_model_
from fastinit.model import materialize_ as materialize_
from fastinit.plan import Plan as Plan
from fastinit.plan import record as record

__all__ = [  # torch's own come first
    *__all__,
    *(
        "Key",
        "Plan",
        "Report",
        "fused",
        "init_model_",
        "install",
        "installed",
        "materialize_",
        "record",
    ),
    *("orthogonal_batched_", "uninstall"),
]
__version__ = "0.5.0"
