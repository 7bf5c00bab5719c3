// The XLA handler of `codebook_matmul`: checks every shape, chooses the variant, and splits the columns over the threads.
#include "codebook_matmul.h"

#include <string>

#include "cpu.h"
#include "threads.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace effjax {
namespace {

ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("codebook_matmul: " + what); }

ffi::Error CodebookMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes,
                          ffi::Buffer<ffi::F32> tables, ffi::Buffer<ffi::F32> scales, int64_t bits, int64_t variant, int64_t tile,
                          ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> scratch) {
  CodebookProblem p = {};
  if (x.dimensions().size() != 2 || codes.dimensions().size() != 2 || tables.dimensions().size() != 3 ||
      scales.dimensions().size() != 2 || y->dimensions().size() != 2) {
    return Bad("x, codes, scales and y must be matrices, and tables three-dimensional");
  }
  if (bits < 1 || bits > 8) return Bad("bits must be 1 to 8, found " + std::to_string(bits));
  p.rows = x.dimensions()[0];
  p.in = x.dimensions()[1];
  p.out = codes.dimensions()[1];
  p.bits = static_cast<int32_t>(bits);
  if (p.rows == 0 || p.out == 0) return ffi::Error::Success();
  if (p.in == 0 || codes.dimensions()[0] != (p.in * bits + 7) / 8) {
    return Bad("codes have not the rows that the inputs need");
  }
  if (y->dimensions()[0] != p.rows || y->dimensions()[1] != p.out) return Bad("x, codes and y do not fit together");
  const CodebookKernel* kernel = ChooseKernel(variant, kCodebookPortable, kCodebookAvx2, kCodebookAvx512);
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "codebook_matmul: variant " + std::to_string(variant) + " does not run on this processor");
  }
  const int64_t fields = FieldsOf(p.bits), chunk = kernel->lanes * fields;

  const int64_t in_groups = tables.dimensions()[0];
  p.out_groups = tables.dimensions()[1];
  p.entries = tables.dimensions()[2];
  if (in_groups == 0 || p.out_groups == 0 || p.in % in_groups != 0 || p.out % p.out_groups != 0) {
    return Bad("the tables do not divide the matrix");
  }
  if (p.entries < 1 || p.entries > (int64_t{1} << bits)) return Bad("a table has more entries than codes can name");
  p.table_inputs = p.in / in_groups;
  p.table_outputs = p.out / p.out_groups;
  if (in_groups > 1 && p.table_inputs % chunk != 0) {
    return Bad("tables of " + std::to_string(p.table_inputs) + " inputs are no whole chunks of " + std::to_string(chunk));
  }
  p.group_size = p.in;
  if (scales.element_count() != 0) {
    const int64_t groups = scales.dimensions()[0];
    if (p.in % groups != 0 || scales.dimensions()[1] != p.out) return Bad("the scales do not divide the matrix");
    p.group_size = p.in / groups;
    if (groups > 1 && p.group_size % fields != 0) {
      return Bad("groups of " + std::to_string(p.group_size) + " are no whole words of " + std::to_string(fields));
    }
    p.scales = scales.typed_data();
  }
  if (const char* error = TileError(tile, p.out, true)) return Bad(error);
  if (tile == 1 && 8 % bits != 0) return Bad("codes that cross bytes cannot lie column by column");
  p.tile = tile;
  p.codes = RowsOf(codes.typed_data(), codes.dimensions()[0], p.out, tile);
  p.tables = tables.typed_data();
  p.y = y->typed_data();
  p.chunks = (p.in + chunk - 1) / chunk;
  if (p.rows == 1 && static_cast<int64_t>(scratch->element_count()) < p.chunks * chunk) {
    return Bad("the scratch buffer is too small");
  }
  p.ordered = scratch->typed_data();

  p.x = x.typed_data();
  if (p.rows == 1) kernel->order(p);
  ParallelColumns(pool, p.rows * p.in, p.out, [&](int64_t begin, int64_t end) { kernel->columns(p, begin, end); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxCodebookMatmul(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxCodebookMatmul, effjax::CodebookMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("variant")
                                  .Attr<int64_t>("tile")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
