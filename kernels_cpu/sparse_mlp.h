// What the kernel of `sparse_mlp` computes, and the table of its variants.
//
// y[b] = sum over chosen neurons j of act(up[j] . x[b] + up_bias[j] - shift) * down[j]; with a gate
// act(gate[j] . x[b] + gate_bias[j] - shift) * (up[j] . x[b] + up_bias[j]) takes the place of the first factor.
//
// A row of each matrix belongs to one neuron, so that only chosen ones are read.
#pragma once

#include <cstdint>

namespace effjax {

enum RowType : int32_t { kRowFloat32 = 0, kRowBfloat16 = 1, kRowInt8 = 2, kRowInt4 = 3 };
enum Activation : int32_t { kRelu = 0, kSilu = 1, kGelu = 2 };

constexpr int64_t kCodeRun = 32;  // numbers of a row of codes that are unpacked together; RUN in effjax/ops/neurons.py

// Rows of numbers, or of unsigned codes: number = scale * (code - zero).
struct NeuronRows {
  const uint8_t* data;
  int64_t row_bytes, width;
  const float* scales;  // of codes: [neurons, groups] where by_neuron, else [groups, width]
  const float* zeros;   // likewise
  int64_t groups, group_size;  // of numbers of a row where by_neuron, else of neurons
  bool by_neuron;
};

struct SparseMlpProblem {
  int64_t batch, in, out, neurons, count;
  int64_t padded_in, padded_out;  // whole runs
  RowType type;
  Activation activation;
  float shift;  // of what the activation takes
  bool gated;
  const int32_t* chosen;  // [count]; what is outside [0, neurons) is passed over
  NeuronRows up, gate, down;
  const float* up_bias;    // or null
  const float* gate_bias;  // or null
  const float* x;          // [batch, padded_in], zeros behind the inputs
  uint8_t* used;           // [neurons], zeros: becomes 1 where a neuron is not zero for some input; or null
};

struct SparseMlpKernel {
  // Adds what the chosen neurons [begin, end) give to sums [batch, padded_out].
  void (*neurons)(const SparseMlpProblem&, int64_t begin, int64_t end, float* sums);
};

// Null where the library was built without them. Each is compiled in a file of its own for its instruction set.
extern const SparseMlpKernel* const kSparseMlpAvx512;
extern const SparseMlpKernel* const kSparseMlpAvx2;
extern const SparseMlpKernel* const kSparseMlpPortable;

}  // namespace effjax
