// What the kernels of `quant_matmul` compute, and the table of their variants.
//
// y[m, o] = sum_i x[m, i] * scales[g(i), o] * (code[i, o] - zero[g(i), o])
//
// in integer products of fixed-point activations.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activations.h"
#include "unpack.h"

namespace effjax {

enum ScaleType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };
enum ZeroKind : int32_t { kCentre = 0, kPacked = 1, kReal = 2 };

struct QuantProblem {
  FixedPoint x;
  int64_t out;
  int32_t bits;
  bool tiled;            // codes, scales and zeros lie in tiles of 64 columns
  Rows codes;            // [ceil(in * bits / 8), out]
  const void* scales;    // [groups, out]
  const void* zeros;     // [ceil(groups * bits / 8), out] packed, [groups, out] real, or null
  ScaleType scale_type, zero_type;
  ZeroKind zero_kind;
  float centre;  // the zero point of all groups where zero_kind is kCentre
  float* y;      // [rows, out]
};

struct QuantKernel {
  void (*digits)(const FixedPoint&, const float* x, int64_t row);
  // Columns [begin, end) of y; `begin` is a multiple of 64.
  void (*columns)(const QuantProblem&, int64_t begin, int64_t end);
};

// Null where the library was built without them. Each is compiled in a file of its own for its instruction set.
extern const QuantKernel* const kQuantAvx512;
extern const QuantKernel* const kQuantAvx2;
extern const QuantKernel* const kQuantI8mm;
extern const QuantKernel* const kQuantPortable;

}  // namespace effjax
