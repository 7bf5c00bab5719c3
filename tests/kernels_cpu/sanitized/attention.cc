// Attention of one query to slots as they are held, on buffers of exactly their size.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"
#include "attention.h"
#include "cpu.h"
#include "variants.h"

namespace {

// Number `i` of a vector that is held so.
double Number(const uint8_t* row, effjax::Held held, int64_t i, int64_t head_dim) {
  if (held == effjax::Held::kBytes) return row[i];
  if (held == effjax::Held::kNibbles) return i < head_dim / 2 ? row[i] & 15 : row[i - head_dim / 2] >> 4;
  uint32_t bits = 0;
  if (held == effjax::Held::kBfloat16) {
    bits = static_cast<uint32_t>(row[2 * i] | row[2 * i + 1] << 8) << 16;
  } else {
    std::memcpy(&bits, row + 4 * i, 4);
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Random vectors as they are held: small codes, or floats that are exact in 16 bits.
void Fill(uint8_t* bytes, effjax::Held held, int64_t n) {
  const bool floats = held == effjax::Held::kFloat32 || held == effjax::Held::kBfloat16;
  for (int64_t i = 0; i < n; ++i) bytes[i] = static_cast<uint8_t>(Draw(0, 255));
  if (!floats) return;
  const int64_t size = held == effjax::Held::kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < n; i += size) {
    const float x = Normal();
    std::memcpy(bytes + i, reinterpret_cast<const uint8_t*>(&x) + 4 - size, static_cast<size_t>(size));
  }
}

void RunAttention(const char* name, const effjax::AttentionKernel* kernel) {
  using effjax::Held;
  for (int i = 0; i < 30; ++i, ++cases) {
    effjax::AttentionProblem p = {};
    const auto held = [&] { return static_cast<Held>(Draw(0, 3)); };
    p.kv_heads = Draw(1, 2);
    p.heads = p.kv_heads * Draw(1, 2);
    p.group = Draw(1, 7);
    p.page = p.slots = Draw(1, 150);
    const bool paged = p.kv_heads == 1 && Draw(0, 1);  // pages of one head, in order, lie as its slots would
    if (paged) {
      p.page = Draw(1, 40);
      p.row_pages = Draw(1, 6);
      p.slots = p.page * p.row_pages;
    }
    p.pages = p.heads * p.row_pages;
    Exact<int32_t> table(p.pages);
    for (int64_t j = 0; j < p.pages; ++j) table[j] = static_cast<int32_t>(j);
    if (paged) p.table = table.get();
    p.k.held = held();
    p.v.held = held();
    p.head_dim = 32 * Draw(1, 3);
    (Draw(0, 1) ? p.quantile : p.multiple) = 0.45f * static_cast<float>(Draw(0, 2));
    p.peaked = Draw(0, 1);
    const auto bytes = [&](Held h) {
      return h == Held::kFloat32 ? 4 * p.head_dim : h == Held::kBfloat16 ? 2 * p.head_dim : h == Held::kBytes ? p.head_dim : p.head_dim / 2;
    };
    p.k.row_bytes = bytes(p.k.held);
    p.v.row_bytes = bytes(p.v.held);
    const int64_t all = p.heads * p.slots;
    Exact<uint8_t> k(all * p.k.row_bytes), v(all * p.v.row_bytes);
    Fill(k.get(), p.k.held, all * p.k.row_bytes);
    Fill(v.get(), p.v.held, all * p.v.row_bytes);
    Exact<float> q(p.heads * p.group * p.head_dim), low(all), step(all), asked(p.heads), y(p.heads * p.group * p.head_dim), received(all);
    Exact<int32_t> start(p.heads), length(p.heads);
    const bool coded = p.v.held == Held::kBytes || p.v.held == Held::kNibbles;
    for (int64_t j = 0; j < p.heads * p.group * p.head_dim; ++j) q[j] = Normal() / (p.k.held == Held::kBytes ? 500 : 10);
    for (int64_t j = 0; j < all; ++j) low[j] = Normal(), step[j] = 0.1f + std::abs(Normal());
    for (int64_t j = 0; j < p.heads; ++j) {
      length[j] = static_cast<int32_t>(Draw(0, p.slots));
      start[j] = static_cast<int32_t>(Draw(0, p.slots / 2));
      asked[j] = 1.5f;
    }
    p.k.data = k.get(), p.v.data = v.get(), p.q = q.get(), p.start = start.get(), p.length = length.get(), p.y = y.get();
    if (coded) p.low = low.get(), p.step = step.get();
    if (Draw(0, 1)) p.asked = asked.get(), p.received = received.get();
    for (int64_t h = 0; h < p.heads; ++h) {
      kernel->head(p, h);
      std::vector<double> given(static_cast<size_t>(p.slots));
      for (int64_t g = 0; g < p.group; ++g) {
        const int64_t at = (h * p.group + g) * p.head_dim;
        std::vector<double> weights(static_cast<size_t>(p.slots));
        double total = 0;
        for (int64_t s = start[h]; s < length[h]; ++s) {
          double logit = 0;
          const uint8_t* row = p.k.data + (h * p.slots + s) * p.k.row_bytes;
          for (int64_t d = 0; d < p.head_dim; ++d) logit += q[at + d] * Number(row, p.k.held, d, p.head_dim);
          total += weights[static_cast<size_t>(s)] = std::exp(logit);
        }
        for (int64_t d = 0; d < p.head_dim; ++d) {
          double sum = 0, magnitude = 1;
          for (int64_t s = start[h]; s < length[h]; ++s) {
            double value = Number(p.v.data + (h * p.slots + s) * p.v.row_bytes, p.v.held, d, p.head_dim);
            if (coded) value = low[h * p.slots + s] + step[h * p.slots + s] * value;
            sum += weights[static_cast<size_t>(s)] / total * value;
            magnitude += weights[static_cast<size_t>(s)] / total * std::abs(value);
          }
          Compare(name, y[at + d], sum, magnitude, 1e-4);
        }
        std::vector<double> sorted(weights.begin() + start[h], weights.begin() + std::max(start[h], length[h]));
        std::sort(sorted.begin(), sorted.end());
        const double seen = static_cast<double>(sorted.size());
        for (int64_t s = start[h]; s < length[h]; ++s) {
          const double weight = weights[static_cast<size_t>(s)] / total;
          double share = weight;
          const double counted = p.peaked && seen > 0 ? sorted.back() / total : 1.0;
          if (p.quantile > 0) share = counted * (weights[static_cast<size_t>(s)] > sorted[static_cast<size_t>(p.quantile * static_cast<float>(seen - 1))]);
          if (p.multiple > 0) share = counted * (weight * seen > p.multiple);
          given[static_cast<size_t>(s)] += 1.5 * share;
        }
      }
      if (p.received == nullptr) continue;
      for (int64_t s = 0; s < p.slots; ++s) Compare(name, received[h * p.slots + s], given[static_cast<size_t>(s)], 1, 1e-4);
    }
  }
}

}  // namespace

void CheckAttention() {
  RunAttention("attention portable", effjax::kAttentionPortable);
  if (effjax::HasAvx2() && effjax::kAttentionAvx2) RunAttention("attention avx2", effjax::kAttentionAvx2);
  if (effjax::HasAvx512() && effjax::kAttentionAvx512) RunAttention("attention avx512", effjax::kAttentionAvx512);
}
