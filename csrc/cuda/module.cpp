// SPDX-License-Identifier: BSD-3-Clause
// The Python module fastinit._cuda: unpacks, releases the GIL, raises. No decisions.

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "../unlocked.h"
#include "device.h"

namespace py = pybind11;

namespace fastinit {
namespace cuda {
namespace {

// Does what CUDA has a status of, which is raised if it is an error.
template <class Work>
void checked(const Work& work) {
  const Status status = unlocked(work);
  if (status.code != 0) throw std::runtime_error(std::string("fastinit: CUDA: ") + status.message);
}

void run_fill(const py::bytes& fills, uint64_t table, uint32_t count, uint32_t tiles,
              const py::bytes& sources, uint64_t progress, int device, uint64_t stream) {
  const std::string_view inlined = fills, from = sources;
  FillArguments args = {};
  if (inlined.size() > sizeof args.inlined || from.size() > sizeof args.sources ||
      (table == 0 && inlined.size() != count * sizeof(FillTiles))) {
    throw py::value_error("not a packed launch");
  }
  args.table = table;
  args.progress = progress;
  args.fills = count;
  args.tiles = tiles;
  memcpy(args.inlined, inlined.data(), inlined.size());
  memcpy(args.sources, from.data(), from.size());
  checked([&] { return launch_fill(args, device, stream); });
}

void run_keyed(const py::bytes& fills, uint64_t table, uint32_t count, uint32_t tiles, int device,
               uint64_t stream) {
  const std::string_view inlined = fills;
  KeyedArguments args = {};
  if (inlined.size() > sizeof args.inlined ||
      (table == 0 && inlined.size() != count * sizeof(KeyedTiles))) {
    throw py::value_error("not a packed launch");
  }
  args.table = table;
  args.fills = count;
  args.tiles = tiles;
  memcpy(args.inlined, inlined.data(), inlined.size());
  checked([&] { return launch_keyed(args, device, stream); });
}

void run_qr(uint32_t step, const py::bytes& packed, uint32_t x, uint32_t y, uint32_t threads,
            uint32_t shared, int device, uint64_t stream) {
  const std::string_view from = packed;
  QrArguments args = {};
  if (from.size() > sizeof args || step > static_cast<uint32_t>(QrStep::write)) {
    throw py::value_error("not a packed launch");
  }
  memcpy(&args, from.data(), from.size());
  checked([&] {
    return launch_qr(static_cast<QrStep>(step), args, {x, y, threads, shared}, device, stream);
  });
}

int shared_of(int device) {
  int bytes = 0;
  checked([&] { return most_shared(device, &bytes); });
  return bytes;
}

std::string why_no_driver() {
  const Status status = driver();
  return status.code == 0 ? "" : status.message;
}

}  // namespace
}  // namespace cuda
}  // namespace fastinit

PYBIND11_MODULE(_cuda, m) {
  using namespace fastinit::cuda;
  m.doc() = "Fills of GPU memory with torch's numbers. Addresses are the caller's responsibility.";
  py::dict layouts, dtypes, ops, steps;
  layouts["fill"] = fastinit::layout_of<FillTiles>();
  layouts["strided"] = fastinit::layout_of<Strided32>();
  layouts["diagonal"] = fastinit::layout_of<Diagonal32>();
  layouts["source"] = fastinit::layout_of<PhiloxSource>();
  layouts["slot"] = fastinit::layout_of<Slot>();
  layouts["fill_arguments"] = fastinit::layout_of<FillArguments>();
  layouts["keyed"] = fastinit::layout_of<fastinit::KeyedDesc>();
  layouts["keyed_dim"] = fastinit::layout_of<fastinit::KeyedDim>();
  layouts["keyed_tiles"] = fastinit::layout_of<KeyedTiles>();
  layouts["keyed_axis"] = fastinit::layout_of<KeyedAxis>();
  layouts["keyed_arguments"] = fastinit::layout_of<KeyedArguments>();
  layouts["qr_arguments"] = fastinit::layout_of<QrArguments>();
  layouts["qr"] = fastinit::layout_of<QrJob>();
  m.attr("LAYOUTS") = layouts;
  for (const fastinit::Code& c : fastinit::kDtypes) dtypes[c.name] = c.code;
  m.attr("DTYPES") = dtypes;
  for (const fastinit::Code& c : fastinit::kOps) ops[c.name] = c.code;
  m.attr("OPS") = ops;
  for (const fastinit::Code& c : kQrSteps) steps[c.name] = c.code;
  m.attr("STEPS") = steps;
  m.attr("FILL_SIZE") = sizeof(FillTiles);
  m.attr("COMPILER") = FASTINIT_NVCC;
  m.attr("ARCHITECTURES") = FASTINIT_ARCHITECTURES;
  m.def("run_fill", &run_fill, pybind11::arg("fills"), pybind11::arg("table"),
        pybind11::arg("count"), pybind11::arg("tiles"), pybind11::arg("sources"),
        pybind11::arg("progress"), pybind11::arg("device"), pybind11::arg("stream"));
  m.def("run_keyed", &run_keyed, pybind11::arg("fills"), pybind11::arg("table"),
        pybind11::arg("count"), pybind11::arg("tiles"), pybind11::arg("device"),
        pybind11::arg("stream"));
  m.def("run_qr", &run_qr, pybind11::arg("step"), pybind11::arg("packed"), pybind11::arg("x"),
        pybind11::arg("y"), pybind11::arg("threads"), pybind11::arg("shared"),
        pybind11::arg("device"), pybind11::arg("stream"));
  m.def("most_shared", &shared_of, pybind11::arg("device"));
  m.def("why_no_driver", &why_no_driver);
}
