// The query of a Representer Sketch for the plain architecture.
#include "representer_kernel.h"

namespace effjax {

const RepresenterKernel* const kRepresenterPortable = &kKernel;

}  // namespace effjax
