// The vectors that kernels are written over, for AVX2.
#pragma once

#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace effjax {
namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  // Even and odd bytes as 16-bit numbers.
  struct Weights {
    I even, odd;
  };
  using Activations = Weights;
  static constexpr int kBytes = 32;
  static constexpr int kLookupColumns = 2;
  static constexpr int kDigitRows = 3;
  static constexpr int kTileVectors = 2, kTileRows = 6;  // of sums of floats, beside 2 weights and 1 activation

  static I Zero() { return _mm256_setzero_si256(); }
  static I Load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static void Store(uint8_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
  static I Or(I a, I b) { return _mm256_or_si256(a, b); }

  static I FieldAt(I x, int shift, int bits) {
    const int mask = ((1 << bits) - 1) & (0xff >> shift);
    return _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8(static_cast<char>(mask)));
  }
  static I HighPart(I x, int up, int bits) {
    const int mask = ((1 << bits) - 1) & ~((1 << up) - 1);
    return _mm256_and_si256(_mm256_slli_epi16(x, up), _mm256_set1_epi8(static_cast<char>(mask)));
  }

  static void Interleave(const I (&r)[4], I (&q)[4]) {
    const I a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
    const I c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
    q[0] = _mm256_unpacklo_epi16(a, c);
    q[1] = _mm256_unpackhi_epi16(a, c);
    q[2] = _mm256_unpacklo_epi16(b, d);
    q[3] = _mm256_unpackhi_epi16(b, d);
  }

  static Weights LoadWeights(const uint8_t* p) { return ToWeights(Load(p)); }
  static Weights ToWeights(I x) {
    return {_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(x, 8)};
  }
  static Activations Broadcast(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    const I x = _mm256_set1_epi32(quad);
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
  }
  static I Dot(I sum, Weights w, Activations x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.even, x.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w.odd, x.odd));
  }

  static F ToFloat(I x) { return _mm256_cvtepi32_ps(x); }
  static F Set(float x) { return _mm256_set1_ps(x); }
  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F LoadF(const float* p) { return _mm256_loadu_ps(p); }
  static void StoreF(float* p, F x) { _mm256_storeu_ps(p, x); }

  static F LoadStrided(const float* p) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 16), 1);
  }
  static void StoreStrided(float* p, F x) {
    _mm_storeu_ps(p, _mm256_castps256_ps128(x));
    _mm_storeu_ps(p + 16, _mm256_extractf128_ps(x, 1));
  }

  // 8 vectors of 8 words as the rows of a matrix, transposed.
  static void Transpose(I (&x)[8]) {
    I pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      fours[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
      fours[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
      fours[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
      fours[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      x[c] = _mm256_permute2x128_si256(fours[c], fours[4 + c], 0x20);
      x[4 + c] = _mm256_permute2x128_si256(fours[c], fours[4 + c], 0x31);
    }
  }

  // A table of values in registers up to four bits, in memory beyond; `At` looks up field k of every word.
  template <int kBits>
  struct Table {
    static constexpr int kField = 8 % kBits == 0 ? kBits : 8;
    F low, high;
    const float* memory;
    I last;

    Table() = default;
    Table(const float* values, int64_t entries) : memory(values), last(_mm256_set1_epi32(static_cast<int>(entries) - 1)) {
      if constexpr (kBits <= 4) {
        alignas(32) float padded[16];
        for (int i = 0; i < 16; ++i) {
          const int64_t code = i & ((1 << kBits) - 1);
          padded[i] = values[code < entries ? code : entries - 1];
        }
        low = LoadF(padded);
        high = LoadF(padded + 8);
      }
    }
    F At(I words, int k) const {
      const I index = _mm256_srli_epi32(words, k * kField);
      if constexpr (kBits <= 3) {
        return _mm256_permutevar8x32_ps(low, index);
      } else if constexpr (kBits == 4) {
        const F a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
        return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
      } else {
        const I code = _mm256_min_epi32(_mm256_and_si256(index, _mm256_set1_epi32(0xff)), last);
        return _mm256_i32gather_ps(memory, code, 4);
      }
    }
  };

  static void FromHalf(const uint16_t* p, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
    }
    for (; i < n; ++i) to[i] = _cvtsh_ss(p[i]);
  }
};

}  // namespace
}  // namespace effjax
