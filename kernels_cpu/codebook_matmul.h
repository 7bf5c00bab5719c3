// What the kernels of `codebook_matmul` compute, and the table of their variants.
//
// y[m, o] = sum_i x[m, i] * scales[g(i), o] * tables[t(i), c(o), code[i, o]]
//
// Lanes of a lookup are inputs: all weights of a vector belong to one column, so their table sits in registers, and a
// lookup is one permutation. For many rows they are then turned to lanes of columns. Codes that lie in memory by rows of
// bytes are turned first, so that 32 bits of a column stand side by side; `prepare` stores them so.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activations.h"
#include "unpack.h"

namespace effjax {

struct CodebookProblem {
  int64_t rows, in, out;
  int32_t bits;
  int64_t entries;                     // of a table
  int64_t table_inputs, table_outputs; // inputs and outputs that share a table
  int64_t out_groups;                  // tables side by side
  int64_t group_size;                  // inputs that share a scale
  int64_t tile;                        // of codes and scales, see `Rows`
  Rows codes;                          // [ceil(in * bits / 8), out]
  const float* tables;                 // [in / table_inputs, out_groups, entries]
  const float* scales;                 // [in / group_size, out], or null
  int64_t chunks;                      // of a column: kLanes fields of 32 bits
  const float* x;                      // [rows, in]
  float* ordered;                      // [chunks, fields, lanes]: the activations of one row as they meet the codes
  float* y;                            // [rows, out]
};

// Codes of a field of 32 bits: odd widths are unpacked to bytes first.
inline constexpr int64_t FieldsOf(int bits) { return 8 % bits == 0 ? 32 / bits : 4; }
inline constexpr int64_t kMostLanes = 16;

struct CodebookKernel {
  int64_t lanes;
  void (*order)(const CodebookProblem&);  // of one row
  // Columns [begin, end) of y; `begin` is a multiple of 64.
  void (*columns)(const CodebookProblem&, int64_t begin, int64_t end);
};

extern const CodebookKernel* const kCodebookAvx512;
extern const CodebookKernel* const kCodebookAvx2;
extern const CodebookKernel* const kCodebookPortable;

}  // namespace effjax
