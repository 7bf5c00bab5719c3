// The look-up loop of NoMAD over the vectors `S` of an instruction set.
#pragma once

#include <cstring>

#include "nomad.h"

namespace effjax {

template <class S>
struct NomadLookup {
  using I = typename S::I;
  static constexpr int kSubs = S::kBytes / 16;  // sub-quantizers of a vector, one a lane of 16 bytes
  static constexpr int64_t kChunkBlocks = kChunkKeys / kBlockKeys;

  // Logits of `kBlocks` blocks for `kHeads` queries: a vector of tables serves all the blocks, one of codes all the heads.
  //
  // Bytes are added as the 16-bit numbers they lie in: `all` wraps around and `odd` counts their high bytes, so that
  // `all - (odd << 8)` are the sums of the low ones. That takes one operation less a look-up than to widen both.
  template <int kHeads, int kBlocks>
  __attribute__((always_inline)) static void Tile(const uint8_t* tables, const uint8_t* codes, int64_t subs,
                                                  const float* scales, const float* biases, float* logits,
                                                  int64_t stride) {
    const int64_t size = subs * kBlockBytes;
    I all[kHeads][kBlocks][2], odd[kHeads][kBlocks][2];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) all[h][b][0] = all[h][b][1] = odd[h][b][0] = odd[h][b][1] = S::Zero();
    }
    auto add = [&](const I (&table)[kHeads], const I (&bytes)[kBlocks]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const I nibbles[2] = {S::FieldAt(bytes[b], 0, 4), S::FieldAt(bytes[b], 4, 4)};
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const I found = S::Lookup(table[h], nibbles[half]);
            all[h][b][half] = S::Add16(all[h][b][half], found);
            odd[h][b][half] = S::Add16(odd[h][b][half], S::HighBytes(found));
          }
        }
      }
    };
    I table[kHeads], bytes[kBlocks];
    int64_t s = 0;
    for (; s + kSubs <= subs; s += kSubs) {
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) table[h] = S::Load(tables + h * size + s * kEntries);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const uint8_t* at = codes + b * size + s * kBlockBytes;
        bytes[b] = S::Load(at);
        __builtin_prefetch(at + kBlocks * size);  // the same of the next blocks: streams are too short to be foreseen
      }
      add(table, bytes);
    }
    if (s < subs) {  // lanes that are not there look up zeros
      const int64_t rest = (subs - s) * kEntries;
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) table[h] = LoadPart(tables + h * size + s * kEntries, rest);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) bytes[b] = LoadPart(codes + b * size + s * kBlockBytes, rest);
      add(table, bytes);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const I even = S::Sub16(all[h][b][half], S::ToHighBytes(odd[h][b][half]));
          S::StoreSums(even, odd[h][b][half], 1.0f / scales[h], biases[h], logits + h * stride + b * kBlockKeys + half * 16);
        }
      }
    }
  }

  static I LoadPart(const uint8_t* p, int64_t bytes) {
    alignas(64) uint8_t whole[S::kBytes] = {};
    std::memcpy(whole, p, static_cast<size_t>(bytes));
    return S::Load(whole);
  }

  template <int kHeads>
  __attribute__((noinline)) static void Heads(const uint8_t* tables, const uint8_t* codes, int64_t subs, int64_t blocks,
                                              const float* scales, const float* biases, float* logits, int64_t stride) {
    constexpr int kAtOnce = S::kTiles / kHeads;
    const int64_t size = subs * kBlockBytes;
    int64_t b = 0;
    for (; b + kAtOnce <= blocks; b += kAtOnce) {
      Tile<kHeads, kAtOnce>(tables, codes + b * size, subs, scales, biases, logits + b * kBlockKeys, stride);
    }
    if constexpr (kAtOnce > 1) {
      for (; b < blocks; ++b) {
        Tile<kHeads, 1>(tables, codes + b * size, subs, scales, biases, logits + b * kBlockKeys, stride);
      }
    }
  }

  // Logits [group][stride] of some blocks.
  static void Blocks(const uint8_t* tables, const uint8_t* codes, int64_t subs, int64_t blocks, int64_t group,
                     const float* scales, const float* biases, float* logits, int64_t stride) {
    const int64_t size = subs * kEntries;
    int64_t h = 0;
    if constexpr (S::kTiles >= 4) {
      for (; h + 4 <= group; h += 4) {
        Heads<4>(tables + h * size, codes, subs, blocks, scales + h, biases + h, logits + h * stride, stride);
      }
    }
    if constexpr (S::kTiles >= 2) {
      for (; h + 2 <= group; h += 2) {
        Heads<2>(tables + h * size, codes, subs, blocks, scales + h, biases + h, logits + h * stride, stride);
      }
    }
    for (; h < group; ++h) {
      Heads<1>(tables + h * size, codes, subs, blocks, scales + h, biases + h, logits + h * stride, stride);
    }
  }

  static void Lookup(const LookupProblem& p, int64_t row) {
    const int64_t size = p.subs * kBlockBytes, keys = p.blocks * kBlockKeys;
    const uint8_t* codes = p.codes + row * p.blocks * size;
    float* logits = p.logits + row * p.group * keys;
    for (int64_t b = 0; b < p.blocks; b += kChunkBlocks) {  // whose codes stay in the cache for all heads
      const int64_t blocks = Min(kChunkBlocks, p.blocks - b);
      Blocks(p.tables + row * p.group * size, codes + b * size, p.subs, blocks, p.group, p.scales + row * p.group,
             p.biases + row * p.group, logits + b * kBlockKeys, keys);
    }
  }

  static int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
};

}  // namespace effjax
