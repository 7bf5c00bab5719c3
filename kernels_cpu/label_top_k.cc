// The XLA handler of label tables: checks every shape, chooses the variant, splits queries over the threads.
#include "label_top_k.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cpu.h"
#include "threads.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace effjax {
namespace {

// Null when the variant is unknown, was not built, or this processor cannot run it.
ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("label_top_k: " + what); }

template <typename Buffer>
bool Is(Buffer& buffer, std::initializer_list<int64_t> wanted) {
  const auto dims = buffer.dimensions();
  return dims.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), dims.begin());
}

ffi::Error LabelTopK(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> h, ffi::Buffer<ffi::F32> directions,
                     ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::S32> offsets, ffi::AnyBuffer weights,
                     ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::S32> fallback, int64_t variant,
                     ffi::ResultBuffer<ffi::F32> values, ffi::ResultBuffer<ffi::S32> found,
                     ffi::ResultBuffer<ffi::S32> scored) {
  if (h.dimensions().size() != 2 || directions.dimensions().size() != 3 || ids.dimensions().size() != 2 ||
      fallback.dimensions().size() != 1 || values->dimensions().size() != 2) {
    return Bad("directions must have three axes, h, ids and values two, fallback one");
  }
  LabelProblem p = {};
  p.batch = h.dimensions()[0];
  p.in = h.dimensions()[1];
  p.hashes = directions.dimensions()[1];
  p.tables = directions.dimensions()[2];
  p.labels = ids.dimensions()[1];
  p.k = values->dimensions()[1];
  p.spare = fallback.dimensions()[0];
  if (p.hashes > kMostHashes || p.hashes * p.tables > kMostBits || p.labels >> 31 != 0) {
    return Bad("too many hashes, tables or labels");
  }
  if (p.k < 1 || p.hashes < 1) return Bad("k and hashes must be positive");
  p.bfloat16 = weights.element_type() == ffi::DataType::BF16;
  if (!p.bfloat16 && weights.element_type() != ffi::DataType::F32) return Bad("weights must be float32 or bfloat16");
  if (!Is(directions, {p.in + 1, p.hashes, p.tables}) || !Is(ids, {p.tables, p.labels}) ||
      !Is(offsets, {p.tables, (int64_t{1} << p.hashes) + 1}) || !Is(weights, {p.labels, p.in}) ||
      !Is(bias, {p.labels}) || !Is(*found, {p.batch, p.k}) || !Is(*scored, {p.batch})) {
    return Bad("h, directions, ids, offsets, weights, bias and the results do not fit together");
  }
  const LabelKernel* kernel = ChooseKernel(variant, kLabelPortable, kLabelAvx2, kLabelAvx512);
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "label_top_k: variant " + std::to_string(variant) + " does not run on this processor");
  }
  p.h = h.typed_data();
  p.directions = directions.typed_data();
  p.ids = ids.typed_data();
  p.offsets = offsets.typed_data();
  p.weights = weights.untyped_data();
  p.bias = bias.typed_data();
  p.fallback = fallback.typed_data();
  p.values = values->typed_data();
  p.found = found->typed_data();
  p.scored = scored->typed_data();
  std::vector<uint64_t> maps;
  if (WorthMaps(p)) {
    maps.resize(static_cast<size_t>(AllMapWords(p)));
    FillMaps(p, maps.data());
    p.maps = maps.data();
  }
  // Queries in parts that share the bits of the labels seen; about four parts a thread.
  const int64_t words = LabelWords(p);
  const int64_t about = p.in * (p.hashes * p.tables + (p.tables * p.labels >> p.hashes));  // numbers that a query touches
  const int64_t threads = p.batch * about < 2 * kWorthAThread ? 1 : ThreadLimit(pool);
  const int64_t each = threads == 1 ? p.batch : (p.batch + 4 * threads - 1) / (4 * threads);
  ParallelFor(pool, p.batch == 0 ? 0 : (p.batch + each - 1) / each, [&](int64_t part) {
    std::vector<uint64_t> seen(static_cast<size_t>(words));
    const int64_t end = std::min(p.batch, (part + 1) * each);
    for (int64_t row = part * each; row < end; ++row) kernel->query(p, row, seen.data());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxLabelTopK(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxLabelTopK, effjax::LabelTopK,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("variant")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
