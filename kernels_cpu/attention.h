// What the kernels of `decode_attention` compute, and the table of their variants.
//
// For every row and key head, over the slots from `start` to `length`:
//   w[g, s] = softmax_s(q[g] . k[s]),  y[g] = sum_s w[g, s] v[s],  received[s] = asked * sum_g w[g, s]
// or, where pivotal slots are counted, 1 (or max_s w[g, s]) in place of w[g, s] above the threshold and 0 below.
//
// Integers are multiplied as they are: the caller has put the steps of a key's channels on `q`, and left out what is the
// same for all slots; a value is `low[s] + step[s] * code`, whose `step` is put on the weight.
#pragma once

#include <cstdint>

namespace effjax {

// How a vector of `head_dim` numbers is held. Of nibbles, the lower ones of all bytes come first.
enum class Held : int32_t { kFloat32, kBfloat16, kBytes, kNibbles };

struct Slots {
  const uint8_t* data;  // [heads, slots, row_bytes], or of pages [pages, kv_heads, page, row_bytes]
  Held held;
  int64_t row_bytes;
};

struct AttentionProblem {
  int64_t heads;     // of all rows
  int64_t kv_heads;  // of a row
  int64_t group, slots, head_dim;
  const int32_t* table;           // [rows, row_pages], the pages of every row, or null
  int64_t page, row_pages, pages; // slots of a page, pages of a row, and all pages there are
  const float* q;  // [heads, group, head_dim], times the scale of the logits
  Slots k, v;
  const float *low, *step;        // [heads, slots] of values, or null
  const int32_t *start, *length;  // [heads]
  const float* asked;             // [rows], or null where nothing is asked
  float quantile, multiple;       // above that quantile, or multiple of the mean, a slot is pivotal; 0 for none
  bool peaked;                    // counts a pivotal slot by the largest weight of the query
  float* y;                       // [heads, group, head_dim]
  float* received;                // [heads, slots], or null
};

inline constexpr int64_t kMostAttentionLanes = 16;  // that `head_dim` must be a multiple of

struct AttentionKernel {
  void (*head)(const AttentionProblem&, int64_t head);
};

extern const AttentionKernel* const kAttentionAvx512;
extern const AttentionKernel* const kAttentionAvx2;
extern const AttentionKernel* const kAttentionPortable;

}  // namespace effjax
