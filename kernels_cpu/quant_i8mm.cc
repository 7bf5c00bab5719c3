// `quant_matmul` for 64-bit ARM with the 8-bit matrix extension: products of unsigned by signed bytes.
#include "quant_matmul.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "quant_kernel.h"
#include "simd_i8mm.h"

namespace effjax {
namespace {

constexpr QuantKernel kKernel = {ToFixedPoint<I8mm>::Digits, Quant<I8mm>::Columns};

}  // namespace

const QuantKernel* const kQuantI8mm = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const QuantKernel* const kQuantI8mm = nullptr;
}
#endif
