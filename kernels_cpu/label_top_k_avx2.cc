// The query of label tables for AVX2.
#include "label_top_k.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "label_top_k_kernel.h"

namespace effjax {

const LabelKernel* const kLabelAvx2 = &kKernel;

}  // namespace effjax
#else
namespace effjax {

const LabelKernel* const kLabelAvx2 = nullptr;

}  // namespace effjax
#endif
