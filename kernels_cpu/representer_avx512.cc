// The query of a Representer Sketch for AVX-512, which multiplies 64-bit numbers in vectors.
#include "representer.h"

#if defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "representer_kernel.h"

namespace effjax {

const RepresenterKernel* const kRepresenterAvx512 = &kKernel;

}  // namespace effjax
#else
namespace effjax {

const RepresenterKernel* const kRepresenterAvx512 = nullptr;

}  // namespace effjax
#endif
