// `nm_matmul` for AVX-512 with VNNI and VBMI.
#include "nm_matmul.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#include "unpack.h"

namespace effjax {
namespace {

using S = Avx512;
using I = __m512i;
using F = __m512;
constexpr int kBytes = 64, kLanes = 16;
constexpr int64_t kRunInputs = 16;  // eight kept codes: four rows of bytes, and two rows of positions
constexpr int64_t kMostRuns = kMaxBlock / kRunInputs;
constexpr int64_t kTileFloats = 16384, kMaxRows = kTileFloats / kBytes;

// The kept codes and their positions of one block, for 64 columns: [runs][2 quads][4 vectors].
struct Panel {
  alignas(64) uint8_t weights[kMostRuns * 2 * 4 * kBytes];  // signed: code - 8
  alignas(64) uint8_t picks[kMostRuns * 2 * 4 * kBytes];    // bytes of the 16 activations of a run
};

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Two rows of positions to the bytes that a shuffle takes. Quad s holds the s-th kept code of four groups of four
// inputs: byte r picks 4 * r plus the two bits at 4 * r + 2 * s of the column's 16.
inline void PicksOf(I first, I second, I (&picks)[2][4]) {
  const I group = _mm512_set1_epi32(0x0c080400), three = _mm512_set1_epi8(3);
  const I shifts[2] = {_mm512_set1_epi64(0x2c2824200c080400), _mm512_set1_epi64(0x2e2a26220e0a0602)};
  // The 16 bits of column 4 v + j of a lane, twice in word j.
  const I orders[2] = {_mm512_broadcast_i32x4(_mm_set_epi32(0x07060706, 0x05040504, 0x03020302, 0x01000100)),
                       _mm512_broadcast_i32x4(_mm_set_epi32(0x0f0e0f0e, 0x0d0c0d0c, 0x0b0a0b0a, 0x09080908))};
  const I halves[2] = {_mm512_unpacklo_epi8(first, second), _mm512_unpackhi_epi8(first, second)};
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const I bits = _mm512_shuffle_epi8(halves[v / 2], orders[v % 2]);
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      picks[s][v] = _mm512_or_si512(_mm512_and_si512(_mm512_multishift_epi64_epi8(shifts[s], bits), three), group);
    }
  }
}

template <bool kFull>
void Picks(const uint8_t* indices, int64_t stride, int64_t rows, int64_t runs, int64_t columns, int64_t ahead,
           uint8_t* to) {
  for (int64_t run = 0; run < runs; ++run) {
    I row[2], picks[2][4];
    for (int r = 0; r < 2; ++r) {
      const uint8_t* at = indices + (2 * run + r) * stride;
      row[r] = 2 * run + r < rows ? LoadRow<S, kFull>(at, columns) : S::Zero();
      __builtin_prefetch(at + ahead);
    }
    PicksOf(row[0], row[1], picks);
    for (int i = 0; i < 8; ++i) S::Store(to + i * kBytes, picks[i / 4][i % 4]);
    to += 8 * kBytes;
  }
}

void Fill(const NmProblem& p, int64_t first, int64_t runs, int64_t column, int64_t columns, int64_t ahead_codes,
          int64_t ahead_indices, Panel* panel) {
  UnpackColumns<S, 4, true>(p.codes.At(first / 4, column), p.codes.row, p.x.in / 4 - first / 4, runs, columns, ahead_codes, panel->weights);
  const I eight = _mm512_set1_epi8(8);
  for (int64_t i = 0; i < runs * 8; ++i) {
    S::Store(panel->weights + i * kBytes, _mm512_sub_epi8(S::Load(panel->weights + i * kBytes), eight));
  }
  const uint8_t* indices = p.indices.At(first / 8, column);
  const int64_t rows = p.x.in / 8 - first / 8;
  if (columns == kBytes) {
    Picks<true>(indices, p.indices.row, rows, runs, columns, ahead_indices, panel->picks);
  } else {
    Picks<false>(indices, p.indices.row, rows, runs, columns, ahead_indices, panel->picks);
  }
}

// Sums of the weights of a panel, times 128: what the offset of the digits adds to every digit.
void Offsets(const Panel& panel, int64_t quads, I (&sums)[4]) {
  const I all = _mm512_set1_epi8(static_cast<char>(128));
  for (int v = 0; v < 4; ++v) sums[v] = S::Zero();
  for (int64_t q = 0; q < quads; ++q) {
    for (int v = 0; v < 4; ++v) sums[v] = S::Dot(sums[v], all, S::Load(panel.weights + (q * 4 + v) * kBytes));
  }
}

