# SPDX-License-Identifier: BSD-3-Clause
"""Random programs as Python text."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.support.program_grammar import BODIES, STATEMENTS
from tests.support.program_words import LARGE, NAMES, ODD, SMALL, SMALLEST, WORDS


@dataclass
class Statement:
    """A line, or lines that open a body with the statements in it."""

    lines: list[str]
    body: list[Statement] | None = None

    def names(self) -> Iterator[str]:
        """Yield the names that are bound or unbound here."""
        for line in self.lines:
            bound = re.match(r"(?:(\w+) (?:[-+*/]?=) |del (.*))", line)
            if bound:
                yield from (bound[1] or bound[2]).split(", ")
        for statement in self.body or ():
            yield from statement.names()

    def has(self, text: str) -> bool:
        return text in self.lines[-1] or any(s.has(text) for s in self.body or ())

    def text(self, indent: str) -> Iterator[str]:
        if self.body is None:
            leaves = self.lines[0].startswith("raise ") and len(indent) > 4  # a body
            caught = "" if leaves else "with caught: "
            yield f"{indent}{caught}{self.lines[0]}"
            return
        yield from (indent + line for line in self.lines)
        last = self.lines[-1]
        indent += " " * (len(last) - len(last.lstrip()) + 4)
        if last.endswith("def body():"):
            names = sorted({name for s in self.body for name in s.names()})
            if names:
                yield f"{indent}nonlocal {', '.join(names)}"
        if not self.body:
            yield f"{indent}pass"
        for statement in self.body:
            yield from statement.text(indent)


def text_of(statements: Sequence[Statement]) -> str:
    """Return a program as Python text: a function of what opens a scope, and of what notes."""
    names = sorted({name for s in statements for name in s.names()} - {"g"})
    lines = ["def program(block, note, caught, pool, g):"]
    if names:
        lines.append(f"    {' = '.join(names)} = None")
    for statement in statements:
        lines.extend(statement.text("    "))
    return "\n".join([*lines, "    return locals()", ""])


@dataclass
class Writer:
    """Draws statements. What it knows of a program: which names are bound, and what it is about."""

    shapes: tuple[str, ...]
    random: random.Random = field(default_factory=random.Random)
    bound: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in NAMES})

    def statements(self) -> list[str]:
        """Return statements whose names are bound, most probably."""
        while True:
            weights = [weight for weight, _ in STATEMENTS.values()]
            texts = self.random.choices(list(STATEMENTS), weights)
            lines = STATEMENTS[texts[0]][1].strip().split("\n")
            try:
                return self.filled(self.random.choice(lines).strip()).split(" ;; ")
            except LookupError:  # needs a name that is not bound
                continue

    def filled(self, template: str) -> str:
        targets: list[tuple[str, str]] = []
        last = ""

        def word(match: re.Match[str]) -> str:
            nonlocal last
            kind = match[1]
            if kind in WORDS:
                return re.sub(r"\{(\w+)\}", word, self.random.choice(WORDS[kind]))
            if kind in ("shape", "room", "width"):
                return str(getattr(self, kind)())
            if kind == "it":
                return last
            if kind == "same":
                return targets[0][1]
            if kind.isupper():
                name = f"{kind.lower()}{self.random.randrange(NAMES[kind.lower()])}"
                targets.append((kind.lower(), name))
                return name
            if kind in ("e", "w"):
                return re.sub(r"\{(\w+)\}", word, self.expression())
            last = self.name(kind)
            return last

        text = re.sub(r"\{(\w+)\}", word, template)
        for kind, name in targets:
            self.bound[kind] = [x for x in self.bound[kind] if x != name] + [name]
        if text.startswith("del "):
            for name in text[4:].split(", "):
                self.bound[name[0]] = [x for x in self.bound[name[0]] if x != name]
        return text

    def name(self, kind: str) -> str:
        """Return a bound name; the one bound or used last is as probable as all others."""
        names = self.bound[kind]
        if not names:
            raise LookupError(kind)
        name = names[-1] if self.random.random() < 0.4 else self.random.choice(names)
        names.remove(name)
        names.append(name)
        return name

    def expression(self) -> str:
        """Return a tensor that is read or written."""
        ways = ["{t}"] * 14 + ["{t}.data", "{t}.data", "{t}.detach()", "{t}[{k}:]", "{t}.t()"]
        ways += ["{t}.view(-1)[50:9000]", "{t}[..., ::2]"]
        if self.bound["m"]:
            ways += ["parameter({m}, {k})"] * 4 + ["parameter({m}, {k}).data"] * 2
        return self.random.choice(ways)

    def shape(self) -> str:
        rare = self.random.random() < 0.06
        return self.random.choice(ODD if rare else self.shapes)

    def room(self) -> str:
        """Return a shape of what is not filled at once.

        glibc gives small memory out as it is, whatever it is told to fill it with.
        """
        large = [shape for shape in self.shapes if shape not in SMALL[:SMALLEST]]
        return self.random.choice(large or ["(64, 64)"])

    def width(self) -> str:
        is_large = any(shape in LARGE for shape in self.shapes)
        return self.random.choice(("16", "64", "400", "256", "1000") if is_large else ("4", "16"))


def program_of(seeds: Sequence[int]) -> list[Statement]:
    """Return a program, of which each number gives a statement; the first says what it is like.

    Some before the scope, most of them inside, some afterwards.
    """
    first = random.Random(seeds[0])
    small = tuple(first.choice(SMALL) for _ in range(3))
    large = (first.choice(LARGE), first.choice(LARGE), first.choice((*LARGE, *SMALL)))
    # Nothing large, large from the beginning, or from somewhere in the middle on.
    large_from = first.choice((len(seeds), 0, 0, 0, first.randrange(len(seeds)), len(seeds) // 2))
    before, after = first.choice((0, 0, 1, 4, 8)), first.choice((0, 0, 2, 5))
    writer = Writer(small)
    at = 1

    def some(most: int, depth: int) -> list[Statement]:
        nonlocal at
        made: list[Statement] = []
        end = min(len(seeds), at + most)
        while at < end:
            writer.random = random.Random(seeds[at])
            if at >= large_from:
                writer.shapes = large
            at += 1
            if depth < 4 and writer.random.random() < 0.12:
                weights = [weight for weight, _ in BODIES]
                opening = writer.random.choices([text for _, text in BODIES], weights)[0]
                lines = writer.filled(opening).split("\n")
                made.append(Statement(lines, some(writer.random.choice((1, 2, 5, 9)), depth + 1)))
            else:
                made.extend(Statement([line]) for line in writer.statements())
        return made

    program = [Statement(["torch.manual_seed(1)"]), *some(before, 2)]
    program = [s for s in program if not s.has("Later(")]  # a scope does not see older threads
    inside = some(len(seeds) - at - after, 0)
    return [*program, Statement(["with caught, block():"], inside), *some(after, 1)]
