// One query of a Representer Sketch, in loops over consecutive rows that compilers turn into vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "representer.h"

namespace effjax {
namespace {  // compiled anew for each instruction set

constexpr int64_t kBlockRows = 64;

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
inline int32_t Floor(float x) {
  constexpr float kMost = 1073741824.0f;
  const float above = x >= -kMost ? x : -kMost;
  const float held = above <= kMost ? above : kMost;
  const int32_t whole = static_cast<int32_t>(held);
  return whole - (static_cast<float>(whole) > held);
}

// The cells of `n` rows from `row`.
inline void Cells(const RepresenterProblem& p, const float* z, int64_t row, int64_t n, uint32_t* cells) {
  uint64_t keys[kBlockRows];
  float at[kBlockRows];
  for (int64_t b = 0; b < n; ++b) keys[b] = p.addend[row + b];
  for (int64_t k = 0; k < p.hashes; ++k) {
    const float* offset = p.offsets + k * p.rows + row;
    for (int64_t b = 0; b < n; ++b) at[b] = 0;
    for (int64_t d = 0; d < p.dim; ++d) {
      const float* direction = p.directions + (d * p.hashes + k) * p.rows + row;
      const float channel = z[d];
      for (int64_t b = 0; b < n; ++b) at[b] += channel * direction[b];
    }
    const uint64_t* multiplier = p.multiplier + k * p.rows + row;
    if (p.signs) {
      for (int64_t b = 0; b < n; ++b) keys[b] += multiplier[b] * static_cast<uint64_t>(at[b] >= 0);
    } else {
      for (int64_t b = 0; b < n; ++b) keys[b] += multiplier[b] * static_cast<uint32_t>(Floor(at[b] + offset[b]));
    }
  }
  const uint64_t buckets = static_cast<uint64_t>(p.buckets);
  for (int64_t b = 0; b < n; ++b) cells[b] = static_cast<uint32_t>(((keys[b] >> 32) * buckets) >> 32);
}

void Query(const RepresenterProblem& p, int64_t query) {
  float z[kMostDim];
  uint32_t cells[kBlockRows];
  const float* x = p.x + query * p.in;
  int64_t j = 0;
  for (; j + 8 <= p.dim; j += 8) ProjectColumns<8>(x, p.in, p.projection + j, p.dim, z + j);
  for (; j < p.dim; ++j) ProjectColumns<1>(x, p.in, p.projection + j, p.dim, z + j);
  const int64_t each = p.rows / p.groups;
  for (int64_t g = 0; g < p.groups; ++g) {
    float* mean = p.means + (query * p.groups + g) * p.outputs;
    std::fill(mean, mean + p.outputs, 0.0f);
    for (int64_t row = g * each; row < (g + 1) * each; row += kBlockRows) {
      const int64_t n = std::min(kBlockRows, (g + 1) * each - row);
      Cells(p, z, row, n, cells);
      const float* counts = p.counts + row * p.buckets * p.outputs;
      if (p.outputs == 1) {
        float sums[4] = {};  // additions that do not wait for one another
        for (int64_t b = 0; b < n; ++b) sums[b & 3] += counts[b * p.buckets + cells[b]];
        mean[0] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
      } else {
        for (int64_t b = 0; b < n; ++b) {
          const float* cell = counts + (b * p.buckets + cells[b]) * p.outputs;
          for (int64_t o = 0; o < p.outputs; ++o) mean[o] += cell[o];
        }
      }
    }
    for (int64_t o = 0; o < p.outputs; ++o) mean[o] /= static_cast<float>(each);
  }
}

constexpr RepresenterKernel kKernel = {Query};

}  // namespace
}  // namespace effjax
