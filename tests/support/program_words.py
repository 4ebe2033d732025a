# SPDX-License-Identifier: BSD-3-Clause
"""What is drawn into the statements of random programs."""

from __future__ import annotations

from collections.abc import Sequence

SMALL = ("(7,)", "(16,)", "(10, 10)", "(3, 4, 5)", "(1,)", "(64, 64)", "(8191,)", "(90, 91)")
SMALLEST = 5  # of these in less than a kilobyte
LARGE = (
    *("(8192,)", "(8193,)", "(128, 64)", "(20000,)", "(100, 200)", "(200, 100)"),
    *("(25, 40, 20)", "(5, 4, 30, 40)", "(600, 700)", "(100000,)", "(250, 400)", "(130, 130)"),
)
ODD = ("(0,)", "()", "(1, 1)", "(0, 5)", "(17, 1)")
NUMBERS = ("0.5", "-1.5", "2", "0", "0.0", "1", "1e-3", "3.0", "True", "np.float32(0.3)", "1e30")
NAMES = {"t": 6, "m": 2, "a": 2, "p": 1, "l": 1, "s": 1}  # of each kind, so many

# What stands in braces is drawn: by Writer's method of that name, or from here.
WORDS: dict[str, Sequence[str]] = {
    "dtype": (
        *("",) * 12,
        *(f", dtype=torch.{name}" for name in ("bfloat16", "bfloat16", "float16", "float64")),
    ),
    "cast": ("half", "bfloat16", "double", "float"),
    "to": ("bfloat16", "float16", "float64", "float32", "bfloat16", "float32", "int32"),
    "gen": ("", "", "", ", generator=g", ", generator=torch.default_generator"),
    "x": NUMBERS,
    "std": ("1.0", "0.02", "0.5", "2", "0.0"),
    "spread": ("1.0", "0.02", "0.5", "2"),  # with which torch's trunc_normal_ comes to an end
    "low": ("-1.0", "0.0", "-0.05", "-2"),
    "high": ("1.0", "0.25", "3"),
    "k": tuple("01234567"),
    "like": ("empty", "zeros", "ones", "rand", "randn"),
    "new_like": ("empty", "zeros", "ones"),
    "init": ("nn.init.", "nn.init.", "nn.init.", "fastinit.", ""),
    "fill": (
        *("uniform_({low}, {high}{gen})", "normal_({low}, {std}{gen})", "fill_({x})", "zero_()"),
        *("uniform_()", "normal_()", "uniform_({low}, {high}{gen})", "normal_(0, {std}{gen})"),
    ),
    "chain": (
        *("mul_({x})", "div_({x})", "add_({x})", "sub_({x})", "add_({x}, alpha={std})", "neg_()"),
        *("clamp_({low}, {high})", "clamp_(min={low})", "clamp_min_({x})", "clamp_max_(0.5)"),
        *("erfinv_()", "exp_()", "log_()", "abs_()", "sqrt_()", "tanh_()", "pow_({x})"),
        *("pow_(2)", "sigmoid_()", "floor_()", "rsqrt_()", "mul_(torch.tensor({x}))", "div_(3)"),
        *("mul_({x}).add_({x})", "erfinv_().mul_({std}).add_({x}).clamp_({low}, {high})"),
        *("relu_()", "square_()", "masked_fill_(torch.tensor(True), {x})", "reciprocal_()"),
    ),
    "out": (
        *(" * {x}", " / {x}", " + {x}", " - {x}", " ** 2", ".neg()", ".exp()", ".abs().sqrt()"),
        *(".clamp({low}, {high})", ".tanh()", ".erfinv()", ".mul({x}).add({x})", ".log()"),
        *(".add({x}, alpha=2)", ".square()", " * torch.tensor({x})"),
    ),
    "part": (
        *("[{k}:]", "[..., ::2]", "[..., :-1]", ".view(-1)", ".view(-1)[100:9000]", ".t()"),
        *(".transpose(0, -1)", ".detach()", ".data", ".unsqueeze(0)", "[{k}]", ".data[{k}:]"),
        *(".chunk(2)[1]", ".narrow(0, 0, 1)", ".select(-1, 0)", ".diagonal()", ".flatten()"),
        *(".unbind()[0]", ".as_strided((50, 3), (3, 1), 4)", ".squeeze()", ".mT", ".view(-1)[3]"),
        *(".split(3)[0]", ".unflatten(0, (2, -1))", ".expand(2, *[-1] * {t}.dim())", "[None]"),
        *(".view_as({t})", ".movedim(0, -1)", ".view(torch.int16)", "[{e} > 0]"),
    ),
    "module": (
        *("nn.Linear({in}, {width}{dtype})", "nn.Embedding({width}, {in}, padding_idx=3)"),
        *("nn.Linear({in}, {width}, bias=False)", "nn.Conv2d(8, {in}, 3)", "Table({width}, {in})"),
        *("nn.Sequential(nn.Linear({in}, {width}), nn.ReLU(), nn.Linear({width}, {in}))",),
        *("nn.LSTM({in}, 24)", "nn.GRU(8, {in})", "nn.LayerNorm({in})", "nn.BatchNorm1d({in})"),
        *("nn.MultiheadAttention(64, 4)", "nn.TransformerEncoderLayer(32, 2, {width})"),
        *("nn.ModuleList([nn.Linear({in}, {in}) for _ in range(3)])", "nn.Bilinear(8, 9, {in})"),
        "nn.utils.parametrizations.weight_norm(nn.Linear({in}, {width}))",
        "nn.utils.parametrizations.spectral_norm(nn.Linear({in}, {width}))",
        "nn.utils.parametrizations.orthogonal(nn.Linear(40, 30))",
        "torch.nn.utils.skip_init(nn.Linear, {in}, {width})",
        "nn.Linear({in}, {width}, device='meta')",
    ),
    "in": ("8", "32", "64", "128"),
    "law": (
        *("normal_({w}, {low}, {std}{gen})", "uniform_({w}, {low}, {high}{gen})"),
        *("zeros_({w})", "constant_({w}, {x})", "kaiming_uniform_({w}, a=5**0.5{gen})"),
        *("trunc_normal_({w}, std={spread}{gen})", "trunc_normal_({w}, std=0.02, a=-0.04, b=0.04)"),
        *("trunc_normal_({w}, 0.5, 1.0, -1.0, 3.0{gen})",),
    ),
    "longer_law": (
        *("ones_({w})", "eye_({w})", "dirac_({w})", "sparse_({w}, 0.3, 0.02{gen})"),
        *("orthogonal_(small({w}){gen})", "orthogonal_(small({w}), 0.01)"),
        *("xavier_uniform_({w}{gen})", "xavier_normal_({w}, 2.0{gen})"),
        *("kaiming_normal_({w}, mode='fan_out', nonlinearity='relu'{gen})",),
    ),
}
