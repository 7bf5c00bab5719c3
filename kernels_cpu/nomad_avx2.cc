// NoMAD for AVX2: two sub-quantizers a vector.
#include "nomad.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "nomad_kernel.h"
#include "simd_avx2.h"

namespace effjax {
namespace {

struct Avx2Lookup : Avx2 {
  static constexpr int kTiles = 2;  // of 4 sums each, in 16 registers
  static constexpr int kSums = 8;
  struct Half {
    uint16_t bits;
  };
  struct Bfloat {
    uint16_t bits;
  };

  static I Lookup(I table, I index) { return _mm256_shuffle_epi8(table, index); }
  static I Add16(I a, I b) { return _mm256_add_epi16(a, b); }
  static I Sub16(I a, I b) { return _mm256_sub_epi16(a, b); }
  static I HighBytes(I x) { return _mm256_srli_epi16(x, 8); }
  static I ToHighBytes(I x) { return _mm256_slli_epi16(x, 8); }

  // Adds the lanes; `even` and `odd` are keys 0, 2, .. and 1, 3, ..
  static void StoreSums(I even, I odd, float unit, float bias, float* to) {
    const __m128i a = _mm_add_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1));
    const __m128i b = _mm_add_epi16(_mm256_castsi256_si128(odd), _mm256_extracti128_si256(odd, 1));
    const F u = Set(unit), c = Set(bias);
    StoreF(to, Fma(ToFloat(_mm256_cvtepu16_epi32(_mm_unpacklo_epi16(a, b))), u, c));
    StoreF(to + 8, Fma(ToFloat(_mm256_cvtepu16_epi32(_mm_unpackhi_epi16(a, b))), u, c));
  }

  static F LoadValues(const float* p) { return LoadF(p); }
  static F LoadValues(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F LoadValues(const Bfloat* p) {
    const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static float ToFloat1(float x) { return x; }
  static float ToFloat1(Half x) { return _cvtsh_ss(x.bits); }
  static float ToFloat1(Bfloat x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float found;
    std::memcpy(&found, &wide, 4);
    return found;
  }
};

constexpr NomadKernel kKernel = {Nomad<Avx2Lookup>::Lookup, Nomad<Avx2Lookup>::Attend};

}  // namespace

const NomadKernel* const kNomadAvx2 = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const NomadKernel* const kNomadAvx2 = nullptr;
}
#endif
