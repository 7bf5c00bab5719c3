// Logits and attention looked up in tables, on buffers of exactly their size.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"
#include "cpu.h"
#include "nomad.h"
#include "variants.h"

namespace {

using effjax::NomadKernel;

unsigned Nibble(const uint8_t* codes, int64_t subs, int64_t key, int64_t s) {
  const uint8_t byte = codes[(key / 32 * subs + s) * 16 + key % 16];
  return key % 32 < 16 ? byte & 15u : byte >> 4;
}

void RunNomad(const char* name, const NomadKernel* kernel) {
  for (int i = 0; i < 40; ++i, ++cases) {
    effjax::AttendProblem p = {};
    p.rows = Draw(1, 3);
    p.kv_heads = 1;
    p.group = Draw(1, 11);
    p.d_sub = int64_t{1} << Draw(0, 2);
    p.subs = Draw(1, 40);
    p.head_dim = p.subs * p.d_sub;
    p.slots = Draw(1, 300);
    p.blocks = (p.slots + 31) / 32;
    p.value_dim = Draw(1, 150);
    p.received = Draw(0, 1) == 1;
    p.out_stride = p.group * p.value_dim + (p.received ? p.slots : 0);
    p.value_type = static_cast<effjax::ValueType>(Draw(0, 2));
    Exact<float> q(p.rows * p.group * p.head_dim), recent(p.rows * 32 * p.head_dim), wide(p.rows * p.slots * p.value_dim);
    Exact<float> books(p.subs * 16 * p.d_sub), out(p.rows * p.out_stride), scratch(p.rows * ScratchFloats(p));
    Exact<uint16_t> narrow(p.rows * p.slots * p.value_dim);
    Exact<uint8_t> codes(p.rows * p.blocks * p.subs * 16), seen(p.rows * p.slots);
    Exact<int32_t> lengths(p.rows);
    // Small multiples of 1/8 for exact products, and values that 16 bits hold.
    for (int64_t k = 0; k < p.rows * p.group * p.head_dim; ++k) q[k] = static_cast<float>(Draw(-8, 8)) / 8;
    for (int64_t k = 0; k < p.rows * 32 * p.head_dim; ++k) recent[k] = static_cast<float>(Draw(-8, 8)) / 8;
    for (int64_t k = 0; k < p.subs * 16 * p.d_sub; ++k) books[k] = static_cast<float>(Draw(-8, 8)) / 8;
    for (int64_t k = 0; k < p.rows * p.blocks * p.subs * 16; ++k) codes[k] = static_cast<uint8_t>(Draw(0, 255));
    for (int64_t k = 0; k < p.rows * p.slots; ++k) seen[k] = Draw(0, 3) != 0;
    for (int64_t k = 0; k < p.rows; ++k) lengths[k] = static_cast<int32_t>(Draw(0, p.slots));
    for (int64_t k = 0; k < p.rows * p.slots * p.value_dim; ++k) {
      const bool one = Draw(0, 1) == 1;
      wide[k] = one ? 1.0f : -2.0f;
      narrow[k] = p.value_type == effjax::kValueFloat16 ? (one ? 0x3c00 : 0xc000) : (one ? 0x3f80 : 0xc000);
    }
    p.q = q.get();
    p.codes = codes.get();
    p.recent = recent.get();
    p.values = p.value_type == effjax::kValueFloat32 ? static_cast<const void*>(wide.get()) : narrow.get();
    p.lengths = lengths.get();
    p.books = books.get();
    p.seen = i % 2 == 0 ? seen.get() : nullptr;
    p.out = out.get();
    p.scratch = scratch.get();
    for (int64_t row = 0; row < p.rows; ++row) {
      kernel->attend(p, row);
      std::vector<double> received(static_cast<size_t>(p.slots));
      for (int64_t g = 0; g < p.group; ++g) {
        const float* query = q.get() + (row * p.group + g) * p.head_dim;
        std::vector<float> products(static_cast<size_t>(p.subs * 16));
        std::vector<double> logits(static_cast<size_t>(p.slots), -INFINITY);
        float span = 0;
        double bias = 0;
        std::vector<float> lows(static_cast<size_t>(p.subs));
        for (int64_t s = 0; s < p.subs; ++s) {
          float low = INFINITY, high = -INFINITY;
          for (int64_t c = 0; c < 16; ++c) {
            float sum = 0;
            for (int64_t d = 0; d < p.d_sub; ++d) sum += query[s * p.d_sub + d] * books[(s * 16 + c) * p.d_sub + d];
            products[static_cast<size_t>(s * 16 + c)] = sum;
            low = std::min(low, sum);
            high = std::max(high, sum);
          }
          lows[static_cast<size_t>(s)] = low;
          bias += double{low};
          span = std::max(span, high - low);
        }
        const float scale = span > 0 ? 255.0f / span : 1.0f;
        double peak = -INFINITY, total = 0;
        for (int64_t key = 0; key < lengths[row]; ++key) {
          if (p.seen && !seen[row * p.slots + key]) continue;
          double sum = 0;
          if (key < lengths[row] / 32 * 32) {
            for (int64_t s = 0; s < p.subs; ++s) {
              const unsigned code = Nibble(codes.get() + row * p.blocks * p.subs * 16, p.subs, key, s);
              const float product = products[static_cast<size_t>(s * 16 + code)] - lows[static_cast<size_t>(s)];
              sum += static_cast<double>(std::nearbyint(product * scale));
            }
            sum = sum / double{scale} + bias;
          } else {
            const float* at = recent.get() + (row * 32 + key % 32) * p.head_dim;
            for (int64_t d = 0; d < p.head_dim; ++d) sum += double{query[d]} * double{at[d]};
          }
          logits[static_cast<size_t>(key)] = sum;
          peak = std::max(peak, sum);
        }
        for (double& x : logits) total += x = peak > -INFINITY ? std::exp(x - peak) : 0;
        for (int64_t key = 0; key < p.slots; ++key) {
          received[static_cast<size_t>(key)] += total > 0 ? logits[static_cast<size_t>(key)] / total : 0;
        }
        for (int64_t c = 0; c < p.value_dim; ++c) {
          double y = 0;
          for (int64_t key = 0; key < p.slots; ++key) {
            y += total > 0 ? logits[static_cast<size_t>(key)] / total * double{wide[(row * p.slots + key) * p.value_dim + c]} : 0;
          }
          Compare(name, out[row * p.out_stride + g * p.value_dim + c], y, 2, 3e-5);
        }
      }
      for (int64_t key = 0; p.received && key < p.slots; ++key) {
        Compare(name, out[row * p.out_stride + p.group * p.value_dim + key], received[static_cast<size_t>(key)], 11, 3e-5);
      }
    }
    effjax::LookupProblem l = {};
    l.rows = p.rows;
    l.group = p.group;
    l.blocks = p.blocks;
    l.subs = p.subs;
    Exact<uint8_t> tables(l.rows * l.group * l.subs * 16);
    Exact<float> scales(l.rows * l.group), biases(l.rows * l.group), logits(l.rows * l.group * l.blocks * 32);
    for (int64_t k = 0; k < l.rows * l.group * l.subs * 16; ++k) tables[k] = static_cast<uint8_t>(Draw(0, 255));
    for (int64_t k = 0; k < l.rows * l.group; ++k) scales[k] = 4.0f, biases[k] = static_cast<float>(Draw(-9, 9));
    l.tables = tables.get();
    l.scales = scales.get();
    l.biases = biases.get();
    l.codes = codes.get();
    l.logits = logits.get();
    for (int64_t row = 0; row < l.rows; ++row) {
      kernel->lookup(l, row);
      for (int64_t g = row * l.group; g < (row + 1) * l.group; ++g) {
        for (int64_t key = 0; key < l.blocks * 32; ++key) {
          double sum = 0;
          for (int64_t s = 0; s < l.subs; ++s) {
            sum += tables[(g * l.subs + s) * 16 + Nibble(codes.get() + row * l.blocks * l.subs * 16, l.subs, key, s)];
          }
          Compare(name, logits[g * l.blocks * 32 + key], sum / 4 + double{biases[g]}, 1, 0);
        }
      }
    }
  }
}

}  // namespace

void CheckNomad() {
  RunNomad("nomad portable", effjax::kNomadPortable);
  if (effjax::HasAvx2() && effjax::kNomadAvx2) RunNomad("nomad avx2", effjax::kNomadAvx2);
  if (effjax::HasAvx512() && effjax::kNomadAvx512) RunNomad("nomad avx512", effjax::kNomadAvx512);
}
