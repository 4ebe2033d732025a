// SPDX-License-Identifier: BSD-3-Clause
// From a dtype at run time to one at compile time: for every CPU target and for CUDA.

// Calls body with the dtype as a type; the only switch over dtypes.
template <class Body>
FI_LAW auto as_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
      return body(Typed<Dtype::f32>());
    case Dtype::f64:
      return body(Typed<Dtype::f64>());
    case Dtype::bf16:
      return body(Typed<Dtype::bf16>());
    case Dtype::f16:
      break;
  }
  return body(Typed<Dtype::f16>());
}
