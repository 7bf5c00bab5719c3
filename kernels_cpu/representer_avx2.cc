// The query of a Representer Sketch for AVX2.
#include "representer.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "representer_kernel.h"

namespace effjax {

const RepresenterKernel* const kRepresenterAvx2 = &kKernel;

}  // namespace effjax
#else
namespace effjax {

const RepresenterKernel* const kRepresenterAvx2 = nullptr;

}  // namespace effjax
#endif
