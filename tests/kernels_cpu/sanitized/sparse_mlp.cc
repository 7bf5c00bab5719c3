// Chosen neurons of an MLP on buffers of exactly their size.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "common.h"
#include "cpu.h"
#include "sparse_mlp.h"
#include "variants.h"

namespace {

void RunSparseMlp(const char* name, const effjax::SparseMlpKernel* kernel) {
  for (int i = 0; i < 40; ++i, ++cases) {
    effjax::SparseMlpProblem p = {};
    p.type = static_cast<effjax::RowType>(Draw(0, 3));
    const bool codes = p.type >= effjax::kRowInt8;
    p.gated = Draw(0, 1) != 0;
    p.batch = Draw(1, 6), p.neurons = Draw(1, 120), p.count = Draw(0, p.neurons);
    p.in = codes ? 32 * Draw(1, 4) : Draw(1, 90), p.out = codes ? 32 * Draw(1, 3) : Draw(1, 70);
    p.padded_in = (p.in + 31) / 32 * 32, p.padded_out = (p.out + 31) / 32 * 32;
    struct Matrix {
      std::vector<double> dense;
      std::unique_ptr<Exact<uint8_t>> data;
      std::unique_ptr<Exact<float>> scales, zeros;
    };
    const auto make = [&](int64_t width, bool by_neuron, effjax::NeuronRows* rows) {
      Matrix m;
      const int64_t bits = p.type == effjax::kRowFloat32 ? 32 : p.type == effjax::kRowBfloat16 ? 16 : codes && p.type == effjax::kRowInt8 ? 8 : 4;
      m.dense.resize(static_cast<size_t>(p.neurons * width));
      m.data = std::make_unique<Exact<uint8_t>>(p.neurons * width * bits / 8);
      rows->data = m.data->get(), rows->row_bytes = width * bits / 8, rows->width = width, rows->by_neuron = by_neuron;
      rows->groups = by_neuron && width % 64 == 0 ? 2 : 1;
      rows->group_size = (by_neuron ? width : p.neurons) / rows->groups;
      const int64_t scales = by_neuron ? p.neurons * rows->groups : rows->groups * width;
      m.scales = std::make_unique<Exact<float>>(scales), m.zeros = std::make_unique<Exact<float>>(scales);
      for (int64_t k = 0; k < scales; ++k) (*m.scales)[k] = Normal(), (*m.zeros)[k] = static_cast<float>(Draw(0, 15));
      rows->scales = m.scales->get(), rows->zeros = m.zeros->get();
      for (int64_t j = 0; j < p.neurons; ++j) {
        for (int64_t k = 0; k < width; ++k) {
          uint8_t* row = m.data->get() + j * rows->row_bytes;
          double& value = m.dense[static_cast<size_t>(j * width + k)];
          if (!codes) {
            float number = Normal();
            uint32_t word;
            std::memcpy(&word, &number, 4);
            if (p.type == effjax::kRowBfloat16) word &= 0xffff0000u;
            std::memcpy(&number, &word, 4);
            value = number;
            const uint16_t half = static_cast<uint16_t>(word >> 16);
            p.type == effjax::kRowBfloat16 ? std::memcpy(row + 2 * k, &half, 2) : std::memcpy(row + 4 * k, &number, 4);
            continue;
          }
          const int64_t code = Draw(0, (1 << bits) - 1);
          if (bits == 8) row[k] = static_cast<uint8_t>(code);
          else row[k / 32 * 16 + k % 16] |= static_cast<uint8_t>(code << 4 * (k % 32 / 16));
          const int64_t group = by_neuron ? j * rows->groups + k / rows->group_size : k;
          value = double{(*m.scales)[group]} * (static_cast<double>(code) - (*m.zeros)[group]);
        }
      }
      return m;
    };
    const Matrix up = make(p.in, true, &p.up), gate = make(p.in, true, &p.gate);
    const Matrix down = make(p.out, Draw(0, 1) != 0, &p.down);
    Exact<float> x(p.batch * p.padded_in), sums(p.batch * p.padded_out), bias(p.neurons), gate_bias(p.neurons);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t k = 0; k < p.in; ++k) x[b * p.padded_in + k] = Normal();
    }
    for (int64_t j = 0; j < p.neurons; ++j) bias[j] = Normal(), gate_bias[j] = Normal();
    Exact<int32_t> chosen(p.count);
    for (int64_t k = 0; k < p.count; ++k) chosen[k] = static_cast<int32_t>(Draw(-1, p.neurons));
    Exact<uint8_t> used(p.neurons);
    p.x = x.get(), p.chosen = chosen.get(), p.up_bias = Draw(0, 1) ? bias.get() : nullptr;
    p.gate_bias = Draw(0, 1) ? gate_bias.get() : nullptr;
    p.used = used.get(), p.shift = Draw(0, 1) ? 0.25f : 0.0f;
    kernel->neurons(p, 0, p.count, sums.get());
    for (int64_t b = 0; b < p.batch; ++b) {
      std::vector<double> want(static_cast<size_t>(p.out)), size(static_cast<size_t>(p.out));
      for (int64_t k = 0; k < p.count; ++k) {
        const int64_t j = chosen[k];
        if (j < 0 || j >= p.neurons) continue;
        double z = p.up_bias ? bias[j] : 0, g = (p.gate_bias ? gate_bias[j] : 0) - p.shift, most = 1;
        for (int64_t n = 0; n < p.in; ++n) {
          z += x[b * p.padded_in + n] * up.dense[static_cast<size_t>(j * p.in + n)];
          g += x[b * p.padded_in + n] * gate.dense[static_cast<size_t>(j * p.in + n)];
          most += std::abs(x[b * p.padded_in + n] * up.dense[static_cast<size_t>(j * p.in + n)]);
        }
        const double h = p.gated ? std::max(g, 0.0) * z : std::max(z - p.shift, 0.0);
        for (int64_t o = 0; o < p.out; ++o) {
          const double w = down.dense[static_cast<size_t>(j * p.out + o)];
          want[static_cast<size_t>(o)] += h * w;
          size[static_cast<size_t>(o)] += std::abs(w) * most * (p.gated ? 1 + std::abs(g) : 1) + 1;
        }
      }
      for (int64_t o = 0; o < p.out; ++o) Compare(name, sums[b * p.padded_out + o], want[static_cast<size_t>(o)], size[static_cast<size_t>(o)], 1e-4);
    }
  }
}

}  // namespace

void CheckSparseMlp() {
  RunSparseMlp("sparse_mlp portable", effjax::kSparseMlpPortable);
  if (effjax::HasAvx2() && effjax::kSparseMlpAvx2) RunSparseMlp("sparse_mlp avx2", effjax::kSparseMlpAvx2);
  if (effjax::HasAvx512() && effjax::kSparseMlpAvx512) RunSparseMlp("sparse_mlp avx512", effjax::kSparseMlpAvx512);
}
