// SPDX-License-Identifier: BSD-3-Clause
// The Python module fastinit._cuda: unpacks, releases the GIL, raises. No decisions.

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "device.h"

namespace py = pybind11;

namespace fastinit {
namespace cuda {
namespace {

void run(const py::bytes& fills, uint64_t table, uint32_t count, uint32_t tiles,
         const py::bytes& sources, uint64_t progress, int device, uint64_t stream) {
  const std::string_view inlined = fills, from = sources;
  Arguments args = {};
  if (inlined.size() > sizeof args.inlined || from.size() > sizeof args.sources ||
      (table == 0 && inlined.size() != count * sizeof(Fill))) {
    throw py::value_error("not a packed launch");
  }
  args.table = table;
  args.progress = progress;
  args.fills = count;
  args.tiles = tiles;
  memcpy(args.inlined, inlined.data(), inlined.size());
  memcpy(args.sources, from.data(), from.size());
  Status status;
  {
    py::gil_scoped_release unlocked;
    status = launch(args, device, stream);
  }
  if (status.code != 0) throw std::runtime_error(std::string("fastinit: CUDA: ") + status.message);
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
  m.attr("FILL_SIZE") = sizeof(Fill);
  m.attr("SLOT_SIZE") = sizeof(Slot);
  m.attr("MOST_INLINED") = kMostInlined;
  m.attr("MOST_SOURCES") = kMostSources;
  m.attr("COMPILER") = FASTINIT_NVCC;
  m.attr("ARCHITECTURES") = FASTINIT_ARCHITECTURES;
  m.def("run", &run, pybind11::arg("fills"), pybind11::arg("table"), pybind11::arg("count"),
        pybind11::arg("tiles"), pybind11::arg("sources"), pybind11::arg("progress"),
        pybind11::arg("device"), pybind11::arg("stream"));
  m.def("why_no_driver", &why_no_driver);
}
