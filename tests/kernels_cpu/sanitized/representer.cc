// Queries of the Representer Sketch on buffers of exactly their size.
#include <cmath>
#include <vector>

#include "common.h"
#include "cpu.h"
#include "representer.h"
#include "variants.h"

namespace {

// Numbers of few bits, so that no code depends on the order of a sum.
void RunRepresenter(const char* name, const effjax::RepresenterKernel* kernel) {
  for (int i = 0; i < 40; ++i, ++cases) {
    effjax::RepresenterProblem p = {};
    p.batch = Draw(1, 3), p.in = Draw(1, 20), p.dim = Draw(1, 20), p.hashes = Draw(1, 4), p.groups = Draw(1, 3);
    p.rows = p.groups * Draw(1, 150), p.buckets = Draw(1, 20), p.outputs = Draw(1, 3), p.signs = Draw(0, 1) != 0;
    const int64_t codes = p.hashes * p.rows;
    Exact<float> x(p.batch * p.in), a(p.in * p.dim), directions(p.dim * codes), offsets(codes);
    Exact<float> counts(p.rows * p.buckets * p.outputs), means(p.batch * p.groups * p.outputs);
    Exact<uint64_t> multiplier(codes), addend(p.rows);
    const auto fill = [](Exact<float>& numbers, int64_t n) {
      for (int64_t j = 0; j < n; ++j) numbers[j] = static_cast<float>(Draw(-16, 16)) / 8;
    };
    fill(x, p.batch * p.in), fill(a, p.in * p.dim), fill(directions, p.dim * codes), fill(offsets, codes);
    fill(counts, p.rows * p.buckets * p.outputs);
    for (int64_t j = 0; j < codes; ++j) multiplier[j] = static_cast<uint64_t>(generator()) << 32 | generator();
    for (int64_t j = 0; j < p.rows; ++j) addend[j] = static_cast<uint64_t>(generator()) << 32 | generator();
    if (Draw(0, 3) == 0) x[0] = Draw(0, 1) ? 1e30f : -INFINITY;
    p.x = x.get(), p.projection = a.get(), p.directions = directions.get(), p.offsets = offsets.get();
    p.multiplier = multiplier.get(), p.addend = addend.get(), p.counts = counts.get(), p.means = means.get();
    for (int64_t q = 0; q < p.batch; ++q) {
      kernel->query(p, q);
      if (std::abs(x[q * p.in]) > 1e6f) continue;  // only that it is read safely
      std::vector<double> sums(static_cast<size_t>(p.groups * p.outputs));
      for (int64_t r = 0; r < p.rows; ++r) {
        uint64_t key = addend[r];
        for (int64_t k = 0; k < p.hashes; ++k) {
          double at = p.signs ? 0 : offsets[k * p.rows + r];
          for (int64_t d = 0; d < p.dim; ++d) {
            double z = 0;
            for (int64_t j = 0; j < p.in; ++j) z += x[q * p.in + j] * a[j * p.dim + d];
            at += z * directions[(d * p.hashes + k) * p.rows + r];
          }
          const int64_t code = p.signs ? at >= 0 : static_cast<int64_t>(std::floor(at));
          key += multiplier[k * p.rows + r] * static_cast<uint32_t>(code);
        }
        const int64_t cell = static_cast<int64_t>((key >> 32) * static_cast<uint64_t>(p.buckets) >> 32);
        const int64_t each = p.rows / p.groups;
        for (int64_t o = 0; o < p.outputs; ++o) {
          sums[static_cast<size_t>(r / each * p.outputs + o)] += counts[(r * p.buckets + cell) * p.outputs + o] / static_cast<double>(each);
        }
      }
      for (size_t j = 0; j < sums.size(); ++j) Compare(name, means[q * p.groups * p.outputs + static_cast<int64_t>(j)], sums[j], 1, 1e-5);
    }
  }
}

}  // namespace

void CheckRepresenter() {
  RunRepresenter("representer portable", effjax::kRepresenterPortable);
  if (effjax::HasAvx2() && effjax::kRepresenterAvx2) RunRepresenter("representer avx2", effjax::kRepresenterAvx2);
  if (effjax::HasAvx512() && effjax::kRepresenterAvx512) RunRepresenter("representer avx512", effjax::kRepresenterAvx512);
}
