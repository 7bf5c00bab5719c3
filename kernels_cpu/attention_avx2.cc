// `decode_attention` for AVX2.
#include "attention.h"

#if defined(__AVX2__) && defined(__FMA__)
#define EFFJAX_LANES 8
#include "attention_kernel.h"

namespace effjax {
const AttentionKernel* const kAttentionAvx2 = &kKernel;
}
#else
namespace effjax {
const AttentionKernel* const kAttentionAvx2 = nullptr;
}
#endif
