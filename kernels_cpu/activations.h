// Activations as fixed-point numbers: one to three signed bytes each, with one scale for a block of inputs.
//
// Products of bytes are then summed exactly in integers, four at a time. Three digits are 24 bits of the largest
// activation of a block: what float32 holds. One digit is the usual dynamic int8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace effjax {

inline constexpr int64_t kMaxBlock = 256;

// Bytes from a row to the next: an odd number of cache lines, since rows that lie a power of two apart share a few sets
// of the cache and drive each other out.
inline int64_t OddLines(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

struct FixedPoint {
  int64_t rows, in;
  int32_t digits;
  int64_t run;             // inputs that a kernel takes together: blocks are filled up to whole runs
  int64_t per_byte;        // codes in a byte, which decide the order of a run; 1 keeps the inputs' own
  int64_t group_size;      // inputs that share a scale of the weights
  int64_t block;           // inputs that share a scale of the activations; blocks do not cross groups
  int64_t blocks, padded;  // blocks of a row; bytes from a digit of a row to the next
  int8_t* digit_rows;      // [rows, digits, padded], digits from the lowest
  float* block_scales;     // [rows, blocks]
  float* block_sums;       // [rows, blocks]: of the activations themselves
};

// Sets the sizes, and returns the bytes of scratch that the arrays take.
inline int64_t Arrange(FixedPoint* p) {
  p->block = p->group_size < kMaxBlock ? p->group_size : kMaxBlock;
  const int64_t groups = p->in / p->group_size, whole = p->group_size / p->block, rest = p->group_size % p->block;
  const int64_t block = (p->block + p->run - 1) / p->run * p->run, last = (rest + p->run - 1) / p->run * p->run;
  p->blocks = groups * (whole + (rest != 0));
  p->padded = OddLines(groups * (whole * block + last));
  return p->rows * p->digits * p->padded + 8 * p->rows * p->blocks;
}

inline void Place(FixedPoint* p, uint8_t* scratch) {
  p->digit_rows = reinterpret_cast<int8_t*>(scratch);
  p->block_scales = reinterpret_cast<float*>(scratch + p->rows * p->digits * p->padded);
  p->block_sums = p->block_scales + p->rows * p->blocks;
}

// A template of the vectors S for the sake of its name alone: see quant_kernel.h. Compilers vectorise these loops.
template <class S>
struct ToFixedPoint {
  // Row `row` of `x`, `[rows, in]`.
  static void Digits(const FixedPoint& p, const float* x, int64_t row) {
    const float* source = x + row * p.in;
    int8_t* digits = p.digit_rows + row * p.digits * p.padded;
    int64_t block = 0, at = 0;
    for (int64_t start = 0; start < p.in; ++block) {
      const int64_t end_of_group = (start / p.group_size + 1) * p.group_size;
      const int64_t size = Min(p.block, Min(end_of_group, p.in) - start);
      DigitsOfBlock(p, source + start, size, digits + at, p.block_scales + row * p.blocks + block,
                    p.block_sums + row * p.blocks + block);
      at += RoundUp(size, p.run);
      start += size;
    }
  }

  static void DigitsOfBlock(const FixedPoint& p, const float* x, int64_t size, int8_t* out, float* scale,
                            float* sum) {
    alignas(64) int32_t fixed[kMaxBlock + 64];
    const int64_t filled = RoundUp(size, p.run);
    const float largest = MaxAbs(x, size);
    // 127 in every digit; less where the rounding of the product itself could reach beyond.
    const float top = p.digits == 1 ? 127.0f : p.digits == 2 ? 32639.0f : 8355000.0f;
    // A block with something that is no number gives no number; below 1e-30 the inverse would not be one.
    const bool finite = largest <= 3.4028235e38f;
    const bool empty = !finite || largest < 1e-30f;
    *scale = finite ? (empty ? 0.0f : largest / top) : __builtin_nanf("");
    const int64_t total = ToFixed(x, size, empty ? 0.0f : top / largest, fixed);
    *sum = *scale * static_cast<float>(total);
    for (int64_t i = size; i < filled; ++i) fixed[i] = 0;
    if (p.per_byte == 1) return SplitDigits(p, fixed, filled, out);
    // Byte r of a run of codes holds inputs r * per_byte + s: quad s of the panel is made of field s of its four bytes.
    alignas(64) int32_t ordered[kMaxBlock + 64];
    for (int64_t start = 0; start < filled; start += p.run) {
      for (int64_t s = 0; s < p.per_byte; ++s) {
        for (int64_t r = 0; r < 4; ++r) ordered[start + 4 * s + r] = fixed[start + r * p.per_byte + s];
      }
    }
    SplitDigits(p, ordered, filled, out);
  }

  // The largest magnitude; more than any number where there is a NaN, since bits of magnitudes are in their order.
  static float MaxAbs(const float* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float value;
    std::memcpy(&value, &most, 4);
    return value;
  }

  // Rounds `x * factor`; returns the sum.
  static int64_t ToFixed(const float* x, int64_t n, float factor, int32_t* fixed) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float value = x[i] * factor;
      fixed[i] = factor == 0.0f ? 0 : static_cast<int32_t>(value + (value < 0.0f ? -0.5f : 0.5f));
      total += fixed[i];
    }
    return total;
  }

  // Signed bytes in base 256, the lowest first.
  static void SplitDigits(const FixedPoint& p, int32_t* fixed, int64_t n, int8_t* out) {
    for (int d = 0; d < p.digits; ++d) {
      int8_t* to = out + d * p.padded;
      for (int64_t i = 0; i < n; ++i) {
        const int8_t digit = static_cast<int8_t>(static_cast<uint8_t>(fixed[i]));
        to[i] = digit;
        fixed[i] = (fixed[i] - digit) >> 8;
      }
    }
  }

  static int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
};

}  // namespace effjax
