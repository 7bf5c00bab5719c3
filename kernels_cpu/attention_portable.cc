// `decode_attention` in plain C++, for the vectors that every processor of an architecture has.
#define EFFJAX_LANES 4
#include "attention_kernel.h"

namespace effjax {
const AttentionKernel* const kAttentionPortable = &kKernel;
}
