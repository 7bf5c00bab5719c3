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
  static constexpr int64_t kPanelInputs = 512;  // whose weights are looked up together for many rows
  static constexpr int64_t kTile = S::kTileVectors * kLanes;  // columns whose sums are in registers together

  // ---- the activations of one row: [chunks][fields][lanes] -------------------------------------------------------

  static void Order(const CodebookProblem& p) {
    const int64_t fields = FieldsOf(p.bits);
    float* to = p.ordered;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      for (int64_t k = 0; k < fields; ++k) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t i = (chunk * kLanes + lane) * fields + k;
          *to++ = i < p.in ? p.x[i] : 0.0f;
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
          const int64_t ahead = column + kBytes < right ? kBytes : left - column + bytes * p.codes.row;
          Turn<kBits>(p, chunk, column, columns, ahead, words);
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

  // The weights of a panel of columns and of some inputs are looked up and turned to [inputs][columns]: a sum is then a
  // lane, and an activation meets a vector of columns. They stay in the second-level cache for all rows.
  template <int kBits>
  static void ManyRows(const CodebookProblem& p, int64_t begin, int64_t end) {
    constexpr int64_t kInputs = FieldsOf(kBits) * kLanes;  // of a chunk
    constexpr int64_t kSpan = Max(1, kPanelInputs / kInputs);
    alignas(64) static thread_local float panel[kSpan * kInputs * kBytes];
    for (int64_t column = begin; column < end; column += kBytes) {
      const int64_t columns = Min(kBytes, end - column);
      for (int64_t chunk = 0; chunk < p.chunks; chunk += kSpan) {
        const int64_t span = Min(kSpan, p.chunks - chunk), first = chunk * kInputs;
        for (int64_t i = 0; i < span; ++i) Decode<kBits>(p, chunk + i, column, columns, panel + i * kInputs * kBytes);
        const int64_t inputs = Min(span * kInputs, p.in - first);
        for (int64_t row = 0; row < p.rows; row += S::kTileRows) {
          const int64_t rows = Min(S::kTileRows, p.rows - row);
          for (int64_t c = 0; c < columns; c += kTile) {
            TileOf<S::kTileRows>(p, panel + c, first, inputs, row, rows, column + c, Min(kTile, columns - c));
          }
        }
      }
    }
  }

  // The weights of a chunk and of kBytes columns, as [inputs][columns]; columns that are not there are zero.
  template <int kBits>
  static void Decode(const CodebookProblem& p, int64_t chunk, int64_t column, int64_t columns, float* weights) {
    using Table = typename S::template Table<kBits>;
    constexpr int kFields = static_cast<int>(FieldsOf(kBits));
    const int64_t first = chunk * kFields * kLanes;
    alignas(64) uint8_t words[kBytes * kBytes];
    alignas(64) float scales[kBytes * kLanes];
    if (p.tile == 1) {
      Copy(p, chunk, column, columns, words);
    } else {
      Turn<kBits>(p, chunk, column, columns, kLanes * kFields * kBits / 8 * p.codes.row, words);
    }
    if (p.scales != nullptr) Scales(p, first, kFields, column, columns, scales);
    for (int64_t left = 0; left < kBytes; left += kLanes) {
      const int there = static_cast<int>(Max(0, Min(kLanes, columns - left)));
      Table tables[kLanes];
      I codes[kLanes];
      for (int c = 0; c < there; ++c) {
        tables[c] = Table(TableOf(p, first, column + left + c), p.entries);
        codes[c] = S::Load(words + (left + c) * kBytes);
      }
#pragma GCC unroll 32
      for (int k = 0; k < kFields; ++k) {
        I values[kLanes];
        for (int c = 0; c < kLanes; ++c) {
          F value = S::Set(0.0f);
          if (c < there) value = tables[c].At(codes[c], k);
          if (c < there && p.scales != nullptr) value = S::Mul(value, S::LoadF(scales + (left + c) * kLanes));
          std::memcpy(&values[c], &value, sizeof(value));
        }
        S::Transpose(values);
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          S::Store(reinterpret_cast<uint8_t*>(weights + (lane * kFields + k) * kBytes + left), values[lane]);
        }
      }
    }
  }

  // Goes to the tile of exactly `rows` rows.
  template <int kRows>
  static void TileOf(const CodebookProblem& p, const float* weights, int64_t first, int64_t inputs, int64_t row,
                     int64_t rows, int64_t column, int64_t columns) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return TileOf<kRows - 1>(p, weights, first, inputs, row, rows, column, columns);
    }
    Tile<kRows>(p, weights, first, inputs, row, column, columns);
  }

  // y[row + m][column + c] (+)= sum_i x[row + m][first + i] * weights[i][c]; the first inputs set, later ones add.
  template <int kRows>
  __attribute__((noinline)) static void Tile(const CodebookProblem& p, const float* weights, int64_t first,
                                             int64_t inputs, int64_t row, int64_t column, int64_t columns) {
    F total[kRows][S::kTileVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < S::kTileVectors; ++v) total[m][v] = S::Set(0.0f);
    }
    const float* x = p.x + row * p.in + first;
    for (int64_t i = 0; i < inputs; ++i) {
      F w[S::kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < S::kTileVectors; ++v) w[v] = S::LoadF(weights + i * kBytes + v * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const F a = S::Set(x[m * p.in + i]);
#pragma GCC unroll 4
        for (int v = 0; v < S::kTileVectors; ++v) total[m][v] = S::Fma(w[v], a, total[m][v]);
      }
    }
    for (int m = 0; m < kRows; ++m) {
      float* y = p.y + (row + m) * p.out + column;
      alignas(64) float sums[kTile];
#pragma GCC unroll 4
      for (int v = 0; v < S::kTileVectors; ++v) S::StoreF(sums + v * kLanes, total[m][v]);
      if (first > 0) {
        for (int64_t c = 0; c < columns; ++c) y[c] += sums[c];
      } else {
        std::memcpy(y, sums, static_cast<size_t>(columns) * 4);
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

  static constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
  static constexpr int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
};

}  // namespace effjax
