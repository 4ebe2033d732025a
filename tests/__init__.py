# SPDX-License-Identifier: BSD-3-Clause
"""The test suite of fastinit; the modules not named test_* hold what several of them need."""

import pytest

for helper in ("layouts", "models", "plans"):
    pytest.register_assert_rewrite(f"{__name__}.{helper}")
