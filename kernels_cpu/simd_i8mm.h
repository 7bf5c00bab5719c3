// The vectors that kernels are written over, for 64-bit ARM with the 8-bit matrix extension.
#pragma once

#include <arm_neon.h>
#include <cstdint>
#include <cstring>

namespace effjax {
namespace {

struct I8mm {
  using I = uint8x16_t;
  using F = float32x4_t;
  using Weights = uint8x16_t;
  using Activations = int8x16_t;
  static constexpr int kBytes = 16;
  static constexpr int kDigitRows = 6;

  static I Zero() { return vdupq_n_u8(0); }
  static I Load(const uint8_t* p) { return vld1q_u8(p); }
  static void Store(uint8_t* p, I x) { vst1q_u8(p, x); }
  static I Or(I a, I b) { return vorrq_u8(a, b); }

  static I FieldAt(I x, int shift, int bits) {
    return vandq_u8(vshlq_u8(x, vdupq_n_s8(static_cast<int8_t>(-shift))), vdupq_n_u8((1 << bits) - 1));
  }
  static I HighPart(I x, int up, int bits) {
    return vandq_u8(vshlq_u8(x, vdupq_n_s8(static_cast<int8_t>(up))), vdupq_n_u8((1 << bits) - 1));
  }

  static void Interleave(const I (&r)[4], I (&q)[4]) {
    const uint8x16x2_t a = vzipq_u8(r[0], r[1]), b = vzipq_u8(r[2], r[3]);
    for (int half = 0; half < 2; ++half) {
      const uint16x8x2_t both = vzipq_u16(vreinterpretq_u16_u8(a.val[half]), vreinterpretq_u16_u8(b.val[half]));
      q[2 * half] = vreinterpretq_u8_u16(both.val[0]);
      q[2 * half + 1] = vreinterpretq_u8_u16(both.val[1]);
    }
  }

  static Weights ToWeights(I x) { return x; }
  static Weights LoadWeights(const uint8_t* p) { return vld1q_u8(p); }
  static Activations Broadcast(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
  }
  static I Dot(I sum, Weights w, Activations x) {
    return vreinterpretq_u8_s32(vusdotq_s32(vreinterpretq_s32_u8(sum), w, x));
  }

  static F ToFloat(I x) { return vcvtq_f32_s32(vreinterpretq_s32_u8(x)); }
  static F Set(float x) { return vdupq_n_f32(x); }
  static F Mul(F a, F b) { return vmulq_f32(a, b); }
  static F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F LoadF(const float* p) { return vld1q_f32(p); }
  static void StoreF(float* p, F x) { vst1q_f32(p, x); }
  static F LoadStrided(const float* p) { return LoadF(p); }
  static void StoreStrided(float* p, F x) { StoreF(p, x); }

  static void FromHalf(const uint16_t* p, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) {
      __fp16 half;
      std::memcpy(&half, p + i, 2);
      to[i] = half;
    }
  }
};

}  // namespace
}  // namespace effjax
