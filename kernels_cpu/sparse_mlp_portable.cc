// The chosen neurons of an MLP for the plain architecture.
#include "sparse_mlp_kernel.h"

namespace effjax {

const SparseMlpKernel* const kSparseMlpPortable = &kKernel;

}  // namespace effjax
