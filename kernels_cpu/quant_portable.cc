// `quant_matmul` in plain C++ over 16 bytes at a time, which compilers turn into SSE2 or NEON.
#include "quant_kernel.h"
#include "simd_portable.h"

namespace effjax {
namespace {

constexpr QuantKernel kKernel = {ToFixedPoint<Portable>::Digits, Quant<Portable>::Columns};

}  // namespace

const QuantKernel* const kQuantPortable = &kKernel;

}  // namespace effjax
