// Runs every variant of the kernels on buffers of exactly their size, compares with plain loops, for the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "codebook_matmul.h"
#include "cpu.h"
#include "label_top_k.h"
#include "nm_matmul.h"
#include "nomad.h"
#include "quant_matmul.h"
#include "representer.h"
#include "sparse_mlp.h"
#include "variants.h"

namespace {

using effjax::CodebookKernel;
using effjax::NmKernel;
using effjax::NomadKernel;
using effjax::QuantKernel;

std::mt19937 generator(7);
int failures = 0, cases = 0;

int64_t Draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float Normal() { return std::normal_distribution<float>()(generator); }

// Memory of exactly n elements, so that one element further is not ours.
template <typename T>
struct Exact {
  explicit Exact(int64_t n) : data(new T[static_cast<size_t>(n)]()) {}
  T* get() { return data.get(); }
  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  std::unique_ptr<T[]> data;
};

void PutCode(uint8_t* codes, int64_t stride, int64_t column, int64_t index, int bits, unsigned code) {
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = index * bits + b;
    if (code >> b & 1) codes[bit / 8 * stride + column] |= static_cast<uint8_t>(1u << bit % 8);
  }
}

void Compare(const char* name, float got, double expected, double magnitude, double tolerance) {
  if (!(std::abs(got - expected) <= tolerance * (magnitude + 1e-30))) {
    ++failures;
    if (failures < 10) std::printf("%s: %g instead of %g\n", name, static_cast<double>(got), expected);
  }
}

void RunQuant(const char* name, const QuantKernel* kernel) {
  for (int i = 0; i < 40; ++i, ++cases) {
    effjax::QuantProblem p = {};
    const int bits = static_cast<int>(Draw(1, 8));
    p.bits = bits;
    p.x.run = effjax::RunOf(bits);
    p.x.per_byte = 8 % bits == 0 ? 8 / bits : 1;
    const int64_t groups = Draw(1, 3);
    p.x.group_size = groups == 1 ? Draw(1, 600) : p.x.run * Draw(1, 10);
    p.x.in = groups * p.x.group_size;
    p.x.rows = Draw(1, 9);
    p.x.digits = static_cast<int32_t>(Draw(1, 3));
    p.out = Draw(1, 150);
    Exact<uint8_t> codes((p.x.in * bits + 7) / 8 * p.out), zeros((groups * bits + 7) / 8 * p.out);
    Exact<float> scales(groups * p.out), x(p.x.rows * p.x.in), y(p.x.rows * p.out);
    std::vector<double> w(static_cast<size_t>(p.x.in * p.out));
    std::vector<unsigned> zero(static_cast<size_t>(groups * p.out));
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t o = 0; o < p.out; ++o) {
        scales[g * p.out + o] = Normal();
        zero[static_cast<size_t>(g * p.out + o)] = static_cast<unsigned>(Draw(0, (1 << bits) - 1));
        PutCode(zeros.get(), p.out, o, g, bits, zero[static_cast<size_t>(g * p.out + o)]);
      }
    }
    for (int64_t k = 0; k < p.x.in; ++k) {
      for (int64_t o = 0; o < p.out; ++o) {
        const unsigned code = static_cast<unsigned>(Draw(0, (1 << bits) - 1));
        PutCode(codes.get(), p.out, o, k, bits, code);
        const int64_t g = k / p.x.group_size * p.out + o;
        w[static_cast<size_t>(k * p.out + o)] =
            double{scales[g]} * (static_cast<double>(code) - zero[static_cast<size_t>(g)]);
      }
    }
    for (int64_t k = 0; k < p.x.rows * p.x.in; ++k) x[k] = Normal();
    Exact<uint8_t> scratch(Arrange(&p.x));
    Place(&p.x, scratch.get());
    p.codes = effjax::RowsOf(codes.get(), (p.x.in * bits + 7) / 8, p.out, 0);
    p.scales = scales.get();
    p.zeros = zeros.get();
    p.zero_kind = effjax::kPacked;
    p.y = y.get();
    for (int64_t m = 0; m < p.x.rows; ++m) kernel->digits(p.x, x.get(), m);
    for (int64_t begin = 0; begin < p.out; begin += 64) kernel->columns(p, begin, begin + 64 < p.out ? begin + 64 : p.out);
    const double tolerance = p.x.digits == 1 ? 0.03 : p.x.digits == 2 ? 2e-4 : 5e-6;
    for (int64_t m = 0; m < p.x.rows; ++m) {
      for (int64_t o = 0; o < p.out; ++o) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < p.x.in; ++k) {
          const int64_t g = k / p.x.group_size * p.out + o;
          sum += double{x[m * p.x.in + k]} * w[static_cast<size_t>(k * p.out + o)];
          // Codes and zero points are multiplied apart, so their own magnitude bounds the rounding.
          magnitude += std::abs(double{x[m * p.x.in + k]} * scales[g]) * (1 << bits);
        }
        Compare(name, y[m * p.out + o], sum, magnitude, tolerance);
      }
    }
  }
}

