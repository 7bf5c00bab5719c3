// Best labels of hash buckets on buffers of exactly their size.
#include <algorithm>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "common.h"
#include "cpu.h"
#include "label_top_k.h"
#include "variants.h"

namespace {

// Tables with ids and offsets that lie, now and then: only read safely then.
void RunLabels(const char* name, const effjax::LabelKernel* kernel) {
  for (int i = 0; i < 60; ++i, ++cases) {
    effjax::LabelProblem p = {};
    p.batch = Draw(1, 3), p.in = Draw(1, 70), p.hashes = Draw(1, 6), p.tables = Draw(1, 30), p.labels = Draw(1, 300);
    p.k = Draw(1, p.labels), p.spare = Draw(0, 3), p.bfloat16 = Draw(0, 1) != 0;
    const int64_t bits = p.hashes * p.tables, edges = (int64_t{1} << p.hashes) + 1;
    Exact<float> h(p.batch * p.in), directions((p.in + 1) * bits), w(p.labels * p.in), bias(p.labels);
    Exact<float> values(p.batch * p.k);
    Exact<uint16_t> halves(p.labels * p.in);
    Exact<int32_t> ids(p.tables * p.labels), offsets(p.tables * edges), fallback(p.spare);
    Exact<int32_t> found(p.batch * p.k), scored(p.batch);
    Exact<uint64_t> seen((p.labels + 63) / 64);
    const auto fill = [](Exact<float>& numbers, int64_t n) {
      for (int64_t j = 0; j < n; ++j) numbers[j] = static_cast<float>(Draw(-16, 16)) / 8;
    };
    fill(h, p.batch * p.in), fill(directions, (p.in + 1) * bits), fill(w, p.labels * p.in), fill(bias, p.labels);
    for (int64_t j = 0; j < p.labels * p.in; ++j) {
      uint32_t word;
      std::memcpy(&word, &w[j], 4);
      halves[j] = static_cast<uint16_t>(word >> 16);  // exact: few bits
    }
    for (int64_t j = 0; j < p.spare; ++j) fallback[j] = static_cast<int32_t>(Draw(0, p.labels - 1));
    // Any order of the labels, cut anywhere, will do as a table.
    for (int64_t t = 0; t < p.tables; ++t) {
      int32_t* order = ids.get() + t * p.labels;
      for (int64_t j = 0; j < p.labels; ++j) order[j] = static_cast<int32_t>(j);
      std::shuffle(order, order + p.labels, generator);
      int32_t* cuts = offsets.get() + t * edges;
      for (int64_t e = 1; e + 1 < edges; ++e) cuts[e] = static_cast<int32_t>(Draw(0, p.labels));
      std::sort(cuts + 1, cuts + edges - 1);
      cuts[edges - 1] = static_cast<int32_t>(p.labels);
    }
    const bool lies = Draw(0, 4) == 0;
    if (lies) {
      for (int64_t j = 0; j < 20; ++j) ids[Draw(0, p.tables * p.labels - 1)] = static_cast<int32_t>(Draw(-1000, 1000000));
      for (int64_t j = 0; j < 20; ++j) offsets[Draw(0, p.tables * edges - 1)] = static_cast<int32_t>(Draw(-1000, 1000000));
      if (p.spare > 0) fallback[0] = -7;
    }
    p.h = h.get(), p.directions = directions.get(), p.ids = ids.get(), p.offsets = offsets.get(), p.bias = bias.get();
    p.weights = p.bfloat16 ? static_cast<const void*>(halves.get()) : w.get();
    p.fallback = fallback.get(), p.values = values.get(), p.found = found.get(), p.scored = scored.get();
    Exact<uint64_t> maps(effjax::AllMapWords(p));
    if (Draw(0, 1) != 0) {
      effjax::FillMaps(p, maps.get());
      p.maps = maps.get();
    }
    for (int64_t q = 0; q < p.batch; ++q) {
      kernel->query(p, q, seen.get());
      for (int64_t word = 0; word < (p.labels + 63) / 64; ++word) Compare(name, static_cast<float>(seen[word] != 0), 0, 1, 0);
      if (lies) continue;
      std::vector<bool> member(static_cast<size_t>(p.labels));
      for (int64_t t = 0; t < p.tables; ++t) {
        int64_t code = 0;
        for (int64_t b = 0; b < p.hashes; ++b) {
          double at = directions[(p.in * p.hashes + b) * p.tables + t];
          for (int64_t d = 0; d < p.in; ++d) at += h[q * p.in + d] * directions[(d * p.hashes + b) * p.tables + t];
          code |= static_cast<int64_t>(at >= 0) << b;
        }
        for (int64_t j = offsets[t * edges + code]; j < offsets[t * edges + code + 1]; ++j) {
          member[static_cast<size_t>(ids[t * p.labels + j])] = true;
        }
      }
      int64_t count = std::count(member.begin(), member.end(), true);
      if (count < p.k) {
        for (int64_t j = 0; j < p.spare; ++j) member[static_cast<size_t>(fallback[j])] = true;
        count = std::count(member.begin(), member.end(), true);
      }
      std::vector<std::pair<double, int64_t>> ranked;
      for (int64_t j = 0; j < p.labels; ++j) {
        if (!member[static_cast<size_t>(j)]) continue;
        double logit = bias[j];
        for (int64_t d = 0; d < p.in; ++d) logit += h[q * p.in + d] * w[j * p.in + d];
        ranked.emplace_back(-logit, j);
      }
      std::sort(ranked.begin(), ranked.end());
      Compare(name, static_cast<float>(scored[q]), static_cast<double>(count), 1, 0);
      for (int64_t j = 0; j < p.k; ++j) {
        const bool some = j < count;
        Compare(name, static_cast<float>(found[q * p.k + j]), some ? static_cast<double>(ranked[static_cast<size_t>(j)].second) : -1, 1, 0);
        if (some) Compare(name, values[q * p.k + j], -ranked[static_cast<size_t>(j)].first, 1, 1e-5);
      }
    }
  }
}

}  // namespace

void CheckLabels() {
  RunLabels("labels portable", effjax::kLabelPortable);
  if (effjax::HasAvx2() && effjax::kLabelAvx2) RunLabels("labels avx2", effjax::kLabelAvx2);
  if (effjax::HasAvx512() && effjax::kLabelAvx512) RunLabels("labels avx512", effjax::kLabelAvx512);
}
