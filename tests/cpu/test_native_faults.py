# SPDX-License-Identifier: BSD-3-Clause
"""What the compiled code does when something runs out: the interpreter, threads, memory, bytes."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


# Only fastinit's own code, as torch's operators do abort then: 2.13, Python 3.11.
DAEMON = """
    import threading, time, torch, fastinit
    from fastinit.core import build
    from fastinit.cpu import fills
    t = torch.empty({items}, dtype=torch.float64)
    state = torch.Generator().get_state()
    packed = fills._pack(build.normal(t, 0.0, 1.0, None), t.data_ptr(), 0, 0, False)
    states = [state.data_ptr()]
    def work():
        while True:
            fastinit._cpu.run_fill(packed, states, [{items}], 1)
            fastinit._cpu.advance(states[0], states[0], 1 << 21)
    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
"""


@pytest.mark.parametrize("items", [1 << 10, 1 << 26])
def test_the_interpreter_ends_while_a_daemon_thread_fills(
    python: Callable[..., Any], items: int
) -> None:
    """Short fills want Python's lock again, long ones would ask for Ctrl-C in between."""
    done = python(DAEMON.format(items=items))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def run(tmp_path: Path, source: str, *flags: str) -> str:
    (tmp_path / "main.cpp").write_text(source)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    options = ["-std=c++17", "-pthread", f"-I{CSRC}", *flags, "-o", str(tmp_path / "main")]
    subprocess.run([*compiler, str(tmp_path / "main.cpp"), *options], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_bytes_are_no_descriptors(tmp_path: Path) -> None:
    """Of a plan without fills, that is: nothing may be copied to where there is no memory."""
    source = """
        #include "fill_desc.h"
        int main() {
          using fastinit::FillDesc;
          FillDesc some[3] = {};
          some[2].items = 7;
          const std::string_view bytes(reinterpret_cast<const char*>(some), sizeof some);
          const bool right = fastinit::unpacked<FillDesc>(bytes).at(2).items == 7;
          return right && fastinit::unpacked<FillDesc>(std::string_view()).empty() ? 0 : 1;
        }
    """
    run(tmp_path, source, "-fsanitize=undefined", "-fno-sanitize-recover=undefined")


# Fails the new threads from the third on, by what std::thread may throw, and counts what was done.
FAILING = """
    #include "cpu/threads.h"
    #include <cstdio>
    #include <cstdlib>
    #include <new>
    #include <pthread.h>
    #include <dlfcn.h>

    static std::atomic<int> made{0};
    static std::atomic<bool> counting{false};
    static const bool by_memory = BY_MEMORY;

    void* operator new(size_t bytes) {
      // Two vectors, and a state for each thread: the third one fails.
      if (by_memory && counting && ++made > 4) throw std::bad_alloc();
      if (void* p = std::malloc(bytes)) return p;
      throw std::bad_alloc();
    }
    void operator delete(void* p) noexcept { std::free(p); }
    void operator delete(void* p, size_t) noexcept { std::free(p); }

    using Work = void* (*)(void*);
    extern "C" int pthread_create(pthread_t* t, const pthread_attr_t* a, Work f, void* x) {
      using Create = int (*)(pthread_t*, const pthread_attr_t*, Work, void*);
      static const Create real = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
      if (!by_memory && counting && ++made > 2) return EAGAIN;
      return real(t, a, f, x);
    }

    static std::atomic<int> asked{0};
    static bool ask() {
      ++asked;
      return true;
    }

    int main() {
      const fastinit::Control control = {7, ask};
      std::atomic<int> shares{0}, own{0};
      const auto me = std::this_thread::get_id();
      fastinit::Interrupt interrupt(control);
      std::function<void(int)> body = [&](int worker) {
        if (worker == 0) counting = false;
        shares += 1 << 4 * worker;
        if (std::this_thread::get_id() != me) {
          std::this_thread::sleep_for(std::chrono::milliseconds(100));
          if (interrupt.raised()) return;
        } else if (worker == 0) {
          return;  // too soon to ask
        } else {  // the shares of those that there are not
          ++own;
          std::this_thread::sleep_for(std::chrono::milliseconds(60));
          interrupt.raised();
        }
      };
      counting = true;
      fastinit::parallel(7, body);
      std::printf("%x %d %d %d", shares.load(), own.load(), asked.load(), interrupt.was_raised());
    }
"""


@pytest.mark.parametrize("by_memory", [False, True], ids=["no thread", "no memory"])
def test_threads_that_cannot_be_had(tmp_path: Path, by_memory: bool) -> None:
    """Those that run are waited for, the caller does all other shares, and hears of Ctrl-C."""
    source = FAILING.replace("BY_MEMORY", str(by_memory).lower())
    shares, own, asked, raised = run(tmp_path, source, "-rdynamic", "-D_GNU_SOURCE").split()
    assert shares == "1111111"  # each once
    assert own == "4"
    assert (asked, raised) == ("1", "1")
