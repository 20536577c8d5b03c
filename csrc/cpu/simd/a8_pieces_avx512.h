// SPDX-License-Identifier: Apache-2.0
// How the kernels with int8 activations for many rows walk a weight: two halves at a time, pieces
// of columns ascending. A piece is unpacked to bytes once per block of rows, [k / 4][2][64] in the
// first-level cache, and register tiles run over it; 8-bit Int already lies so. A piece holds one
// segment per chunk that it touches; only chunks longer than a piece span several.
#pragma once

#include "a8_output_avx512.h"
#include "a8_tile_avx512.h"

namespace qkern {
namespace {

constexpr int64_t kPiece = 512;         // columns of scratch (16 KiB); whole units
constexpr int64_t kDirectPiece = 1024;  // columns where packed bytes are used as they are
constexpr int kSegments = 32;           // chunks that a piece may touch
constexpr int kScratchStride = 64 * kVectors;

// A half of a panel and its first output.
struct HalfAt {
  const uint8_t* panel;
  int half, halves;
  int64_t n0;
};

// Columns of one chunk inside a piece.
struct Segment {
  const uint8_t* weights;
  int64_t stride;  // bytes from four columns to the next four
  int64_t column;  // the first, of a row in packed order
  int64_t columns, chunk;
  bool first, last;  // of the chunk
};

// kCentred: unpacked bytes are signed, code_offset() taken off, instead of unsigned.
template <class Codes, bool kCentred = false>
struct Pieces {
  static constexpr int kPanels = kVectors / Codes::kPanelHalves;

  const LinearJob& job;
  const Codes& codes;
  const int64_t step;  // columns that a tile takes at once: unpacked segments are filled up with 0
  HalfAt halves[kVectors];
  int count;    // of halves
  bool direct;  // packed bytes are used where they lie
  // The piece at hand, and what lies behind it in each panel.
  Segment segments[kSegments];
  int segment_count;
  int64_t columns, scratch_columns;
  const uint8_t *begin[kPanels], *end[kPanels];
  alignas(64) uint8_t scratch[kPiece * kHalf * kVectors];
  alignas(64) float scales[kSegments][kVectors][kHalf];
  alignas(64) float negative_zeros[kSegments][kVectors][kHalf];

  // Halves [h0, h1) of the weight. A vector beyond repeats the first half; nobody stores it.
  Pieces(const LinearJob& j, const Codes& c, int64_t columns_at_once, int64_t h0, int64_t h1)
      : job(j),
        codes(c),
        step(columns_at_once),
        count((int)(h1 - h0)),
        direct(Codes::kPlain && count == kVectors) {
    const Packed& w = *job.w;
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t h = v < count ? h0 + v : h0, p = h / Codes::kPanelHalves;
      halves[v] = {w.panel(p), (int)(h % Codes::kPanelHalves), w.halves_of(p), h * kHalf};
    }
  }

  const uint8_t* unit_of(const HalfAt& at, int64_t g, int64_t k) const {
    const Packed& w = *job.w;
    const uint8_t* group_codes = w.codes_of(w.group_block(at.panel, g, at.halves));
    return group_codes + (k / Codes::kUnit * at.halves + at.half) * Codes::kUnitBytes;
  }

