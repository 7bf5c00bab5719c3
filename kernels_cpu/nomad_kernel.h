// The attention of one query to coded keys over the vectors `S` of an instruction set; included once by the file of each.
//
// Everything is a template of S: the files are compiled for different processors, and a function they shared would be
// taken from any one of them.
#pragma once

#include <cmath>
#include <cstring>

#include "nomad_lookup.h"

namespace effjax {

template <class S>
struct Nomad : NomadLookup<S> {
  using F = typename S::F;
  using NomadLookup<S>::Blocks;
  using NomadLookup<S>::Min;
  using NomadLookup<S>::kChunkBlocks;
  static constexpr int kLanes = S::kBytes / 4;
  static constexpr float kNone = -__builtin_inff();

  // ---- the table of a query --------------------------------------------------------------------------------------------

  template <int kSub>
  static void Products(const float* q, const float* books, int64_t subs, float* products) {
    for (int64_t s = 0; s < subs; ++s) {
      for (int c = 0; c < kEntries; ++c) {
        float sum = 0.0f;
        for (int i = 0; i < kSub; ++i) sum += q[s * kSub + i] * books[(s * kEntries + c) * kSub + i];
        products[s * kEntries + c] = sum;
      }
    }
  }

  // As `query_table` in effjax/kv/nomad.py.
  static void Table(const AttendProblem& p, const float* q, const float* books, uint8_t* table, float* scale, float* bias) {
    alignas(64) float products[kMostSubs * kEntries];
    float lows[kMostSubs];
    if (p.d_sub == 1) {
      Products<1>(q, books, p.subs, products);
    } else if (p.d_sub == 2) {
      Products<2>(q, books, p.subs, products);
    } else {
      Products<4>(q, books, p.subs, products);
    }
    float span = 0.0f, sum = 0.0f;
    for (int64_t s = 0; s < p.subs; ++s) {
      float low = products[s * kEntries], high = low;
      for (int c = 1; c < kEntries; ++c) {
        const float x = products[s * kEntries + c];
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      lows[s] = low;
      sum += low;
      span = high - low > span ? high - low : span;
    }
    *scale = span > 1e-30f ? 255.0f / span : 1.0f;
    *bias = sum;
    for (int64_t s = 0; s < p.subs; ++s) {
      for (int c = 0; c < kEntries; ++c) {
        // Adding 1.5 * 2^23 rounds to the nearest, ties to even; what is not finite is told by the bias.
        float x = (products[s * kEntries + c] - lows[s]) * *scale;
        x = x > 0.0f ? x : 0.0f;
        x = (x < 255.0f ? x : 255.0f) + 12582912.0f;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        table[s * kEntries + c] = static_cast<uint8_t>(bits);
      }
    }
  }

  // ---- softmax ---------------------------------------------------------------------------------------------------------

  // exp(x) for x <= 0 to about 2 units in the last place: 2^n times a polynomial on half a unit of the exponent.
  __attribute__((always_inline)) static float Exp(float x) {
    const float low = x > -87.0f ? x : -87.0f;
    const float shifted = low * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.0f / 5040.0f;
    y = y * r + 1.0f / 720.0f;
    y = y * r + 1.0f / 120.0f;
    y = y * r + 1.0f / 24.0f;
    y = y * r + 1.0f / 6.0f;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x > -87.0f ? y * power : x == x ? 0.0f : x;
  }

  static float Largest(const float* x) {
    float most[16];
    for (int j = 0; j < 16; ++j) most[j] = x[j];
    for (int64_t i = 16; i < kChunkKeys; i += 16) {
      for (int j = 0; j < 16; ++j) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
    }
    float found = most[0];
    for (int j = 1; j < 16; ++j) found = most[j] > found ? most[j] : found;
    return found;
  }

  // Puts powers in place of a chunk of logits and returns their sum.
  static float Powers(float* x, float peak) {
    float sums[16] = {};
    for (int64_t i = 0; i < kChunkKeys; i += 16) {
      for (int j = 0; j < 16; ++j) {
        const float power = Exp(x[i + j] - peak);
        x[i + j] = power;
        sums[j] += power;
      }
    }
    float sum = 0.0f;
    for (int j = 0; j < 16; ++j) sum += sums[j];
    return sum;
  }

  // ---- values ----------------------------------------------------------------------------------------------------------

  // y[h][kVecs vectors] = y * factors[h] + sum_k powers[h][k] * values[k].
  template <int kHeads, int kVecs, class T>
  __attribute__((always_inline)) static void AddValues(const T* values, int64_t width, int64_t keys, const float* powers,
                                                       int64_t stride, const float* factors, float* y) {
    F sums[kHeads][kVecs];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[h][v] = S::Mul(S::LoadF(y + h * width + v * kLanes), S::Set(factors[h]));
    }
    for (int64_t k = 0; k < keys; ++k) {
      F weight[kHeads];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) weight[h] = S::Set(powers[h * stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const F value = S::LoadValues(values + k * width + v * kLanes);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) sums[h][v] = S::Fma(weight[h], value, sums[h][v]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) S::StoreF(y + h * width + v * kLanes, sums[h][v]);
    }
  }

