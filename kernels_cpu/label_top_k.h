// What a query of label tables computes, and the table of its variants.
//
// Per query: the signs of [h, 1] times the directions are a code a table; the labels in the buckets of these codes, each
// once, are scored by h . w + b, and the k best kept. Below k labels those of `fallback` are scored too.
#pragma once

#include <cstdint>

namespace effjax {

constexpr int64_t kMostBits = 2048;  // of all tables, on the stack; MOST_BITS in label_top_k.py
constexpr int64_t kMostHashes = 24;  // of one table; MOST_HASHES

struct LabelProblem {
  int64_t batch, in, hashes, tables, labels, k, spare;
  bool bfloat16;            // rows of weights; else float
  const float* h;           // [batch, in]
  const float* directions;  // [in + 1, hashes, tables]
  const int32_t* ids;       // [tables, labels]
  const int32_t* offsets;   // [tables, 2**hashes + 1]
  const void* weights;      // [labels, in]
  const float* bias;        // [labels]
  const int32_t* fallback;  // [spare]
  float* values;            // [batch, k]
  int32_t* found;           // [batch, k]
  int32_t* scored;          // [batch]
};

struct LabelKernel {
  // `seen` is a bit a label in whole words, all zero before and after.
  void (*query)(const LabelProblem&, int64_t row, uint64_t* seen);
};

// Null where the library was built without them. Each is compiled in a file of its own for its instruction set.
extern const LabelKernel* const kLabelAvx512;
extern const LabelKernel* const kLabelAvx2;
extern const LabelKernel* const kLabelPortable;

}  // namespace effjax
