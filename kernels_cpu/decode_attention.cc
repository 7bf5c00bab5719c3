// The XLA handler of `decode_attention`: checks every shape, chooses the variant, and splits the heads over the threads.
#include <string>

#include "attention.h"
#include "cpu.h"
#include "threads.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace effjax {
namespace {

ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("decode_attention: " + what); }

// Whether `x` holds vectors of `p.head_dim` numbers; `bits` are those of integers.
bool Hold(const ffi::AnyBuffer& x, int64_t bits, const AttentionProblem& p, Slots* slots) {
  const auto dims = x.dimensions();
  const int64_t first = p.table == nullptr ? p.heads / p.kv_heads : p.pages;
  if (dims.size() != 4 || dims[0] != first || dims[1] != p.kv_heads || dims[2] != p.page) return false;
  slots->data = static_cast<const uint8_t*>(x.untyped_data());
  int64_t width = p.head_dim, size = 1;
  if (x.element_type() == ffi::F32) {
    slots->held = Held::kFloat32;
    size = 4;
  } else if (x.element_type() == ffi::BF16) {
    slots->held = Held::kBfloat16;
    size = 2;
  } else if (x.element_type() == ffi::U8 && bits == 8) {
    slots->held = Held::kBytes;
  } else if (x.element_type() == ffi::U8 && bits == 4 && p.head_dim % (2 * kMostAttentionLanes) == 0) {
    slots->held = Held::kNibbles;
    width = p.head_dim / 2;
  } else {
    return false;
  }
  slots->row_bytes = width * size;
  return dims[3] == width;
}

ffi::Error DecodeAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                           ffi::Buffer<ffi::F32> low, ffi::Buffer<ffi::F32> step, ffi::Buffer<ffi::S32> start,
                           ffi::Buffer<ffi::S32> length, ffi::Buffer<ffi::F32> asked,
                           ffi::Buffer<ffi::S32> table, int64_t k_bits, int64_t v_bits, float quantile,
                           float multiple, bool peaked, int64_t variant, ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> received) {
  const auto dims = q.dimensions();
  if (dims.size() != 4 || k.dimensions().size() != 4) return Bad("q, k and v must have four axes");
  AttentionProblem p = {};
  p.heads = dims[0] * dims[1];
  p.kv_heads = dims[1];
  p.group = dims[2];
  p.head_dim = dims[3];
  p.page = p.slots = k.dimensions()[2];
  p.pages = k.dimensions()[0];
  if (table.element_count() != 0) {
    if (table.dimensions().size() != 2 || table.dimensions()[0] != dims[0]) return Bad("table does not fit q");
    p.table = table.typed_data();
    p.row_pages = table.dimensions()[1];
    p.slots = p.page * p.row_pages;
  }
  if (!(quantile < 1.0f)) return Bad("quantile is not below 1");
  p.quantile = quantile;
  p.multiple = multiple;
  p.peaked = peaked;
  if (p.heads == 0 || p.group == 0) return ffi::Error::Success();
  if (p.slots == 0 || p.pages == 0) return Bad("k holds no slots");
  if (p.head_dim == 0 || p.head_dim % kMostAttentionLanes != 0) return Bad("head_dim is no multiple of 16");
  if (!Hold(k, k_bits, p, &p.k) || !Hold(v, v_bits, p, &p.v)) return Bad("k or v does not fit q");
  const auto heads = static_cast<size_t>(p.heads), slots = static_cast<size_t>(p.slots);
  if (start.element_count() != heads || length.element_count() != heads) return Bad("start or length does not fit q");
  for (size_t i = 0; i < heads; ++i) {
    const int32_t begin = start.typed_data()[i], end = length.typed_data()[i];
    if (begin < 0 || end > p.slots) return Bad("slots " + std::to_string(begin) + " to " + std::to_string(end));
  }
  if (y->element_count() != q.element_count()) return Bad("y does not fit q");
  if (p.v.held == Held::kBytes || p.v.held == Held::kNibbles) {
    if (p.table != nullptr) return Bad("pages of coded values");
    if (low.element_count() != heads * slots || step.element_count() != heads * slots) return Bad("scales do not fit v");
    p.low = low.typed_data();
    p.step = step.typed_data();
  }
  if (asked.element_count() != 0) {
    if (static_cast<int64_t>(asked.element_count()) * p.kv_heads != p.heads) return Bad("asked does not fit q");
    if (received->element_count() != heads * slots) return Bad("received does not fit k");
    p.asked = asked.typed_data();
    p.received = received->typed_data();
  }
  const AttentionKernel* kernel = ChooseKernel(variant, kAttentionPortable, kAttentionAvx2, kAttentionAvx512);
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "decode_attention: variant " + std::to_string(variant) + " does not run on this processor");
  }
  p.q = q.typed_data();
  p.start = start.typed_data();
  p.length = length.typed_data();
  p.y = y->typed_data();
  int64_t live = 0;
  for (int64_t i = 0; i < p.heads; ++i) live += std::max(p.length[i] - p.start[i], 0);
  if (live * p.group * p.head_dim < 2 * kWorthAThread) {
    for (int64_t i = 0; i < p.heads; ++i) kernel->head(p, i);
  } else {
    ParallelFor(pool, p.heads, [&](int64_t i) { kernel->head(p, i); });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxDecodeAttention(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxDecodeAttention, effjax::DecodeAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("k_bits")
                                  .Attr<int64_t>("v_bits")
                                  .Attr<float>("quantile")
                                  .Attr<float>("multiple")
                                  .Attr<bool>("peaked")
                                  .Attr<int64_t>("variant")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
