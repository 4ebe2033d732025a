# SPDX-License-Identifier: BSD-3-Clause
"""`fastinit inspect`: what is said of a model, and which models are refused."""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fastinit.cli import inspect as inspect_model


def line(output: str, name: str) -> list[str]:
    """The cells of a tensor's line, from its name on."""
    (found,) = [x for x in output.splitlines() if f" {name} " in f" {x} " and "x" in x]
    return found[found.index(name) :].split()


RIGHT = """
def make():
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(64, 2, 128)
    model = nn.Sequential(nn.Embedding(300, 64, padding_idx=1), *[nn.Linear(64, 64)] * 2,
                          nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),
                          nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.LSTM(40, 60))
    model.head = nn.Linear(64, 300, bias=False)
    model.head.weight = model[0].weight
    return model
"""


def test_a_right_model(inspected: Callable) -> None:
    status, out, err = inspected(RIGHT)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "50 tensors with 157,793 elements."
    assert "Tied: 0.weight = head.weight" in out
    assert "OFF" not in out
    assert "UNWRITTEN" not in out
    assert ", 0 off, 0 unwritten," in out
    assert "3 x" in out
    assert "3.layers.*.linear1.weight" not in out  # the pattern stands for all numbers
    assert "*.layers.*.linear*.weight" in out
    assert "fan_in=144" in " ".join(line(out, "4.weight"))
    assert " key " not in out.splitlines()[2]


def test_keys(inspected: Callable) -> None:
    with pytest.warns(UserWarning, match="read.weight has .* needed before its name was known"):
        status, out, _ = inspected(
            """
            def make():
                model = nn.Module()
                model.named = nn.Linear(100, 100)
                early = nn.Linear(100, 90)
                early.weight.sum()
                model.read = early
                return model
            """,
            seed=3,
        )
    assert status == 0
    assert " key " in out
    assert "#~1.weight" in line(out, "read.weight")
    assert not any(cell.startswith("#") for cell in line(out, "named.weight"))


def test_meta(inspected: Callable) -> None:
    status, out, _ = inspected("def make():\n    return nn.Linear(100, 100)", meta=True, seed=5)
    assert status == 0
    assert "kaiming_uniform_" in out
    status, out, _ = inspected(
        """
        class Table(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(30, 30)
                self.register_buffer("angles", torch.arange(9.0))

        make = Table
        """,
        meta=True,
    )
    assert status == 1
    assert "Never written: angles" in out


def test_numbers_are_torchs(inspected: Callable, tmp_path: Path) -> None:
    """Without --seed, and with the generator as it is."""
    source = """
    def make():
        global model
        model = nn.Linear(200, 200)
        return model
    """
    torch.manual_seed(9)
    (tmp_path / "kept_by_test.py").write_text(
        "import torch\nfrom torch import nn\n" + textwrap.dedent(source)
    )
    assert inspect_model.main("kept_by_test:make") == 0
    module = sys.modules.pop("kept_by_test")
    torch.manual_seed(9)
    plain = nn.Linear(200, 200)
    assert torch.equal(plain.weight, module.model.weight)
    assert torch.equal(plain.bias, module.model.bias)


def test_unwritten(inspected: Callable) -> None:
    status, out, _ = inspected("""
        def make():
            model = nn.Linear(30, 30)
            model.forgotten = nn.Parameter(torch.empty(70, 70))
            model.register_buffer("hole", torch.empty(5))
            return model
    """)
    assert status == 1
    assert "Never written: forgotten, hole" in out
    assert line(out, "forgotten")[-1] == "UNWRITTEN"
    assert "2 as expected, 0 off, 2 unwritten" in out


def test_left_on_the_meta_device(inspected: Callable) -> None:
    status, out, _ = inspected("def make(): return nn.Linear(9, 9, device='meta')")
    assert status == 1
    assert "Never written: weight, bias" in out


def test_parts_of_one_storage(inspected: Callable) -> None:
    """Each has its own law, at its own place."""
    status, out, _ = inspected("""
        def make():
            model, flat = nn.Module(), torch.empty(30_000)
            model.a = nn.Parameter(flat[:10_000].view(100, 100))
            model.b = nn.Parameter(flat[10_000:].view(100, 200))
            nn.init.normal_(model.a)
            nn.init.uniform_(model.b, 1.0, 3.0)
            return model
    """)
    assert (status, "2 as expected" in out) == (0, True)
    assert float(line(out, "a")[6]) == 1
    assert float(line(out, "b")[4]) == 2


@pytest.mark.parametrize("width", [40, 200], ids=["small", "large"])
def test_changed_after_it_was_filled(inspected: Callable, width: int) -> None:
    """In one layer of four: its line says so, and the name is given."""
    status, out, _ = inspected(f"""
        def make():
            torch.manual_seed(2)
            model = nn.Sequential(*[nn.Linear({width}, {width}) for _ in range(4)])
            model[2].weight.detach().numpy()[:] *= 1.3
            return model
    """)
    assert status == 1
    assert "Off by more than 6 standard errors: 2.weight" in out
    cells = line(out, "*.weight")
    assert cells[cells.index("OFF") - 1] == "1"
    assert float(cells[5]) == pytest.approx(1.3 / math.sqrt(3 * width), rel=0.1)  # of the worst
    assert float(cells[6]) == pytest.approx(1 / math.sqrt(3 * width), rel=1e-3)


