// `decode_attention` of one head over vectors of kLanes floats, which the compiler makes of the instruction set at hand.
// The including file defines EFFJAX_LANES.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "attention.h"

namespace effjax {
namespace {

constexpr int kLanes = EFFJAX_LANES;
constexpr int kQueries = 4;          // whose sums share a read of keys or values
constexpr int64_t kValueSlots = 64;  // whose values stay in the first-level cache

typedef float F __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Byte __attribute__((vector_size(kLanes)));

template <typename T>
inline T Read(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}
inline void Write(float* p, F x) { std::memcpy(p, &x, sizeof(F)); }
inline F Set(float x) { return x - F{}; }
inline F AsFloats(U x) { return Read<F>(&x); }

// Numbers [chunk * kLanes, ...) of a vector.
template <Held H>
inline F Load(const uint8_t* row, int64_t chunk, int64_t head_dim) {
  if constexpr (H == Held::kFloat32) {
    return Read<F>(row + chunk * kLanes * 4);
  } else if constexpr (H == Held::kBfloat16) {
    return AsFloats(__builtin_convertvector(Read<Half>(row + chunk * kLanes * 2), U) << 16);
  } else if constexpr (H == Held::kBytes) {
    const Half codes = __builtin_convertvector(Read<Byte>(row + chunk * kLanes), Half);  // at once, gcc takes them apart
    return __builtin_convertvector(__builtin_convertvector(codes, I), F);
  } else {
    const int64_t at = chunk * kLanes, half = head_dim / 2;
    const Byte bytes = Read<Byte>(row + (at < half ? at : at - half));
    const Byte codes = at < half ? bytes & 15 : bytes >> 4;
    return __builtin_convertvector(__builtin_convertvector(codes, I), F);
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EFFJAX_SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#endif
#endif

inline float Sum(F x) {
#ifdef EFFJAX_SHUFFLE  // gcc makes single floats of the loop below
#if EFFJAX_LANES == 16
  const auto y = EFFJAX_SHUFFLE(x, 0, 1, 2, 3, 4, 5, 6, 7) + EFFJAX_SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const F y = x;
#endif
#if EFFJAX_LANES >= 8
  const auto z = EFFJAX_SHUFFLE(y, 0, 1, 2, 3) + EFFJAX_SHUFFLE(y, 4, 5, 6, 7);
#else
  const F z = y;
#endif
  const auto pair = z + EFFJAX_SHUFFLE(z, 2, 3, 0, 1);
  return pair[0] + pair[1];
#else
  float a[kLanes];
  Write(a, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  }
  return a[0];
#endif
}

inline float Largest(const float* x, int64_t n, float least) {
  F best = Set(least);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F y = Read<F>(x + i);
    best = y > best ? y : best;
  }
  float a[kLanes];
  Write(a, best);
  for (float y : a) least = std::max(least, y);
  for (; i < n; ++i) least = std::max(least, x[i]);
  return least;
}

// e to the power of x, x <= 0, to an ulp or two: Cephes' polynomial after a reduction by powers of two.
inline F Exp(F x) {
  x = x > Set(-87.0f) ? x : Set(-87.0f);
  const F magic = Set(12582912.0f);  // its last bits are units
  const F shifted = x * Set(1.44269504f) + magic;
  const F n = shifted - magic;
  const F r = (x - n * Set(0.693359375f)) + n * Set(2.12194440e-4f);
  F p = Set(1.9875691500e-4f);
  p = p * r + Set(1.3981999507e-3f);
  p = p * r + Set(8.3334519073e-3f);
  p = p * r + Set(4.1665795894e-2f);
  p = p * r + Set(1.6666665459e-1f);
  p = p * r + Set(5.0000001201e-1f);
  p = p * r * r + r + Set(1.0f);
  return AsFloats(Read<U>(&p) + (Read<U>(&shifted) << 23));
}

struct Head {
  const AttentionProblem& p;
  int64_t count, stride;  // slots that lie together, and floats from the logits of a query to those of the next
  const float* q;
  const uint8_t *k, *v;
  float *weights, *y;  // of these slots; and of all

  template <Held H, int N>
  void Logits(int64_t query) const {
    const int64_t chunks = p.head_dim / kLanes;
    for (int64_t s = 0; s < count; ++s) {
      const uint8_t* row = k + s * p.k.row_bytes;
      F sums[N] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        const F key = Load<H>(row, c, p.head_dim);
        for (int g = 0; g < N; ++g) sums[g] += Read<F>(q + (query + g) * p.head_dim + c * kLanes) * key;
      }
      for (int g = 0; g < N; ++g) weights[(query + g) * stride + s] = Sum(sums[g]);
    }
  }

  template <Held H, int N>
  void Values(int64_t query) const {
    const int64_t chunks = p.head_dim / kLanes;
    for (int64_t begin = 0; begin < count; begin += kValueSlots) {
      const int64_t end = std::min(count, begin + kValueSlots);
      for (int64_t c = 0; c < chunks; c += 2) {
        const int parts = c + 1 < chunks ? 2 : 1;
        F sums[N][2];
        for (int g = 0; g < N; ++g) {
          for (int i = 0; i < parts; ++i) sums[g][i] = Read<F>(y + (query + g) * p.head_dim + (c + i) * kLanes);
        }
        if (parts == 1) {
          Add<H, N, 1>(query, begin, end, c, sums);
        } else {
          Add<H, N, 2>(query, begin, end, c, sums);
        }
        for (int g = 0; g < N; ++g) {
          for (int i = 0; i < parts; ++i) Write(y + (query + g) * p.head_dim + (c + i) * kLanes, sums[g][i]);
        }
      }
    }
  }

  template <Held H, int N, int Parts>
  void Add(int64_t query, int64_t begin, int64_t end, int64_t c, F (&sums)[N][2]) const {
    F kept[N][Parts];
    for (int g = 0; g < N; ++g) {
      for (int i = 0; i < Parts; ++i) kept[g][i] = sums[g][i];
    }
    for (int64_t s = begin; s < end; ++s) {
      const uint8_t* row = v + s * p.v.row_bytes;
      F value[Parts];
      for (int i = 0; i < Parts; ++i) value[i] = Load<H>(row, c + i, p.head_dim);
      for (int g = 0; g < N; ++g) {
        const F weight = Set(weights[(query + g) * stride + s]);
        for (int i = 0; i < Parts; ++i) kept[g][i] += weight * value[i];
      }
    }
    for (int g = 0; g < N; ++g) {
      for (int i = 0; i < Parts; ++i) sums[g][i] = kept[g][i];
    }
  }

  // All queries, `kQueries` at a time.
  template <Held H>
  void Both(bool values) const {
    int64_t g = 0;
    for (; g + kQueries <= p.group; g += kQueries) values ? Values<H, kQueries>(g) : Logits<H, kQueries>(g);
    for (; g + 2 <= p.group; g += 2) values ? Values<H, 2>(g) : Logits<H, 2>(g);
    for (; g < p.group; ++g) values ? Values<H, 1>(g) : Logits<H, 1>(g);
  }

  void Product(Held held, bool values) const {
    switch (held) {
      case Held::kFloat32: return Both<Held::kFloat32>(values);
      case Held::kBfloat16: return Both<Held::kBfloat16>(values);
      case Held::kBytes: return Both<Held::kBytes>(values);
      case Held::kNibbles: return Both<Held::kNibbles>(values);
    }
  }
};

// A number that parts `w`, none negative, so that `index` + 1 of the `count` are at most that: a range of bit patterns,
// which order as the floats do, is halved. What lies behind, up to `stride`, is 0.
inline float Parting(const float* w, int64_t count, int64_t stride, int64_t index) {
  const int64_t wanted = index + 1 + stride - count;
  int32_t low = 0, high = 0x3F800000;  // 1.0
  for (int64_t found = -1; low < high && found != wanted;) {
    const int32_t middle = low + (high - low) / 2;
    const I bound = middle - I{};
    I below = {};
    for (int64_t s = 0; s < stride; s += kLanes) below -= Read<I>(w + s) <= bound;
    found = 0;
    for (int i = 0; i < kLanes; ++i) found += below[i];
    (found >= wanted ? high : low) = found >= wanted ? middle : middle + 1;
  }
  float parting;
  std::memcpy(&parting, &high, sizeof(parting));
  return parting;
}

// Above which power a slot is pivotal, see `AttentionProblem`.
inline float Threshold(const AttentionProblem& p, const float* w, int64_t count, int64_t stride, float inverse) {
  const auto seen = static_cast<float>(count);
  if (p.quantile <= 0.0f) return p.multiple / (inverse * seen);
  return Parting(w, count, stride, static_cast<int64_t>(p.quantile * (seen - 1.0f)));
}

// Logits to weights of one query; returns what the sums of values are short of.
inline float Softmax(const AttentionProblem& p, float* w, int64_t count, int64_t stride, float asked, const float* low,
                     const float* step, float* received) {
  const F peak = Set(Largest(w, count, -3.0e38f));
  F total = {};
  for (int64_t s = 0; s < stride; s += kLanes) {  // what is behind the last slot is -3e38
    const F power = Exp(Read<F>(w + s) - peak);
    Write(w + s, power);
    total += power;
  }
  for (int64_t s = count; s < stride; ++s) w[s] = 0.0f;
  const float inverse = 1.0f / Sum(total);
  const bool counts = received != nullptr && std::max(p.quantile, p.multiple) > 0.0f;
  if (counts) {
    const float threshold = Threshold(p, w, count, stride, inverse);
    const float counted = p.peaked ? asked * inverse : asked;  // the largest power is 1
    for (int64_t s = 0; s < count; ++s) received[s] += w[s] > threshold ? counted : 0.0f;
  }
  float least = 0.0f;
  for (int64_t s = 0; s < count; ++s) {
    const float weight = w[s] * inverse;
    if (received != nullptr && !counts) received[s] += asked * weight;
    if (low != nullptr) least += weight * low[s];
    w[s] = step == nullptr ? weight : weight * step[s];
  }
  return least;
}

// Calls `part(first, count, k, v)` for the live slots of a head, those of a page together.
template <typename Part>
void EachPart(const AttentionProblem& p, int64_t head, const Part& part) {
  const int64_t first = p.start[head], last = p.length[head];
  if (p.table == nullptr) {
    const int64_t at = head * p.slots + first;
    part(first, last - first, p.k.data + at * p.k.row_bytes, p.v.data + at * p.v.row_bytes);
    return;
  }
  for (int64_t s = first; s < last;) {
    const int64_t count = std::min(last, (s / p.page + 1) * p.page) - s;
    const int64_t named = p.table[head / p.kv_heads * p.row_pages + s / p.page];
    const int64_t page = std::min(std::max<int64_t>(named, 0), p.pages - 1);
    const int64_t at = (page * p.kv_heads + head % p.kv_heads) * p.page + s % p.page;
    part(s, count, p.k.data + at * p.k.row_bytes, p.v.data + at * p.v.row_bytes);
    s += count;
  }
}

void AttendHead(const AttentionProblem& p, int64_t head) {
  const int64_t first = p.start[head], count = std::max<int64_t>(p.length[head] - first, 0);
  const int64_t stride = (count + kLanes - 1) / kLanes * kLanes, row = head * p.slots;
  float* y = p.y + head * p.group * p.head_dim;
  std::fill(y, y + p.group * p.head_dim, 0.0f);
  float* received = p.received == nullptr ? nullptr : p.received + row;
  if (received != nullptr) std::fill(received, received + p.slots, 0.0f);
  if (count == 0) return;
  const std::unique_ptr<float[]> weights(new float[static_cast<size_t>(p.group * stride)]);
  const auto product = [&](Held held, bool values) {
    EachPart(p, head, [&](int64_t from, int64_t together, const uint8_t* k, const uint8_t* v) {
      const float* q = p.q + head * p.group * p.head_dim;
      Head{p, together, stride, q, k, v, weights.get() + from - first, y}.Product(held, values);
    });
  };
  product(p.k.held, false);
  const float asked = p.asked == nullptr ? 0.0f : p.asked[head / p.kv_heads];
  const float* low = p.low == nullptr ? nullptr : p.low + row + first;
  const float* step = p.step == nullptr ? nullptr : p.step + row + first;
  for (int64_t g = 0; g < p.group; ++g) {
    float* w = weights.get() + g * stride;
    std::fill(w + count, w + stride, -3.0e38f);
    const float least = Softmax(p, w, count, stride, asked, low, step, received == nullptr ? nullptr : received + first);
    std::fill(y + g * p.head_dim, y + (g + 1) * p.head_dim, least);
  }
  product(p.v.held, true);
}

constexpr AttentionKernel kKernel = {AttendHead};

}  // namespace
}  // namespace effjax
