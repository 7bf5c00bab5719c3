// What the kernels of NoMAD compute, and the table of their variants.
//
// A key is `subs` codes of 4 bits; its product with a query is `sum_s table[s][code_s] / scale + bias`. Codes lie in blocks
// of 32 keys [subs][16]: low nibbles are the first 16 keys, high nibbles the others. A row is a sequence and a key head,
// whose `group` query heads share its keys.
#pragma once

#include <cstddef>
#include <cstdint>

namespace effjax {

constexpr int64_t kBlockKeys = 32, kBlockBytes = 16, kEntries = 16;
constexpr int64_t kMostSubs = 257;   // 257 * 255 is the largest number of 16 bits
constexpr int64_t kChunkKeys = 128;  // whose logits are made before their values are read

struct LookupProblem {
  int64_t rows, group, blocks, subs;
  const uint8_t* tables;  // [rows, group, subs, 16]
  const float* scales;    // [rows, group]
  const float* biases;    // [rows, group]
  const uint8_t* codes;   // [rows, blocks, subs, 16]
  float* logits;          // [rows, group, blocks * 32]
};

enum ValueType : int32_t { kValueFloat32 = 0, kValueFloat16 = 1, kValueBfloat16 = 2 };

struct AttendProblem {
  int64_t rows, kv_heads, group, head_dim, subs, d_sub, blocks, slots, value_dim;
  const float* q;           // [rows, group, head_dim]
  const uint8_t* codes;     // [rows, blocks, subs, 16]
  const float* recent;      // [rows, 32, head_dim]: the keys of the block that is not full
  const void* values;       // [rows, slots, value_dim]
  ValueType value_type;
  const int32_t* lengths;   // [rows]
  const float* books;       // [kv_heads, subs, 16, d_sub]
  const uint8_t* seen;      // [rows, slots], or null
  float* out;               // [rows, out_stride]: [group, value_dim], then [slots] where `received`
  int64_t out_stride;
  bool received;
  float* scratch;           // [rows, ScratchFloats]
};

// Floats between the logits of two heads of a group.
inline int64_t LogitStride(int64_t slots, bool received) {
  return received ? (slots + kChunkKeys - 1) / kChunkKeys * kChunkKeys : kChunkKeys;
}

// Of one row: tables, four numbers a head, logits. As `scratch_floats` in nomad.py.
inline int64_t ScratchFloats(const AttendProblem& p) {
  return p.group * (p.subs * kEntries / 4 + 4 + LogitStride(p.slots, p.received));
}

struct NomadKernel {
  void (*lookup)(const LookupProblem&, int64_t row);
  void (*attend)(const AttendProblem&, int64_t row);
};

// Null where the library was built without them. Each is compiled in a file of its own for its instruction set.
extern const NomadKernel* const kNomadAvx512;
extern const NomadKernel* const kNomadAvx2;
extern const NomadKernel* const kNomadPortable;

}  // namespace effjax
