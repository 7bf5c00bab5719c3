// The XLA handlers of NoMAD: check every shape, choose the variant, and split the rows over the threads.
#include "nomad.h"

#include <string>

#include "cpu.h"
#include "threads.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace effjax {
namespace {

// Null when the variant is unknown, was not built, or this processor cannot run it.
ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("nomad: " + what); }

ffi::Error NotHere(int64_t variant) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    "nomad: variant " + std::to_string(variant) + " does not run on this processor");
}

using Dims = ffi::Span<const int64_t>;

bool Is(Dims dims, std::initializer_list<int64_t> wanted) {
  return dims.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), dims.begin());
}

ffi::Error NomadLookup(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> tables, ffi::Buffer<ffi::F32> scales,
                       ffi::Buffer<ffi::F32> biases, ffi::Buffer<ffi::U8> codes, int64_t variant,
                       ffi::ResultBuffer<ffi::F32> logits) {
  LookupProblem p = {};
  if (tables.dimensions().size() != 4 || codes.dimensions().size() != 4) return Bad("tables and codes must have four axes");
  p.rows = tables.dimensions()[0];
  p.group = tables.dimensions()[1];
  p.subs = tables.dimensions()[2];
  p.blocks = codes.dimensions()[1];
  if (p.subs > kMostSubs) return Bad("sums of 16 bits hold 257 sub-quantizers, found " + std::to_string(p.subs));
  if (!Is(tables.dimensions(), {p.rows, p.group, p.subs, kEntries}) ||
      !Is(codes.dimensions(), {p.rows, p.blocks, p.subs, kBlockBytes}) || !Is(scales.dimensions(), {p.rows, p.group}) ||
      !Is(biases.dimensions(), {p.rows, p.group}) ||
      !Is(logits->dimensions(), {p.rows, p.group, p.blocks * kBlockKeys})) {
    return Bad("tables, scales, biases, codes and logits do not fit together");
  }
  p.tables = tables.typed_data();
  p.scales = scales.typed_data();
  p.biases = biases.typed_data();
  p.codes = codes.typed_data();
  p.logits = logits->typed_data();
  const NomadKernel* kernel = ChooseKernel(variant, kNomadPortable, kNomadAvx2, kNomadAvx512);
  if (kernel == nullptr) return NotHere(variant);
  ParallelRows(pool, p.rows, p.group * p.blocks * p.subs, [&](int64_t row) { kernel->lookup(p, row); });
  return ffi::Error::Success();
}

ffi::Error NomadAttend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::U8> codes,
                       ffi::Buffer<ffi::F32> recent, ffi::AnyBuffer values, ffi::Buffer<ffi::S32> lengths,
                       ffi::Buffer<ffi::F32> books, ffi::Buffer<ffi::PRED> seen, int64_t received, int64_t variant,
                       ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> scratch) {
  AttendProblem p = {};
  if (q.dimensions().size() != 4 || codes.dimensions().size() != 5 || values.dimensions().size() != 4 ||
      books.dimensions().size() != 4) {
    return Bad("q, values and books must have four axes, codes five");
  }
  const int64_t batch = q.dimensions()[0];
  p.kv_heads = q.dimensions()[1];
  p.rows = batch * p.kv_heads;
  p.group = q.dimensions()[2];
  p.head_dim = q.dimensions()[3];
  p.subs = books.dimensions()[1];
  p.d_sub = books.dimensions()[3];
  p.blocks = codes.dimensions()[2];
  p.slots = values.dimensions()[2];
  p.value_dim = values.dimensions()[3];
  p.received = received != 0;
  p.out_stride = p.group * p.value_dim + (p.received ? p.slots : 0);
  if (p.subs > kMostSubs) return Bad("sums of 16 bits hold 257 sub-quantizers, found " + std::to_string(p.subs));
  if (p.d_sub != 1 && p.d_sub != 2 && p.d_sub != 4) return Bad("d_sub must be 1, 2 or 4, found " + std::to_string(p.d_sub));
  if (p.head_dim != p.subs * p.d_sub || p.slots > p.blocks * kBlockKeys ||
      !Is(books.dimensions(), {p.kv_heads, p.subs, kEntries, p.d_sub}) ||
      !Is(codes.dimensions(), {batch, p.kv_heads, p.blocks, p.subs, kBlockBytes}) ||
      !Is(recent.dimensions(), {batch, p.kv_heads, kBlockKeys, p.head_dim}) ||
      !Is(values.dimensions(), {batch, p.kv_heads, p.slots, p.value_dim}) ||
      !Is(lengths.dimensions(), {batch, p.kv_heads}) || !Is(out->dimensions(), {batch, p.kv_heads, p.out_stride})) {
    return Bad("q, codes, recent keys, values, lengths, books and the result do not fit together");
  }
  if (seen.element_count() != 0 && !Is(seen.dimensions(), {batch, p.kv_heads, p.slots})) {
    return Bad("seen must be one a row and slot");
  }
  switch (values.element_type()) {
    case ffi::DataType::F32: p.value_type = kValueFloat32; break;
    case ffi::DataType::F16: p.value_type = kValueFloat16; break;
    case ffi::DataType::BF16: p.value_type = kValueBfloat16; break;
    default: return Bad("values must be float32, float16 or bfloat16");
  }
  if (static_cast<int64_t>(scratch->element_count()) < p.rows * ScratchFloats(p)) return Bad("the scratch buffer is too small");
  p.q = q.typed_data();
  p.codes = codes.typed_data();
  p.recent = recent.typed_data();
  p.values = values.untyped_data();
  p.lengths = lengths.typed_data();
  p.books = books.typed_data();
  p.seen = seen.element_count() == 0 ? nullptr : reinterpret_cast<const uint8_t*>(seen.typed_data());
  p.out = out->typed_data();
  p.scratch = scratch->typed_data();
  const NomadKernel* kernel = ChooseKernel(variant, kNomadPortable, kNomadAvx2, kNomadAvx512);
  if (kernel == nullptr) return NotHere(variant);
  ParallelRows(pool, p.rows, p.slots * (p.subs + p.value_dim), [&](int64_t row) { kernel->attend(p, row); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxNomadLookup(XLA_FFI_CallFrame* call_frame);
EFFJAX_EXPORT XLA_FFI_Error* EffjaxNomadAttend(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxNomadLookup, effjax::NomadLookup,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("variant")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxNomadAttend, effjax::NomadAttend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Attr<int64_t>("received")
                                  .Attr<int64_t>("variant")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