// The sums of vector v of a block as floats; `unit` is the block's scale of the activations.
template <int kDigits>
F Value(const I (&total)[kDigits][4], I offset, int v, float unit) {
  F value = _mm512_mul_ps(S::ToFloat(_mm512_sub_epi32(total[0][v], offset)), S::Set(unit));
  if constexpr (kDigits > 1) {
    value = S::Fma(S::ToFloat(_mm512_sub_epi32(total[1][v], offset)), S::Set(unit * 256.0f), value);
  }
  if constexpr (kDigits > 2) {
    value = S::Fma(S::ToFloat(_mm512_sub_epi32(total[2][v], offset)), S::Set(unit * 65536.0f), value);
  }
  return value;
}

template <int kDigits>
__attribute__((noinline)) void Row(const NmProblem& p, const Panel& panel, const I (&offsets)[4], int64_t runs,
                                   const int8_t* x, int64_t row, int64_t block, const float* scales, float* sums) {
  I total[kDigits][4];
#pragma GCC unroll 4
  for (int d = 0; d < kDigits; ++d) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) total[d][v] = S::Zero();
  }
  for (int64_t run = 0; run < runs; ++run) {
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
#pragma GCC unroll 4
      for (int d = 0; d < kDigits; ++d) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + d * p.x.padded + run * kRunInputs));
        const I inputs = _mm512_broadcast_i32x4(bytes);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const int64_t at = ((run * 2 + s) * 4 + v) * kBytes;
          const I picked = _mm512_shuffle_epi8(inputs, S::Load(panel.picks + at));
          total[d][v] = S::Dot(total[d][v], picked, S::Load(panel.weights + at));
        }
      }
    }
  }
  const float unit = p.x.block_scales[row * p.x.blocks + block];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const F value = Value<kDigits>(total, offsets[v], v, unit);
    S::StoreF(sums + v * kLanes, S::Fma(value, S::LoadF(scales + v * kLanes), S::LoadF(sums + v * kLanes)));
  }
}

// ---- one row: codes and positions are used as they are unpacked --------------------------------------------------

// A row of bytes of 64 columns; what lies `ahead` bytes further is fetched into the cache, which in tiles is a later row.
inline I Fetch(const Rows& rows, int64_t r, int64_t column, int64_t ahead) {
  const uint8_t* at = rows.At(r, column);
  __builtin_prefetch(at + ahead);
  return S::Load(at);
}

template <int kDigits>
void OneRow(const NmProblem& p, int64_t column, F (&sums)[4]) {
  constexpr int64_t kAhead = 2048;
  const I nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), all = _mm512_set1_epi8(static_cast<char>(128));
  int64_t block = 0, at = 0;
  for (int64_t start = 0; start < p.x.in; ++block) {
    const int64_t group = start / p.x.group_size, groups = p.x.in / p.x.group_size;
    const int64_t size = Min(p.x.block, Min((group + 1) * p.x.group_size, p.x.in) - start);
    I total[kDigits][4], offsets[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      offsets[v] = S::Zero();
#pragma GCC unroll 4
      for (int d = 0; d < kDigits; ++d) total[d][v] = S::Zero();
    }
    for (int64_t i = 0; i < size; i += kRunInputs) {
      I rows[4], codes[4], picks[2][4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) rows[r] = Fetch(p.codes, (start + i) / 4 + r, column, kAhead);
      S::Interleave(rows, codes);
      const I first = Fetch(p.indices, (start + i) / 8, column, kAhead);
      PicksOf(first, Fetch(p.indices, (start + i) / 8 + 1, column, kAhead), picks);
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        I inputs[kDigits];
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d) {
          inputs[d] = _mm512_broadcast_i32x4(
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.x.digit_rows + d * p.x.padded + at + i)));
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const I code = _mm512_and_si512(s == 0 ? codes[v] : _mm512_srli_epi16(codes[v], 4), nibble);
          const I weights = _mm512_sub_epi8(code, eight);
          offsets[v] = S::Dot(offsets[v], all, weights);
#pragma GCC unroll 4
          for (int d = 0; d < kDigits; ++d) {
            total[d][v] = S::Dot(total[d][v], _mm512_shuffle_epi8(inputs[d], picks[s][v]), weights);
          }
        }
      }
    }
    const float* scales = p.scales + (p.tiled ? (column / 64 * groups + group) * 64 : group * p.out + column);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const F value = Value<kDigits>(total, offsets[v], v, p.x.block_scales[block]);
      sums[v] = S::Fma(value, S::LoadStrided(scales + 4 * v), sums[v]);
    }
    at += RoundUp(size, p.x.run);
    start += size;
  }
}

