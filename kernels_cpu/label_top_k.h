// What a query of label tables computes, and the table of its variants.
//
// Per query: the signs of [h, 1] times the directions are a code a table; the labels in the buckets of these codes, each
// once, are scored by h . w + b, and the k best kept. Below k labels those of `fallback` are scored too.
//
// Which labels these are is found in one of two ways. Ids of the buckets are read one by one and marked as seen; or,
// where labels are few and queries many, each bucket is a map of bits first, and the union an OR of one map a table.
#pragma once

#include <cstdint>

namespace effjax {

constexpr int64_t kMostBits = 2048;  // of all tables, on the stack; MOST_BITS in label_top_k.py
constexpr int64_t kMostHashes = 24;  // of one table; MOST_HASHES
constexpr int64_t kMapWords = 1 << 15;  // of all maps, at most: they stay in the second-level cache
constexpr int64_t kMapQueries = 16;     // fewer are answered before the maps are made

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
  const uint64_t* maps;     // [tables, 2**hashes, words], of `FillMaps`; or null
  float* values;            // [batch, k]
  int32_t* found;           // [batch, k]
  int32_t* scored;          // [batch]
};

inline int64_t LabelWords(const LabelProblem& p) { return (p.labels + 63) / 64; }
inline int64_t AllMapWords(const LabelProblem& p) { return (p.tables << p.hashes) * LabelWords(p); }
inline bool WorthMaps(const LabelProblem& p) { return p.batch >= kMapQueries && AllMapWords(p) <= kMapWords; }

// The labels of every bucket as bits of `maps`, zeros before. Ids and buckets that do not lie in a table hold none.
inline void FillMaps(const LabelProblem& p, uint64_t* maps) {
  const int64_t buckets = int64_t{1} << p.hashes, words = LabelWords(p);
  for (int64_t t = 0; t < p.tables; ++t) {
    for (int64_t b = 0; b < buckets; ++b, maps += words) {
      const int64_t begin = p.offsets[t * (buckets + 1) + b], end = p.offsets[t * (buckets + 1) + b + 1];
      if (begin < 0 || end > p.labels) continue;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t id = p.ids[t * p.labels + i];
        if (id >= 0 && id < p.labels) maps[id >> 6] |= uint64_t{1} << (id & 63);
      }
    }
  }
}

struct LabelKernel {
  // `seen` is a bit a label in whole words, all zero before and after.
  void (*query)(const LabelProblem&, int64_t row, uint64_t* seen);
};

// Null where the library was built without them. Each is compiled in a file of its own for its instruction set.
extern const LabelKernel* const kLabelAvx512;
extern const LabelKernel* const kLabelAvx2;
extern const LabelKernel* const kLabelPortable;

}  // namespace effjax
