// The variants of a kernel by number, and whether this processor runs them; the names are in `variants.py`.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace effjax {

enum Variant : int64_t { kAuto = 0, kPortable = 1, kAvx2 = 2, kAvx512 = 3, kI8mm = 4 };

inline bool HasAvx512() {
  return HasFeature("avx512f") && HasFeature("avx512bw") && HasFeature("avx512vl") && HasFeature("avx512dq") &&
         HasFeature("avx512vnni") && HasFeature("avx512vbmi") && HasFeature("f16c");
}
inline bool HasAvx2() { return HasFeature("avx2") && HasFeature("fma") && HasFeature("f16c"); }
inline bool HasI8mm() { return HasFeature("i8mm"); }

}  // namespace effjax
