// What the kernel of `nm_matmul` computes: 2 of every 4 inputs of a column are kept, with codes of 4 bits.
//
// y[m, o] = sum_k x[m, input(k, o)] * scales[g(k), o] * (code[k, o] - 8)
//
// The activations that the four kept weights of a lane meet are picked from 16 bytes by one shuffle.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activations.h"
#include "unpack.h"

namespace effjax {

struct NmProblem {
  FixedPoint x;            // groups and blocks in inputs; digits are offset by 128, so that they have no sign
  int64_t out;
  bool tiled;              // codes, indices and scales lie in tiles of 64 columns
  Rows codes;              // [in / 4, out]: two kept codes a byte
  Rows indices;            // [in / 8, out]: four positions of two bits a byte
  const float* scales;     // [groups, out]
  float* y;                // [rows, out]
};

struct NmKernel {
  void (*digits)(const FixedPoint&, const float* x, int64_t row);
  void (*columns)(const NmProblem&, int64_t begin, int64_t end);
};

extern const NmKernel* const kNmAvx512;

}  // namespace effjax
