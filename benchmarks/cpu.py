# SPDX-License-Identifier: BSD-3-Clause
"""torch's numbers on the CPU: single calls, a recorded plan, a model."""

from __future__ import annotations

from functools import partial

import torch
from harness import Case, both, main, of_network, resnet50

import fastinit

LARGE = 1 << 24  # elements


def law(name: str, dtype: torch.dtype, goal: float | str) -> Case:
    t = torch.ones(4096, LARGE // 4096, dtype=dtype)
    arguments = (0.5,) if name == "constant_" else ()
    plan = fastinit.Plan()
    getattr(plan, name)(t, *arguments)
    ways = both(lambda f: getattr(f, name)(t, *arguments))
    return Case(ways | {"plan": plan.run}, [t], goal, rounds=3 if name == "trunc_normal_" else 9)


def sparse() -> Case:
    t = torch.ones(1024, 1024)
    plan = fastinit.Plan()
    plan.sparse_(t, 0.9)
    return Case(both(lambda f: f.sparse_(t, 0.9)) | {"plan": plan.run}, [t], 20)


def fresh() -> Case:
    return Case(both(lambda f: f.normal_(torch.empty(1 << 26))), goal=5, rounds=5)


def small() -> Case:
    t = torch.ones(8, 8)
    return Case(both(lambda f: f.kaiming_uniform_(t)), [t], calls=1000)


def resnet() -> Case:
    model = resnet50()
    ways = both(lambda f: model.apply(of_network(f)))
    ways["plan"] = lambda: fastinit.init_model_(model, of_network(torch.nn.init))
    return Case(ways, list(model.parameters()), 8)


LAWS = [
    *(("uniform_", torch.float32, 15), ("normal_", torch.float32, 9)),
    *(("normal_", torch.bfloat16, 12), ("normal_", torch.float64, 1.9)),
    *(("kaiming_uniform_", torch.float32, 15), ("kaiming_normal_", torch.float32, 9)),
    *(("xavier_uniform_", torch.float32, 15), ("xavier_normal_", torch.float32, 9)),
    *(("trunc_normal_", torch.float32, 40), ("zeros_", torch.float32, "")),
    ("constant_", torch.float32, ""),
]
CASES = {
    **{f"{x[0]} {str(x[1])[6:]}": partial(law, *x) for x in LAWS},
    "sparse_ 1024 x 1024, 0.9": sparse,
    "normal_ on fresh memory, 2^26": fresh,
    "kaiming_uniform_ 64 elements": small,
    "ResNet-50, kaiming_normal_": resnet,
}

if __name__ == "__main__":
    main(CASES, __doc__)