void RunCodebook(const char* name, const CodebookKernel* kernel) {
  for (int i = 0; i < 40; ++i, ++cases) {
    effjax::CodebookProblem p = {};
    const int bits = static_cast<int>(Draw(1, 8));
    p.bits = bits;
    const int64_t fields = effjax::FieldsOf(bits), chunk = kernel->lanes * fields, groups = Draw(1, 2);
    p.in = groups == 1 ? Draw(1, 700) : groups * fields * Draw(1, 8);  // many rows take 512 inputs together
    p.rows = Draw(0, 2) == 0 ? 1 : Draw(2, 70);
    p.out = Draw(1, 90);
    p.entries = bits == 1 ? 2 : Draw((1 << (bits - 1)) + 1, 1 << bits);
    p.out_groups = Draw(0, 1) == 0 ? 1 : p.out;
    p.table_inputs = p.in;
    p.table_outputs = p.out / p.out_groups;
    p.group_size = p.in / groups;
    p.tile = 8 % bits == 0 ? Draw(0, 1) : 0;  // by rows of bytes, or column by column
    const int64_t bytes = (p.in * bits + 7) / 8;
    Exact<uint8_t> codes(bytes * p.out);
    Exact<float> tables(p.out_groups * p.entries), scales(groups * p.out), x(p.rows * p.in), y(p.rows * p.out);
    for (int64_t k = 0; k < p.out_groups * p.entries; ++k) tables[k] = Normal();
    for (int64_t k = 0; k < groups * p.out; ++k) scales[k] = Normal();
    for (int64_t k = 0; k < p.rows * p.in; ++k) x[k] = Normal();
    std::vector<double> w(static_cast<size_t>(p.in * p.out));
    for (int64_t k = 0; k < p.in; ++k) {
      for (int64_t o = 0; o < p.out; ++o) {
        const int64_t code = Draw(0, p.entries - 1);
        if (p.tile == 1) {
          PutCode(codes.get() + o * bytes, 1, 0, k, bits, static_cast<unsigned>(code));
        } else {
          PutCode(codes.get(), p.out, o, k, bits, static_cast<unsigned>(code));
        }
        const int64_t group = k / p.group_size;
        w[static_cast<size_t>(k * p.out + o)] =
            double{tables[o / p.table_outputs * p.entries + code]} *
            scales[p.tile == 1 ? o * groups + group : group * p.out + o];
      }
    }
    p.chunks = (p.in + chunk - 1) / chunk;
    Exact<float> ordered(p.rows == 1 ? p.chunks * chunk : 0);
    p.codes = effjax::RowsOf(codes.get(), bytes, p.out, p.tile);
    p.tables = tables.get();
    p.scales = scales.get();
    p.x = x.get();
    p.ordered = ordered.get();
    p.y = y.get();
    if (p.rows == 1) kernel->order(p);
    for (int64_t begin = 0; begin < p.out; begin += 64) kernel->columns(p, begin, begin + 64 < p.out ? begin + 64 : p.out);
    for (int64_t m = 0; m < p.rows; ++m) {
      for (int64_t o = 0; o < p.out; ++o) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < p.in; ++k) {
          const double product = double{x[m * p.in + k]} * w[static_cast<size_t>(k * p.out + o)];
          sum += product;
          magnitude += std::abs(product);
        }
        Compare(name, y[m * p.out + o], sum, magnitude, 5e-6);
      }
    }
  }
}

