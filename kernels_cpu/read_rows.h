// Rows of a file into memory: many requests at once, past the page cache where the file system allows it.
#pragma once

#include <cstdint>

#include "pool.h"

namespace effjax {

// Bytes [offset, offset + length) of the file, of which pieces [first, first + count) are wanted.
struct ReadRequest {
  int64_t offset, length, first, count;
};

// Bytes [from, from + length) of its request go to `buffer + to`.
struct ReadPiece {
  int64_t from, to, length;
};

struct ReadOptions {
  int64_t align;  // of offsets, lengths and addresses, as O_DIRECT wants it; a power of two, 1 for buffered reads
  int64_t drop;   // tell the system to forget the pages that were read
};

constexpr int32_t kEndOfFile = -1;

// What went wrong first: an errno or kEndOfFile, and at which request; 0 where all is there.
struct ReadError {
  int32_t code;
  int64_t request;
};

// Returns when every piece is in place, or one request failed.
ReadError ReadRows(Pool& pool, int fd, const ReadRequest* requests, int64_t count, const ReadPiece* pieces,
                   uint8_t* buffer, const ReadOptions& options);

}  // namespace effjax
