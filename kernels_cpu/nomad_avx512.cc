// NoMAD for AVX-512: four sub-quantizers a vector.
#include "nomad.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)
#include "nomad_kernel.h"
#include "simd_avx512.h"

namespace effjax {
namespace {

struct Avx512Lookup : Avx512 {
  static constexpr int kTiles = 4;  // of 4 sums each, in 32 registers
  static constexpr int kSums = 16;
  struct Half {
    uint16_t bits;
  };
  struct Bfloat {
    uint16_t bits;
  };

  static I Lookup(I table, I index) { return _mm512_shuffle_epi8(table, index); }
  static I Add16(I a, I b) { return _mm512_add_epi16(a, b); }
  static I Sub16(I a, I b) { return _mm512_sub_epi16(a, b); }
  static I HighBytes(I x) { return _mm512_srli_epi16(x, 8); }
  static I ToHighBytes(I x) { return _mm512_slli_epi16(x, 8); }

  static __m128i AddLanes(I x) {
    const __m256i half = _mm256_add_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return _mm_add_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
  // Adds the lanes; `even` and `odd` are keys 0, 2, .. and 1, 3, ..
  static void StoreSums(I even, I odd, float unit, float bias, float* to) {
    const __m128i a = AddLanes(even), b = AddLanes(odd);
    const __m256i keys = _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
    StoreF(to, Fma(ToFloat(_mm512_cvtepu16_epi32(keys)), Set(unit), Set(bias)));
  }

  static F LoadValues(const float* p) { return LoadF(p); }
  static F LoadValues(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F LoadValues(const Bfloat* p) {
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
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

constexpr NomadKernel kKernel = {Nomad<Avx512Lookup>::Lookup, Nomad<Avx512Lookup>::Attend};

}  // namespace

const NomadKernel* const kNomadAvx512 = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const NomadKernel* const kNomadAvx512 = nullptr;
}
#endif
