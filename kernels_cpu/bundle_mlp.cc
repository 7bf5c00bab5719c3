// The product of `sparse_mlp` on the rows of a neuron cache, where they lie; called from Python through a C interface.
#include "bundle_mlp.h"

#include <cstring>
#include <numeric>

#include "cpu.h"
#include "sparse_mlp.h"
#include "variants.h"

namespace effjax {
namespace {

constexpr int64_t kParts = 16;  // at most, each with sums of its own; a fixed number, so that threads change no result

}  // namespace

bool RunBundleMlp(Pool& pool, const BundleMlp& call) {
  static constexpr int64_t kBits[] = {32, 16, 8, 4};
  const SparseMlpKernel* kernel = ChooseKernel(call.variant, kSparseMlpPortable, kSparseMlpAvx2, kSparseMlpAvx512);
  if (kernel == nullptr) return false;
  std::vector<int32_t> every(static_cast<size_t>(call.count));
  std::iota(every.begin(), every.end(), 0);
  SparseMlpProblem p = {};
  p.batch = 1;
  p.in = p.out = call.width;
  p.neurons = p.count = call.count;
  p.padded_in = p.padded_out = (call.width + kCodeRun - 1) / kCodeRun * kCodeRun;
  p.type = static_cast<RowType>(call.type);
  p.activation = kRelu;
  p.gated = call.gate >= 0;
  p.chosen = every.data();
  const auto part = [&](int64_t begin, int64_t number) {
    NeuronRows rows = {};
    rows.data = call.rows + begin;
    rows.row_bytes = call.stride;
    rows.width = rows.group_size = call.width;
    rows.groups = 1;
    rows.by_neuron = true;
    if (call.scales != nullptr) rows.scales = call.scales + number * call.slots;
    rows.zeros = call.zeros;
    return rows;
  };
  if (p.gated) p.gate = part(call.gate, 0);
  p.up = part(call.up, 1);
  p.down = part(call.down, 2);
  p.gate_bias = call.biases;
  p.up_bias = call.biases + call.slots;
  std::vector<float> x(static_cast<size_t>(p.padded_in));
  std::memcpy(x.data(), call.x, static_cast<size_t>(call.width) * 4);
  p.x = x.data();
  const int64_t parts = std::clamp<int64_t>(p.count / 8, 1, kParts), each = (p.count + parts - 1) / parts;
  std::vector<float> sums(static_cast<size_t>(parts * p.padded_out));
  const bool small = p.count * call.width * kBits[p.type] < 1 << 20;  // done before a thread has woken
  pool.Run(parts, small ? 0 : call.helpers, [&](int64_t i) {
    kernel->neurons(p, i * each, std::min(p.count, (i + 1) * each), sums.data() + i * p.padded_out);
  });
  for (int64_t i = 0; i < parts; ++i) {
    for (int64_t o = 0; o < call.width; ++o) call.y[o] += sums[static_cast<size_t>(i * p.padded_out + o)];
  }
  return true;
}

}  // namespace effjax

EFFJAX_EXPORT int32_t EffjaxBundleMlp(void* pool, const effjax::BundleMlp* call) {
  return effjax::RunBundleMlp(*static_cast<effjax::Pool*>(pool), *call) ? 0 : 1;
}
