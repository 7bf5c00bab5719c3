// The vectors that kernels are written over, for AVX-512 with VNNI.
#pragma once

#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace effjax {
namespace {

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  using Weights = __m512i;
  using Activations = __m512i;
  static constexpr int kBytes = 64;
  static constexpr int kTileVectors = 4, kTileRows = 6;  // of sums of floats, beside 4 weights and 1 activation
  static constexpr int kLookupColumns = 4;  // whose tables and sums share a read of activations
  static constexpr int kDigitRows = 6;  // 24 sums, 4 weights and 1 activation in 32 registers

  static I Zero() { return _mm512_setzero_si512(); }
  static I Load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void Store(uint8_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I Or(I a, I b) { return _mm512_or_si512(a, b); }

  static I FieldAt(I x, int shift, int bits) {
    const int mask = ((1 << bits) - 1) & (0xff >> shift);
    return _mm512_and_si512(_mm512_srli_epi16(x, shift), _mm512_set1_epi8(static_cast<char>(mask)));
  }
  static I HighPart(I x, int up, int bits) {
    const int mask = ((1 << bits) - 1) & ~((1 << up) - 1);
    return _mm512_and_si512(_mm512_slli_epi16(x, up), _mm512_set1_epi8(static_cast<char>(mask)));
  }

  static void Interleave(const I (&r)[4], I (&q)[4]) {
    const I a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
    const I c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
    q[0] = _mm512_unpacklo_epi16(a, c);
    q[1] = _mm512_unpackhi_epi16(a, c);
    q[2] = _mm512_unpacklo_epi16(b, d);
    q[3] = _mm512_unpackhi_epi16(b, d);
  }

  static Weights ToWeights(I x) { return x; }
  static Weights LoadWeights(const uint8_t* p) { return Load(p); }
  static Activations Broadcast(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
  }
  // As an instruction and not the intrinsic, which gcc 12 gives a register of its own for the result: the sums of a
  // panel, in place, just fit the 32 there are.
  static I Dot(I sum, Weights w, Activations x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }

  static F ToFloat(I x) { return _mm512_cvtepi32_ps(x); }
  static F Set(float x) { return _mm512_set1_ps(x); }
  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F LoadF(const float* p) { return _mm512_loadu_ps(p); }
  static void StoreF(float* p, F x) { _mm512_storeu_ps(p, x); }

  // Four floats at p, p + 16, p + 32 and p + 48.
  static F LoadStrided(const float* p) {
    F x = _mm512_castps128_ps512(_mm_loadu_ps(p));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 16), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 32), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(p + 48), 3);
  }
  static void StoreStrided(float* p, F x) {
    _mm_storeu_ps(p, _mm512_castps512_ps128(x));
    _mm_storeu_ps(p + 16, _mm512_extractf32x4_ps(x, 1));
    _mm_storeu_ps(p + 32, _mm512_extractf32x4_ps(x, 2));
    _mm_storeu_ps(p + 48, _mm512_extractf32x4_ps(x, 3));
  }

  // 16 vectors of 16 words as the rows of a matrix, transposed.
  static void Transpose(I (&x)[16]) {
    I pairs[16], fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
      fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
      fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
      fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const I even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
      const I odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
      const I even_low = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
      const I odd_low = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
      x[c] = _mm512_shuffle_i32x4(even, even_low, 0x88);
      x[4 + c] = _mm512_shuffle_i32x4(odd, odd_low, 0x88);
      x[8 + c] = _mm512_shuffle_i32x4(even, even_low, 0xdd);
      x[12 + c] = _mm512_shuffle_i32x4(odd, odd_low, 0xdd);
    }
  }

  // A table of values in registers; `At` looks up field k of every word. Bits above a code do no harm where the table
  // repeats itself, so up to four bits need no mask. Tables of more than 64 values stay in memory.
  template <int kBits>
  struct Table {
    static constexpr int kParts = kBits <= 4 ? 1 : kBits == 5 ? 2 : 4;
    static constexpr int kField = 8 % kBits == 0 ? kBits : 8;
    F part[kParts];
    const float* memory;
    I last;

    Table() = default;
    Table(const float* values, int64_t entries) : memory(values), last(_mm512_set1_epi32(static_cast<int>(entries) - 1)) {
      if (kBits == 4 && entries == 16) {
        part[0] = LoadF(values);
      } else if constexpr (kBits <= 6) {
        alignas(64) float padded[16 * kParts];
        for (int i = 0; i < 16 * kParts; ++i) {
          const int64_t code = i & ((1 << kBits) - 1);
          padded[i] = values[code < entries ? code : entries - 1];
        }
        for (int i = 0; i < kParts; ++i) part[i] = LoadF(padded + 16 * i);
      }
    }
    F At(I words, int k) const {
      const I index = _mm512_srli_epi32(words, static_cast<unsigned>(k * kField));
      if constexpr (kBits <= 4) {
        return _mm512_permutexvar_ps(index, part[0]);
      } else if constexpr (kBits == 5) {
        return _mm512_permutex2var_ps(part[0], index, part[1]);
      } else if constexpr (kBits == 6) {
        const F low = _mm512_permutex2var_ps(part[0], index, part[1]);
        const F high = _mm512_permutex2var_ps(part[2], index, part[3]);
        return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
      } else {
        const I code = _mm512_min_epi32(_mm512_and_si512(index, _mm512_set1_epi32(0xff)), last);
        return _mm512_i32gather_ps(code, memory, 4);
      }
    }
  };

  static void FromHalf(const uint16_t* p, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 some = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : static_cast<__mmask16>(0xffff);
      _mm512_mask_storeu_ps(to + i, some, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p + i)));
    }
  }
};

}  // namespace
}  // namespace effjax
