// SPDX-License-Identifier: BSD-3-Clause
// Everything that is compiled once per target, in the order in which it rests on what is above it.

#include "../dtypes.inl.h"
#include "fill/mt19937.inl.h"
#include "fill/torch_dist.inl.h"
#include "fill/fill.inl.h"
#include "fill/trunc.inl.h"
#include "qr/stripes.inl.h"
#include "qr/qr.inl.h"
#include "doubles.inl.h"
#include "../laws.inl.h"
#include "keyed/keyed.inl.h"
#include "pointwise/pointwise.inl.h"
