// The chosen neurons of an MLP for AVX-512.
#include "sparse_mlp.h"

#if defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "sparse_mlp_kernel.h"

namespace effjax {

const SparseMlpKernel* const kSparseMlpAvx512 = &kKernel;

}  // namespace effjax
#else
namespace effjax {

const SparseMlpKernel* const kSparseMlpAvx512 = nullptr;

}  // namespace effjax
#endif
