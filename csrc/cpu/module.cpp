// SPDX-License-Identifier: BSD-3-Clause
// The Python module fastinit._cpu: unpacks, releases the GIL, raises. No decisions.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../unlocked.h"
#include "surface.h"

namespace py = pybind11;

namespace fastinit {
namespace {

constexpr uint64_t kQuick = 1 << 20;  // words that are passed over in 0.1 ms

const Target& active_target() {
  static const Target* chosen = nullptr;
  if (chosen != nullptr) return *chosen;
  const char* forced = std::getenv("FASTINIT_TARGET");
  chosen = find_target(forced == nullptr ? "" : forced);
  if (chosen != nullptr) return *chosen;
  throw py::value_error(std::string("FASTINIT_TARGET=") + forced +
                        " is not a compiled target that this processor can run");
}

bool python_interrupted() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

PyObject* main_thread = nullptr;  // threading.main_thread

// Only Python's main thread hears signals. Others do not ask: to take the lock may be their end.
Control control_of(int threads) {
  const auto main = py::reinterpret_borrow<py::object>(main_thread)().attr("ident");
  const bool hears = main.cast<unsigned long>() == PyThread_get_thread_ident();
  return {threads, hears ? python_interrupted : nullptr};
}

// Runs what gives false or 0 if it was interrupted: then a signal handler has raised.
template <class Work>
auto interruptible(const Work& work) {
  const auto done = unlocked(work);
  if (!done) throw py::error_already_set();
  return done;
}

void run_fills(const py::bytes& packed, const std::vector<uint64_t>& states,
               const std::vector<uint64_t>& words_drawn, int threads) {
  const std::vector<FillDesc> fills = unpacked<FillDesc>(packed);
  std::vector<Source> sources(states.size());
  for (size_t i = 0; i < states.size(); ++i) {
    sources[i] = {reinterpret_cast<TorchState*>(states[i]), words_drawn.at(i)};
  }
  for (const FillDesc& d : fills) {
    if (d.source >= static_cast<int64_t>(sources.size())) throw py::value_error("no such source");
  }
  const Target& target = active_target();
  const Control control = control_of(threads);
  interruptible([&] {
    return run_fill(target, fills.data(), static_cast<int64_t>(fills.size()), sources.data(),
                    static_cast<int64_t>(sources.size()), control);
  });
}

uint64_t run_truncated(const py::bytes& packed, uint64_t state, int threads) {
  const std::vector<FillDesc> fills = unpacked<FillDesc>(packed);
  if (fills.size() != 1) throw py::value_error("one fill expected");
  const Target& target = active_target();
  const Control control = control_of(threads);
  return interruptible(
      [&] { return run_trunc(target, fills[0], reinterpret_cast<TorchState*>(state), control); });
}

// `written` gets one byte per matrix. Not all are if a signal handler raises.
void run_matrices(const py::bytes& packed, const py::buffer& written, int threads) {
  const py::buffer_info done = written.request(true);
  std::vector<QrDesc> matrices;
  for (QrDesc d : unpacked<QrDesc>(packed)) {
    const uint64_t items = static_cast<uint64_t>(d.rows) * static_cast<uint64_t>(d.cols);
    const uint64_t given = static_cast<uint64_t>(Shape(d).given(d.direct));
    for (int64_t left = std::exchange(d.count, 1); left > 0; --left) {
      matrices.push_back(d);
      d.gaussian += given * (d.dtype == Dtype::f64 ? 8 : 4);
      d.out += items * static_cast<uint64_t>(element_size(d.dtype));
    }
  }
  if (static_cast<size_t>(done.size) != matrices.size() || done.itemsize != 1) {
    throw py::value_error("one byte per matrix expected");
  }
  const Target& target = active_target();
  const Control control = control_of(threads);
  interruptible([&] {
    return run_qr(target, matrices.data(), static_cast<int64_t>(matrices.size()),
                  static_cast<char*>(done.ptr), control);
  });
}

void run_keyed_fills(const py::bytes& packed, int threads) {
  const std::vector<KeyedDesc> fills = unpacked<KeyedDesc>(packed);
  for (const KeyedDesc& d : fills) {
    if (d.rank < 1 || d.rank > kMostDims) throw py::value_error("not a packed plan");
  }
  const Target& target = active_target();
  const Control control = control_of(threads);
  interruptible(
      [&] { return run_keyed(target, fills.data(), static_cast<int64_t>(fills.size()), control); });
}

void run_arithmetic(const py::bytes& packed, int threads) {
  const std::vector<PointwiseDesc> all = unpacked<PointwiseDesc>(packed);
  for (const PointwiseDesc& d : all) {
    if (d.steps > kMostSteps) throw py::value_error("not a packed plan");
  }
  const Target& target = active_target();
  const Control control = control_of(threads);
  interruptible(
      [&] { return run_pointwise(target, all.data(), static_cast<int64_t>(all.size()), control); });
}

void copy_advanced(uint64_t from, uint64_t to, uint64_t words) {
  const Target& target = active_target();
  TorchState* state = reinterpret_cast<TorchState*>(to);
  memcpy(state, reinterpret_cast<const void*>(from), sizeof *state);
  if (words < kQuick) {
    advance(target, state, words);
  } else {
    unlocked([&] {
      advance(target, state, words);
      return true;
    });
  }
}

std::vector<std::pair<std::string, bool>> list_targets() {
  int count;
  const Target* table = targets(&count);
  std::vector<std::pair<std::string, bool>> result;
  for (int i = 0; i < count; ++i) result.emplace_back(table[i].name, table[i].supported());
  return result;
}

}  // namespace
}  // namespace fastinit