  // Columns [k, k + length) of group g to `to`.
  void unpack(int64_t g, int64_t k, int64_t length, uint8_t* to) const {
    const uint8_t* units[kVectors];
    const uint8_t* tables[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const HalfAt& at = halves[v];
      units[v] = unit_of(at, g, k);
      tables[v] = job.w->half_tables(at.panel, g, at.halves, at.half);
    }
    if constexpr (!Codes::kStreamed) {
      for (int v = 0; v < kVectors; ++v)
        codes.unpack(units[v], tables[v], length, to + 64 * v, kScratchStride);
      return;
    }
    const __m512i offset = _mm512_set1_epi8((char)code_offset(*job.w));
    for (int64_t i = 0; i < length; i += Codes::kUnit) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        __m512i parts[Codes::kHalfVectors][Codes::kParts];
#pragma GCC unroll 4
        for (int j = 0; j < Codes::kHalfVectors; ++j) codes.load(units[v], j, tables[v], parts[j]);
#pragma GCC unroll 8
        for (int part = 0; part < Codes::kParts; ++part) {
          __m512i bytes[Codes::kHalfVectors];
#pragma GCC unroll 4
          for (int j = 0; j < Codes::kHalfVectors; ++j)
            bytes[j] = kCentred ? _mm512_sub_epi8(parts[j][part], offset) : parts[j][part];
          if constexpr (Codes::kHalfVectors == 4) transpose_dwords(bytes);
#pragma GCC unroll 4
          for (int j = 0; j < Codes::kHalfVectors; ++j)
            _mm512_store_si512(to + 64 * (kVectors * (part * Codes::kHalfVectors + j) + v),
                               bytes[j]);
        }
        units[v] += Codes::kUnitBytes * halves[v].halves;
      }
      to += kScratchStride * Codes::kParts * Codes::kHalfVectors;
    }
  }

  void load_terms(int64_t g, int segment) {
    const Packed& w = *job.w;
    for (int v = 0; v < kVectors; ++v) {
      const HalfAt& at = halves[v];
      const uint8_t* block = w.group_block(at.panel, g, at.halves);
      _mm512_store_ps(scales[segment][v], load_scales(w, block, g, at.half, at.halves));
      if (w.zero_bytes)
        _mm512_store_ps(negative_zeros[segment][v],
                        load_negative_zeros(w, block, g, at.half, at.halves));
    }
  }

  bool in_place(int64_t length) const { return direct && length % step == 0; }

  // The columns of the next segment where `left` are left of a chunk.
  int64_t segment_length(int64_t left) const {
    if (!direct) return min64(left, kPiece / step * step);
    if (left >= kDirectPiece) return kDirectPiece;
    return in_place(left) || left <= kPiece / 2 ? left : left / step * step;
  }

  bool fits(int64_t length) const {
    if (segment_count == kSegments) return false;
    return in_place(length) ? columns + length <= kDirectPiece
                            : scratch_columns + round_up(length, step) <= kPiece;
  }

  // Adds columns [k, k + length) of group g to the piece.
  __attribute__((noinline)) void add_segment(int64_t g, int64_t k, int64_t length, int64_t chunk,
                                             bool first, bool last) {
    const bool copied = !in_place(length);
    uint8_t* to = scratch + scratch_columns * kHalf * kVectors;
    segments[segment_count] = {copied ? to : unit_of(halves[0], g, k),
                               copied ? kScratchStride : 2 * Codes::kUnitBytes,
                               g * job.w->group_padded + k,
                               length,
                               chunk,
                               first,
                               last};
    for (int p = 0; p < kPanels; ++p) {
      const HalfAt& at = halves[p * Codes::kPanelHalves];
      const uint8_t* unit = unit_of(at, g, k);
      if (segment_count == 0) begin[p] = unit;
      end[p] = unit + length * kHalf * Codes::kBits / 8 * at.halves;
    }
    if (copied) {
      const int64_t whole = round_up(length, step);
      unpack(g, k, length, to);
      memset(to + length * kHalf * kVectors, 0, (size_t)((whole - length) * kHalf * kVectors));
      scratch_columns += whole;
    }
    if (last) load_terms(g, segment_count);
    ++segment_count;
    columns += length;
  }

  void clear() {
    columns = scratch_columns = 0;
    segment_count = 0;
  }

  // Calls block.run_piece() whenever a piece is complete; a block derives from this.
  template <class Block>
  static void walk(Block& block) {
    const LinearJob& job = block.job;
    const Packed& w = *job.w;
    block.clear();
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t padded = w.group_columns_padded(g);
      for (int64_t c = 0; c * job.chunk < padded; ++c) {
        const int64_t chunk_begin = c * job.chunk,
                      chunk_end = min64(padded, chunk_begin + job.chunk);
        for (int64_t k = chunk_begin, length; k < chunk_end; k += length) {
          length = block.segment_length(chunk_end - k);
          if (!block.fits(length)) {
            block.run_piece();
            block.clear();
          }
          block.add_segment(g, k, length, g * job.chunks_per_group + c, k == chunk_begin,
                            k + length == chunk_end);
        }
      }
    }
    block.run_piece();
  }
};

}  // namespace
}  // namespace qkern