void RunSparse(const char* name, const NmKernel* kernel) {
  for (int i = 0; i < 40; ++i, ++cases) {
    effjax::NmProblem p = {};
    const int64_t groups = Draw(1, 3);
    p.x.run = 16;
    p.x.per_byte = 1;
    p.x.group_size = 16 * Draw(1, 20);
    p.x.in = groups * p.x.group_size;
    p.x.rows = Draw(1, 5);
    p.x.digits = static_cast<int32_t>(Draw(1, 3));
    p.out = Draw(1, 150);
    Exact<uint8_t> codes(p.x.in / 4 * p.out), indices(p.x.in / 8 * p.out);
    Exact<float> scales(groups * p.out), x(p.x.rows * p.x.in), y(p.x.rows * p.out);
    for (int64_t k = 0; k < groups * p.out; ++k) scales[k] = Normal();
    for (int64_t k = 0; k < p.x.rows * p.x.in; ++k) x[k] = Normal();
    std::vector<double> w(static_cast<size_t>(p.x.in * p.out));
    for (int64_t k = 0; k < p.x.in / 2; ++k) {
      for (int64_t o = 0; o < p.out; ++o) {
        const unsigned code = static_cast<unsigned>(Draw(0, 15)), place = static_cast<unsigned>(Draw(0, 1) + k % 2 * 2);
        PutCode(codes.get(), p.out, o, k, 4, code);
        PutCode(indices.get(), p.out, o, k, 2, place);
        const int64_t input = k / 2 * 4 + place;
        w[static_cast<size_t>(input * p.out + o)] =
            double{scales[input / p.x.group_size * p.out + o]} * (static_cast<double>(code) - 8);
      }
    }
    Exact<uint8_t> scratch(Arrange(&p.x));
    Place(&p.x, scratch.get());
    p.codes = effjax::RowsOf(codes.get(), p.x.in / 4, p.out, 0);
    p.indices = effjax::RowsOf(indices.get(), p.x.in / 8, p.out, 0);
    p.scales = scales.get();
    p.y = y.get();
    for (int64_t m = 0; m < p.x.rows; ++m) kernel->digits(p.x, x.get(), m);
    for (int64_t begin = 0; begin < p.out; begin += 64) kernel->columns(p, begin, begin + 64 < p.out ? begin + 64 : p.out);
    const double tolerance = p.x.digits == 1 ? 0.03 : p.x.digits == 2 ? 2e-4 : 5e-6;
    for (int64_t m = 0; m < p.x.rows; ++m) {
      for (int64_t o = 0; o < p.out; ++o) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < p.x.in; ++k) {
          const double product = double{x[m * p.x.in + k]} * w[static_cast<size_t>(k * p.out + o)];
          sum += product;
          magnitude += std::abs(double{x[m * p.x.in + k]} * scales[k / p.x.group_size * p.out + o]) * 8;
        }
        Compare(name, y[m * p.out + o], sum, magnitude, tolerance);
      }
    }
  }
}

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
        for (int64_t s = start[h]; s < length[h]; ++s) given[static_cast<size_t>(s)] += 1.5 * weights[static_cast<size_t>(s)] / total;
      }
      if (p.received == nullptr) continue;
      for (int64_t s = 0; s < p.slots; ++s) Compare(name, received[h * p.slots + s], given[static_cast<size_t>(s)], 1, 1e-4);
    }
  }
}

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
    Exact<float> x(p.batch * p.padded_in), sums(p.batch * p.padded_out), bias(p.neurons);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t k = 0; k < p.in; ++k) x[b * p.padded_in + k] = Normal();
    }
    for (int64_t j = 0; j < p.neurons; ++j) bias[j] = Normal();
    Exact<int32_t> chosen(p.count);
    for (int64_t k = 0; k < p.count; ++k) chosen[k] = static_cast<int32_t>(Draw(-1, p.neurons));
    Exact<uint8_t> used(p.neurons);
    p.x = x.get(), p.chosen = chosen.get(), p.up_bias = Draw(0, 1) ? bias.get() : nullptr;
    p.used = used.get(), p.shift = Draw(0, 1) ? 0.25f : 0.0f;
    kernel->neurons(p, 0, p.count, sums.get());
    for (int64_t b = 0; b < p.batch; ++b) {
      std::vector<double> want(static_cast<size_t>(p.out)), size(static_cast<size_t>(p.out));
      for (int64_t k = 0; k < p.count; ++k) {
        const int64_t j = chosen[k];
        if (j < 0 || j >= p.neurons) continue;
        double z = p.up_bias ? bias[j] : 0, g = -p.shift, most = 1;
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

int main() {
  RunLabels("labels portable", effjax::kLabelPortable);
  if (effjax::HasAvx2() && effjax::kLabelAvx2) RunLabels("labels avx2", effjax::kLabelAvx2);
  if (effjax::HasAvx512() && effjax::kLabelAvx512) RunLabels("labels avx512", effjax::kLabelAvx512);
  RunSparseMlp("sparse_mlp portable", effjax::kSparseMlpPortable);
  if (effjax::HasAvx2() && effjax::kSparseMlpAvx2) RunSparseMlp("sparse_mlp avx2", effjax::kSparseMlpAvx2);
  if (effjax::HasAvx512() && effjax::kSparseMlpAvx512) RunSparseMlp("sparse_mlp avx512", effjax::kSparseMlpAvx512);
  RunRepresenter("representer portable", effjax::kRepresenterPortable);
  if (effjax::HasAvx2() && effjax::kRepresenterAvx2) RunRepresenter("representer avx2", effjax::kRepresenterAvx2);
  if (effjax::HasAvx512() && effjax::kRepresenterAvx512) RunRepresenter("representer avx512", effjax::kRepresenterAvx512);
  RunNomad("nomad portable", effjax::kNomadPortable);
  if (effjax::HasAvx2() && effjax::kNomadAvx2) RunNomad("nomad avx2", effjax::kNomadAvx2);
  if (effjax::HasAvx512() && effjax::kNomadAvx512) RunNomad("nomad avx512", effjax::kNomadAvx512);
  RunQuant("quant portable", effjax::kQuantPortable);
  RunCodebook("codebook portable", effjax::kCodebookPortable);
  RunAttention("attention portable", effjax::kAttentionPortable);
  if (effjax::HasAvx2() && effjax::kQuantAvx2) {
    RunQuant("quant avx2", effjax::kQuantAvx2);
    RunCodebook("codebook avx2", effjax::kCodebookAvx2);
    RunAttention("attention avx2", effjax::kAttentionAvx2);
  }
  if (effjax::HasAvx512() && effjax::kQuantAvx512) {
    RunQuant("quant avx512", effjax::kQuantAvx512);
    RunCodebook("codebook avx512", effjax::kCodebookAvx512);
    RunSparse("nm avx512", effjax::kNmAvx512);
    RunAttention("attention avx512", effjax::kAttentionAvx512);
  }
  if (effjax::HasI8mm() && effjax::kQuantI8mm) RunQuant("quant i8mm", effjax::kQuantI8mm);
  std::printf("%d cases, %d numbers off\n", cases, failures);
  return failures != 0;
}
