# SPDX-License-Identifier: BSD-3-Clause
"""`python -m fastinit inspect`: what is expected of a tensor, what is found, and what is said."""

from __future__ import annotations

import importlib
import itertools
import math
import struct
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastinit import __main__, fused
from fastinit.capture.written import Written
from fastinit.cli import expected
from fastinit.cli import inspect as inspect_model
from fastinit.cli import plot as inspect_plot
from fastinit.cli.expected import Expected, Part, measure, parts_of
from tests.support.compare import BF16, F16, F32, F64

INF = math.inf
_names = itertools.count()


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """run(source, ...): inspect what `make` of such a module makes; status, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def inspect(source: str, factory: str = "make", **options: Any) -> tuple[int, str, str]:
        name = f"inspected_{next(_names)}"
        (tmp_path / f"{name}.py").write_text(
            "import torch\nfrom torch import nn\n" + textwrap.dedent(source)
        )
        importlib.invalidate_caches()
        status = inspect_model.main(f"{name}:{factory}", **options)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return status, *capsys.readouterr()

    return inspect


def line(output: str, name: str) -> list[str]:
    """The cells of a tensor's line, from its name on."""
    (found,) = [x for x in output.splitlines() if f" {name} " in f" {x} " and "x" in x]
    return found[found.index(name) :].split()


# ---- what is expected ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"),
    [
        *[(0.0, 1.0, -2.0, 2.0), (0.5, 1.0, -1.0, 1.2), (0.0, 0.02, -2.0, 2.0)],
        *[(0.0, 1.0, 1.5, 4.0), (0.0, 1.0, 8.0, 9.0), (0.0, 1.0, -9.0, -8.0)],
        *[(0.0, 1.0, 0.5, 0.5001), (3.0, 2.0, -INF, 1.0), (1.0, 0.5, -INF, INF)],
    ],
)
def test_truncated_normal(mean: float, std: float, low: float, high: float) -> None:
    """Against Gauss's quadrature of the density relative to its largest value."""
    part = Part("normal", 1, mean, std, low, high)
    mode = min(max(mean, low), high)
    near, far = max(low, mode - 12 * std), min(high, mode + 12 * std)

    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(near, far, 401)
    half = np.diff(edges)[:, None] / 2
    at = edges[:-1, None] + half * (nodes + 1)
    mass = half * weights * np.exp((((mode - mean) / std) ** 2 - ((at - mean) / std) ** 2) / 2)

    def moment(k: int, about: float) -> float:
        return math.fsum((mass * (at - about) ** k).ravel())

    total = moment(0, 0.0)
    centre = mode + moment(1, mode) / total
    want = [centre, *(moment(k, centre) / total for k in (2, 3, 4))]
    got = part.moments()
    scale = math.sqrt(want[1])
    for k, (x, y) in enumerate(zip(got, want)):
        assert x == pytest.approx(y, rel=1e-8, abs=1e-8 * scale ** max(1, k + 1)), k
    x = torch.linspace(near, far, 200_001, dtype=F64)
    assert float(torch.trapezoid(part.density(x), x)) == pytest.approx(1, abs=1e-6)


def test_uniform_and_constant() -> None:
    assert Part("uniform", 9, -1.0, 3.0).moments() == pytest.approx((1, 16 / 12, 0, 256 / 80))
    assert Part("constant", 9, 0.25).moments() == (0.25, 0, 0, 0)
    assert Part("normal", 9, 0.25, 0.0).moments() == (0.25, 0, 0, 0)
    assert float(Part("uniform", 9, -1.0, 3.0).density(torch.tensor(0.0))) == 0.25
    assert Part("uniform", 1, 2.0, 2.0).is_point()


FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, ...]]] = {
    "sparse_": (lambda t: nn.init.sparse_(t, 0.83, 0.5), (150, 110)),
    "orthogonal_ tall": (lambda t: nn.init.orthogonal_(t, 1.5), (170, 90)),
    "orthogonal_ wide": (lambda t: nn.init.orthogonal_(t), (90, 5, 34)),
    "eye_": (lambda t: nn.init.eye_(t), (100, 130)),
    "dirac_": (lambda t: nn.init.dirac_(t, 2), (60, 40, 3, 3)),
    "trunc_normal_": (lambda t: nn.init.trunc_normal_(t, 0.1, 1.0, -0.5, 2.0), (100, 100)),
    "xavier_uniform_": (lambda t: nn.init.xavier_uniform_(t, 2.0), (100, 130)),
    "kaiming_normal_": (lambda t: nn.init.kaiming_normal_(t, mode="fan_out"), (64, 32, 3, 3)),
    "normal_": (lambda t: nn.init.normal_(t, 1.0, 1.0), (100, 100)),
    "constant_": (lambda t: nn.init.constant_(t, 0.1), (100, 100)),
}


@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_torch(
    name: str, seed: int | None, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is expected of each is what numpy finds in what it wrote."""
    monkeypatch.setattr("fastinit.core.geometry.MIN_NATIVE", 1 << 20 if small else 8192)
    fill, shape = FUNCTIONS[name]
    torch.manual_seed(5)
    with fused(seed=seed) as report:
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(shape))
        fill(model.w)
    (row,) = report.rows()
    parts = parts_of(row.laws, row.shape, row.dtype)
    assert parts is not None
    assert sum(p.items for p in parts) == model.w.numel()
    want = Expected.of(parts)
    values = model.w.detach().double().numpy()
    n, exact = values.size, name in ("eye_", "dirac_", "constant_")
    tolerance = 1e-8 if exact else 5 * values.std() / math.sqrt(n)
    assert values.mean() == pytest.approx(want.mean, abs=tolerance)
    spread = math.sqrt(((values - want.mean) ** 2).mean())
    assert spread == pytest.approx(want.std, rel=1e-6 if "orth" in name else 0.05, abs=1e-7)
    found = measure(model.w)
    assert found is not None
    assert want.z(found, F32) < 5


def written(op: str, a: float, b: float, first: int, last: int, **more: Any) -> Written:
    """A dense fill of float32 elements."""
    return Written(op, a, b, last - first, F32, (4 * first, 4 * last), None, **more)


def test_partial_fills() -> None:
    """Of elements that do not overlap, over a fill of all; else nothing is said."""
    whole = written("normal", 0.0, 2.0, 0, 100)
    row = written("constant", 5.0, 0.0, 10, 20)
    other = written("uniform", 0.0, 1.0, 20, 30)
    parts = parts_of([whole, row, other], (10, 10), F32)
    assert parts == (
        Part("normal", 80, 0.0, 2.0),
        Part("constant", 10, 5.0),
        Part("uniform", 10, 0.0, 1.0),
    )
    rng = np.random.default_rng(1)
    draws = np.concatenate(
        [rng.normal(0, 2, 800_000), np.full(100_000, 5.0), rng.uniform(0, 1, 100_000)]
    )
    want = Expected.of(parts)
    assert want.mean == pytest.approx(draws.mean(), abs=0.01)
    assert want.std == pytest.approx(draws.std(), abs=0.01)
    assert parts_of([whole, row, written("constant", 1.0, 0.0, 15, 25)], (100,), F32) is None
    assert parts_of([row], (100,), F32) is None
    assert parts_of([row, other], (100,), F32) is None
    assert parts_of([], (100,), F32) is None
    assert parts_of([row, whole], (100,), F32) == (Part("normal", 100, 0.0, 2.0),)
    assert parts_of([whole], (100,), F64) is None
    assert parts_of([whole._replace(op="exponential")], (100,), F32) is None
    assert parts_of([whole._replace(a=math.nan)], (100,), F32) is None


def test_views_of_one_storage() -> None:
    fills = [written("uniform", 0.0, 1.0, 0, 100), written("normal", 0.0, 3.0, 100, 300)]
    assert parts_of(fills, (100,), F32, 0) == (Part("uniform", 100, 0.0, 1.0),)
    assert parts_of(fills, (10, 20), F32, 400) == (Part("normal", 200, 0.0, 3.0),)
    assert parts_of(fills, (50,), F32, 800) == (Part("normal", 50, 0.0, 3.0),)
    assert parts_of(fills, (100,), F32, 200) is None  # half of each


def test_errors_of_mean_and_variance() -> None:
    """Of as many elements: known for one law, simulated for several."""
    for part, freedom in ((Part("normal", 50, 3.0, 2.0), 50), (Part("uniform", 50, 0.0, 2.0), 125)):
        want = Expected.of([part])
        assert want.error == pytest.approx(want.std / math.sqrt(50))
        assert want.freedom == pytest.approx(freedom)
    parts = [
        *(Part("normal", 60, 1.0, 2.0, 0.0, 9.0), Part("uniform", 30, -4.0, 0.0)),
        Part("constant", 10, 5.0),
    ]
    want = Expected.of(parts)
    rng = np.random.default_rng(3)
    normal = rng.normal(1.0, 2.0, 4_000_000)
    normal = normal[(normal > 0) & (normal < 9)][: 60 * 30_000].reshape(-1, 60)
    uniform = rng.uniform(-4.0, 0.0, (30_000, 30))
    values = np.hstack([normal, uniform, np.full((30_000, 10), 5.0)])
    assert values.mean(axis=1).std() == pytest.approx(want.error, rel=0.02)
    squares = ((values - want.mean) ** 2).mean(axis=1)
    assert squares.mean() == pytest.approx(want.std**2, rel=0.005)
    assert squares.var() == pytest.approx(2 * want.std**4 / want.freedom, rel=0.04)


LAWS = {
    "uniform": (Part("uniform", 0, -1.0, 1.0), lambda g, s: g.uniform(-1, 1, s)),
    "normal": (Part("normal", 0, 0.5, 2.0), lambda g, s: g.normal(0.5, 2, s)),
}


@pytest.mark.parametrize("items", [2, 5, 16, 1000])
@pytest.mark.parametrize("law", LAWS)
def test_a_right_tensor_is_not_off(law: str, items: int) -> None:
    """Of 4,000 none; and what is measured in standard errors has the size of one."""
    part, draw = LAWS[law]
    want = Expected.of([part._replace(items=items)])
    rng = np.random.default_rng(items)
    zs = []
    for values in draw(rng, (4000, items)):
        found = measure(torch.from_numpy(values))
        assert found is not None
        zs.append(want.z(found, F64))
    assert max(zs) < inspect_model.MOST
    beyond = np.mean(np.array(zs) > 2)  # of two nearly normal numbers, one: 9 %
    assert beyond < 0.15
    assert beyond > 0.02 or items < 16


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize(
    ("law", "a", "b"),
    [("uniform", -0.02, 0.02), ("normal", 0.0, 0.02), ("normal", 1.0, 0.02), ("uniform", 0.0, 1.0)],
)
def test_rounding_is_not_off_but_ten_percent_are(
    dtype: torch.dtype, law: str, a: float, b: float
) -> None:
    t = getattr(torch.empty(1 << 20, dtype=dtype), f"{law}_")(a, b)
    want = Expected.of([Part(law, t.numel(), a, b)])
    for factor, off in ((1.0, False), (1.1, True)):
        found = measure((t.double() * factor).to(dtype))
        assert found is not None
        assert (want.z(found, dtype) > inspect_model.MOST) is off, factor


def test_constants_are_exact() -> None:
    want = Expected.of([Part("constant", 1000, 0.1)])
    for dtype in (BF16, F16, F32, F64):
        t = torch.full((1000,), 0.1, dtype=dtype)
        assert want.z(measure(t), dtype) == 0.0  # type: ignore[arg-type]
        t[3] = 0.2
        assert want.z(measure(t), dtype) == INF  # type: ignore[arg-type]


# ---- what is there -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1000, 700),
        lambda: torch.randn(700, 1000).t(),
        lambda: torch.randn(8, 64, 30, 30).to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 1, 400_000)[:, :, ::2],
        lambda: torch.randn(1, 1, 700_000) + 1e6,
        lambda: torch.randn(300_001, dtype=BF16),
        lambda: torch.randn(1, 5).expand(200_000, 5),
        lambda: torch.arange(700_000),
        lambda: torch.randint(0, 2, (600_000,)).bool(),
        lambda: torch.tensor(3.5),
    ],
)
def test_measure(make: Callable[[], torch.Tensor]) -> None:
    """In chunks the same as numpy at once, whatever the layout."""
    t = make()
    found = measure(t)
    assert found is not None
    values = t.double().numpy()
    assert found == pytest.approx(
        (values.mean(), values.std(), values.min(), values.max()), rel=1e-9, abs=1e-9
    )
    assert all(len(x) <= expected.CHUNK for x in expected.chunks(t))


def test_measure_what_is_not_numbers() -> None:
    assert measure(torch.empty(0, 3)) is None
    assert measure(torch.empty(3, device="meta")) is None
    assert measure(torch.randn(3, dtype=torch.complex64)) is None
    for bad in (math.nan, math.inf):
        t = torch.zeros(600_000)
        t[400_000] = bad
        found = measure(t)
        assert found is not None
        assert Expected.of([Part("constant", 600_000, 0.0)]).z(found, F32) == INF


def test_memory(python: Callable) -> None:
    """128 MiB are measured in little more, also where they are not contiguous."""
    done = python("""
        import resource, torch
        from fastinit.cli.expected import measure
        t = torch.zeros(64, 1 << 20, dtype=torch.bfloat16).fill_(1)
        measure(t[:, :1000])
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak()
        assert measure(t).mean == 1 == measure(t.t()).mean
        print(peak() - before)
    """)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40


# ---- the command ---------------------------------------------------------------------------------

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


def test_a_right_model(run: Callable) -> None:
    status, out, err = run(RIGHT)
    assert (status, err) == (0, "")
    assert "elements recorded" in out.splitlines()[0]
    assert "Tied: 0.weight = head.weight" in out
    assert "OFF" not in out
    assert "UNWRITTEN" not in out
    assert ", 0 off, 0 unwritten," in out
    assert "3 x" in out
    assert "3.layers.*.linear1.weight" not in out  # the pattern stands for all numbers
    assert "*.layers.*.linear*.weight" in out
    assert "fan_in=144" in " ".join(line(out, "4.weight"))
    assert " key " not in out.splitlines()[2]


def test_keys(run: Callable) -> None:
    status, out, _ = run(
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
    assert "#block.0" in line(out, "read.weight")
    assert not any(cell.startswith("#") for cell in line(out, "named.weight"))


def test_meta(run: Callable) -> None:
    status, out, _ = run("def make():\n    return nn.Linear(100, 100)", meta=True, seed=5)
    assert status == 0
    assert "kaiming_uniform_" in out
    status, out, _ = run(
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


def test_numbers_are_torchs(run: Callable, tmp_path: Path) -> None:
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


def test_unwritten(run: Callable) -> None:
    status, out, _ = run("""
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


def test_left_on_the_meta_device(run: Callable) -> None:
    status, out, _ = run("def make(): return nn.Linear(9, 9, device='meta')")
    assert status == 1
    assert "Never written: weight, bias" in out


def test_parts_of_one_storage(run: Callable) -> None:
    """Each has its own law, at its own place."""
    status, out, _ = run("""
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
def test_changed_after_it_was_filled(run: Callable, width: int) -> None:
    """In one layer of four: its line says so, and the name is given."""
    status, out, _ = run(f"""
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


def test_filled_more_than_once(run: Callable) -> None:
    status, out, _ = run("""
        def make():
            model = nn.Linear(100, 100)
            nn.init.normal_(model.weight, std=0.02)
            return model
    """)
    assert status == 0
    assert "Filled more than once: weight" in out
    assert "normal_(mean=0, std=0.02)" in out


def test_gpt2(run: Callable) -> None:
    pytest.importorskip("transformers")
    status, out, _ = run(
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


def test_arithmetic_is_part_of_the_rule(run: Callable) -> None:
    """What an operator did after the fill is shown, and nothing is expected any more."""
    status, out, _ = run("""
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
def test_errors(run: Callable, name: str) -> None:
    source, factory, message = ERRORS[name]
    status, out, err = run(source, factory)
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


def test_attributes_and_classes(run: Callable) -> None:
    source = """
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(100, 100)

        @classmethod
        def tiny(cls):
            return cls()
    """
    assert run(source, "Net")[0] == 0
    assert run(source, "Net.tiny")[0] == 0
    assert run(source, "Net.forward")[0] == 2


def test_command_line(python: Callable, tmp_path: Path) -> None:
    """In a process of its own, which finds modules where it was started."""
    (tmp_path / "here.py").write_text("from torch import nn\ndef make(): return nn.LSTM(9, 90)")
    done = python(["-m", "fastinit", "inspect", "here:make", "--seed", "4", "--meta"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert ", 0 off, 0 unwritten," in done.stdout


def test_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--help"], 0), ([], 2), (["a:b", "--seed", "x"], 2)):
        monkeypatch.setattr(sys, "argv", ["fastinit", "inspect", *arguments])
        with pytest.raises(SystemExit) as exit_:
            __main__.main()
        assert exit_.value.code == status
        if status == 0:
            said = capsys.readouterr().out
            assert all(x in said for x in ("module:factory", "--seed", "--plot", "--meta"))


# ---- the picture ---------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


MIXED = """
def make():
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(6)], nn.LayerNorm(5))
    nn.init.sparse_(model[0].weight, 0.9)
    nn.init.trunc_normal_(model[1].weight, std=1.0, a=-1.0, b=0.5)
    nn.init.eye_(model[2].weight)
    with torch.no_grad():
        model[3].weight.fill_(0.5)[0, 0] = float("nan")
        model[4].weight *= 3
    model.forgotten = nn.Parameter(torch.empty(9000))
    model.register_buffer("steps", torch.arange(7))
    return model
"""


def test_plot(run: Callable, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = importlib.import_module("matplotlib.image")
    status, out, err = run(MIXED, plot="picture.png")
    assert (status, err) == (1, "")
    assert "Distributions: picture.png" in out
    width, height = png_size(tmp_path / "picture.png")
    assert 600 < width < 2400
    assert 200 < height < 2400
    pixels = image.imread(tmp_path / "picture.png")[..., :3]
    assert 0.03 < (pixels.min(axis=2) < 0.95).mean() < 0.6  # neither empty nor full
    red = (pixels[..., 0] > 0.7) & (pixels[..., 1] < 0.72) & (pixels[..., 2] < 0.72)
    assert red.sum() > 500  # what is off


def test_no_more_than_64_panels(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[str] = []
    monkeypatch.setattr(inspect_plot, "_panel", lambda axes, x: drawn.append(x.names[0]))
    status, _, _ = run(
        """
        def make():
            model = nn.Module()
            for i in range(70):
                name = "".join(chr(97 + int(c)) for c in str(i))
                setattr(model, name, nn.Linear(10 + i, 5, bias=False))
            model.a.weight.detach().numpy()[:] += 9
            return model
        """,
        plot="many.png",
    )
    assert status == 1
    assert len(drawn) == inspect_plot.PANELS
    assert drawn[0] == "a.weight"  # the smallest, but off
    assert png_size(tmp_path / "many.png")[0] < 3000


def test_nothing_to_draw(run: Callable, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    status, _, _ = run("def make():\n    return nn.LayerNorm(5)", plot="none.png")
    assert status == 0
    assert png_size(tmp_path / "none.png")[0] > 300


def test_plot_without_matplotlib(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is built."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run("def make():\n    raise AssertionError", plot="picture.png")
    assert (status, out) == (2, "")
    assert "pip install 'torch-fastinit[plot]'" in err


@pytest.mark.parametrize("path", ["nowhere/picture.png", "picture.unknown"])
def test_plot_that_cannot_be_written(run: Callable, path: str) -> None:
    pytest.importorskip("matplotlib")
    status, out, err = run("def make():\n    return nn.Linear(20, 20)", plot=path)
    assert status == 2
    assert "weight" in out
    assert f"{path} cannot be written" in err
