// An MLP whose neurons lie one to a row, gate, up and down side by side, as a neuron cache holds them.
#pragma once

#include <cstdint>

#include "pool.h"

namespace effjax {

// As bundle_mlp.py lays it out; sizes are of numbers, but for those in bytes.
struct BundleMlp {
  const uint8_t* rows;   // [count, stride] bytes
  const float* scales;   // of codes: [3, slots] for gate, up and down; else null
  const float* zeros;    // of codes: [slots], the code of 0; else null
  const float* biases;   // [2, slots] for gate and up
  const float* x;        // [width]
  float* y;              // [width], which the neurons' sum is added to
  int64_t count, slots;  // rows in use, rows that there are
  int64_t stride, gate, up, down;  // bytes of a row; where its parts begin, gate -1 without one
  int64_t width;         // of every part; whole runs of 32 where there are codes
  int64_t type;          // RowType
  int64_t helpers;       // threads of the pool
  int64_t variant;
};

// False where the variant does not run on this processor.
bool RunBundleMlp(Pool& pool, const BundleMlp& call);

}  // namespace effjax
