// Some neurons of an MLP, in vectors of the compiler's own: products with their rows, then their rows added up.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sparse_mlp.h"

namespace effjax {
namespace {  // compiled anew for each instruction set

constexpr int64_t kNeuronBlock = 32;  // neurons whose activations are known before their rows of `down` are read
constexpr int kTogether = 4;          // rows of `down` that share a pass over the sums
constexpr int kMostBatch = 4;         // inputs that share a read of a row

typedef float Floats __attribute__((vector_size(4 * kVector)));
typedef uint32_t Words __attribute__((vector_size(4 * kVector)));
typedef uint16_t Halves __attribute__((vector_size(2 * kVector)));
typedef uint8_t Bytes __attribute__((vector_size(kVector)));

template <typename Vector>
inline void Read(const void* from, Vector* to) {
  std::memcpy(to, from, sizeof(Vector));
}

// Sixteen numbers or codes from `i`, a multiple of 16; behind the end of a row of numbers come zeros.
template <RowType kType>
inline void Values(const uint8_t* row, int64_t i, int64_t width, Floats* to) {
  if constexpr (kType == kRowFloat32) {
    if (i + kVector <= width) return Read(row + 4 * i, to);
    *to = Floats{};
    if (i < width) std::memcpy(to, row + 4 * i, static_cast<size_t>(width - i) * 4);
  } else if constexpr (kType == kRowBfloat16) {
    Halves halves = {};
    if (i + kVector <= width) {
      Read(row + 2 * i, &halves);
    } else if (i < width) {
      std::memcpy(&halves, row + 2 * i, static_cast<size_t>(width - i) * 2);
    }
    *to = (Floats)(__builtin_convertvector(halves, Words) << 16);
  } else {
    Bytes bytes;
    if constexpr (kType == kRowInt8) {
      Read(row + i, &bytes);
    } else {  // sixteen codes in the lower halves of sixteen bytes, the next sixteen in the upper ones
      Read(row + i / kCodeRun * 16, &bytes);
      bytes = i % kCodeRun ? bytes >> 4 : bytes & 15;
    }
    *to = __builtin_convertvector(bytes, Floats);
  }
}

constexpr int64_t BitsOf(RowType type) {
  return type == kRowFloat32 ? 32 : type == kRowBfloat16 ? 16 : type == kRowInt8 ? 8 : 4;
}

inline const uint8_t* RowOf(const NeuronRows& m, int64_t neuron) { return m.data + neuron * m.row_bytes; }

// Fetches a run from `i` into the cache. Rows are chosen one by one, so that the processor cannot guess the next.
template <RowType kType>
inline void Prefetch(const uint8_t* row, int64_t i) {
  constexpr int64_t kBytes = kCodeRun * BitsOf(kType) / 8;
  for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(row + i * BitsOf(kType) / 8 + byte);
}

// Products of a row with `kBatch` inputs. The row `next` is fetched meanwhile.
template <RowType kType, int kBatch>
inline void Dot(const NeuronRows& m, int64_t neuron, int64_t next, const float* x, int64_t stride, float* to) {
  const uint8_t* row = RowOf(m, neuron);
  const uint8_t* ahead = RowOf(m, next);
  constexpr bool kCodes = kType == kRowInt8 || kType == kRowInt4;
  const int64_t groups = kCodes ? m.groups : 1, size = kCodes ? m.group_size : m.width;
  Floats total[kBatch] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Floats sums[2][kBatch] = {};
    const float zero = kCodes ? m.zeros[neuron * groups + g] : 0.0f;
    for (int64_t i = g * size; i < (g + 1) * size; i += 2 * kVector) {
      Prefetch<kType>(ahead, i);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Floats w;
        Values<kType>(row, i + half * kVector, m.width, &w);
        if constexpr (kCodes) w -= zero;
#pragma GCC unroll 4
        for (int b = 0; b < kBatch; ++b) {
          Floats in;
          Read(x + b * stride + i + half * kVector, &in);
          sums[half][b] += w * in;
        }
      }
    }
    for (int b = 0; b < kBatch; ++b) {
      const Floats sum = sums[0][b] + sums[1][b];
      total[b] += kCodes ? sum * m.scales[neuron * groups + g] : sum;
    }
  }
  for (int b = 0; b < kBatch; ++b) {
    float sum = 0;
    for (int i = 0; i < kVector; ++i) sum += total[b][i];
    to[b] = sum;
  }
}

// Adds `h[b][n]` times the rows of `count` neurons to the sums of each input.
template <RowType kType, int kBatch>
inline void AddRows(const SparseMlpProblem& p, const int64_t* neurons, int count, const float (*h)[kTogether],
                    const int64_t* next, int next_count, float* sums) {
  const NeuronRows& m = p.down;
  constexpr bool kCodes = kType == kRowInt8 || kType == kRowInt4;
  const uint8_t* rows[kTogether];
  for (int n = 0; n < count; ++n) rows[n] = RowOf(m, neurons[n]);
  for (int64_t i = 0; i < m.width; i += 2 * kVector) {
    for (int n = 0; n < next_count; ++n) Prefetch<kType>(RowOf(m, next[n]), i);
#pragma GCC unroll 2
    for (int64_t at = i; at < i + 2 * kVector; at += kVector) {
      Floats w[kTogether];
      for (int n = 0; n < count; ++n) {
        Values<kType>(rows[n], at, m.width, &w[n]);
        if constexpr (kCodes) {
          const int64_t j = neurons[n];
          if (m.by_neuron) {
            const int64_t group = j * m.groups + at / m.group_size;
            w[n] = (w[n] - m.zeros[group]) * m.scales[group];
          } else {
            const int64_t group = j / m.group_size * m.width + at;
            Floats scale, zero;
            Read(m.scales + group, &scale);
            Read(m.zeros + group, &zero);
            w[n] = (w[n] - zero) * scale;
          }
        }
      }
      for (int b = 0; b < kBatch; ++b) {
        Floats sum;
        Read(sums + b * p.padded_out + at, &sum);
        for (int n = 0; n < count; ++n) sum += h[b][n] * w[n];
        std::memcpy(sums + b * p.padded_out + at, &sum, sizeof(sum));
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
        gate[b] = Activate(p.activation, gate[b]);
        open = open || gate[b] != 0;  // NaN too
      }
      if (!open) continue;
    }
    Dot<kType, kBatch>(p.up, j, next, x, p.padded_in, z);
    bool any = false;
    for (int b = 0; b < kBatch; ++b) {
      if (p.up_bias != nullptr) z[b] += p.up_bias[j];
      h[lives][b] = p.gated ? gate[b] * z[b] : Activate(p.activation, z[b]);
      any = any || h[lives][b] != 0;
    }
    live[lives] = j;
    lives += any;
  }
  for (int64_t n = 0; n < lives; n += kTogether) {
    const int some = static_cast<int>(std::min<int64_t>(kTogether, lives - n));
    const int more = static_cast<int>(std::clamp<int64_t>(lives - n - kTogether, 0, kTogether));
    float factors[kBatch][kTogether];
    for (int b = 0; b < kBatch; ++b) {
      for (int k = 0; k < some; ++k) factors[b][k] = h[n + k][b];
    }
    if (some == kTogether) {
      AddRows<kType, kBatch>(p, live + n, kTogether, factors, live + n + kTogether, more, sums);
    } else {
      for (int k = 0; k < some; ++k) {
        float one[kBatch][kTogether];
        for (int b = 0; b < kBatch; ++b) one[b][0] = factors[b][k];
        AddRows<kType, kBatch>(p, live + n + k, 1, one, nullptr, 0, sums);
      }
    }
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
