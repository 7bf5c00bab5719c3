// Counts the set bits of each row of bytes: the toolchain's self check, and the density of a packed mask.
#include <cstring>
#include <limits>
#include <string>

#include "cpu.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Values of the attribute `variant`; the names are in popcount.py.
enum Variant : int64_t { kAuto = 0, kPortable = 1, kPopcnt = 2 };

uint64_t CountPortable(const uint8_t* bytes, size_t n) {
  uint64_t total = 0;
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t v;
    std::memcpy(&v, bytes + i, 8);  // rows may start at any byte
    v -= (v >> 1) & 0x5555555555555555u;
    v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
    v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    total += (v * 0x0101010101010101u) >> 56;
  }
  for (; i < n; ++i) {
    for (unsigned v = bytes[i]; v != 0; v &= v - 1) ++total;
  }
  return total;
}

#if defined(EFFJAX_X86)
EFFJAX_TARGET("popcnt")
uint64_t CountPopcnt(const uint8_t* bytes, size_t n) {
  uint64_t total = 0;
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t v;
    std::memcpy(&v, bytes + i, 8);
    total += static_cast<uint64_t>(__builtin_popcountll(v));
  }
  for (; i < n; ++i) total += static_cast<uint64_t>(__builtin_popcount(bytes[i]));
  return total;
}
#endif

using CountFn = uint64_t (*)(const uint8_t*, size_t);

// Null when the variant is unknown or this processor cannot run it.
CountFn Choose(int64_t variant) {
#if defined(EFFJAX_X86)
  if (variant != kPortable && effjax::HasFeature("popcnt")) {
    return variant == kAuto || variant == kPopcnt ? CountPopcnt : nullptr;
  }
#endif
  return variant == kAuto || variant == kPortable ? CountPortable : nullptr;
}

ffi::Error Popcount(ffi::Buffer<ffi::U8> bytes, int64_t variant, ffi::ResultBuffer<ffi::U32> counts) {
  const auto dims = bytes.dimensions();
  if (dims.size() == 0) return ffi::Error::InvalidArgument("popcount: bytes must have at least one axis");
  const size_t row = static_cast<size_t>(dims.back());
  const size_t rows = counts->element_count();
  if (rows * row != bytes.element_count()) {
    return ffi::Error::InvalidArgument("popcount: counts must have one element for each row of bytes");
  }
  if (row > std::numeric_limits<uint32_t>::max() / 8) {
    return ffi::Error::InvalidArgument("popcount: a row of " + std::to_string(row) + " bytes overflows uint32");
  }
  const CountFn count = Choose(variant);
  if (count == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "popcount: variant " + std::to_string(variant) + " does not run on this processor");
  }
  const uint8_t* in = bytes.typed_data();
  uint32_t* out = counts->typed_data();
  for (size_t r = 0; r < rows; ++r) out[r] = static_cast<uint32_t>(count(in + r * row, row));
  return ffi::Error::Success();
}

}  // namespace

EFFJAX_EXPORT XLA_FFI_Error* EffjaxPopcount(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxPopcount, Popcount,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("variant")
                                  .Ret<ffi::Buffer<ffi::U32>>());
