// Products with quantized, codebook and 2:4 matrices on buffers of exactly their size.
#include <cmath>
#include <vector>

#include "common.h"
#include "codebook_matmul.h"
#include "cpu.h"
#include "nm_matmul.h"
#include "quant_matmul.h"
#include "variants.h"

namespace {

using effjax::CodebookKernel;
using effjax::NmKernel;
using effjax::QuantKernel;

void PutCode(uint8_t* codes, int64_t stride, int64_t column, int64_t index, int bits, unsigned code) {
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = index * bits + b;
    if (code >> b & 1) codes[bit / 8 * stride + column] |= static_cast<uint8_t>(1u << bit % 8);
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

}  // namespace

void CheckMatmuls() {
  RunQuant("quant portable", effjax::kQuantPortable);
  RunCodebook("codebook portable", effjax::kCodebookPortable);
  if (effjax::HasAvx2() && effjax::kQuantAvx2) {
    RunQuant("quant avx2", effjax::kQuantAvx2);
    RunCodebook("codebook avx2", effjax::kCodebookAvx2);
  }
  if (effjax::HasAvx512() && effjax::kQuantAvx512) {
    RunQuant("quant avx512", effjax::kQuantAvx512);
    RunCodebook("codebook avx512", effjax::kCodebookAvx512);
    RunSparse("nm avx512", effjax::kNmAvx512);
  }
  if (effjax::HasI8mm() && effjax::kQuantI8mm) RunQuant("quant i8mm", effjax::kQuantI8mm);
}
