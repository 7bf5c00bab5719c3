// NoMAD in plain C++ over 16 bytes at a time; with NEON the look-up is one instruction.
#include "nomad_kernel.h"
#include "simd_portable.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace effjax {
namespace {

struct PortableLookup : Portable {
  typedef uint16_t Words __attribute__((vector_size(16)));
#if defined(__ARM_NEON)
  static constexpr int kTiles = 4;  // of 4 sums each, in 32 registers
  static constexpr int kSums = 16;
#else
  static constexpr int kTiles = 2;
  static constexpr int kSums = 8;
#endif
  struct Half {
    uint16_t bits;
  };
  struct Bfloat {
    uint16_t bits;
  };

  static I Lookup(I table, I index) {
#if defined(__ARM_NEON)
    return reinterpret_cast<I>(vqtbl1q_u8(reinterpret_cast<uint8x16_t>(table), reinterpret_cast<uint8x16_t>(index)));
#else
    uint8_t entries[16], codes[16];
    std::memcpy(entries, &table, 16);
    std::memcpy(codes, &index, 16);
    for (int i = 0; i < 16; ++i) codes[i] = entries[codes[i]];
    return Load(codes);
#endif
  }
  static I Add16(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<Words>(a) + reinterpret_cast<Words>(b)); }
  static I Sub16(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<Words>(a) - reinterpret_cast<Words>(b)); }
  static I HighBytes(I x) { return reinterpret_cast<I>(reinterpret_cast<Words>(x) >> 8); }
  static I ToHighBytes(I x) { return reinterpret_cast<I>(reinterpret_cast<Words>(x) << 8); }

  // `even` and `odd` are keys 0, 2, .. and 1, 3, .. where the first byte of a word is the low one.
  static void StoreSums(I even, I odd, float unit, float bias, float* to) {
    const Words a = reinterpret_cast<Words>(even), b = reinterpret_cast<Words>(odd);
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = static_cast<float>(a[i]) * unit + bias;
      to[2 * i + 1] = static_cast<float>(b[i]) * unit + bias;
    }
  }

  static F LoadValues(const float* p) { return LoadF(p); }
  template <class T>
  static F LoadValues(const T* p) {
    return F{ToFloat1(p[0]), ToFloat1(p[1]), ToFloat1(p[2]), ToFloat1(p[3])};
  }
  static float ToFloat1(float x) { return x; }
  static float ToFloat1(Half x) {
    float found;
    FromHalf(&x.bits, 1, &found);
    return found;
  }
  static float ToFloat1(Bfloat x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float found;
    std::memcpy(&found, &wide, 4);
    return found;
  }
};

constexpr NomadKernel kKernel = {Nomad<PortableLookup>::Lookup, Nomad<PortableLookup>::Attend};

}  // namespace

const NomadKernel* const kNomadPortable = &kKernel;

}  // namespace effjax
