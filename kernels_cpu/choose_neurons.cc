// The XLA handler of `choose_neurons`: the largest scores of each row by counting their bits, and the union over rows.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace effjax {
namespace {

// Whole numbers in the order of the floats; NaN above all.
inline uint32_t Ordered(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0xffffffffu;
  if (bits == 0x80000000u) bits = 0;  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Marks the `k` largest of `keys` that are above `least`; of equal ones the first.
void Mark(const uint32_t* keys, int64_t n, int64_t k, uint32_t least, uint8_t* marks) {
  uint32_t prefix = 0, known = 0;  // of the k-th largest key: its leading bits, and which bits those are
  int64_t left = k;
  for (const auto [shift, width] : {std::pair{21, 11}, std::pair{10, 11}, std::pair{0, 10}}) {
    int64_t counts[1 << 11] = {};
    const uint32_t mask = (1u << width) - 1;
    for (int64_t i = 0; i < n; ++i) counts[keys[i] >> shift & mask] += (keys[i] & known) == prefix;
    uint32_t digit = mask;
    while (counts[digit] < left) left -= counts[digit--];
    prefix |= digit << shift;
    known |= mask << shift;
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = keys[i] == prefix && left > 0;
    left -= equal;
    marks[i] |= (keys[i] > prefix || equal) && keys[i] > least;
  }
}

ffi::Error Bad(const std::string& what) { return ffi::Error::InvalidArgument("choose_neurons: " + what); }

ffi::Error ChooseNeurons(ffi::Buffer<ffi::F32> scores, ffi::Buffer<ffi::F32> threshold, int64_t k,
                         ffi::ResultBuffer<ffi::S32> chosen, ffi::ResultBuffer<ffi::S32> count) {
  if (scores.dimensions().size() != 2 || threshold.element_count() != 1 || chosen->dimensions().size() != 1 ||
      count->element_count() != 1) {
    return Bad("scores must be a matrix, threshold and count one number, the result a vector");
  }
  const int64_t rows = scores.dimensions()[0], n = scores.dimensions()[1], room = chosen->dimensions()[0];
  if (k < 1 || k > n) return Bad("k=" + std::to_string(k) + " of " + std::to_string(n));
  if (room < std::min(n, rows * k)) return Bad("no room for the union of " + std::to_string(rows) + " rows");
  std::vector<uint32_t> keys(static_cast<size_t>(n));
  std::vector<uint8_t> marks(static_cast<size_t>(n));
  const float low = threshold.typed_data()[0];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < n; ++i) keys[static_cast<size_t>(i)] = Ordered(scores.typed_data()[row * n + i]);
    Mark(keys.data(), n, k, Ordered(low), marks.data());
  }
  int32_t* to = chosen->typed_data();
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (marks[static_cast<size_t>(i)]) to[found++] = static_cast<int32_t>(i);
  }
  count->typed_data()[0] = static_cast<int32_t>(found);
  std::fill(to + found, to + room, static_cast<int32_t>(n));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace effjax

EFFJAX_EXPORT XLA_FFI_Error* EffjaxChooseNeurons(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffjaxChooseNeurons, effjax::ChooseNeurons,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("k")
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
