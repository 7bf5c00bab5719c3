// Splits a loop over XLA's own thread pool: no threads of ours, and never more than OMP_NUM_THREADS where that is set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>

#include "cpu.h"
#include "xla/ffi/api/ffi.h"

namespace effjax {

// Threads that a kernel may use: those of XLA's pool, or fewer where OMP_NUM_THREADS says so; read at every call, so
// that a process can change it.
inline int64_t ThreadLimit(const xla::ffi::ThreadPool& pool) {
  int64_t limit = std::max<int64_t>(pool.num_threads(), 1);
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const long wanted = std::strtol(text, nullptr, 10);
    if (wanted > 0) limit = std::min<int64_t>(limit, wanted);
  }
  return limit;
}

inline void Relax() {
#if defined(EFFJAX_X86)
  __builtin_ia32_pause();
#elif defined(EFFJAX_ARM64)
  asm volatile("yield");
#endif
}

// Runs `body(i)` for 0 <= i < n. The caller works too, so the loop ends even where every thread of the pool is busy
// (or is this one); a helper that starts late finds nothing left and touches nothing of the caller's.
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t n, const Body& body) {
  const int64_t helpers = std::min(ThreadLimit(pool), n) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto state = std::make_shared<State>();
  const Body* shared_body = &body;
  auto work = [state, shared_body, n] {
    for (int64_t i; (i = state->next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      (*shared_body)(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));  // takes a copy of its own
  work();
  for (int64_t spins = 0; state->done.load(std::memory_order_acquire) < n; ++spins) {
    if (spins < 4096) {
      Relax();
    } else {
      std::this_thread::yield();  // a helper lost its core in the middle of a part
    }
  }
}

inline constexpr int64_t kColumnTile = 64;         // a multiple of the columns that any variant takes at once
inline constexpr int64_t kWorthAThread = 1 << 15;  // numbers to touch; fewer are done before a thread has woken

// Runs `row(i)` for the rows of a matrix of `width` columns.
template <typename Row>
void ParallelRows(xla::ffi::ThreadPool& pool, int64_t rows, int64_t width, const Row& row) {
  if (rows * width < kWorthAThread) {
    for (int64_t i = 0; i < rows; ++i) row(i);
  } else {
    ParallelFor(pool, rows, row);
  }
}

// Runs `columns(begin, end)` over `out` columns, in parts that begin at whole tiles: about four a thread, so that none
// waits long for another. `work` is what each column costs, in products.
template <typename Columns>
void ParallelColumns(xla::ffi::ThreadPool& pool, int64_t work, int64_t out, const Columns& columns) {
  const int64_t tiles = (out + kColumnTile - 1) / kColumnTile;
  const int64_t threads = work * out < 8 * kWorthAThread ? 1 : ThreadLimit(pool);
  if (threads == 1) return columns(0, out);
  const int64_t each = (tiles + 4 * threads - 1) / (4 * threads);
  ParallelFor(pool, (tiles + each - 1) / each, [&](int64_t part) {
    const int64_t begin = part * each * kColumnTile;
    columns(begin, std::min(out, begin + each * kColumnTile));
  });
}

}  // namespace effjax
