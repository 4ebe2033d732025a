# SPDX-License-Identifier: BSD-3-Clause
"""init_model_ while the user's function also reads, writes and draws: order must not be visible.

Fills are held back, so everything here looks at, changes or replaces something that a fill before
or after it has to do with. `m.notes` collects what the function saw.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

from fastinit import init_model_
from tests.support.marks import slow
from tests.support.models import Net, assert_same_model

pytestmark = pytest.mark.usefixtures("native")

G = torch.Generator


CASES: dict[str, Callable[[Net, G], Any]] = {}
DANGEROUS: dict[str, Callable[[Net, G], Any]] = {}  # a late fill would write to freed memory


def case(function: Callable[[Net, G], Any]) -> Callable[[Net, G], Any]:
    CASES[function.__name__] = function
    return function


def dangerous(function: Callable[[Net, G], Any]) -> Callable[[Net, G], Any]:
    DANGEROUS[function.__name__] = function
    return function


# ---- reading what a fill before should have written ----


@case
def reads_by_operators(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    m.notes += [m.weight.std().item(), float(m.weight.detach().sum())]
    m.notes.append(bool((m.weight > 0).any()))
    torch_init.uniform_(m.weight, 0, 1 + abs(m.notes[0]))
    m.notes += [m.weight[3, 4].item(), repr(m.weight), m.weight.detach().view(-1)[:3].tolist()]
    torch_init.zeros_(m.weight) if m.notes[1] > 0 else torch_init.ones_(m.weight)


@case
def reads_memory(m: Net, g: G) -> None:
    """No operator is involved in any of these."""
    torch_init.normal_(m.weight)
    m.notes.append(m.weight.detach().numpy().copy().tobytes())
    torch_init.uniform_(m.weight)
    m.notes.append(m.weight.tolist())
    torch_init.normal_(m.weight)
    m.notes.append(np.asarray(m.weight.detach()).sum())
    torch_init.uniform_(m.weight)
    m.notes.append(np.from_dlpack(m.weight.detach()).sum())
    torch_init.normal_(m.weight)
    m.notes.append(m.weight.data.__array__().sum())


@case
def reads_storage(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    m.notes.append(bytes(m.weight.untyped_storage()))
    torch_init.uniform_(m.weight)
    m.notes.append(m.weight.untyped_storage().tolist())
    torch_init.normal_(m.weight)
    m.notes.append(bytes(m.weight.untyped_storage().clone()))


@case
def reads_dlpack(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    m.notes.append(torch.utils.dlpack.from_dlpack(m.weight.detach()).sum().item())
    torch_init.uniform_(m.weight)
    m.notes.append(torch.from_dlpack(torch.utils.dlpack.to_dlpack(m.weight.detach())).sum().item())


@case
def copies(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    m.notes.append(copy.deepcopy(m.weight).tolist())
    torch_init.uniform_(m.weight)
    m.notes.append(copy.deepcopy(m.weight.detach()).tolist())
    torch_init.normal_(m.weight)
    m.notes.append(pickle.loads(pickle.dumps(m.weight.detach())).tolist())
    torch_init.uniform_(m.weight)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    m.notes.append(torch.load(file)["weight"].tolist())
    torch_init.normal_(m.weight)
    m.notes.append(m.weight.detach().clone().double().tolist())


@case
def reads_through_a_view(m: Net, g: G) -> None:
    window = m.weight.detach()[3:5].t()
    torch_init.normal_(m.weight)
    m.notes.append(window.sum().item())
    torch_init.uniform_(m.weight.data[:, 7:])
    m.notes.append(window.max().item())
    other = torch.empty(0).set_(m.weight.untyped_storage())
    torch_init.normal_(other)
    m.notes.append(m.weight.sum().item())


@case
def reads_in_another_thread(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    thread = threading.Thread(target=lambda: m.notes.append(m.weight.detach().sum().item()))
    thread.start()
    thread.join()


# ---- writing ----


@case
def changes_what_was_filled(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    m.weight.data.mul_(0.5)
    torch_init.normal_(m.table)
    m.table.data[1].fill_(0)
    with torch.no_grad():
        m.table[2] = 7.0
        m.weight[:, 0] += 1
        m.bias.copy_(m.weight.view(-1)[:41])
        torch_init.ones_(m.bias)
        torch.mul(m.weight.t(), 2.0, out=m.mask)
        nn.utils.vector_to_parameters(torch.arange(1641.0), [m.weight, m.bias, m.table])
    torch_init.uniform_(m.weight[3:5])


@case
def changes_several_at_once(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    torch_init.uniform_(m.table)
    # Of .data, whose versions are not compared: torch's foreach operators do not count versions up
    # under any dispatch mode.
    torch._foreach_mul_([m.weight.data, m.table.data], 3.0)


@case
def fills_after_writes(m: Net, g: G) -> None:
    m.weight.data.fill_(3)
    torch_init.normal_(m.weight[::2])
    m.weight.data[0] = 5
    torch_init.zeros_(m.weight[:, ::3])
    m.weight.data.t()[1].uniform_()
    torch_init.kaiming_uniform_(m.weight.t())
    m.weight.data[4:].normal_()


@case
def overlapping_fills(m: Net, g: G) -> None:
    flat = m.weight.data.view(-1)
    for i in range(30):
        torch_init.normal_(flat[13 * i : 13 * i + 40])
        torch_init.uniform_(flat[-9 * i - 30 : -9 * i - 1], generator=g)
        if i % 7 == 0:
            torch_init.zeros_(m.weight)


@case
def writes_through_numpy(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    array = m.weight.detach().numpy()
    array[0] = 1.0
    torch_init.normal_(m.weight[1:3])
    m.weight.data.numpy()[2] *= 2


@case
def replaces_data(m: Net, g: G) -> None:
    """Assigning .data swaps the memory under a tensor whose fill may still be pending."""
    torch_init.normal_(m.weight)
    m.weight.data = torch.full((40, 30), 2.0)
    torch_init.normal_(m.table)
    m.table.data = m.table.data.double()
    torch_init.normal_(m.table)
    old = m.bias.data
    torch_init.uniform_(m.bias)
    m.bias.data = torch.ones(41)
    m.notes.append(old.tolist())


@dangerous
def replaces_data_by_less(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    m.weight.data = torch.ones(3)
    torch_init.uniform_(m.bias)
    m.bias.data = torch.ones(2, dtype=torch.bfloat16)


@dangerous
def swaps(m: Net, g: G) -> None:
    one, two = nn.Parameter(torch.zeros(4000)), nn.Parameter(torch.ones(9))
    torch_init.normal_(one)
    torch.utils.swap_tensors(one, two)
    m.one, m.two = one, two


@dangerous
def replaces_parameters(m: Net, g: G) -> None:
    old = m.weight
    torch_init.normal_(m.weight)
    m.weight = nn.Parameter(torch.empty(5, 6))
    torch_init.uniform_(m.weight)
    m.notes.append(old.sum().item())
    torch_init.normal_(m.bias)
    del m.bias
    torch_init.normal_(m.table)
    m.table.requires_grad_(False)
    m.mask = torch_init.uniform_(torch.empty(7))


@dangerous
def resizes(m: Net, g: G) -> None:
    data = m.mask
    torch_init.normal_(data)
    data.resize_(10, 3)
    torch_init.uniform_(data)
    data.set_(torch.zeros(12))
    torch_init.normal_(data[3:])
    data.untyped_storage().fill_(0)
    data.untyped_storage().resize_(4 * 13)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, *slow([2])])
def test_order_is_not_visible(name: str, seed: int) -> None:
    assert_same_model(Net, CASES[name], init_model_, seed=seed)


@pytest.mark.slow
def test_memory_that_goes_away(python: Callable[..., Any]) -> None:
    """In a process of its own: a write past the end shows as a crash there, or as other bits."""
    done = python(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.api import test_model_order as t
        for name, case in t.DANGEROUS.items():
            t.assert_same_model(t.Net, case, t.init_model_)
            print(name, flush=True)
        """,
        timeout=30,
    )
    assert done.stdout.split() == list(DANGEROUS), done.stderr[-2000:]
    assert done.returncode == 0


def test_some_of_this_is_really_deferred() -> None:
    for name in ("overlapping_fills", "changes_what_was_filled"):
        assert_same_model(Net, CASES[name], init_model_, native=True)
