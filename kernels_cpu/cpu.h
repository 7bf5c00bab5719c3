// What the processor underneath can do, asked at run time: one library serves every machine of an architecture.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#define EFFJAX_X86 1
#elif defined(__aarch64__)
#define EFFJAX_ARM64 1
#endif

// Marks a function compiled for an instruction set that the rest of the library must not assume.
#define EFFJAX_TARGET(features) __attribute__((target(features)))

// Symbols that Python looks up; everything else stays private (-fvisibility=hidden).
#define EFFJAX_EXPORT extern "C" __attribute__((visibility("default")))

namespace effjax {

// Whether the processor (and the operating system) support the named feature; unknown names are not supported.
bool HasFeature(const char* name);

}  // namespace effjax
