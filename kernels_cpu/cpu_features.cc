// Lists the vector features of this processor, and the FFI version this library was compiled for.
#include <cstring>
#include <string>

#include "cpu.h"
#include "xla/ffi/api/c_api.h"

#if defined(EFFJAX_X86)
#include <cpuid.h>
#endif

#if defined(EFFJAX_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace effjax {
namespace {

#if defined(EFFJAX_X86)
// The builtin does not know this name in every compiler; bit 29 of ecx in leaf 1, under the same saving of registers as avx.
bool HasF16c() {
  unsigned eax, ebx, ecx, edx;
  return __builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}
#endif

// "popcnt,avx2,..." in a fixed order.
std::string DetectFeatures() {
  std::string names;
  auto add = [&names](const char* name, bool present) {
    if (!present) return;
    if (!names.empty()) names += ',';
    names += name;
  };
#if defined(EFFJAX_X86)
  // The builtin takes literals only, and knows whether the system saves the wide registers.
  __builtin_cpu_init();
  add("popcnt", __builtin_cpu_supports("popcnt"));
  add("sse4.2", __builtin_cpu_supports("sse4.2"));
  add("avx", __builtin_cpu_supports("avx"));
  add("avx2", __builtin_cpu_supports("avx2"));
  add("fma", __builtin_cpu_supports("fma"));
  add("f16c", HasF16c());
  add("bmi2", __builtin_cpu_supports("bmi2"));
  add("avx512f", __builtin_cpu_supports("avx512f"));
  add("avx512dq", __builtin_cpu_supports("avx512dq"));
  add("avx512bw", __builtin_cpu_supports("avx512bw"));
  add("avx512vl", __builtin_cpu_supports("avx512vl"));
  add("avx512vbmi", __builtin_cpu_supports("avx512vbmi"));
  add("avx512vnni", __builtin_cpu_supports("avx512vnni"));
#elif defined(EFFJAX_ARM64)
  add("neon", true);  // part of the architecture
#if defined(__linux__)
  const unsigned long caps = getauxval(AT_HWCAP);
#if defined(HWCAP_ASIMDDP)
  add("dotprod", (caps & HWCAP_ASIMDDP) != 0);
#endif
#if defined(HWCAP_SVE)
  add("sve", (caps & HWCAP_SVE) != 0);
#endif
#if defined(HWCAP2_I8MM)
  add("i8mm", (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0);
#endif
  (void)caps;
#elif defined(__ARM_FEATURE_DOTPROD)
  add("dotprod", true);
#endif
#endif
  return names;
}

const std::string& Features() {
  static const std::string features = DetectFeatures();
  return features;
}

}  // namespace

bool HasFeature(const char* name) {
  // Compares whole names: "avx" must not be found inside "avx2".
  return ("," + Features() + ",").find("," + std::string(name) + ",") != std::string::npos;
}

}  // namespace effjax

EFFJAX_EXPORT const char* EffjaxCpuFeatures() { return effjax::Features().c_str(); }

// major * 65536 + minor of the XLA FFI headers at compile time.
EFFJAX_EXPORT int32_t EffjaxFfiApiVersion() { return XLA_FFI_API_MAJOR * 65536 + XLA_FFI_API_MINOR; }
