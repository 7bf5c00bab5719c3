// `codebook_matmul` in plain C++.
#include "codebook_kernel.h"
#include "simd_portable.h"

namespace effjax {
namespace {

using Kernel = Lookup<Portable>;
constexpr CodebookKernel kKernel = {Kernel::kLanes, Kernel::Order, Kernel::Columns};

}  // namespace

const CodebookKernel* const kCodebookPortable = &kKernel;

}  // namespace effjax
