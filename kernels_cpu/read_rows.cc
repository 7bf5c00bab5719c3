// Reads rows of a file with a pool of threads; called from Python through a C interface, since it computes nothing.
#include "read_rows.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu.h"

namespace effjax {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory of one thread for what is read beside the wanted rows; grows to the largest request.
uint8_t* Scratch(int64_t size, int64_t align) {
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t held = 0, held_align = 0;
  if (held < size || held_align < align) {
    void* fresh = nullptr;
    memory.reset();
    held = 0;
    if (posix_memalign(&fresh, static_cast<size_t>(std::max<int64_t>(align, 64)), static_cast<size_t>(size)) != 0) {
      return nullptr;
    }
    memory.reset(fresh);
    held = size;
    held_align = align;
  }
  return static_cast<uint8_t*>(memory.get());
}

// Fills the parts until `needed` bytes are there. Goes on after a signal and after a short read: from the last aligned
// byte, since a direct read may start nowhere else.
int32_t Fill(int fd, std::vector<iovec>& parts, int64_t offset, int64_t needed, int64_t align) {
  size_t first = 0;
  int64_t got = 0;
  while (got < needed) {
    const ssize_t n = preadv(fd, parts.data() + first, static_cast<int>(parts.size() - first), offset + got);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return kEndOfFile;
    if (got + n >= needed) break;
    int64_t whole = n / align * align;
    if (whole == 0) return kEndOfFile;  // the file ends within a block, before what is wanted
    got += whole;
    while (whole > 0) {
      iovec& part = parts[first];
      const int64_t taken = std::min(whole, static_cast<int64_t>(part.iov_len));
      part.iov_base = static_cast<uint8_t*>(part.iov_base) + taken;
      part.iov_len -= static_cast<size_t>(taken);
      whole -= taken;
      if (part.iov_len == 0) ++first;
    }
  }
  return 0;
}

// The pieces as the parts of one read, neighbours joined; empty where they leave gaps or lie where a read may not go.
std::vector<iovec> Straight(const ReadRequest& r, const ReadPiece* pieces, uint8_t* buffer, int64_t align) {
  std::vector<iovec> parts;
  int64_t at = 0;
  for (int64_t i = r.first; i < r.first + r.count; ++i) {
    const ReadPiece& p = pieces[i];
    uint8_t* to = buffer + p.to;
    if (p.from != at || ((reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(p.length)) & (align - 1)) != 0) return {};
    at += p.length;
    if (!parts.empty() && static_cast<uint8_t*>(parts.back().iov_base) + parts.back().iov_len == to) {
      parts.back().iov_len += static_cast<size_t>(p.length);
    } else {
      parts.push_back({to, static_cast<size_t>(p.length)});
    }
  }
  if (at != r.length || parts.size() > IOV_MAX) return {};
  return parts;
}

int32_t ReadOne(int fd, const ReadRequest& r, const ReadPiece* pieces, uint8_t* buffer, const ReadOptions& options) {
  std::vector<iovec> parts = Straight(r, pieces, buffer, options.align);
  int32_t error = 0;
  if (!parts.empty()) {
    error = Fill(fd, parts, r.offset, r.length, options.align);
  } else {
    uint8_t* scratch = Scratch(r.length, options.align);
    if (scratch == nullptr) return ENOMEM;
    int64_t needed = 0;
    for (int64_t i = r.first; i < r.first + r.count; ++i) needed = std::max(needed, pieces[i].from + pieces[i].length);
    parts.push_back({scratch, static_cast<size_t>(r.length)});
    error = Fill(fd, parts, r.offset, needed, options.align);
    for (int64_t i = r.first; error == 0 && i < r.first + r.count; ++i) {
      std::memcpy(buffer + pieces[i].to, scratch + pieces[i].from, static_cast<size_t>(pieces[i].length));
    }
  }
#if defined(POSIX_FADV_DONTNEED)
  if (options.drop) posix_fadvise(fd, r.offset, r.length, POSIX_FADV_DONTNEED);
#endif
  return error;
}

}  // namespace

ReadError ReadRows(Pool& pool, int fd, const ReadRequest* requests, int64_t count, const ReadPiece* pieces,
                   uint8_t* buffer, const ReadOptions& options) {
  ReadError first = {0, -1};
  std::mutex mutex;
  std::atomic<bool> failed{false};
  pool.Run(count, count, [&](int64_t i) {
    if (failed) return;
    const int32_t code = ReadOne(fd, requests[i], pieces, buffer, options);
    if (code == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    if (!failed.exchange(true)) first = {code, i};
  });
  return first;
}

}  // namespace effjax

EFFJAX_EXPORT void* EffjaxPoolNew(int64_t threads) {
  try {
    return new effjax::Pool(threads);
  } catch (...) {
    return nullptr;  // no more threads, or no memory: nothing may be thrown through C
  }
}

EFFJAX_EXPORT void EffjaxPoolDelete(void* pool) { delete static_cast<effjax::Pool*>(pool); }

// Returns 0, an errno or kEndOfFile; `where` gets the number of the request that failed.
EFFJAX_EXPORT int32_t EffjaxReadRows(void* pool, int32_t fd, const effjax::ReadRequest* requests, int64_t count,
                                     const effjax::ReadPiece* pieces, uint8_t* buffer, int64_t align, int64_t drop,
                                     int64_t* where) {
  const effjax::ReadError error =
      effjax::ReadRows(*static_cast<effjax::Pool*>(pool), fd, requests, count, pieces, buffer, {align, drop});
  *where = error.request;
  return error.code;
}
