// The query of label tables for AVX-512.
#include "label_top_k.h"

#if defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "label_top_k_kernel.h"

namespace effjax {

const LabelKernel* const kLabelAvx512 = &kKernel;

}  // namespace effjax
#else
namespace effjax {

const LabelKernel* const kLabelAvx512 = nullptr;

}  // namespace effjax
#endif