  template <int kHeads, int kVecs, class T>
  __attribute__((always_inline)) static void Columns(const T* values, int64_t width, int64_t keys, const float* powers,
                                                     int64_t stride, const float* factors, float* y, int64_t* column) {
    for (; *column + kVecs * kLanes <= width; *column += kVecs * kLanes) {
      AddValues<kHeads, kVecs>(values + *column, width, keys, powers, stride, factors, y + *column);
    }
    if constexpr (kVecs > 1) {
      Columns<kHeads, kVecs / 2>(values, width, keys, powers, stride, factors, y, column);
    }
  }

  template <int kHeads, class T>
  __attribute__((noinline)) static void Values(const T* values, int64_t width, int64_t keys, const float* powers,
                                               int64_t stride, const float* factors, float* y) {
    constexpr int kVecs = S::kSums / kHeads < 8 ? S::kSums / kHeads : 8;
    int64_t column = 0;
    Columns<kHeads, kVecs>(values, width, keys, powers, stride, factors, y, &column);
    for (; column < width; ++column) {
      for (int h = 0; h < kHeads; ++h) {
        float sum = y[h * width + column] * factors[h];
        for (int64_t k = 0; k < keys; ++k) sum += powers[h * stride + k] * S::ToFloat1(values[k * width + column]);
        y[h * width + column] = sum;
      }
    }
  }

  template <class T>
  static void GroupValues(const AttendProblem& p, int64_t row, int64_t key, int64_t keys, const float* powers,
                          int64_t stride, const float* factors, float* y) {
    const T* values = static_cast<const T*>(p.values) + (row * p.slots + key) * p.value_dim;
    int64_t h = 0;
    for (; h + 4 <= p.group; h += 4) {
      Values<4>(values, p.value_dim, keys, powers + h * stride, stride, factors + h, y + h * p.value_dim);
    }
    for (; h + 2 <= p.group; h += 2) {
      Values<2>(values, p.value_dim, keys, powers + h * stride, stride, factors + h, y + h * p.value_dim);
    }
    for (; h < p.group; ++h) {
      Values<1>(values, p.value_dim, keys, powers + h * stride, stride, factors + h, y + h * p.value_dim);
    }
  }

  // ---- attention of one row --------------------------------------------------------------------------------------------

