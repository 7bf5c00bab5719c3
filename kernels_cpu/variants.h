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

// The kernel of a variant, of kAuto the fastest that this processor runs; null where it does not run. A kernel that was
// not compiled is null.
template <class Kernel>
const Kernel* ChooseKernel(int64_t variant, const Kernel* portable, const Kernel* avx2, const Kernel* avx512,
                           const Kernel* i8mm = nullptr) {
  if (!HasAvx2()) avx2 = nullptr;
  if (!HasAvx512()) avx512 = nullptr;
  if (!HasI8mm()) i8mm = nullptr;
  switch (variant) {
    case kAuto: return avx512 ? avx512 : avx2 ? avx2 : i8mm ? i8mm : portable;
    case kPortable: return portable;
    case kAvx2: return avx2;
    case kAvx512: return avx512;
    case kI8mm: return i8mm;
    default: return nullptr;
  }
}

}  // namespace effjax
