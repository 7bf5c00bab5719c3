// What a query of a Representer Sketch computes, and the table of its variants.
//
// Per query: z = x A; in each row, codes floor(z . a + b) or the signs of z . a; their sum with 64-bit multipliers, whose
// upper half, scaled to the buckets, is the cell that is read. The cells of each group of rows are averaged.
#pragma once

#include <cstdint>

namespace effjax {

constexpr int64_t kMostDim = 256;  // projected channels, on the stack; MOST_DIM in representer.py

struct RepresenterProblem {
  int64_t batch, in, dim, hashes, rows, buckets, outputs, groups;
  bool signs;
  const float* x;              // [batch, in]
  const float* projection;     // [in, dim]
  const float* directions;     // [dim, hashes, rows]
  const float* offsets;        // [hashes, rows]
  const uint64_t* multiplier;  // [hashes, rows]
  const uint64_t* addend;      // [rows]
  const float* counts;         // [rows, buckets, outputs]
  float* means;                // [batch, groups, outputs]
};

struct RepresenterKernel {
  void (*query)(const RepresenterProblem&, int64_t row);
};

// Null where the library was built without them. Each is compiled in a file of its own for its instruction set.
extern const RepresenterKernel* const kRepresenterAvx512;
extern const RepresenterKernel* const kRepresenterAvx2;
extern const RepresenterKernel* const kRepresenterPortable;

}  // namespace effjax
