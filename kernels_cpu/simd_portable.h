// The vectors that kernels are written over, for plain C++ on 16 bytes, which compilers turn into SSE2 or NEON.
#pragma once

#include <cstdint>
#include <cstring>

namespace effjax {
namespace {

struct Portable {
  typedef uint8_t I __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t Sums __attribute__((vector_size(16)));
  using Weights = I;
  struct Activations {
    int32_t quad[4];
  };
  static constexpr int kBytes = 16;
  static constexpr int kLookupColumns = 1;
  static constexpr int kDigitRows = 3;
  static constexpr int kTileVectors = 2, kTileRows = 2;

  static I Zero() { return I{}; }
  static I Load(const uint8_t* p) {
    I x;
    std::memcpy(&x, p, 16);
    return x;
  }
  static void Store(uint8_t* p, I x) { std::memcpy(p, &x, 16); }
  static I Or(I a, I b) { return a | b; }

  static I Splat(int byte) {
    I x;
    std::memset(&x, byte, 16);
    return x;
  }
  static I FieldAt(I x, int shift, int bits) { return (x >> Splat(shift)) & Splat((1 << bits) - 1); }
  static I HighPart(I x, int up, int bits) { return (x << Splat(up)) & Splat((1 << bits) - 1); }

  static void Interleave(const I (&r)[4], I (&q)[4]) {
    for (int v = 0; v < 4; ++v) {
      for (int lane = 0; lane < 4; ++lane) {
        for (int k = 0; k < 4; ++k) q[v][4 * lane + k] = r[k][4 * v + lane];
      }
    }
  }

  static Weights ToWeights(I x) { return x; }
  static Weights LoadWeights(const uint8_t* p) { return Load(p); }
  static Activations Broadcast(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static I Dot(I sum, Weights w, Activations x) {
    Sums total = reinterpret_cast<Sums>(sum);
    for (int lane = 0; lane < 4; ++lane) {
      for (int k = 0; k < 4; ++k) total[lane] += static_cast<int32_t>(w[4 * lane + k]) * x.quad[k];
    }
    return reinterpret_cast<I>(total);
  }

  static F ToFloat(I x) { return __builtin_convertvector(reinterpret_cast<Sums>(x), F); }
  static F Set(float x) { return F{x, x, x, x}; }
  static F Add(F a, F b) { return a + b; }
  static F Mul(F a, F b) { return a * b; }
  static F Fma(F a, F b, F c) { return a * b + c; }
  static F LoadF(const float* p) {
    F x;
    std::memcpy(&x, p, 16);
    return x;
  }
  static void StoreF(float* p, F x) { std::memcpy(p, &x, 16); }
  static F LoadStrided(const float* p) { return LoadF(p); }
  static void StoreStrided(float* p, F x) { StoreF(p, x); }

  static void Transpose(I (&x)[4]) {
    uint32_t words[4][4];
    std::memcpy(words, x, 64);
    for (int i = 0; i < 4; ++i) {
      const uint32_t column[4] = {words[0][i], words[1][i], words[2][i], words[3][i]};
      std::memcpy(&x[i], column, 16);
    }
  }

  template <int kBits>
  struct Table {
    static constexpr int kField = 8 % kBits == 0 ? kBits : 8;
    const float* values;
    uint32_t last;

    Table() = default;
    Table(const float* from, int64_t entries) : values(from), last(static_cast<uint32_t>(entries) - 1) {}
    F At(I words, int k) const {
      uint32_t lanes[4];
      std::memcpy(lanes, &words, 16);
      F found;
      for (int i = 0; i < 4; ++i) {
        const uint32_t code = lanes[i] >> (k * kField) & ((1u << kBits) - 1);
        found[i] = values[code < last ? code : last];
      }
      return found;
    }
  };

  static void FromHalf(const uint16_t* p, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t half = p[i], sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
      uint32_t bits;
      if (rest >= 0x7c00u) {
        bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
      } else if (rest >= 0x400u) {
        bits = sign | ((rest << 13) + 0x38000000u);
      } else {
        const float subnormal = static_cast<float>(rest) * 0x1p-24f;
        std::memcpy(&bits, &subnormal, 4);
        bits |= sign;
      }
      std::memcpy(to + i, &bits, 4);
    }
  }
};

}  // namespace
}  // namespace effjax
