// The XLA handler of `nm_matmul`: checks every shape, and splits the columns over the threads.
#include "nm_matmul.h"

#include <string>

#include "threads.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace effjax {
namespace {

ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("nm_matmul: " + what); }

ffi::Error NmMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes,
                    ffi::Buffer<ffi::U8> indices, ffi::Buffer<ffi::F32> scales, int64_t digits, int64_t tile,
                    ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::U8> scratch) {
  NmProblem p = {};
  if (x.dimensions().size() != 2 || codes.dimensions().size() != 2 || indices.dimensions().size() != 2 ||
      scales.dimensions().size() != 2 || y->dimensions().size() != 2) {
    return Bad("x, codes, indices, scales and y must be matrices");
  }
  if (digits < 1 || digits > 3) return Bad("digits must be 1 to 3, found " + std::to_string(digits));
  p.x.rows = x.dimensions()[0];
  p.x.in = x.dimensions()[1];
  p.x.digits = static_cast<int32_t>(digits);
  p.out = codes.dimensions()[1];
  const int64_t groups = scales.dimensions()[0];
  if (p.x.rows == 0 || p.out == 0) return ffi::Error::Success();
  if (p.x.in == 0 || p.x.in % 16 != 0 || groups == 0 || p.x.in % groups != 0 || p.x.in / groups % 16 != 0) {
    return Bad("inputs and groups must be whole runs of 16");
  }
  if (codes.dimensions()[0] != p.x.in / 4 || indices.dimensions()[0] != p.x.in / 8 ||
      indices.dimensions()[1] != p.out || scales.dimensions()[1] != p.out || y->dimensions()[0] != p.x.rows ||
      y->dimensions()[1] != p.out) {
    return Bad("x, codes, indices, scales and y do not fit together");
  }
  p.x.group_size = p.x.in / groups;
  p.x.run = 16;
  p.x.per_byte = 1;
  if (static_cast<int64_t>(scratch->element_count()) < Arrange(&p.x)) return Bad("the scratch buffer is too small");
  Place(&p.x, scratch->typed_data());
  if (const char* error = TileError(tile, p.out, false)) return Bad(error);
  p.tiled = tile == 64;
  p.codes = RowsOf(codes.typed_data(), codes.dimensions()[0], p.out, tile);
  p.indices = RowsOf(indices.typed_data(), indices.dimensions()[0], p.out, tile);
  p.scales = scales.typed_data();
  p.y = y->typed_data();
  const NmKernel* kernel = HasAvx512() ? kNmAvx512 : nullptr;
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "nm_matmul: this processor lacks AVX-512 with VNNI and VBMI");
  }
  const float* input = x.typed_data();
  ParallelRows(pool, p.x.rows, p.x.in, [&](int64_t row) { kernel->digits(p.x, input, row); });
  ParallelColumns(pool, p.x.rows * p.x.in, p.out, [&](int64_t begin, int64_t end) { kernel->columns(p, begin, end); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxNmMatmul(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxNmMatmul, effjax::NmMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("digits")
                                  .Attr<int64_t>("tile")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());
