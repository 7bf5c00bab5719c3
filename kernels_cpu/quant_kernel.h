// The kernel of `quant_matmul` over the vectors `S` of an instruction set; included once by the file of each.
//
// Everything is a template of S: the files are compiled for different processors, and a function they shared would be
// taken from any one of them.
#pragma once

#include <cstring>

#include "quant_matmul.h"
#include "unpack.h"

namespace effjax {

template <class S>
struct Quant {
  using I = typename S::I;
  using F = typename S::F;
  static constexpr int kBytes = S::kBytes;           // columns of a panel: one byte each
  static constexpr int kLanes = kBytes / 4;          // columns of a vector of sums
  static constexpr int64_t kTileFloats = 16384;      // 64 KiB of sums on the stack
  static constexpr int64_t kMaxRows = kTileFloats / kBytes;

  // ---- products ------------------------------------------------------------------------------------------------------

  // Sums of `kRows` rows of `kDigits` digits against a panel, scaled and added to `sums` [kRows][sums_stride].
  template <int kRows, int kDigits>
  __attribute__((noinline)) static void Multiply(const QuantProblem& p, const uint8_t* panel, int64_t quads, const int8_t* x, int64_t block,
                       int64_t row, const float* scales, const float* offsets, float* sums, int64_t sums_stride) {
    constexpr int kAll = kRows * kDigits;
    // Every loop over `total` is unrolled, or it would be kept in memory.
    I total[kAll][4];
#pragma GCC unroll 8
    for (int r = 0; r < kAll; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) total[r][v] = S::Zero();
    }
    for (int64_t q = 0; q < quads; ++q) {
      typename S::Weights w[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) w[v] = S::LoadWeights(panel + v * kBytes);
      panel += 4 * kBytes;
#pragma GCC unroll 8
      for (int r = 0; r < kAll; ++r) {
        const typename S::Activations a = S::Broadcast(x + r * p.x.padded + 4 * q);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) total[r][v] = S::Dot(total[r][v], w[v], a);
      }
    }
    for (int m = 0; m < kRows; ++m) {
      AddScaled<kDigits>(p, total + m * kDigits, block, row + m, scales, offsets, sums + m * sums_stride);
    }
  }

  // Adds the sums of a row's digits to its results, with the scales of the activations and of the weights.
  template <int kDigits>
  __attribute__((always_inline)) static void AddScaled(const QuantProblem& p, const I (*total)[4], int64_t block,
                                                       int64_t row, const float* scales, const float* offsets,
                                                       float* sums) {
    const float unit = p.x.block_scales[row * p.x.blocks + block];
    const float minus = -p.x.block_sums[row * p.x.blocks + block];
    const bool centred = p.zero_kind == kCentre;  // one zero point for all: it comes off before the scale
    const F start = S::Set(centred ? minus * p.centre : 0.0f);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      F value = S::Fma(S::ToFloat(total[0][v]), S::Set(unit), start);
      if constexpr (kDigits > 1) value = S::Fma(S::ToFloat(total[1][v]), S::Set(unit * 256.0f), value);
      if constexpr (kDigits > 2) value = S::Fma(S::ToFloat(total[2][v]), S::Set(unit * 65536.0f), value);
      float* to = sums + v * kLanes;
      F sum = S::Fma(value, S::LoadF(scales + v * kLanes), S::LoadF(to));
      if (!centred) sum = S::Fma(S::Set(minus), S::LoadF(offsets + v * kLanes), sum);
      S::StoreF(to, sum);
    }
  }

  // One row: codes of widths that divide 8 are multiplied as they are unpacked, without a panel.
  template <int kBits, int kDigits>
  __attribute__((noinline)) static void MultiplyCodes(const QuantProblem& p, const uint8_t* codes, int64_t rows,
                                                      int64_t runs, int64_t ahead, const int8_t* x, int64_t block,
                                                      int64_t row, const float* scales,
                                                      const float* offsets, float* sums) {
    I total[kDigits][4];
#pragma GCC unroll 4
    for (int d = 0; d < kDigits; ++d) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) total[d][v] = S::Zero();
    }
    const int64_t stride = p.codes.row;
    for (int64_t run = 0; run < runs; ++run) {
      I bytes[4], mixed[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const uint8_t* at = codes + (4 * run + r) * stride;
        bytes[r] = 4 * run + r < rows ? S::Load(at) : S::Zero();
        __builtin_prefetch(at + ahead);
      }
      S::Interleave(bytes, mixed);
#pragma GCC unroll 8
      for (int s = 0; s < 8 / kBits; ++s) {
        typename S::Activations a[kDigits];
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d) a[d] = S::Broadcast(x + d * p.x.padded + run * RunOf(kBits) + 4 * s);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const typename S::Weights w = S::ToWeights(kBits == 8 ? mixed[v] : S::FieldAt(mixed[v], s * kBits, kBits));
#pragma GCC unroll 4
          for (int d = 0; d < kDigits; ++d) total[d][v] = S::Dot(total[d][v], w, a[d]);
        }
      }
    }
    AddScaled<kDigits>(p, total, block, row, scales, offsets, sums);
  }

  template <int kDigits>
  static void MultiplyRows(const QuantProblem& p, const uint8_t* panel, int64_t quads, const int8_t* x, int64_t block,
                           int64_t row, int64_t rows, const float* scales, const float* offsets, float* sums,
                           int64_t sums_stride) {
    constexpr int kMost = S::kDigitRows / kDigits;
    const int64_t x_stride = kDigits * p.x.padded;
    int64_t m = 0;
    for (; m + kMost <= rows; m += kMost) {
      Multiply<kMost, kDigits>(p, panel, quads, x + m * x_stride, block, row + m, scales, offsets,
                               sums + m * sums_stride, sums_stride);
    }
    if constexpr (kMost > 3) {
      if (m + 3 <= rows) {
        Multiply<3, kDigits>(p, panel, quads, x + m * x_stride, block, row + m, scales, offsets,
                             sums + m * sums_stride, sums_stride);
        m += 3;
      }
    }
    if constexpr (kMost > 2) {
      if (m + 2 <= rows) {
        Multiply<2, kDigits>(p, panel, quads, x + m * x_stride, block, row + m, scales, offsets,
                             sums + m * sums_stride, sums_stride);
        m += 2;
      }
    }
    for (; m < rows; ++m) {
      Multiply<1, kDigits>(p, panel, quads, x + m * x_stride, block, row + m, scales, offsets,
                           sums + m * sums_stride, sums_stride);
    }
  }

  // ---- scales and zero points ------------------------------------------------------------------------------------------

  static void ToFloats(const void* from, ScaleType type, int64_t at, int64_t columns, float* to) {
    if (type == kFloat32) {
      std::memcpy(to, static_cast<const float*>(from) + at, static_cast<size_t>(columns) * 4);
    } else if (type == kFloat16) {
      S::FromHalf(static_cast<const uint16_t*>(from) + at, columns, to);
    } else {
      const uint16_t* bits = static_cast<const uint16_t*>(from) + at;
      for (int64_t c = 0; c < columns; ++c) {
        const uint32_t wide = static_cast<uint32_t>(bits[c]) << 16;
        std::memcpy(to + c, &wide, 4);
      }
    }
  }

  // Scales of one group for the columns of a panel, in the panel's order; and `scale * zero`, unless it is one for all.
  static void GroupScales(const QuantProblem& p, int64_t group, int64_t column, int64_t columns, float* scales,
                          float* offsets) {
    alignas(64) float natural[kBytes] = {};
    alignas(64) float zeros[kBytes] = {};
    const int64_t groups = p.x.in / p.x.group_size;
    const int64_t at = p.tiled ? (column / 64 * groups + group) * 64 + column % 64 : group * p.out + column;
    ToFloats(p.scales, p.scale_type, at, columns, natural);
    for (int v = 0; v < 4; ++v) S::StoreF(scales + v * kLanes, S::LoadStrided(natural + 4 * v));
    if (p.zero_kind == kCentre) return;
    if (p.zero_kind == kReal) {
      ToFloats(p.zeros, p.zero_type, at, columns, zeros);
    } else {
      const int64_t bit = group * p.bits, byte = bit / 8;
      const int shift = static_cast<int>(bit % 8);
      const Rows rows = RowsOf(static_cast<const uint8_t*>(p.zeros), (groups * p.bits + 7) / 8, p.out, p.tiled ? 64 : 0);
      const uint8_t* low = rows.At(byte, column);
      const uint8_t* high = shift + p.bits > 8 ? rows.At(byte + 1, column) : low;
      const uint32_t mask = (1u << p.bits) - 1;
      for (int64_t c = 0; c < columns; ++c) {
        const uint32_t both = low[c] | static_cast<uint32_t>(high[c]) << 8;
        zeros[c] = static_cast<float>(both >> shift & mask);
      }
    }
    for (int c = 0; c < kBytes; ++c) zeros[c] *= natural[c];
    for (int v = 0; v < 4; ++v) S::StoreF(offsets + v * kLanes, S::LoadStrided(zeros + 4 * v));
  }

  // ---- a range of columns ------------------------------------------------------------------------------------------------

  template <int kBits>
  static void ColumnsOf(const QuantProblem& p, int64_t begin, int64_t end) {
    alignas(64) uint8_t panel[kMaxBlock * kBytes];
    alignas(64) float sums[kTileFloats];
    alignas(64) float scales[kBytes], offsets[kBytes];
    constexpr int64_t kRun = RunOf(kBits);
    const int64_t bytes = (p.x.in * kBits + 7) / 8;  // of a column
    for (int64_t row = 0; row < p.x.rows; row += kMaxRows) {
      const int64_t rows = Min(kMaxRows, p.x.rows - row);
      // As wide as the sums allow: the bytes of a row of codes are then read in one go. Tiles are read one by one.
      const int64_t width = p.tiled ? 64 : kTileFloats / rows / kBytes * kBytes;
      for (int64_t left = begin; left < end; left += width) {
        const int64_t right = Min(end, left + width), tile = RoundUp(right - left, kBytes);
        std::memset(sums, 0, static_cast<size_t>(rows * tile) * 4);
        int64_t block = 0, at = 0;
        for (int64_t start = 0; start < p.x.in; ++block) {
          const int64_t group = start / p.x.group_size;
          const int64_t size = Min(p.x.block, Min((group + 1) * p.x.group_size, p.x.in) - start);
          const int64_t runs = RoundUp(size, kRun) / kRun, first_byte = start * kBits / 8;
          for (int64_t column = left; column < right; column += kBytes) {
            const int64_t columns = Min(kBytes, right - column);
            // The next panel of the row of panels, or the first one of the next row.
            const uint8_t* codes = p.codes.At(first_byte, column);
            const int64_t below = size * kBits / 8 * p.codes.row;
            const int64_t ahead = column + kBytes < right ? kBytes : left - column + below;
            GroupScales(p, group, column, columns, scales, offsets);
            const int8_t* x = p.x.digit_rows + row * p.x.digits * p.x.padded + at;
            float* to = sums + column - left;
            if constexpr (8 % kBits == 0) {
              if (rows == 1 && columns == kBytes) {
                const auto multiply = p.x.digits == 1   ? MultiplyCodes<kBits, 1>
                                      : p.x.digits == 2 ? MultiplyCodes<kBits, 2>
                                                        : MultiplyCodes<kBits, 3>;
                multiply(p, codes, bytes - first_byte, runs, ahead, x, block, row, scales, offsets, to);
                continue;
              }
            }
            UnpackColumns<S, kBits, true>(codes, p.codes.row, bytes - first_byte, runs, columns, ahead, panel);
            const int64_t quads = runs * kRun / 4;
            if (p.x.digits == 1) {
              MultiplyRows<1>(p, panel, quads, x, block, row, rows, scales, offsets, to, tile);
            } else if (p.x.digits == 2) {
              MultiplyRows<2>(p, panel, quads, x, block, row, rows, scales, offsets, to, tile);
            } else {
              MultiplyRows<3>(p, panel, quads, x, block, row, rows, scales, offsets, to, tile);
            }
          }
          at += runs * kRun;
          start += size;
        }
        for (int64_t m = 0; m < rows; ++m) {
          for (int64_t column = left; column < right; column += kBytes) {
            WriteRow(sums + m * tile + column - left, Min(kBytes, right - column), p.y + (row + m) * p.out + column);
          }
        }
      }
    }
  }

  // From the panel's order to the columns' own.
  static void WriteRow(const float* sums, int64_t columns, float* y) {
    alignas(64) float natural[kBytes];
    for (int v = 0; v < 4; ++v) S::StoreStrided(natural + 4 * v, S::LoadF(sums + v * kLanes));
    std::memcpy(y, natural, static_cast<size_t>(columns) * 4);
  }

  static void Columns(const QuantProblem& p, int64_t begin, int64_t end) {
    switch (p.bits) {
      case 1: return ColumnsOf<1>(p, begin, end);
      case 2: return ColumnsOf<2>(p, begin, end);
      case 3: return ColumnsOf<3>(p, begin, end);
      case 4: return ColumnsOf<4>(p, begin, end);
      case 5: return ColumnsOf<5>(p, begin, end);
      case 6: return ColumnsOf<6>(p, begin, end);
      case 7: return ColumnsOf<7>(p, begin, end);
      case 8: return ColumnsOf<8>(p, begin, end);
    }
  }

  static int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
};

}  // namespace effjax