// ---- columns of y ------------------------------------------------------------------------------------------------

void StoreNatural(const F (&sums)[4], float* y, int64_t columns) {
  alignas(64) float natural[kBytes];
  for (int v = 0; v < 4; ++v) S::StoreStrided(natural + 4 * v, sums[v]);
  std::memcpy(y, natural, static_cast<size_t>(columns) * 4);
}

void ManyRows(const NmProblem& p, int64_t begin, int64_t end) {
  Panel panel;
  alignas(64) float sums[kTileFloats];
  alignas(64) float scales[kBytes];
  for (int64_t row = 0; row < p.x.rows; row += kMaxRows) {
    const int64_t rows = Min(kMaxRows, p.x.rows - row), width = p.tiled ? 64 : kTileFloats / rows / kBytes * kBytes;
    for (int64_t left = begin; left < end; left += width) {
      const int64_t right = Min(end, left + width), tile = RoundUp(right - left, kBytes);
      std::memset(sums, 0, static_cast<size_t>(rows * tile) * 4);
      int64_t block = 0, at = 0;
      for (int64_t start = 0; start < p.x.in; ++block) {
        const int64_t group = start / p.x.group_size;
        const int64_t size = Min(p.x.block, Min((group + 1) * p.x.group_size, p.x.in) - start);
        const int64_t runs = RoundUp(size, kRunInputs) / kRunInputs;
        for (int64_t column = left; column < right; column += kBytes) {
          const int64_t columns = Min(kBytes, right - column);
          const bool last = column + kBytes >= right;
          Fill(p, start, runs, column, columns, last ? left - column + size / 4 * p.codes.row : kBytes,
               last ? left - column + size / 8 * p.indices.row : kBytes, &panel);
          alignas(64) float natural[kBytes] = {};
          const int64_t groups = p.x.in / p.x.group_size;
          const int64_t scale = p.tiled ? (column / 64 * groups + group) * 64 : group * p.out + column;
          std::memcpy(natural, p.scales + scale, static_cast<size_t>(columns) * 4);
          for (int v = 0; v < 4; ++v) S::StoreF(scales + v * kLanes, S::LoadStrided(natural + 4 * v));
          I offsets[4];
          Offsets(panel, 2 * runs, offsets);
          for (int64_t m = 0; m < rows; ++m) {
            const int8_t* x = p.x.digit_rows + (row + m) * p.x.digits * p.x.padded + at;
            float* to = sums + m * tile + column - left;
            if (p.x.digits == 1) {
              Row<1>(p, panel, offsets, runs, x, row + m, block, scales, to);
            } else if (p.x.digits == 2) {
              Row<2>(p, panel, offsets, runs, x, row + m, block, scales, to);
            } else {
              Row<3>(p, panel, offsets, runs, x, row + m, block, scales, to);
            }
          }
        }
        at += RoundUp(size, p.x.run);
        start += size;
      }
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t column = left; column < right; column += kBytes) {
          F found[4];
          for (int v = 0; v < 4; ++v) found[v] = S::LoadF(sums + m * tile + column - left + v * kLanes);
          StoreNatural(found, p.y + (row + m) * p.out + column, Min(kBytes, right - column));
        }
      }
    }
  }
}

void Columns(const NmProblem& p, int64_t begin, int64_t end) {
  if (p.x.rows == 1) {
    for (; begin + kBytes <= end; begin += kBytes) {
      F sums[4] = {S::Set(0.0f), S::Set(0.0f), S::Set(0.0f), S::Set(0.0f)};
      switch (p.x.digits) {
        case 1: OneRow<1>(p, begin, sums); break;
        case 2: OneRow<2>(p, begin, sums); break;
        default: OneRow<3>(p, begin, sums);
      }
      StoreNatural(sums, p.y + begin, kBytes);
    }
  }
  if (begin < end) ManyRows(p, begin, end);
}

// Digits without a sign: a shuffle's bytes are the unsigned side of the product.
void Digits(const FixedPoint& p, const float* x, int64_t row) {
  ToFixedPoint<S>::Digits(p, x, row);
  int8_t* digits = p.digit_rows + row * p.digits * p.padded;
  for (int64_t i = 0; i < p.digits * p.padded; ++i) digits[i] = static_cast<int8_t>(digits[i] ^ 0x80);
}

constexpr NmKernel kKernel = {Digits, Columns};

}  // namespace

const NmKernel* const kNmAvx512 = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const NmKernel* const kNmAvx512 = nullptr;
}
#endif
