// `quant_matmul` for AVX2: bytes are widened to 16 bits, since the byte products of AVX2 saturate.
#include "quant_matmul.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "quant_kernel.h"
#include "simd_avx2.h"

namespace effjax {
namespace {

constexpr QuantKernel kKernel = {ToFixedPoint<Avx2>::Digits, Quant<Avx2>::Columns};

}  // namespace

const QuantKernel* const kQuantAvx2 = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const QuantKernel* const kQuantAvx2 = nullptr;
}
#endif
