// The chosen neurons of an MLP for AVX2.
#include "sparse_mlp.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "sparse_mlp_kernel.h"

namespace effjax {

const SparseMlpKernel* const kSparseMlpAvx2 = &kKernel;

}  // namespace effjax
#else
namespace effjax {

const SparseMlpKernel* const kSparseMlpAvx2 = nullptr;

}  // namespace effjax
#endif