PYBIND11_MODULE(_cpu, m) {
  using namespace fastinit;
  main_thread =
      py::module_::import("threading").attr("main_thread").cast<py::object>().release().ptr();
  m.doc() = "Fills of CPU memory with torch's numbers. Addresses are the caller's responsibility.";
  py::dict layouts, dtypes, ops, arithmetic;
  layouts["fill"] = layout_of<FillDesc>();
  layouts["strided"] = layout_of<Strided>();
  layouts["diagonal"] = layout_of<Diagonal>();
  layouts["sparse"] = layout_of<Sparse>();
  layouts["keyed"] = layout_of<KeyedDesc>();
  layouts["keyed_dim"] = layout_of<KeyedDim>();
  layouts["pointwise"] = layout_of<PointwiseDesc>();
  layouts["qr"] = layout_of<QrDesc>();
  m.attr("LAYOUTS") = layouts;
  for (const Code& c : kDtypes) dtypes[c.name] = c.code;
  m.attr("DTYPES") = dtypes;
  for (const Code& c : kOps) ops[c.name] = c.code;
  m.attr("OPS") = ops;
  for (const Code& c : kArithmetic) arithmetic[c.name] = c.code;
  m.attr("ARITHMETIC") = arithmetic;
  m.attr("FILL_SIZE") = sizeof(FillDesc);
  m.attr("KEYED_SIZE") = sizeof(KeyedDesc);
  m.attr("COMPILER") = FASTINIT_COMPILER;
  m.def("run_fill", &run_fills, py::arg("fills"), py::arg("states"), py::arg("words_drawn"),
        py::arg("threads"));
  m.def("run_trunc", &run_truncated, py::arg("fill"), py::arg("state"), py::arg("threads"));
  m.def("run_qr", &run_matrices, py::arg("matrices"), py::arg("written"), py::arg("threads"));
  m.def("run_keyed", &run_keyed_fills, py::arg("fills"), py::arg("threads"));
  m.def("run_pointwise", &run_arithmetic, py::arg("all"), py::arg("threads"));
  m.def("advance", &copy_advanced, py::arg("state"), py::arg("to"), py::arg("words"));
  m.def("jumps", &jumps_made);
  m.def("targets", &list_targets);
  m.def("target", [] { return std::string(active_target().name); });
}