  static float Dot(const float* a, const float* b, int64_t n) {
    F sum = S::Set(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum = S::Fma(S::LoadF(a + i), S::LoadF(b + i), sum);
    float lanes[kLanes], total = 0.0f;
    S::StoreF(lanes, sum);
    for (int l = 0; l < kLanes; ++l) total += lanes[l];
    for (; i < n; ++i) total += a[i] * b[i];
    return total;
  }

  static void Attend(const AttendProblem& p, int64_t row) {
    const int64_t group = p.group, size = p.subs * kBlockBytes, stride = LogitStride(p.slots, p.received);
    const int64_t length = Min(p.slots, p.lengths[row] > 0 ? p.lengths[row] : 0);
    const int64_t whole = length / kBlockKeys;  // blocks
    float* at = p.scratch + row * ScratchFloats(p);
    float *scales = at, *biases = at + group, *peaks = at + 2 * group, *sums = at + 3 * group;
    float* logits = at + 4 * group;
    uint8_t* tables = reinterpret_cast<uint8_t*>(logits + group * stride);
    float* y = p.out + row * p.out_stride;
    const float* q = p.q + row * group * p.head_dim;
    const float* books = p.books + row % p.kv_heads * p.subs * kEntries * p.d_sub;
    std::memset(y, 0, static_cast<size_t>(p.out_stride) * 4);
    for (int64_t h = 0; h < group; ++h) {
      Table(p, q + h * p.head_dim, books, tables + h * size, scales + h, biases + h);
      peaks[h] = kNone;
      sums[h] = 0.0f;
    }
    for (int64_t key = 0; key < length; key += kChunkKeys) {
      const int64_t keys = Min(kChunkKeys, length - key), blocks = Min(kChunkBlocks, whole - key / kBlockKeys);
      float* chunk = logits + (p.received ? key : 0);
      if (blocks > 0) {
        Blocks(tables, p.codes + (row * p.blocks + key / kBlockKeys) * size, p.subs, blocks, group, scales, biases, chunk,
               stride);
      }
      for (int64_t h = 0; h < group; ++h) {
        for (int64_t i = blocks * kBlockKeys; i < keys; ++i) {
          const float* recent = p.recent + (row * kBlockKeys + (key + i) % kBlockKeys) * p.head_dim;
          chunk[h * stride + i] = Dot(q + h * p.head_dim, recent, p.head_dim);
        }
        for (int64_t i = keys; i < kChunkKeys; ++i) chunk[h * stride + i] = kNone;
        if (p.seen != nullptr) {
          const uint8_t* seen = p.seen + row * p.slots + key;
          for (int64_t i = 0; i < keys; ++i) chunk[h * stride + i] = seen[i] ? chunk[h * stride + i] : kNone;
        }
      }
      AddChunk(p, row, key, keys, chunk, stride, peaks, sums, y);
    }
    for (int64_t h = 0; h < group; ++h) {
      // Not a number where a product was none: sums of bytes cannot show it.
      const float inverse = std::isfinite(biases[h]) ? sums[h] > 0.0f ? 1.0f / sums[h] : sums[h] : biases[h] - biases[h];
      for (int64_t c = 0; c < p.value_dim; ++c) y[h * p.value_dim + c] *= inverse;
      sums[h] = inverse;
    }
    if (p.received) Receive(p, length, logits, stride, peaks, sums, y + group * p.value_dim);
  }

  // Takes the logits of a chunk into the running softmax.
  static void AddChunk(const AttendProblem& p, int64_t row, int64_t key, int64_t keys, float* chunk, int64_t stride,
                       float* peaks, float* sums, float* y) {
    constexpr int64_t kHeadsAtOnce = 8;
    float powers[kHeadsAtOnce * kChunkKeys], factors[kHeadsAtOnce];
    AttendProblem part = p;
    for (int64_t first = 0; first < p.group; first += kHeadsAtOnce) {
      part.group = Min(kHeadsAtOnce, p.group - first);
      bool any = false;
      for (int64_t h = 0; h < part.group; ++h) {
        float* to = powers + h * kChunkKeys;
        std::memcpy(to, chunk + (first + h) * stride, sizeof(float) * kChunkKeys);
        const float before = peaks[first + h], largest = Largest(to), peak = largest > before ? largest : before;
        factors[h] = 1.0f;
        if (peak == kNone) {  // nothing seen up to here
          std::memset(to, 0, sizeof(float) * kChunkKeys);
          continue;
        }
        any = true;
        factors[h] = Exp(before - peak);
        sums[first + h] = sums[first + h] * factors[h] + Powers(to, peak);
        peaks[first + h] = peak;
      }
      if (!any) continue;
      float* to = y + first * p.value_dim;
      if (p.value_type == kValueFloat32) {
        GroupValues<float>(part, row, key, keys, powers, kChunkKeys, factors, to);
      } else if (p.value_type == kValueFloat16) {
        GroupValues<typename S::Half>(part, row, key, keys, powers, kChunkKeys, factors, to);
      } else {
        GroupValues<typename S::Bfloat>(part, row, key, keys, powers, kChunkKeys, factors, to);
      }
    }
  }

  // What slots receive: their weights, summed over the group.
  static void Receive(const AttendProblem& p, int64_t length, const float* logits, int64_t stride, const float* peaks,
                      const float* inverses, float* received) {
    for (int64_t h = 0; h < p.group; ++h) {
      if (peaks[h] == kNone) continue;
      for (int64_t i = 0; i < length; ++i) received[i] += Exp(logits[h * stride + i] - peaks[h]) * inverses[h];
    }
  }
};

}  // namespace effjax
