// `decode_attention` for AVX-512.
#include "attention.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define EFFJAX_LANES 16
#include "attention_kernel.h"

namespace effjax {
const AttentionKernel* const kAttentionAvx512 = &kKernel;
}
#else
namespace effjax {
const AttentionKernel* const kAttentionAvx512 = nullptr;
}
#endif
