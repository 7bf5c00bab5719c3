// One query of a Representer Sketch, sixteen rows at a time in vectors of the compiler's own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "representer.h"

namespace effjax {
namespace {  // compiled anew for each instruction set

constexpr int64_t kBlockRows = 16;
typedef float Floats __attribute__((vector_size(4 * kBlockRows)));
typedef int32_t Ints __attribute__((vector_size(4 * kBlockRows)));
typedef uint32_t Words __attribute__((vector_size(4 * kBlockRows)));
typedef uint64_t Keys __attribute__((vector_size(8 * kBlockRows)));

// `n` numbers, then zeros; `n` is a constant where a block is whole.
template <typename Vector, typename Number>
inline void Load(const Number* from, int64_t n, Vector* to) {
  *to = Vector{};
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(Number));
}

// z[j] for `kColumns` channels; four inputs at a time, so that sums do not wait for one another.
template <int kColumns>
void ProjectColumns(const float* x, int64_t in, const float* a, int64_t dim, float* z) {
  float sums[4][kColumns] = {};
  int64_t i = 0;
  for (; i + 4 <= in; i += 4) {
    for (int u = 0; u < 4; ++u) {
      for (int j = 0; j < kColumns; ++j) sums[u][j] += x[i + u] * a[(i + u) * dim + j];
    }
  }
  for (; i < in; ++i) {
    for (int j = 0; j < kColumns; ++j) sums[0][j] += x[i] * a[i * dim + j];
  }
  for (int j = 0; j < kColumns; ++j) z[j] = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
}

// Rounds down; what is not above -2^30, and NaN, becomes that, as in effjax/hashing/lsh.py.
inline void Floor(const Floats& x, Words* codes) {
  const Floats most = Floats{} + 1073741824.0f;
  Floats held = x >= -most ? x : -most;
  held = held <= most ? held : most;
  Ints whole = __builtin_convertvector(held, Ints);
  whole += __builtin_convertvector(whole, Floats) > held;  // a true comparison is -1
  *codes = (Words)whole;
}

// The cells of `n` rows from `row`.
inline void Cells(const RepresenterProblem& p, const float* z, int64_t row, int64_t n, uint32_t* cells) {
  Keys keys, multiplier;
  Load(p.addend + row, n, &keys);
  for (int64_t k = 0; k < p.hashes; ++k) {
    Floats at = {}, direction, offset;
    for (int64_t d = 0; d < p.dim; ++d) {
      Load(p.directions + (d * p.hashes + k) * p.rows + row, n, &direction);
      at += z[d] * direction;
    }
    Words codes;
    if (p.signs) {
      codes = (Words)(at >= 0.0f) & 1u;
    } else {
      Load(p.offsets + k * p.rows + row, n, &offset);
      Floor(at + offset, &codes);
    }
    Load(p.multiplier + k * p.rows + row, n, &multiplier);
    keys += multiplier * __builtin_convertvector(codes, Keys);
  }
  keys = ((keys >> 32) * static_cast<uint64_t>(p.buckets)) >> 32;
  const Words found = __builtin_convertvector(keys, Words);
  std::memcpy(cells, &found, sizeof(found));
}

// Adds the cells that `n` rows from `row` hit to `sum`.
inline void Block(const RepresenterProblem& p, const float* z, int64_t row, int64_t n, float* sum) {
  uint32_t cells[kBlockRows];
  Cells(p, z, row, n, cells);
  const float* counts = p.counts + row * p.buckets * p.outputs;
  if (p.outputs == 1) {
    Floats hit = {};
    for (int64_t b = 0; b < n; ++b) hit[b] = counts[b * p.buckets + cells[b]];
    float sums[4];  // additions that do not wait for one another
    for (int b = 0; b < 4; ++b) sums[b] = (hit[b] + hit[b + 4]) + (hit[b + 8] + hit[b + 12]);
    sum[0] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  } else {
    for (int64_t b = 0; b < n; ++b) {
      const float* cell = counts + (b * p.buckets + cells[b]) * p.outputs;
      for (int64_t o = 0; o < p.outputs; ++o) sum[o] += cell[o];
    }
  }
}

void Query(const RepresenterProblem& p, int64_t query) {
  float z[kMostDim];
  const float* x = p.x + query * p.in;
  int64_t j = 0;
  for (; j + 8 <= p.dim; j += 8) ProjectColumns<8>(x, p.in, p.projection + j, p.dim, z + j);
  for (; j < p.dim; ++j) ProjectColumns<1>(x, p.in, p.projection + j, p.dim, z + j);
  const int64_t each = p.rows / p.groups;
  for (int64_t g = 0; g < p.groups; ++g) {
    float* mean = p.means + (query * p.groups + g) * p.outputs;
    std::fill(mean, mean + p.outputs, 0.0f);
    int64_t row = g * each;
    for (; row + kBlockRows <= (g + 1) * each; row += kBlockRows) Block(p, z, row, kBlockRows, mean);
    if (row < (g + 1) * each) Block(p, z, row, (g + 1) * each - row, mean);
    for (int64_t o = 0; o < p.outputs; ++o) mean[o] /= static_cast<float>(each);
  }
}

constexpr RepresenterKernel kKernel = {Query};

}  // namespace
}  // namespace effjax
