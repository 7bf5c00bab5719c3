// Packed codes to bytes and words that vectors compute with: rows of bytes of many columns, mixed column by column.
//
// Column c of a run stands, in the four vectors that come out, at vector v and lane l of 32 bits with
// c = 16 * (l / 4) + 4 * v + l % 4: the order in which 128-bit lanes interleave.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace effjax {

// Inputs whose codes fill whole bytes and are taken together: four bytes of a column, or eight codes of an odd width.
inline constexpr int64_t RunOf(int bits) { return 8 % bits == 0 ? 32 / bits : 8; }
inline constexpr int64_t BytesOfRun(int bits) { return 8 % bits == 0 ? 4 : bits; }

// How rows of bytes of many columns lie: side by side, `[rows, out]` (tile 0); in tiles of 64 columns,
// `[out / 64, rows, 64]`, which a product of one row reads from one end to the other; or column by column, `[out, rows]`
// (tile 1), for kernels that take several bytes of one column.
struct Rows {
  const uint8_t* data;
  int64_t row, tile;  // bytes from a row to the next, and from 64 columns to the next 64

  const uint8_t* At(int64_t r, int64_t column) const { return data + r * row + column / 64 * tile + column % 64; }
};

inline const char* TileError(int64_t tile, int64_t out, bool columns) {
  if (tile == 0 || (tile == 1 && columns)) return nullptr;
  if (tile != 64) return columns ? "tile must be 0, 1 or 64" : "tile must be 0 or 64";
  return out % 64 == 0 ? nullptr : "tiles are of 64 columns, which do not divide the outputs";
}

inline Rows RowsOf(const uint8_t* data, int64_t rows, int64_t out, int64_t tile) {
  return tile == 64 ? Rows{data, 64, rows * 64} : Rows{data, out, 64};
}

// A row of codes; what is beyond the columns reads as zero.
template <class S, bool kFull>
typename S::I LoadRow(const uint8_t* codes, int64_t columns) {
  if constexpr (kFull) {
    return S::Load(codes);
  } else {
    alignas(64) uint8_t padded[S::kBytes] = {};
    std::memcpy(padded, codes, static_cast<size_t>(columns));
    return S::Load(padded);
  }
}

template <class S>
void StoreMixed(const typename S::I (&rows)[4], uint8_t* to) {
  typename S::I mixed[4];
  S::Interleave(rows, mixed);
  for (int v = 0; v < 4; ++v) S::Store(to + v * S::kBytes, mixed[v]);
}

// Eight codes that run across the borders of bytes, a byte each, as two words a column.
template <class S, int kBits>
void StoreOdd(const typename S::I* bytes, uint8_t* to) {
  typename S::I quad[4];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const int byte = j * kBits / 8, shift = j * kBits % 8;
    typename S::I code = S::FieldAt(bytes[byte], shift, kBits);
    if (shift + kBits > 8) code = S::Or(code, S::HighPart(bytes[byte + 1], 8 - shift, kBits));
    quad[j % 4] = code;
    if (j % 4 == 3) StoreMixed<S>(quad, to + (j / 4) * 4 * S::kBytes);
  }
}

// Runs of codes of S::kBytes columns. With kSplit every code comes out as a byte, [quads][4 vectors][lanes][4 bytes],
// quad s of a run holding field s of its four bytes; without, widths that divide 8 stay packed, a word a run.
//
// `rows` is how many bytes of each column there are: the codes of the last run may end before it does. The bytes
// `ahead` of each are fetched into the cache.
template <class S, int kBits, bool kFull, bool kSplit>
void Unpack(const uint8_t* codes, int64_t stride, int64_t rows, int64_t runs, int64_t columns, int64_t ahead,
            uint8_t* to) {
  using I = typename S::I;
  constexpr int kRows = static_cast<int>(BytesOfRun(kBits));
  for (int64_t run = 0; run < runs; ++run) {
    I bytes[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* at = codes + (run * kRows + r) * stride;
      if (run * kRows + r < rows) {
        bytes[r] = LoadRow<S, kFull>(at, columns);
        __builtin_prefetch(at + ahead);
      } else {
        bytes[r] = S::Zero();
      }
    }
    if constexpr (8 % kBits != 0) {
      StoreOdd<S, kBits>(bytes, to);
      to += 8 * S::kBytes;
    } else if constexpr (kBits == 8 || !kSplit) {
      StoreMixed<S>(bytes, to);
      to += 4 * S::kBytes;
    } else {
      I mixed[4];
      S::Interleave(bytes, mixed);
#pragma GCC unroll 8
      for (int s = 0; s < 8 / kBits; ++s) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) S::Store(to + v * S::kBytes, S::FieldAt(mixed[v], s * kBits, kBits));
        to += 4 * S::kBytes;
      }
    }
  }
}

// The same for whole and for ragged columns.
template <class S, int kBits, bool kSplit>
void UnpackColumns(const uint8_t* codes, int64_t stride, int64_t rows, int64_t runs, int64_t columns, int64_t ahead,
                   uint8_t* to) {
  if (columns == S::kBytes) {
    Unpack<S, kBits, true, kSplit>(codes, stride, rows, runs, columns, ahead, to);
  } else {
    Unpack<S, kBits, false, kSplit>(codes, stride, rows, runs, columns, ahead, to);
  }
}

}  // namespace effjax
