# SPDX-License-Identifier: BSD-3-Clause
"""The grammar of random programs.

A program has a few names (t0 to t5 are tensors, m0 and m1 modules, a0 and a1 numpy arrays), which
are bound again and again, so that tensors die, alias, and are met by statement after statement. A
statement that fails is noted by `caught`, and the program goes on.
"""

from __future__ import annotations

# Statements, by what they are about, with how often that is. ` ;; ` stands between statements; `it`
# is the name that was drawn last, `same` the one that is bound.
STATEMENTS: dict[str, tuple[int, str]] = {
    "make": (
        12,
        """
        {T} = torch.empty({room}{dtype})
        {T} = torch.empty({room}{dtype})
        {T} = torch.empty({shape}{dtype}).{fill}
        {T} = torch.empty({shape}{dtype}).{fill}
        {T} = torch.zeros({shape}{dtype})
        {T} = torch.ones({shape}{dtype})
        {T} = torch.full({shape}, {x}{dtype})
        {T} = torch.rand({shape}{dtype}{gen})
        {T} = torch.randn({shape}{dtype}{gen})
        {T} = torch.randn({shape}) * {std}
        {T} = torch.{like}_like({e})
        {T} = {e}.new_{new_like}({room})
        {T} = nn.Parameter(torch.{like}({room}))
        {T} = torch.empty_strided((100, 200), (1, 100))
        {T} = torch.arange(20000.0)
        {T} = torch.normal(0.5, 1.5, {shape}{gen})
        {T} = torch.tril(torch.ones(150, 150))
        {T} = torch.cat([{e}, {e}])
        {T} = torch.randint(0, 9, {shape})
        """,
    ),
    "fill": (
        22,
        """
        {w}.{fill}
        {w}.{fill}
        {w}.{fill}
        {init}{law}
        {init}{law}
        nn.init.{longer_law}
        fastinit.{longer_law}
        {w}.uniform_(-0.9, 0.9{gen}).erfinv_().mul_(0.02 * math.sqrt(2)).add_(0.0).clamp_(-2, 2)
        {w}.normal_(){part}.zero_()
        {t}[{k}] = {x}
        {t}[{k}:] = {e}
        {w}.bernoulli_(0.3{gen})
        {w}.random_(0, 7)
        {w}.exponential_()
        {w}.fill_({e}.view(-1)[0])
        """,
    ),
    "chain": (14, "\n".join(["{w}.{chain}"] * 6 + ["{t} *= {x}", "{t} += {x}", "{w}.mul_({e})"])),
    "out of place": (
        8,
        """
        {T} = {e}{out}
        {t} = {it}{out}
        {t} = {it}{out}
        {t} = ({it}{out}){out}
        {T} = {e}.clone(){out}
        {T} = {e} + {e}
        torch.mul({t}, {x}, out={it})
        into({t}, {e}, {x})
        {T} = torch.where({e} > 0, {e}, {x})
        """,
    ),
    "part": (
        8,
        "{T} = {e}{part}\n{T} = {e}{part}\n{T} = {e}{part}{part}\n{T} = torch.stack([{e}])",
    ),
    "cast": (
        9,
        """
        {T} = {e}.to(torch.{to})
        {t} = {it}.to(torch.{to})
        {t} = {it}.to(torch.{to})
        {T} = {e}.half()
        {T} = {e}.bfloat16()
        {T} = {e}.double()
        {T} = {e}.float()
        {t} = {it}.float()
        {w}.copy_({e}.to(torch.{to}))
        {T} = {e}.to(torch.{to}, copy=True)
        {T} = {e}.contiguous()
        {m}.to(torch.{to})
        {m}.{cast}()
        """,
    ),
    "copy": (
        9,
        """
        {T} = {e}.clone()
        {T} = {e}.clone()
        {T} = copy.deepcopy({t})
        {w}.copy_({e})
        {w}.copy_({e})
        {M} = copy.deepcopy({m})
        {T} = copy.copy({t})
        {T} = {e}.clone(memory_format=torch.contiguous_format)
        {T} = {e}.detach().clone()
        {w}.copy_(torch.arange(200.0))
        """,
    ),
    "module": (
        14,
        """
        {M} = {module}
        {M} = {module}
        {M} = {module}
        {m}.weight = nn.Parameter({e})
        {m}.extra = nn.Parameter({e}, requires_grad=False)
        {m}.register_buffer('buffer{k}', {e})
        {m}.register_parameter('odd', {t})
        {m}.tied = parameter({m}, {k})
        {m}.weight = parameter({m}, {k})
        {M} = nn.Sequential({m}, nn.Linear({in}, {width}))
        {M} = nn.ModuleList([{m}, copy.deepcopy({m})])
        {M} = nn.Sequential({m}, {m})
        {T} = parameter({m}, {k})
        {T} = parameter({m}, {k}).data
        give(parameter({m}, {k}), {e})
        setattr({m}, 'weight', nn.Parameter(torch.empty({width}, {in}).{fill}))
        {m}.reset_parameters()
        {m}.apply(lambda x: x.reset_parameters() if hasattr(x, 'reset_parameters') else None)
        [nn.init.normal_(p, std=0.02) for p in {m}.parameters()]
        [p.data.{fill} for p in {m}.parameters()]
        {m}.to_empty(device='cpu')
        {m}.load_state_dict({m}.state_dict())
        {m}.load_state_dict({m}.state_dict(), assign=True, strict=False)
        {m}.load_state_dict(copy.deepcopy({m}.state_dict()), strict=False)
        {m}.requires_grad_({k} > 3)
        {m}.register_forward_hook(lambda module, x, y: note(y))
        {m}.register_forward_pre_hook(lambda module, x: module.weight.data.{fill})
        {M} = ({module}).share_memory()
        {t}.requires_grad_({k} > 3)
        {M} = nn.utils.parametrizations.weight_norm({m})
        nn.utils.parametrize.remove_parametrizations({m}, 'weight')
        {m}.to(memory_format=torch.channels_last)
        """,
    ),
    "read": (
        12,
        """
        note({e}.sum())
        note({e})
        note({e}.tolist())
        note({e}.detach().numpy())
        note(np.asarray({e}.data))
        note(repr({e}))
        note(peek({t}))
        note(peek(parameter({m}, {k})))
        note(list({t}.untyped_storage()[:64]))
        note({t}.untyped_storage()[{k}])
        note({e}.view(-1)[{k}].item())
        note(float({e}.max()))
        note(torch.equal({e}, {e}))
        note({e}._version)
        note(({e}.stride(), {e}.storage_offset(), {e}.untyped_storage().nbytes()))
        note({t}.is_set_to({t}))
        note({t}.data_ptr() == {t}.data_ptr())
        note(torch.tensor([{t}.view(-1)[{k}], 1.0]))
        note(len({t}))
        note({a}.copy())
        note({p}.read())
        note(saved({t}, {k} % 3))
        note(saved({m}.state_dict(), 1))
        note({m}.state_dict())
        note(listed({e}))
        note({m}(torch.ones(2, width({m}))))
        note(torch.tensor({e}.view(-1)[:3].tolist()))
        """,
    ),
    "export": (
        7,
        """
        {A} = {t}.detach().numpy()
        {A} = np.asarray({t}.detach())
        {A} = np.from_dlpack({t}.detach())
        {T} = torch.from_dlpack({t}.detach())
        {T} = torch.from_numpy({a})
        {A} = np.full({shape}, 0.5, np.float32)
        {T} = torch.from_numpy(np.full({shape}, 0.25, np.float32))
        {T} = torch.frombuffer(bytearray(40000), dtype=torch.float32)
        {T} = torch.zeros({shape}).share_memory_()
        {P} = address({t})
        {P} = address(parameter({m}, {k}))
        {a}[...] = 2.5
        {T} = saved({t}, {k} % 3)
        {T} = torch.empty(0).set_({t}.untyped_storage())
        {T} = changed_memory(torch.empty({shape}).{fill})
        {T} = torch.empty(0).set_({t}.detach())
        """,
    ),
    "generator": (
        7,
        """
        torch.manual_seed({k})
        g.manual_seed({k})
        torch.default_generator.manual_seed({k})
        {S} = torch.get_rng_state()
        {S} = g.get_state()
        torch.set_rng_state({s})
        g.set_state({s})
        note(torch.get_rng_state())
        note(g.get_state())
        note((torch.initial_seed(), g.initial_seed()))
        note(torch.rand({k}))
        note(torch.randn({k}, generator=g))
        note(torch.randperm(9))
        g = torch.Generator().manual_seed({k})
        {S} = g.clone_state().get_state()
        torch.empty({k}).normal_({low}, 1.0{gen})
        """,
    ),
    "idiom": (
        9,
        """
        {T} = torch.empty({shape}{dtype}) ;; {same}.{fill} ;; {same}.{chain} ;; {same}.{chain}
        {t}.{fill} ;; {it}[{k}:].{fill} ;; {it}.{chain} ;; note({it})
        {t}.{fill} ;; {T} = {it}.to(torch.{to}) ;; {it}.{chain}
        {t}.{fill} ;; {T} = {it}{out} ;; {it}.{chain}
        {t}.{fill} ;; {T} = {it}.detach() ;; {it}.{fill} ;; {same}.{chain}
        {t}.{fill} ;; note(torch.tensor([{it}.view(-1)[{k}], 1.0]))
        {t}.{chain} ;; {it}.{chain} ;; note({it}.tolist())
        {T} = {t}.clone() ;; {it}.{fill} ;; note({same})
        {T} = {t}{out} ;; {it}.{fill} ;; {same}.{chain}
        {t}.{fill} ;; {it}[{k}:].copy_({it}[: len({it}) - {k}].clone())
        {t}.{fill} ;; {it}[..., :4].copy_(torch.ones(4)) ;; {it}.{chain}
        {t}.{fill} ;; {it}[3:].copy_(torch.zeros({it}[3:].shape)) ;; {it}.{chain}
        {A} = {t}.detach().numpy() ;; {it}.{fill} ;; note({same}.copy())
        {A} = {t}.detach().numpy() ;; {it}.data.{chain} ;; note({same}.copy())
        {T} = torch.from_dlpack({t}.detach()) ;; {it}.{fill} ;; note({same}.sum())
        {P} = address({t}) ;; {it}.{fill} ;; note({same}.read())
        {P} = address({t}) ;; {it}.data.{chain} ;; note({same}.read())
        {L} = Later(lambda: note({t}.sum())) ;; {it}.{fill} ;; {same}.go()
        {L} = Later(lambda: {t}.data.{fill}) ;; {same}.go() ;; note({it}.sum())
        {t}.{fill} ;; into({t}, {it}, {x}) ;; {it}.{chain}
        {T} = torch.empty({shape}).{fill}.resize_({shape}) ;; {same}.{chain}
        """,
    ),
    "die": (4, "del {t}\n{T} = None\ndel {t}, {t}\n{M} = nn.Identity()\ndel {a}\ndel {m}"),
    "fail": (
        3,
        """
        {w}.normal_(0.0, -1.0)
        {w}.uniform_(1.0, 0.0)
        {w}.copy_(torch.ones(7, 11))
        {e}.view(-1)[10**9]
        nn.init.xavier_uniform_(torch.empty(3))
        {w}.add_('x')
        {w}.normal_(generator={k})
        raise ValueError({k})
        """,
    ),
    "autograd": (
        4,
        """
        ({e} * {e}).sum().backward()
        {m}(torch.ones(2, width({m}))).sum().backward()
        torch.optim.SGD({m}.parameters(), 0.1, momentum=0.9).step()
        torch.optim.AdamW({m}.parameters(), 0.1).step()
        torch.optim.SGD([p for p in {m}.parameters() if p.is_leaf], 0.1, foreach=True).step()
        {m}.zero_grad()
        torch._foreach_mul_([{w}, {w}], 0.5)
        torch._foreach_zero_([{w}, {w}])
        {T} = torch.vmap(lambda x: x * 2 + torch.zeros(3).sum())({e})
        {T} = torch.func.grad(lambda x: (x * x).sum())({e}.detach())
        note(torch.func.functional_call({m}, {m}.state_dict(), torch.ones({in})))
        {T} = torch.func.stack_module_state([{m}, copy.deepcopy({m})])[0].popitem()[1]
        {T} = torch.autograd.grad(({t} * 2).sum(), {t})[0]
        nn.utils.clip_grad_norm_({m}.parameters(), 1.0)
        {T} = nn.utils.parameters_to_vector({m}.parameters())
        nn.utils.vector_to_parameters({t} * 0.5, {m}.parameters())
        """,
    ),
    "thread": (
        2,
        """
        {L} = Later(lambda: note({t}.sum()))
        {L} = Later(lambda: note({t}.detach().numpy()))
        {L} = Later(lambda: {t}.data.{fill})
        {l}.go()
        {l}.go()
        """,
    ),
}

# What has a body: its first lines, of which the last opens it.
BODIES: tuple[tuple[int, str], ...] = (
    (8, "with caught, torch.no_grad():"),
    (2, "with caught, torch.inference_mode():"),
    (1, "with caught, torch.inference_mode(False):"),
    (1, "with caught, torch.enable_grad():"),
    (4, "with caught, block():"),
    (2, "with caught, torch.random.fork_rng():"),
    (2, "with caught, torch.device('meta'):"),
    (1, "with caught, torch.device('cpu'):"),
    (2, "with caught, default_dtype(torch.{to}):"),
    (1, "with caught, logged(DispatchLog(), note):"),
    (1, "with caught, logged(FunctionLog(), note):"),
    (1, "with caught, Hundredths():"),
    (1, "with caught, torch.nn.utils.parametrize.cached():"),
    (1, "with caught, torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):"),
    (3, "with caught:"),
    (1, "with caught:\n    for _ in range(2):"),
    (2, "with caught:\n    @in_thread\n    def body():"),
    (1, "with caught:\n    @in_pool(pool)\n    def body():"),
    (1, "with caught:\n    @lambda body: body()\n    @block()\n    def body():"),
)
