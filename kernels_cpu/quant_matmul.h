// What the kernels of `quant_matmul` compute, and the table of their variants.
//
// y[m, o] = sum_i x[m, i] * scales[g(i), o] * (code[i, o] - zero[g(i), o])
//
// Activations become fixed-point numbers of `digits` signed bytes, with one scale for each block of inputs, so that the
// products are sums of u8 * s8, which processors do four at a time and exactly. Three digits are 24 bits of the largest
// activation of a block: what float32 holds. One digit is the usual dynamic int8.
#pragma once

#include <cstddef>
#include <cstdint>

#include "unpack.h"

namespace effjax {

enum ScaleType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };
enum ZeroKind : int32_t { kCentre = 0, kPacked = 1, kReal = 2 };

struct QuantProblem {
  int64_t rows, in, out;
  int32_t bits, digits;
  int64_t group_size;      // inputs that share a scale
  int64_t block;           // inputs that share the scale of an activation; blocks do not cross groups
  int64_t blocks, padded;  // blocks of a row; bytes of a digit of a row
  const uint8_t* codes;    // [ceil(in * bits / 8), out]
  const void* scales;      // [groups, out]
  const void* zeros;       // [ceil(groups * bits / 8), out] packed, [groups, out] real, or null
  ScaleType scale_type, zero_type;
  ZeroKind zero_kind;
  float centre;  // the zero point of all groups where zero_kind is kCentre
  // Made from the activations by `Digits`:
  int8_t* digit_rows;   // [rows, digits, padded], ordered as the kernel meets the codes
  float* block_scales;  // [rows, blocks]
  float* block_sums;    // [rows, blocks]: of the activations
  float* y;             // [rows, out]
};

inline constexpr int64_t kMaxBlock = 256;

struct QuantKernel {
  // Digits of row `row` of `x`, `[rows, in]`.
  void (*digits)(const QuantProblem&, const float* x, int64_t row);
  // Columns [begin, end) of y; `begin` is a multiple of 64.
  void (*columns)(const QuantProblem&, int64_t begin, int64_t end);
};

// Null where the library was built without them. Each is compiled in a file of its own for its instruction set.
extern const QuantKernel* const kQuantAvx512;
extern const QuantKernel* const kQuantAvx2;
extern const QuantKernel* const kQuantI8mm;
extern const QuantKernel* const kQuantPortable;

}  // namespace effjax