def test_filled_more_than_once(inspected: Callable) -> None:
    status, out, _ = inspected("""
        def make():
            model = nn.Linear(100, 100)
            nn.init.normal_(model.weight, std=0.02)
            return model
    """)
    assert status == 0
    assert "Filled more than once: weight" in out
    assert "normal_(mean=0, std=0.02)" in out


@pytest.mark.slow
def test_gpt2(inspected: Callable) -> None:
    pytest.importorskip("transformers")
    status, out, _ = inspected(
        """
        from transformers import GPT2Config, GPT2LMHeadModel
        def make():
            sizes = dict(n_layer=3, n_embd=64, n_head=2, vocab_size=400, n_positions=128)
            return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        """,
        seed=11,
    )
    assert status == 0
    assert "3 x  transformer.h.*.attn.c_attn.weight" in out
    assert "Tied: transformer.wte.weight = lm_head.weight" in out
    scaled = line(out, "transformer.h.*.mlp.c_proj.weight")
    assert float(scaled[6]) == pytest.approx(0.02 / math.sqrt(6), rel=1e-3)


def test_arithmetic_is_part_of_the_rule(inspected: Callable) -> None:
    """What an operator did after the fill is shown, and nothing is expected any more."""
    status, out, _ = inspected("""
        def make():
            model = nn.Linear(200, 100)
            with torch.no_grad():
                model.weight.mul_(0.5)
                model.bias.copy_(torch.arange(100.0))
            return model
    """)
    assert status == 0
    assert "mul_" in out
    assert "copy_" in out
    assert "OFF" not in out


ERRORS = {
    "no_such_thing": ("make = 1", "nothing", "has no attribute 'nothing'"),
    "not callable": ("make = 1", "make", "an object of type int"),
    "no module": ("def make():\n    return 3", "make", "returned an object of type int"),
    "a module": ("make = nn.Linear(3, 3)", "make", "has been built already"),
    "arguments": ("def make(width): ...", "make", "takes no arguments"),
    "raises": ("def make():\n    raise KeyError('so')", "make", "raised KeyError: 'so'"),
    "import raises": ("1 / 0", "make", "ZeroDivisionError"),
    "import of another": ("import not_there_at_all", "make", "No module named 'not_there_at_all'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(inspected: Callable, name: str) -> None:
    source, factory, message = ERRORS[name]
    status, out, err = inspected(source, factory)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert ("Traceback" in err) == ("raises" in name or name == "import of another")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        *[("nowhere", "not module:factory"), (":make", "not module:factory")],
        *[("not_there:make", "there is no module not_there"), ("a.py:make", "not a file: a")],
    ],
)
def test_targets(
    target: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert inspect_model.main(target) == 2
    assert message in capsys.readouterr().err


def test_attributes_and_classes(inspected: Callable) -> None:
    source = """
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(100, 100)

        @classmethod
        def tiny(cls):
            return cls()
    """
    assert inspected(source, "Net")[0] == 0
    assert inspected(source, "Net.tiny")[0] == 0
    assert inspected(source, "Net.forward")[0] == 2


@pytest.mark.slow
def test_command_line(python: Callable, tmp_path: Path) -> None:
    """In a process of its own, which finds modules where it was started."""
    (tmp_path / "here.py").write_text("from torch import nn\ndef make(): return nn.LSTM(9, 90)")
    done = python(["-m", "fastinit", "inspect", "here:make", "--seed", "4", "--meta"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert ", 0 off, 0 unwritten," in done.stdout


WEIGHT_NORM = """
def make():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear({n}, {n}))
    model = nn.Sequential(nn.Linear({n}, {n}), normed)
    nn.init.normal_(model[{i}].weight)  # of 1 it is computed
    return model
"""


@pytest.mark.parametrize("seed", [None, 3], ids=["torch", "seed"])
@pytest.mark.parametrize("n", [20, 200])
def test_a_fill_that_is_lost(inspected: Callable, n: int, seed: int | None) -> None:
    """It is of a tensor that weight_norm has computed, and nobody will see it."""
    said = rf"Filled, though no module has it \([^:]*\): normal_ of {n}x{n} at \S*:7 "
    for i in (0, 1):
        status, out, _ = inspected(WEIGHT_NORM.format(n=n, i=i), seed=seed)
        assert status == 0
        assert (re.search(said, " ".join(out.split())) is not None) == (i == 1)


def test_padding_that_is_not_zero(inspected: Callable) -> None:
    _, out, _ = inspected("""
        def make():
            model = nn.ModuleDict({"a": nn.Embedding(20, 8, 0), "b": nn.Embedding(9, 8, 1)})
            model["bag"] = nn.EmbeddingBag(9, 8, padding_idx=2)
            nn.init.normal_(model["a"].weight)
            nn.init.ones_(model["bag"].weight)
            return model
    """)
    assert "Rows for padding that are not zero: a.weight[0], bag.weight[2]\n" in out


@pytest.mark.parametrize("n", [20, 20_000])
@pytest.mark.parametrize("seed", [None, 3], ids=["torch", "seed"])
def test_what_was_copied_says_so(inspected: Callable, seed: int | None, n: int) -> None:
    _, out, _ = inspected(
        f"""
        def make():
            model = nn.Linear(3, {n})
            with torch.no_grad():
                model.bias.copy_(torch.arange({n}.0))
            model.register_buffer("made", torch.arange(7))
            return model
        """,
        seed=seed,
    )
    rules = {x.split()[0]: x.split()[-1] for x in out.splitlines() if x.split()}
    assert (rules["bias"], rules["made"]) == ("copy_()", "made)")
