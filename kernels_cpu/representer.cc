// The XLA handler of Representer Sketch queries: checks every shape, chooses the variant, splits queries over the threads.
#include "representer.h"

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
ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("representer: " + what); }

template <typename Buffer>
bool Is(Buffer& buffer, std::initializer_list<int64_t> wanted) {
  const auto dims = buffer.dimensions();
  return dims.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), dims.begin());
}

uint64_t Whole(const uint32_t* halves) { return static_cast<uint64_t>(halves[1]) << 32 | halves[0]; }

ffi::Error Representer(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> projection,
                       ffi::Buffer<ffi::F32> directions, ffi::Buffer<ffi::F32> offsets,
                       ffi::Buffer<ffi::U32> multiplier, ffi::Buffer<ffi::U32> addend, ffi::Buffer<ffi::F32> counts,
                       int64_t signs, int64_t variant, ffi::ResultBuffer<ffi::F32> means) {
  if (x.dimensions().size() != 2 || directions.dimensions().size() != 3 || counts.dimensions().size() != 3 ||
      means->dimensions().size() != 3) {
    return Bad("x must have two axes, directions, counts and means three");
  }
  RepresenterProblem p = {};
  p.batch = x.dimensions()[0];
  p.in = x.dimensions()[1];
  p.dim = directions.dimensions()[0];
  p.hashes = directions.dimensions()[1];
  p.rows = directions.dimensions()[2];
  p.buckets = counts.dimensions()[1];
  p.outputs = counts.dimensions()[2];
  p.groups = means->dimensions()[1];
  p.signs = signs != 0;
  if (p.dim > kMostDim) return Bad("at most " + std::to_string(kMostDim) + " channels, found " + std::to_string(p.dim));
  if (p.groups < 1 || p.rows % p.groups != 0 || p.rows == 0 || p.buckets == 0 || p.buckets >> 31 != 0) {
    return Bad("groups must divide the rows, and buckets be in [1, 2**31)");
  }
  if (!Is(projection, {p.in, p.dim}) || !Is(offsets, {p.hashes, p.rows}) || !Is(multiplier, {p.rows, p.hashes, 2}) ||
      !Is(addend, {p.rows, 2}) || !Is(counts, {p.rows, p.buckets, p.outputs}) ||
      !Is(*means, {p.batch, p.groups, p.outputs})) {
    return Bad("x, projection, directions, offsets, multiplier, addend, counts and the result do not fit together");
  }
  const RepresenterKernel* kernel = ChooseKernel(variant, kRepresenterPortable, kRepresenterAvx2, kRepresenterAvx512);
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "representer: variant " + std::to_string(variant) + " does not run on this processor");
  }
  // Multipliers as whole numbers, row after row of one hash: a small part of what one query reads.
  std::vector<uint64_t> whole(static_cast<size_t>((p.hashes + 1) * p.rows));
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t k = 0; k < p.hashes; ++k) whole[k * p.rows + row] = Whole(multiplier.typed_data() + 2 * (row * p.hashes + k));
    whole[p.hashes * p.rows + row] = Whole(addend.typed_data() + 2 * row);
  }
  p.x = x.typed_data();
  p.projection = projection.typed_data();
  p.directions = directions.typed_data();
  p.offsets = offsets.typed_data();
  p.multiplier = whole.data();
  p.addend = whole.data() + p.hashes * p.rows;
  p.counts = counts.typed_data();
  p.means = means->typed_data();
  ParallelRows(pool, p.batch, p.dim * (p.in + p.hashes * p.rows), [&](int64_t row) { kernel->query(p, row); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxRepresenter(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxRepresenter, effjax::Representer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("signs")
                                  .Attr<int64_t>("variant")
                                  .Ret<ffi::Buffer<ffi::F32>>());
