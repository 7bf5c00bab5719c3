// `quant_matmul` for AVX-512 with VNNI: four products of bytes a lane in one instruction.
#include "quant_matmul.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "quant_kernel.h"
#include "simd_avx512.h"

namespace effjax {
namespace {

constexpr QuantKernel kKernel = {ToFixedPoint<Avx512>::Digits, Quant<Avx512>::Columns};

}  // namespace

const QuantKernel* const kQuantAvx512 = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const QuantKernel* const kQuantAvx512 = nullptr;
}
#endif
