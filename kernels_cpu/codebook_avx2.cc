// `codebook_matmul` for AVX2: a table of 16 values is two registers.
#include "codebook_matmul.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "codebook_kernel.h"
#include "simd_avx2.h"

namespace effjax {
namespace {

using Kernel = Lookup<Avx2>;
constexpr CodebookKernel kKernel = {Kernel::kLanes, Kernel::Order, Kernel::Columns};

}  // namespace

const CodebookKernel* const kCodebookAvx2 = &kKernel;

}  // namespace effjax
#else
namespace effjax {
const CodebookKernel* const kCodebookAvx2 = nullptr;
}
#endif
