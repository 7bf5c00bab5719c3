// The XLA handler of `quant_matmul`: checks every shape, chooses the variant, and splits the columns over the threads.
#include "quant_matmul.h"

#include <string>

#include "cpu.h"
#include "threads.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace effjax {
namespace {

// Null when the variant is unknown, was not built, or this processor cannot run it.
ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("quant_matmul: " + what); }

bool FloatType(ffi::DataType type, ScaleType* found) {
  switch (type) {
    case ffi::DataType::F32: *found = kFloat32; return true;
    case ffi::DataType::F16: *found = kFloat16; return true;
    case ffi::DataType::BF16: *found = kBfloat16; return true;
    default: return false;
  }
}

ffi::Error QuantMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales,
                       ffi::AnyBuffer zeros, int64_t bits, int64_t digits, int64_t variant, int64_t tile,
                       ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::U8> scratch) {
  QuantProblem p = {};
  if (x.dimensions().size() != 2 || codes.dimensions().size() != 2 || scales.dimensions().size() != 2 ||
      zeros.dimensions().size() != 2 || y->dimensions().size() != 2) {
    return Bad("x, codes, scales, zeros and y must be matrices");
  }
  if (bits < 1 || bits > 8) return Bad("bits must be 1 to 8, found " + std::to_string(bits));
  if (digits < 1 || digits > 3) return Bad("digits must be 1 to 3, found " + std::to_string(digits));
  p.x.rows = x.dimensions()[0];
  p.x.in = x.dimensions()[1];
  p.out = codes.dimensions()[1];
  p.bits = static_cast<int32_t>(bits);
  p.x.digits = static_cast<int32_t>(digits);
  const int64_t groups = scales.dimensions()[0];
  if (p.x.rows == 0 || p.out == 0) return ffi::Error::Success();
  if (p.x.in == 0 || groups == 0 || p.x.in % groups != 0) return Bad("the groups must divide the inputs");
  p.x.group_size = p.x.in / groups;
  if (codes.dimensions()[0] != (p.x.in * bits + 7) / 8) return Bad("codes have not the rows that the inputs need");
  if (scales.dimensions()[1] != p.out || y->dimensions()[0] != p.x.rows || y->dimensions()[1] != p.out) {
    return Bad("x, codes, scales and y do not fit together");
  }
  if (groups > 1 && p.x.group_size % RunOf(p.bits) != 0) {
    return Bad("groups of " + std::to_string(p.x.group_size) + " are no whole runs of " + std::to_string(RunOf(p.bits)));
  }
  if (!FloatType(scales.element_type(), &p.scale_type)) return Bad("scales must be float32, float16 or bfloat16");
  if (zeros.element_count() == 0) {
    p.zero_kind = kCentre;
    p.centre = bits == 1 ? 0.5f : static_cast<float>(1 << (bits - 1));
  } else if (zeros.element_type() == ffi::DataType::U8) {
    p.zero_kind = kPacked;
    if (zeros.dimensions()[0] != (groups * bits + 7) / 8 || zeros.dimensions()[1] != p.out) {
      return Bad("packed zero points have not the shape that the groups need");
    }
  } else {
    p.zero_kind = kReal;
    if (!FloatType(zeros.element_type(), &p.zero_type)) return Bad("zeros must be packed in uint8, or floating");
    if (zeros.dimensions()[0] != groups || zeros.dimensions()[1] != p.out) return Bad("zeros must be one a scale");
  }
  if (const char* error = TileError(tile, p.out, false)) return Bad(error);
  p.tiled = tile == 64;
  p.codes = RowsOf(codes.typed_data(), codes.dimensions()[0], p.out, tile);
  p.scales = scales.untyped_data();
  p.zeros = zeros.untyped_data();
  p.y = y->typed_data();

  p.x.run = RunOf(p.bits);
  p.x.per_byte = 8 % bits == 0 ? 8 / bits : 1;
  if (static_cast<int64_t>(scratch->element_count()) < Arrange(&p.x)) return Bad("the scratch buffer is too small");
  Place(&p.x, scratch->typed_data());

  const QuantKernel* kernel = ChooseKernel(variant, kQuantPortable, kQuantAvx2, kQuantAvx512, kQuantI8mm);
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "quant_matmul: variant " + std::to_string(variant) + " does not run on this processor");
  }
  const float* input = x.typed_data();
  ParallelRows(pool, p.x.rows, p.x.in, [&](int64_t row) { kernel->digits(p.x, input, row); });
  ParallelColumns(pool, p.x.rows * p.x.in, p.out, [&](int64_t begin, int64_t end) { kernel->columns(p, begin, end); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxQuantMatmul(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxQuantMatmul, effjax::QuantMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("digits")
                                  .Attr<int64_t>("variant")
                                  .Attr<int64_t>("tile")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());
