// The XLA handler of `sparse_mlp`: checks every shape, chooses the variant, splits the chosen neurons over the threads.
#include "sparse_mlp.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cpu.h"
#include "threads.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace effjax {
namespace {

constexpr int64_t kParts = 16;  // at most, each with sums of its own; a fixed number, so that threads change no result

// Null when the variant is unknown, was not built, or this processor cannot run it.
ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("sparse_mlp: " + what); }

int64_t Whole(int64_t n) { return (n + kCodeRun - 1) / kCodeRun * kCodeRun; }

// Rows of `width` numbers, from a matrix of numbers or of packed codes with their scales; false where they do not fit.
bool Fill(ffi::AnyBuffer& data, ffi::Buffer<ffi::F32>& scales, ffi::Buffer<ffi::F32>& zeros, int64_t neurons,
          int64_t width, RowType type, bool by_neuron, NeuronRows* to) {
  static constexpr int64_t kBits[] = {32, 16, 8, 4};
  static constexpr ffi::DataType kTypes[] = {ffi::DataType::F32, ffi::DataType::BF16, ffi::DataType::U8, ffi::DataType::U8};
  if (data.element_type() != kTypes[type] || data.dimensions().size() != 2 || data.dimensions()[0] != neurons) return false;
  const bool codes = type == kRowInt8 || type == kRowInt4;
  if (data.dimensions()[1] != (type == kRowInt4 ? width / 2 : width)) return false;
  to->data = static_cast<const uint8_t*>(data.untyped_data());
  to->row_bytes = width * kBits[type] / 8;
  to->width = width;
  to->by_neuron = by_neuron;
  if (!codes) return true;
  if (scales.dimensions().size() != 2 || zeros.dimensions().size() != 2) return false;
  for (int axis = 0; axis < 2; ++axis) {
    if (scales.dimensions()[axis] != zeros.dimensions()[axis]) return false;
  }
  to->groups = scales.dimensions()[by_neuron ? 1 : 0];
  const int64_t length = by_neuron ? width : neurons;
  if (scales.dimensions()[by_neuron ? 0 : 1] != (by_neuron ? neurons : width)) return false;
  if (width % kCodeRun != 0 || to->groups < 1 || length % to->groups != 0) return false;
  to->group_size = length / to->groups;
  to->scales = scales.typed_data();
  to->zeros = zeros.typed_data();
  return !by_neuron || to->group_size % kCodeRun == 0;
}

ffi::Error SparseMlp(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> chosen,
                     ffi::Buffer<ffi::S32> count, ffi::AnyBuffer up, ffi::Buffer<ffi::F32> up_scales,
                     ffi::Buffer<ffi::F32> up_zeros, ffi::AnyBuffer gate, ffi::Buffer<ffi::F32> gate_scales,
                     ffi::Buffer<ffi::F32> gate_zeros, ffi::AnyBuffer down, ffi::Buffer<ffi::F32> down_scales,
                     ffi::Buffer<ffi::F32> down_zeros, ffi::Buffer<ffi::F32> up_bias, ffi::Buffer<ffi::F32> gate_bias,
                     ffi::Buffer<ffi::F32> down_bias, int64_t type, int64_t activation, float shift, int64_t gated, int64_t by_neuron, int64_t variant,
                     ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::U8> used) {
  if (x.dimensions().size() != 2 || up.dimensions().size() != 2 || y->dimensions().size() != 2 ||
      chosen.dimensions().size() != 1 || count.element_count() != 1) {
    return Bad("x, up and y must be matrices, chosen a vector and count one number");
  }
  if (type < kRowFloat32 || type > kRowInt4) return Bad("unknown type " + std::to_string(type));
  if (activation < kRelu || activation > kGelu) return Bad("unknown activation " + std::to_string(activation));
  SparseMlpProblem p = {};
  p.batch = x.dimensions()[0];
  p.in = x.dimensions()[1];
  p.out = y->dimensions()[1];
  p.neurons = up.dimensions()[0];
  p.count = std::clamp<int64_t>(count.typed_data()[0], 0, chosen.dimensions()[0]);
  p.padded_in = Whole(p.in);
  p.padded_out = Whole(p.out);
  p.type = static_cast<RowType>(type);
  p.activation = static_cast<Activation>(activation);
  p.shift = shift;
  p.gated = gated != 0;
  p.chosen = chosen.typed_data();
  if (y->dimensions()[0] != p.batch) return Bad("x and the result have not the same rows");
  if (static_cast<int64_t>(used->element_count()) != p.neurons) return Bad("used has not a byte for every neuron");
  p.used = used->typed_data();
  std::memset(p.used, 0, static_cast<size_t>(p.neurons));
  if (!Fill(up, up_scales, up_zeros, p.neurons, p.in, p.type, true, &p.up)) return Bad("up does not fit x");
  if (p.gated && !Fill(gate, gate_scales, gate_zeros, p.neurons, p.in, p.type, true, &p.gate)) {
    return Bad("gate does not fit x");
  }
  if (!Fill(down, down_scales, down_zeros, p.neurons, p.out, p.type, by_neuron != 0, &p.down)) {
    return Bad("down does not fit the result");
  }
  const auto fits = [](ffi::Buffer<ffi::F32>& bias, int64_t size, const float** to) {
    *to = bias.element_count() == 0 ? nullptr : bias.typed_data();
    return *to == nullptr || static_cast<int64_t>(bias.element_count()) == size;
  };
  const float* last;
  if (!fits(up_bias, p.neurons, &p.up_bias) || !fits(gate_bias, p.neurons, &p.gate_bias) || !fits(down_bias, p.out, &last)) {
    return Bad("a bias does not fit");
  }
  const SparseMlpKernel* kernel = ChooseKernel(variant, kSparseMlpPortable, kSparseMlpAvx2, kSparseMlpAvx512);
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "sparse_mlp: variant " + std::to_string(variant) + " does not run on this processor");
  }
  std::vector<float> inputs(static_cast<size_t>(p.batch * p.padded_in));
  for (int64_t b = 0; b < p.batch; ++b) {
    std::memcpy(inputs.data() + b * p.padded_in, x.typed_data() + b * p.in, static_cast<size_t>(p.in) * 4);
  }
  p.x = inputs.data();
  const int64_t parts = std::clamp<int64_t>(p.count / 8, 1, kParts), each = (p.count + parts - 1) / parts;
  const int64_t size = p.batch * p.padded_out;
  std::vector<float> sums(static_cast<size_t>(parts * size));
  ParallelRows(pool, parts, each * (p.in + p.out) * std::max<int64_t>(p.batch, 1), [&](int64_t part) {
    kernel->neurons(p, part * each, std::min(p.count, (part + 1) * each), sums.data() + part * size);
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    float* to = y->typed_data() + b * p.out;
    const float* from = sums.data() + b * p.padded_out;
    if (last == nullptr) {
      std::copy(from, from + p.out, to);
    } else {
      for (int64_t o = 0; o < p.out; ++o) to[o] = last[o] + from[o];
    }
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t o = 0; o < p.out; ++o) to[o] += from[part * size + o];
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxSparseMlp(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxSparseMlp, effjax::SparseMlp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("type")
                                  .Attr<int64_t>("activation")
                                  .Attr<float>("shift")
                                  .Attr<int64_t>("gated")
                                  .Attr<int64_t>("by_neuron")
                                  .Attr<int64_t>("variant")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());
