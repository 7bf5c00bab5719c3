// Some neurons of an MLP, in the widest vectors of the instruction set that this is compiled for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "sparse_mlp.h"

namespace effjax {
namespace {  // compiled anew for each instruction set

constexpr int64_t kNeuronBlock = 32;  // neurons whose activations are known before their rows of `down` are read
constexpr int kTogether = 4;          // rows of `down` that share a pass over the sums
constexpr int kMostBatch = 4;         // inputs that share a read of a row

// ---- vectors -----------------------------------------------------------------------------------------------------
// `Widen` brings bytes and 16-bit floats to floats; `kUpper` takes the upper halves of bytes, `kMask` keeps four bits.

#if defined(__AVX512BW__)
typedef __m512 Floats;

inline Floats Set(float x) { return _mm512_set1_ps(x); }
inline Floats Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline float Sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline Floats WidenHalves(const uint8_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
template <bool kMask, bool kUpper>
inline Floats WidenBytes(const uint8_t* p) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (kUpper) bytes = _mm_srli_epi16(bytes, 4);
  if (kMask) bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
#elif defined(__AVX2__)
typedef __m256 Floats;

inline Floats Set(float x) { return _mm256_set1_ps(x); }
inline Floats Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline float Sum(Floats x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(pair) + _mm_cvtss_f32(_mm_shuffle_ps(pair, pair, 1));
}
inline Floats WidenHalves(const uint8_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
template <bool kMask, bool kUpper>
inline Floats WidenBytes(const uint8_t* p) {
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if (kUpper) bytes = _mm_srli_epi16(bytes, 4);
  if (kMask) bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
#else
typedef float Floats __attribute__((vector_size(16)));

inline Floats Set(float x) { return Floats{x, x, x, x}; }
inline Floats Load(const float* p) {
  Floats x;
  std::memcpy(&x, p, 16);
  return x;
}
inline void Store(float* p, Floats x) { std::memcpy(p, &x, 16); }
inline float Sum(Floats x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline Floats WidenHalves(const uint8_t* p) {
  uint16_t halves[4];
  std::memcpy(halves, p, 8);
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(halves[i]) << 16;
  Floats x;
  std::memcpy(&x, words, 16);
  return x;
}
template <bool kMask, bool kUpper>
inline Floats WidenBytes(const uint8_t* p) {
  Floats x;
  for (int i = 0; i < 4; ++i) x[i] = static_cast<float>((kUpper ? p[i] >> 4 : p[i]) & (kMask ? 15 : 255));
  return x;
}
#endif

constexpr int kLanes = sizeof(Floats) / 4;
constexpr int kVectors = kCodeRun / kLanes;  // of a run

// ---- rows --------------------------------------------------------------------------------------------------------

constexpr int64_t BitsOf(RowType type) {
  return type == kRowFloat32 ? 32 : type == kRowBfloat16 ? 16 : type == kRowInt8 ? 8 : 4;
}
constexpr bool IsCoded(RowType type) { return type == kRowInt8 || type == kRowInt4; }

inline const uint8_t* RowOf(const NeuronRows& m, int64_t neuron) { return m.data + neuron * m.row_bytes; }

// Vector v of a run of 32 numbers or codes.
template <RowType kType>
inline Floats Values(const uint8_t* run, int v) {
  if constexpr (kType == kRowFloat32) {
    return Load(reinterpret_cast<const float*>(run) + v * kLanes);
  } else if constexpr (kType == kRowBfloat16) {
    return WidenHalves(run + 2 * v * kLanes);
  } else if constexpr (kType == kRowInt8) {
    return WidenBytes<false, false>(run + v * kLanes);
  } else {  // sixteen codes in the lower halves of sixteen bytes, the next sixteen in the upper ones
    const uint8_t* bytes = run + v * kLanes % 16;
    return v * kLanes < 16 ? WidenBytes<true, false>(bytes) : WidenBytes<true, true>(bytes);
  }
}

// The run from `i`, a multiple of 32; where the row ends within it, a copy with zeros behind.
template <RowType kType>
inline const uint8_t* RunAt(const uint8_t* row, int64_t i, int64_t width, uint8_t* copy) {
  const uint8_t* at = row + i * BitsOf(kType) / 8;
  if (IsCoded(kType) || i + kCodeRun <= width) return at;
  std::memset(copy, 0, 4 * kCodeRun);
  std::memcpy(copy, at, static_cast<size_t>((width - i) * BitsOf(kType) / 8));
  return copy;
}

// Fetches a run into the cache. Rows are chosen one by one, so that the processor cannot guess the next.
template <RowType kType>
inline void Prefetch(const uint8_t* row, int64_t i) {
  constexpr int64_t kBytes = kCodeRun * BitsOf(kType) / 8;
  for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(row + i * BitsOf(kType) / 8 + byte);
}

// Products of a row with `kBatch` inputs. The row `next` is fetched meanwhile.
template <RowType kType, int kBatch>
inline void Dot(const NeuronRows& m, int64_t neuron, int64_t next, const float* x, int64_t stride, float* to) {
  alignas(64) uint8_t copy[4 * kCodeRun];
  const uint8_t* row = RowOf(m, neuron);
  const uint8_t* ahead = RowOf(m, next);
  const int64_t groups = IsCoded(kType) ? m.groups : 1, size = IsCoded(kType) ? m.group_size : m.width;
  Floats total[kBatch];
  for (int b = 0; b < kBatch; ++b) total[b] = Set(0);
  for (int64_t g = 0; g < groups; ++g) {
    Floats sums[2][kBatch];
    for (int b = 0; b < kBatch; ++b) sums[0][b] = sums[1][b] = Set(0);
    const Floats zero = Set(IsCoded(kType) ? m.zeros[neuron * groups + g] : 0.0f);
    for (int64_t i = g * size; i < (g + 1) * size; i += kCodeRun) {
      Prefetch<kType>(ahead, i);
      const uint8_t* run = RunAt<kType>(row, i, m.width, copy);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Floats w = Values<kType>(run, v);
        if constexpr (IsCoded(kType)) w -= zero;
#pragma GCC unroll 4
        for (int b = 0; b < kBatch; ++b) sums[v % 2][b] += w * Load(x + b * stride + i + v * kLanes);
      }
    }
    for (int b = 0; b < kBatch; ++b) {
      const Floats sum = sums[0][b] + sums[1][b];
      total[b] += IsCoded(kType) ? sum * Set(m.scales[neuron * groups + g]) : sum;
    }
  }
  for (int b = 0; b < kBatch; ++b) to[b] = Sum(total[b]);
}

// Adds `h[b][n]` times the rows of `kCount` neurons to the sums of each input; fetches those of `next_count` others.
template <RowType kType, int kBatch, int kCount>
inline void AddRows(const SparseMlpProblem& p, const int64_t* neurons, const float (*h)[kTogether],
                    const int64_t* next, int next_count, float* sums) {
  const NeuronRows& m = p.down;
  alignas(64) uint8_t copies[kCount][4 * kCodeRun];
  for (int64_t i = 0; i < m.width; i += kCodeRun) {
    const uint8_t* runs[kCount];
    for (int n = 0; n < next_count; ++n) Prefetch<kType>(RowOf(m, next[n]), i);
    for (int n = 0; n < kCount; ++n) runs[n] = RunAt<kType>(RowOf(m, neurons[n]), i, m.width, copies[n]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kLanes;
      Floats w[kCount];
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) {
        w[n] = Values<kType>(runs[n], v);
        if constexpr (IsCoded(kType)) {
          const int64_t j = neurons[n];
          if (m.by_neuron) {
            const int64_t group = j * m.groups + at / m.group_size;
            w[n] = (w[n] - Set(m.zeros[group])) * Set(m.scales[group]);
          } else {
            const int64_t group = j / m.group_size * m.width + at;
            w[n] = (w[n] - Load(m.zeros + group)) * Load(m.scales + group);
          }
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBatch; ++b) {
        Floats sum = Load(sums + b * p.padded_out + at);
#pragma GCC unroll 4
        for (int n = 0; n < kCount; ++n) sum += Set(h[b][n]) * w[n];
        Store(sums + b * p.padded_out + at, sum);
      }
    }
  }
}

inline float Activate(Activation activation, float z) {
  switch (activation) {
    case kRelu: return z < 0 ? 0 : z;  // NaN stays
    case kSilu: return z / (1 + std::exp(-z));
    default: return 0.5f * z * (1 + std::tanh(0.7978845608f * (z + 0.044715f * z * z * z)));
  }
}

// ---- neurons -----------------------------------------------------------------------------------------------------

// One block of neurons for `kBatch` inputs; those that are zero for every input are not read a second time.
template <RowType kType, int kBatch>
void Block(const SparseMlpProblem& p, const int64_t* neurons, int64_t count, const float* x, float* sums) {
  float h[kNeuronBlock][kMostBatch];
  int64_t live[kNeuronBlock];
  int64_t lives = 0;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t j = neurons[n], next = neurons[std::min(n + 1, count - 1)];
    float z[kBatch], gate[kBatch];
    if (p.gated) {
      Dot<kType, kBatch>(p.gate, j, next, x, p.padded_in, gate);
      bool open = false;
      for (int b = 0; b < kBatch; ++b) {
        if (p.gate_bias != nullptr) gate[b] += p.gate_bias[j];
        gate[b] = Activate(p.activation, gate[b] - p.shift);
        open = open || gate[b] != 0;  // NaN too
      }
      if (!open) continue;
    }
    Dot<kType, kBatch>(p.up, j, next, x, p.padded_in, z);
    bool any = false;
    for (int b = 0; b < kBatch; ++b) {
      if (p.up_bias != nullptr) z[b] += p.up_bias[j];
      h[lives][b] = p.gated ? gate[b] * z[b] : Activate(p.activation, z[b] - p.shift);
      any = any || h[lives][b] != 0;
    }
    live[lives] = j;
    lives += any;
    if (any && p.used != nullptr) p.used[j] = 1;
  }
  for (int64_t n = 0; n < lives;) {
    const bool whole = n + kTogether <= lives;
    const int some = whole ? kTogether : 1;
    float factors[kBatch][kTogether];
    for (int b = 0; b < kBatch; ++b) {
      for (int k = 0; k < some; ++k) factors[b][k] = h[n + k][b];
    }
    const int more = static_cast<int>(std::clamp<int64_t>(lives - n - some, 0, kTogether));
    if (whole) {
      AddRows<kType, kBatch, kTogether>(p, live + n, factors, live + n + some, more, sums);
    } else {
      AddRows<kType, kBatch, 1>(p, live + n, factors, live + n + some, std::min(more, 1), sums);
    }
    n += some;
  }
}

template <RowType kType>
void AllInputs(const SparseMlpProblem& p, const int64_t* neurons, int64_t count, float* sums) {
  for (int64_t b = 0; b < p.batch;) {
    const float* x = p.x + b * p.padded_in;
    float* to = sums + b * p.padded_out;
    switch (std::min<int64_t>(p.batch - b, kMostBatch)) {
      case 1: Block<kType, 1>(p, neurons, count, x, to); b += 1; break;
      case 2: Block<kType, 2>(p, neurons, count, x, to); b += 2; break;
      case 3: Block<kType, 3>(p, neurons, count, x, to); b += 3; break;
      default: Block<kType, 4>(p, neurons, count, x, to); b += 4;
    }
  }
}

void Neurons(const SparseMlpProblem& p, int64_t begin, int64_t end, float* sums) {
  while (begin < end) {
    int64_t block[kNeuronBlock], count = 0;
    for (; begin < end && count < kNeuronBlock; ++begin) {
      const int64_t j = p.chosen[begin];
      if (j >= 0 && j < p.neurons) block[count++] = j;
    }
    if (count == 0) continue;
    switch (p.type) {
      case kRowFloat32: AllInputs<kRowFloat32>(p, block, count, sums); break;
      case kRowBfloat16: AllInputs<kRowBfloat16>(p, block, count, sums); break;
      case kRowInt8: AllInputs<kRowInt8>(p, block, count, sums); break;
      case kRowInt4: AllInputs<kRowInt4>(p, block, count, sums); break;
    }
  }
}

constexpr SparseMlpKernel kKernel = {Neurons};

}  // namespace
}  // namespace effjax
