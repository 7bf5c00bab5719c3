// `quant_matmul` for AVX-512 with VNNI: four products of bytes a lane in one instruction.
#include "quant_matmul.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include "quant_kernel.h"

namespace effjax {
namespace {

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  using Weights = __m512i;
  using Activations = __m512i;
  static constexpr int kBytes = 64;
  static constexpr int kDigitRows = 6;  // 24 sums, 4 weights and 1 activation in 32 registers

  static I Zero() { return _mm512_setzero_si512(); }
  static I Load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void Store(uint8_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I Or(I a, I b) { return _mm512_or_si512(a, b); }

  template <int kBits>
  static I Field(I x, int shift) {
    return FieldAt(x, shift, kBits);
  }
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

  static Weights LoadWeights(const uint8_t* p) { return Load(p); }
  static Activations Broadcast(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
  }
  static I Dot(I sum, Weights w, Activations x) { return _mm512_dpbusd_epi32(sum, w, x); }

  static F ToFloat(I x) { return _mm512_cvtepi32_ps(x); }
  static F Set(float x) { return _mm512_set1_ps(x); }
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

  static void FromHalf(const uint16_t* p, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 some = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : static_cast<__mmask16>(0xffff);
      _mm512_mask_storeu_ps(to + i, some, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p + i)));
    }
  }
};

constexpr QuantKernel kKernel = {Quant<Avx512>::Digits, Quant<Avx512>::Columns};

}  // namespace

const QuantKernel* const kQuantAvx512 = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const QuantKernel* const kQuantAvx512 = nullptr;
}
#endif
