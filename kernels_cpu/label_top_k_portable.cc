// The query of label tables for the plain architecture.
#include "label_top_k_kernel.h"

namespace effjax {

const LabelKernel* const kLabelPortable = &kKernel;

}  // namespace effjax
