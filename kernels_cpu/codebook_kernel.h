// The kernel of `codebook_matmul` over the vectors `S` of an instruction set; included once by the file of each.
#pragma once

#include <cstring>
#include <vector>

#include "codebook_matmul.h"
#include "unpack.h"

namespace effjax {

template <class S>
struct Lookup {
  using I = typename S::I;
  using F = typename S::F;
  static constexpr int kBytes = S::kBytes;   // columns that are turned together
  static constexpr int kLanes = kBytes / 4;  // inputs of a vector of weights
  // With many rows, the weights of some columns and inputs are looked up for some rows at a time, so that activations,
  // weights and sums stay in the second-level cache.
  static constexpr int64_t kColumnsAtOnce = 8, kMostRows = 256, kMost = 32768;  // the last: weights, in floats
  static constexpr int kTileColumns = S::kTileColumns, kTileRows = S::kTileRows;

  // ---- activations: [chunks][fields][lanes] ----------------------------------------------------------------------

  static void Order(const CodebookProblem& p, const float* x, int64_t row) {
    const int64_t fields = FieldsOf(p.bits);
    const float* from = x + row * p.in;
    float* to = p.ordered + row * p.stride;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      for (int64_t k = 0; k < fields; ++k) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t i = (chunk * kLanes + lane) * fields + k;
          *to++ = i < p.in ? from[i] : 0.0f;
        }
      }
    }
  }

  // ---- codes: [kBytes columns][kLanes words of 32 bits] ----------------------------------------------------------

  template <int kBits>
  static void Turn(const CodebookProblem& p, int64_t chunk, int64_t column, int64_t columns, int64_t ahead,
                   uint8_t* words) {
    constexpr int64_t kRows = BytesOfRun(kBits), kWords = 8 % kBits == 0 ? 1 : 2;  // of a run
    constexpr int64_t kRuns = kLanes / kWords;
    alignas(64) uint8_t rows[kLanes * 4 * kBytes];  // [words][4 vectors][kLanes columns][32 bits]
    const int64_t first = chunk * kRuns * kRows, there = (p.in * kBits + 7) / 8 - first;
    UnpackColumns<S, kBits, false>(p.codes.At(first, column), p.codes.row, there, kRuns, columns, ahead, rows);
    for (int v = 0; v < 4; ++v) {
      I vectors[kLanes];
#pragma GCC unroll 16
      for (int word = 0; word < kLanes; ++word) vectors[word] = S::Load(rows + (word * 4 + v) * kBytes);
      S::Transpose(vectors);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        S::Store(words + (16 * (lane / 4) + 4 * v + lane % 4) * kBytes, vectors[lane]);
      }
    }
  }

  // The same words, of codes that lie column by column. What is beyond the inputs reads as zero.
  static void Copy(const CodebookProblem& p, int64_t chunk, int64_t column, int64_t columns, uint8_t* words) {
    const int64_t bytes = BytesOfColumn(p), there = Min(kBytes, bytes - chunk * kBytes);
    for (int64_t c = 0; c < columns; ++c) {
      const uint8_t* from = p.codes.data + (column + c) * bytes + chunk * kBytes;
      S::Store(words + c * kBytes, there == kBytes ? S::Load(from) : LoadRow<S, false>(from, there));
    }
  }

  static int64_t BytesOfColumn(const CodebookProblem& p) { return (p.in * p.bits + 7) / 8; }

  // ---- one row, column by column: a read of activations serves several columns -----------------------------------

  template <int kBits>
  static void OneRowAlong(const CodebookProblem& p, int64_t begin, int64_t end) {
    std::vector<float> spread;
    if (p.scales != nullptr) spread.resize(static_cast<size_t>(S::kLookupColumns * (p.chunks + 1) * kLanes));
    int64_t column = begin;
    for (; column + S::kLookupColumns <= end; column += S::kLookupColumns) {
      Along<kBits, S::kLookupColumns>(p, column, spread.data());
    }
    for (; column < end; ++column) Along<kBits, 1>(p, column, spread.data());
  }

  template <int kBits, int kColumns>
  static void Along(const CodebookProblem& p, int64_t column, float* spread) {
    constexpr int kFields = static_cast<int>(FieldsOf(kBits));
    const int64_t bytes = BytesOfColumn(p), inputs = kLanes * kFields, stride = (p.chunks + 1) * kLanes;
    const int64_t table_chunks = p.table_inputs < p.in ? p.table_inputs / inputs : p.chunks;
    if (p.scales != nullptr) {
      for (int c = 0; c < kColumns; ++c) Spread(p, column + c, kFields, spread + c * stride);
    }
    F total[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) total[c] = S::Set(0.0f);
    for (int64_t first = 0; first < p.chunks; first += table_chunks) {
      typename S::template Table<kBits> tables[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        tables[c] = typename S::template Table<kBits>(TableOf(p, first * inputs, column + c), p.entries);
      }
      for (int64_t chunk = first; chunk < first + table_chunks; ++chunk) {
        const float* x = p.ordered + chunk * inputs;
        const uint8_t* codes = p.codes.data + column * bytes + chunk * kBytes;
        const int64_t there = bytes - chunk * kBytes;
        I words[kColumns];
        F sums[kColumns];
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          words[c] = there >= kBytes ? S::Load(codes + c * bytes) : LoadRow<S, false>(codes + c * bytes, there);
          __builtin_prefetch(codes + (kColumns + c) * bytes);
          sums[c] = p.scales == nullptr ? total[c] : S::Set(0.0f);
        }
#pragma GCC unroll 32
        for (int k = 0; k < kFields; ++k) {
          const F a = S::LoadF(x + k * kLanes);
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) sums[c] = S::Fma(tables[c].At(words[c], k), a, sums[c]);
        }
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          if (p.scales == nullptr) {
            total[c] = sums[c];
          } else {
            total[c] = S::Fma(sums[c], S::LoadF(spread + c * stride + chunk * kLanes), total[c]);
          }
        }
      }
    }
    for (int c = 0; c < kColumns; ++c) {
      alignas(64) float lanes[kLanes];
      S::StoreF(lanes, total[c]);
      p.y[column + c] = Total(lanes);
    }
  }

  // The scale of every word of a column. A vector is written where a group begins, also beyond its end, which the next
  // group then overwrites.
  static void Spread(const CodebookProblem& p, int64_t column, int64_t fields, float* to) {
    const int64_t groups = p.in / p.group_size, words = (p.group_size + fields - 1) / fields;
    for (int64_t group = 0; group < groups; ++group) {
      const F scale = S::Set(p.scales[column * groups + group]);
      for (int64_t i = 0; i < words; i += kLanes) S::StoreF(to + group * words + i, scale);
    }
  }

  // ---- one row of codes by rows of bytes: weights are used as they are looked up ---------------------------------

  template <int kBits>
  static void OneRow(const CodebookProblem& p, int64_t begin, int64_t end) {
    constexpr int64_t kFields = FieldsOf(kBits);
    constexpr int64_t kWide = 8 * kBytes;
    const int64_t width = p.tile == 64 ? 64 : kWide;  // of a pass: the bytes of a row of codes are read in one go
    alignas(64) uint8_t words[kBytes * kBytes];
    alignas(64) float scales[kBytes * kLanes];
    alignas(64) float sums[kWide * kLanes];
    for (int64_t left = begin; left < end; left += width) {
      const int64_t right = Min(end, left + width);
      std::memset(sums, 0, sizeof(sums));
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
        const float* x = p.ordered + chunk * kFields * kLanes;
        for (int64_t column = left; column < right; column += kBytes) {
          const int64_t columns = Min(kBytes, right - column);
          const int64_t bytes = kLanes * kFields * kBits / 8;
          Turn<kBits>(p, chunk, column, columns, column + kBytes < right ? kBytes : left - column + bytes * p.codes.row, words);
          if (p.scales != nullptr) Scales(p, chunk * kLanes * kFields, kFields, column, columns, scales);
          for (int64_t c = 0; c < columns; ++c) {
            const typename S::template Table<kBits> table(TableOf(p, chunk * kLanes * kFields, column + c), p.entries);
            const I codes = S::Load(words + c * kBytes);
            float* to = sums + (column + c - left) * kLanes;
            F a = S::Set(0.0f), b = S::Set(0.0f);
#pragma GCC unroll 32
            for (int k = 0; k < kFields; k += 2) {
              a = S::Fma(table.At(codes, k), S::LoadF(x + k * kLanes), a);
              b = S::Fma(table.At(codes, k + 1), S::LoadF(x + (k + 1) * kLanes), b);
            }
            a = S::Add(a, b);
            const F sum = S::LoadF(to);
            S::StoreF(to, p.scales == nullptr ? S::Add(a, sum) : S::Fma(a, S::LoadF(scales + c * kLanes), sum));
          }
        }
      }
      for (int64_t c = 0; c < right - left; ++c) p.y[left + c] = Total(sums + c * kLanes);
    }
  }

  // ---- more rows: weights are looked up once for many ------------------------------------------------------------

  template <int kBits>
  static void ManyRows(const CodebookProblem& p, int64_t begin, int64_t end) {
    constexpr int64_t kFields = FieldsOf(kBits), kWeights = kFields * kLanes;  // inputs of a chunk
    alignas(64) static thread_local float weights[kMost];
    alignas(64) static thread_local float sums[kMostRows * kColumnsAtOnce * kLanes];  // a vector each
    // Codes by rows of bytes are turned for more columns together; then fewer inputs and rows keep both as small.
    const int64_t step = p.tile == 1 ? kColumnsAtOnce : kBytes, most_rows = kMostRows * kColumnsAtOnce / step;
    const int64_t most_span = kMost / step / kWeights;  // chunks between two visits of the sums
    for (int64_t row = 0; row < p.rows; row += most_rows) {
      const int64_t rows = Min(most_rows, p.rows - row);
      for (int64_t column = begin; column < end; column += step) {
        const int64_t columns = Min(step, end - column), whole = RoundUp(columns, kTileColumns);
        std::memset(sums, 0, static_cast<size_t>(rows * whole * kLanes) * 4);
        for (int64_t chunk = 0; chunk < p.chunks; chunk += most_span) {
          const int64_t span = Min(most_span, p.chunks - chunk), steps = span * kFields;
          for (int64_t i = 0; i < span; ++i) {
            Decode<kBits>(p, chunk + i, column, columns, weights + i * kWeights, span * kWeights);
          }
          std::memset(weights + columns * span * kWeights, 0, static_cast<size_t>((whole - columns) * span * kWeights) * 4);
          const float* x = p.ordered + row * p.stride + chunk * kWeights;
          for (int64_t c = 0; c < whole; c += kColumnsAtOnce) {
            Tiles(weights + c * steps * kLanes, Min(kColumnsAtOnce, whole - c), steps, x, p.stride, rows,
                  sums + c * rows * kLanes);
          }
        }
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t m = 0; m < rows; ++m) {
            p.y[(row + m) * p.out + column + c] = Total(sums + (c * rows + m) * kLanes);
          }
        }
      }
    }
  }

  // Weights of a chunk, `stride` apart from column to column.
  template <int kBits>
  static void Decode(const CodebookProblem& p, int64_t chunk, int64_t column, int64_t columns, float* weights,
                     int64_t stride) {
    constexpr int64_t kFields = FieldsOf(kBits);
    const int64_t first = chunk * kFields * kLanes;
    alignas(64) uint8_t words[kBytes * kBytes];
    alignas(64) float scales[kBytes * kLanes];
    if (p.tile == 1) {
      Copy(p, chunk, column, columns, words);
    } else {
      Turn<kBits>(p, chunk, column, columns, kLanes * kFields * kBits / 8 * p.codes.row, words);
    }
    if (p.scales != nullptr) Scales(p, first, kFields, column, columns, scales);
    for (int64_t c = 0; c < columns; ++c) {
      const typename S::template Table<kBits> table(TableOf(p, first, column + c), p.entries);
      const I codes = S::Load(words + c * kBytes);
#pragma GCC unroll 32
      for (int k = 0; k < static_cast<int>(kFields); ++k) {
        F value = table.At(codes, k);
        if (p.scales != nullptr) value = S::Mul(value, S::LoadF(scales + c * kLanes));
        S::StoreF(weights + c * stride + k * kLanes, value);
      }
    }
  }

  // sums[c][m] += sum_k weights[c][k] * x[m][k] over `steps` vectors, a vector of partial sums each.
  static void Tiles(const float* weights, int64_t columns, int64_t steps, const float* x, int64_t stride, int64_t rows,
                    float* sums) {
    int64_t m = 0;
    for (; m + kTileRows <= rows; m += kTileRows) TileRow<kTileRows>(weights, columns, steps, x, stride, rows, m, sums);
    if constexpr (kTileRows > 4) {
      for (; m + 4 <= rows; m += 4) TileRow<4>(weights, columns, steps, x, stride, rows, m, sums);
    }
    for (; m < rows; ++m) TileRow<1>(weights, columns, steps, x, stride, rows, m, sums);
  }

  // The activations of a few rows meet all columns while they are in the first-level cache.
  template <int kRows>
  static void TileRow(const float* weights, int64_t columns, int64_t steps, const float* x, int64_t stride, int64_t rows,
                      int64_t m, float* sums) {
    for (int64_t c = 0; c < columns; c += kTileColumns) {
      Tile<kRows>(weights + c * steps * kLanes, steps, x + m * stride, stride, rows, sums + (c * rows + m) * kLanes);
    }
  }

  template <int kRows>
  __attribute__((noinline)) static void Tile(const float* w, int64_t steps, const float* x, int64_t stride,
                                             int64_t rows, float* sums) {
    F total[kTileColumns][kRows];
#pragma GCC unroll 8
    for (int c = 0; c < kTileColumns; ++c) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        total[c][m] = S::Set(0.0f);
        __builtin_prefetch(sums + (c * rows + m) * kLanes);
      }
    }
    for (int64_t k = 0; k < steps; ++k) {
      F weights[kTileColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kTileColumns; ++c) weights[c] = S::LoadF(w + (c * steps + k) * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const F a = S::LoadF(x + m * stride + k * kLanes);
#pragma GCC unroll 8
        for (int c = 0; c < kTileColumns; ++c) total[c][m] = S::Fma(weights[c], a, total[c][m]);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kTileColumns; ++c) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        float* to = sums + (c * rows + m) * kLanes;
        S::StoreF(to, S::Add(total[c][m], S::LoadF(to)));
      }
    }
  }

  // ---- tables and scales -----------------------------------------------------------------------------------------

  static const float* TableOf(const CodebookProblem& p, int64_t input, int64_t column) {
    return p.tables + (input / p.table_inputs * p.out_groups + column / p.table_outputs) * p.entries;
  }

  // The scale of every word of a chunk, column by column.
  static void Scales(const CodebookProblem& p, int64_t first, int64_t fields, int64_t column, int64_t columns,
                     float* scales) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t input = Min(first + lane * fields, p.in - 1);  // beyond the inputs x is zero
      const int64_t group = input / p.group_size, groups = p.in / p.group_size;
      const float* from =
          p.scales + (p.tile == 64 ? (column / 64 * groups + group) * 64 + column % 64
                       : p.tile == 1 ? column * groups + group : group * p.out + column);
      const int64_t step = p.tile == 1 ? groups : 1;
      for (int64_t c = 0; c < columns; ++c) scales[c * kLanes + lane] = from[c * step];
    }
  }

  static float Total(const float* lanes) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    return total;
  }

  template <int kBits>
  static void ColumnsOf(const CodebookProblem& p, int64_t begin, int64_t end) {
    if (p.rows > 1) {
      ManyRows<kBits>(p, begin, end);
    } else if (p.tile == 1) {
      if constexpr (8 % kBits == 0) OneRowAlong<kBits>(p, begin, end);
    } else {
      OneRow<kBits>(p, begin, end);
    }
  }

  static void Columns(const CodebookProblem& p, int64_t begin, int64_t end) {
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
