// One query of label tables: code, buckets, unique labels, their logits and the best of them, in one pass.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "label_top_k.h"

namespace effjax {
namespace {  // compiled anew for each instruction set

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));
typedef float FourFloats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));

inline void Load(const float* from, Floats* to) { std::memcpy(to, from, sizeof(Floats)); }
inline void Load(const uint16_t* from, Floats* to) {
  Shorts shorts;
  std::memcpy(&shorts, from, sizeof(shorts));
  const Words words = __builtin_convertvector(shorts, Words) << 16;
  std::memcpy(to, &words, sizeof(words));
}

inline float Widen(float x) { return x; }
inline float Widen(uint16_t x) {
  const uint32_t word = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &word, 4);
  return y;
}

inline float Sum(const Floats& x) {
  HalfFloats eight[2];
  FourFloats four[2];
  std::memcpy(eight, &x, sizeof(x));
  const HalfFloats half = eight[0] + eight[1];
  std::memcpy(four, &half, sizeof(half));
  const FourFloats sums = four[0] + four[1];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// The products of h with `kRows` rows, so that h is read once and sums do not wait for one another.
template <int kRows, typename Row>
inline void Dots(const float* h, int64_t in, const Row* const* rows, float* out) {
  Floats sums[kRows] = {}, x, w;
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    Load(h + i, &x);
    for (int r = 0; r < kRows; ++r) {
      Load(rows[r] + i, &w);
      sums[r] += x * w;
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = Sum(sums[r]);
  for (; i < in; ++i) {
    for (int r = 0; r < kRows; ++r) out[r] += h[i] * Widen(rows[r][i]);
  }
}

// The signs of `kBlocks` vectors of projections from `first`; `n` of the last one exist.
template <int kBlocks>
inline void Signs(const LabelProblem& p, const float* h, int64_t first, int64_t n, bool* signs) {
  const int64_t bits = p.hashes * p.tables, total = (p.in + 1) * bits;
  Floats at[kBlocks] = {}, direction = {};
  for (int64_t d = 0; d <= p.in; ++d) {
    const float x = d < p.in ? h[d] : 1.0f;
    const int64_t begin = d * bits + first;
    const bool whole = begin + kBlocks * kLanes <= total;  // numbers behind the last one are of the next row
    for (int b = 0; b < kBlocks; ++b) {
      if (b + 1 < kBlocks || whole) {
        Load(p.directions + begin + b * kLanes, &direction);
      } else {
        std::memcpy(&direction, p.directions + begin + b * kLanes, static_cast<size_t>(n) * sizeof(float));
      }
      at[b] += x * direction;
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    for (int64_t j = 0; j < (b + 1 == kBlocks ? n : kLanes); ++j) signs[first + b * kLanes + j] = at[b][j] >= 0.0f;
  }
}

inline void Codes(const LabelProblem& p, const float* h, int64_t* codes) {
  bool signs[kMostBits];
  const int64_t bits = p.hashes * p.tables;
  int64_t first = 0;
  for (; first + 4 * kLanes <= bits; first += 4 * kLanes) Signs<4>(p, h, first, kLanes, signs);
  const int64_t rest = bits - first, n = rest % kLanes == 0 ? kLanes : rest % kLanes;
  if (rest > 3 * kLanes) {
    Signs<4>(p, h, first, n, signs);
  } else if (rest > 2 * kLanes) {
    Signs<3>(p, h, first, n, signs);
  } else if (rest > kLanes) {
    Signs<2>(p, h, first, n, signs);
  } else if (rest > 0) {
    Signs<1>(p, h, first, n, signs);
  }
  for (int64_t t = 0; t < p.tables; ++t) {
    codes[t] = 0;
    for (int64_t b = 0; b < p.hashes; ++b) codes[t] |= static_cast<int64_t>(signs[b * p.tables + t]) << b;
  }
}

// The k best, sorted in place where the result goes; of equal ones the smaller label first.
struct Best {
  float* values;
  int32_t* labels;
  int64_t k, held;

  inline void Add(float value, int32_t label) {
    if (held == k && !Before(value, label, k - 1)) return;
    int64_t at = held < k ? held++ : k - 1;
    for (; at > 0 && Before(value, label, at - 1); --at) {
      values[at] = values[at - 1];
      labels[at] = labels[at - 1];
    }
    values[at] = value;
    labels[at] = label;
  }
  inline bool Before(float value, int32_t label, int64_t at) const {
    return value > values[at] || (value == values[at] && label < labels[at]);
  }
};

// Labels wait here while their rows come from memory: the oldest half is scored when it is full.
template <typename Row>
struct Waiting {
  static constexpr int kMost = 32, kAtOnce = kMost / 2;
  const LabelProblem& p;
  const float* h;
  Best best;
  uint64_t* seen;
  int64_t scored = 0;
  int waiting = 0;
  int32_t ids[kMost];

  const Row* RowOf(int32_t id) const { return static_cast<const Row*>(p.weights) + id * p.in; }

  inline void Add(int32_t id) {
    if (static_cast<uint64_t>(static_cast<int64_t>(id)) >= static_cast<uint64_t>(p.labels)) return;  // none of ours
    uint64_t& word = seen[id >> 6];
    const uint64_t bit = uint64_t{1} << (id & 63);
    if (word & bit) return;
    word |= bit;
    Take(id);
  }

  // A label that was not taken before.
  inline void Take(int32_t id) {
    const char* row = reinterpret_cast<const char*>(RowOf(id));
    const int64_t bytes = p.in * static_cast<int64_t>(sizeof(Row));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
    __builtin_prefetch(p.bias + id);
    ids[waiting++] = id;
    if (waiting == kMost) {
      Score(kAtOnce);
      std::memcpy(ids, ids + kAtOnce, sizeof(ids) / 2);
      waiting -= kAtOnce;
    }
  }

  inline void Score(int n) {
    float logits[4];
    const Row* rows[4];
    int i = 0;
    for (; i + 4 <= n; i += 4) {
      for (int r = 0; r < 4; ++r) rows[r] = RowOf(ids[i + r]);
      Dots<4>(h, p.in, rows, logits);
      for (int r = 0; r < 4; ++r) best.Add(logits[r] + p.bias[ids[i + r]], ids[i + r]);
    }
    for (; i < n; ++i) {
      rows[0] = RowOf(ids[i]);
      Dots<1>(h, p.in, rows, logits);
      best.Add(logits[0] + p.bias[ids[i]], ids[i]);
    }
    scored += n;
  }

  inline void Finish() {
    Score(waiting);
    waiting = 0;
  }
};

// Calls `each` with the labels of every bucket; a bucket that does not lie in its table holds none.
template <typename Each>
inline void ForBuckets(const LabelProblem& p, const int64_t* codes, const Each& each) {
  const int64_t edges = (int64_t{1} << p.hashes) + 1;
  for (int64_t t = 0; t < p.tables; ++t) {
    const int32_t* edge = p.offsets + t * edges + codes[t];
    const int64_t begin = edge[0], end = edge[1];
    if (begin < 0 || end > p.labels) continue;
    for (int64_t i = begin; i < end; ++i) each(p.ids[t * p.labels + i]);
  }
}

template <typename Row>
void QueryRows(const LabelProblem& p, int64_t query, uint64_t* seen) {
  int64_t codes[kMostBits];
  const float* h = p.h + query * p.in;
  Codes(p, h, codes);
  float* values = p.values + query * p.k;
  int32_t* found = p.found + query * p.k;
  Waiting<Row> waiting = {p, h, {values, found, p.k, 0}, seen};
  if (p.maps != nullptr) {
    const int64_t words = LabelWords(p);
    for (int64_t t = 0; t < p.tables; ++t) {
      const uint64_t* map = p.maps + ((t << p.hashes) + codes[t]) * words;
      for (int64_t w = 0; w < words; ++w) seen[w] |= map[w];
    }
    for (int64_t w = 0; w < words; ++w) {
      for (uint64_t left = seen[w]; left != 0; left &= left - 1) {
        waiting.Take(static_cast<int32_t>(64 * w + __builtin_ctzll(left)));
      }
    }
  } else {
    ForBuckets(p, codes, [&](int32_t id) { waiting.Add(id); });
  }
  waiting.Finish();
  const bool few = waiting.scored < p.k;
  if (few) {
    for (int64_t i = 0; i < p.spare; ++i) waiting.Add(p.fallback[i]);
    waiting.Finish();
  }
  p.scored[query] = static_cast<int32_t>(waiting.scored);
  for (int64_t i = waiting.best.held; i < p.k; ++i) {
    values[i] = -INFINITY;
    found[i] = -1;
  }
  if (p.maps != nullptr) {
    std::memset(seen, 0, static_cast<size_t>(LabelWords(p)) * sizeof(uint64_t));
    return;
  }
  const auto forget = [&](int32_t id) {
    if (static_cast<uint64_t>(static_cast<int64_t>(id)) < static_cast<uint64_t>(p.labels)) seen[id >> 6] = 0;
  };
  ForBuckets(p, codes, forget);
  if (few) {
    for (int64_t i = 0; i < p.spare; ++i) forget(p.fallback[i]);
  }
}

void Query(const LabelProblem& p, int64_t query, uint64_t* seen) {
  if (p.bfloat16) {
    QueryRows<uint16_t>(p, query, seen);
  } else {
    QueryRows<float>(p, query, seen);
  }
}

constexpr LabelKernel kKernel = {Query};

}  // namespace
}  // namespace effjax
