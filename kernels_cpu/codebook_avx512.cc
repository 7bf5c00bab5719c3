// `codebook_matmul` for AVX-512: a table of 16 values is one register.
#include "codebook_matmul.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "codebook_kernel.h"
#include "simd_avx512.h"

namespace effjax {
namespace {

using Kernel = Lookup<Avx512>;
constexpr CodebookKernel kKernel = {Kernel::kLanes, Kernel::Order, Kernel::Columns};

}  // namespace

const CodebookKernel* const kCodebookAvx512 = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const CodebookKernel* const kCodebookAvx512 = nullptr;
}
#endif
