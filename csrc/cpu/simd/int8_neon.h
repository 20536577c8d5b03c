// SPDX-License-Identifier: Apache-2.0
// y = quantized(x) . W^T, all of it but the multiplications of a level (smlal_neon.h, sdot_neon.h,
// smmla_neon.h).
//
// Codes become signed bytes that fit: Int codes below 64 stay as they are, 8-bit codes and table
// entries, stored plus 128, lose the 128. Sums of a chunk are exact int32, so that their order is
// free; they start at what the bytes leave out (start_of). Scales are applied per chunk, in
// ascending order (half_neon.h).
//
//   few rows: bytes are multiplied where they are made (add_direct of the level).
//   more rows: the bytes of one half of a piece go to a scratch of the first cache, once for all
//     rows of the block, in the order that the level's tile reads:
//       by fours    [step of 4 columns][16 outputs][4]       64 bytes a step, as layout.h has it
//       by eights   [8 columns][8 pairs of outputs][2][8]    128 bytes, what smmla takes
//
// Run under emulation only: speed was judged by the instructions of the loops.
#pragma once

#include "walk_neon.h"

namespace qkern {
namespace {

constexpr int64_t kRowBlock = 64;   // rows whose sums and accumulators stay in the first cache
constexpr int64_t kPiece = 128;     // columns that are unpacked at a time
constexpr int64_t kDirect = 512;    // columns at a time where bytes are used at once
constexpr int64_t kStepBytes = 64;  // values of 4 columns of a half
constexpr int64_t kScratchBytes = kPiece / 4 * kStepBytes;

// Activations of the rows of a block at the first column of a piece. 16 bytes may be read from any
// column of a row (kReadPadding).
struct Rows {
  const int8_t* q;
  int64_t stride;
  int count;

  const int8_t* row(int r) const { return q + r * stride; }
};

// ---- formats: what turns codes into bytes ----

template <int kCodeBits>
struct Int8Int {
  static constexpr int kBits = kCodeBits;
  static constexpr Lanes kLanes = Lanes::kDword;
  static constexpr bool kMinus128 = kBits == 8;
  static constexpr int kLargest = kMinus128 ? 128 : (1 << kBits) - 1;  // magnitude of a byte

  explicit Int8Int(const uint8_t*) {}

  int8x16_t operator()(uint8x16_t codes) const {
    return vreinterpretq_s8_u8(kMinus128 ? veorq_u8(codes, vdupq_n_u8(128)) : codes);
  }
};

// A table of at most 16 entries: of the tensor (dword lanes) or of one output (row lanes).
template <int kCodeBits, Lanes kTableLanes>
struct Int8Table {
  static constexpr int kBits = kCodeBits;
  static constexpr Lanes kLanes = kTableLanes;
  static constexpr bool kMinus128 = true;
  static constexpr int kLargest = 128;
  int8x16_t entries;

  explicit Int8Table(const uint8_t* table)
      : entries(vreinterpretq_s8_u8(veorq_u8(vld1q_u8(table), vdupq_n_u8(128)))) {}

  int8x16_t operator()(uint8x16_t codes) const { return vqtbl1q_s8(entries, codes); }
};

// ---- one half of a piece to scratch ----

struct ByFours {
  static void store(uint8_t* values, int64_t step, int place, int8x16_t bytes) {
    vst1q_s8(reinterpret_cast<int8_t*>(values) + step * kStepBytes + 16 * place, bytes);
  }
  // Outputs 4 place .. 4 place + 3 at steps `step` (even) and step + 1.
  static void store_dwords(uint8_t* values, int64_t step, int place, int8x16_t first,
                           int8x16_t second) {
    store(values, step, place, first);
    store(values, step + 1, place, second);
  }
  // Outputs 4 place .. 4 place + 3, sixteen columns of each, from step `step` on.
  static void store_rows(uint8_t* values, int64_t step, int place, const int8x16_t rows[4]) {
    uint32x4_t in[4], out[4];
    repeat<4>([&](auto r) { in[r] = vreinterpretq_u32_s8(rows[r]); });
    transpose_dwords(in, out);
    repeat<4>([&](auto d) { store(values, step + d, place, vreinterpretq_s8_u32(out[d])); });
  }
};

struct ByEights {
  static void store(uint8_t* values, int64_t step, int pair, int64x2_t bytes) {
    vst1q_s8(reinterpret_cast<int8_t*>(values) + step * kStepBytes + 16 * pair,
             vreinterpretq_s8_s64(bytes));
  }
  static void store_dwords(uint8_t* values, int64_t step, int place, int8x16_t first,
                           int8x16_t second) {
    const int32x4_t a = vreinterpretq_s32_s8(first), b = vreinterpretq_s32_s8(second);
    store(values, step, 2 * place, vreinterpretq_s64_s32(vzip1q_s32(a, b)));
    store(values, step, 2 * place + 1, vreinterpretq_s64_s32(vzip2q_s32(a, b)));
  }
  static void store_rows(uint8_t* values, int64_t step, int place, const int8x16_t rows[4]) {
    repeat<2>([&](auto i) {
      const int64x2_t a = vreinterpretq_s64_s8(rows[2 * i]);
      const int64x2_t b = vreinterpretq_s64_s8(rows[2 * i + 1]);
      store(values, step, 2 * place + i, vzip1q_s64(a, b));
      store(values, step + 2, 2 * place + i, vzip2q_s64(a, b));
    });
  }
};

// An odd number of steps (8-bit codes only) is filled up with a step of zeros.
template <class Format, class Order>
inline void unpack_dwords(const Piece& p, int half, uint8_t* values) {
  constexpr int kBits = Format::kBits, kSteps = kUnitSteps<kBits>;
  const Format convert(p.tables);
  const uint8_t* at = p.codes + half * kDwordUnitBytes<kBits>;
  const int64_t bytes = p.halves * kDwordUnitBytes<kBits>, steps = p.columns / 4;
  if constexpr (kSteps == 1) {
    for (int64_t step = 0; step < steps; step += 2, at += 2 * bytes)
      repeat<4>([&](auto i) {
        const int8x16_t second =
            step + 1 < steps ? convert(vld1q_u8(at + bytes + 16 * i)) : vdupq_n_s8(0);
        Order::store_dwords(values, step, i, convert(vld1q_u8(at + 16 * i)), second);
      });
  } else {
    for (int64_t step = 0; step < steps; step += kSteps, at += bytes)
      repeat<4>([&](auto i) {
        const Unit<kBits> unit(at + 16 * i, 64, AsStored());
        repeat<kSteps / 2>([&](auto s) {
          Order::store_dwords(values, step + 2 * s, i, convert(unit.template codes<2 * s>()),
                              convert(unit.template codes<2 * s + 1>()));
        });
      });
  }
}

template <class Format, class Order>
inline void unpack_rows(const Piece& p, uint8_t* values) {
  constexpr int kBits = Format::kBits, kSteps = kUnitSteps<kBits>;
  for (int place = 0; place < 4; ++place) {
    const auto at = [&](const uint8_t* from, int r) {
      return from + lane_offset(Lanes::kRow, 4 * place + r);
    };
    const Format convert[4] = {Format(at(p.tables, 0)), Format(at(p.tables, 1)),
                               Format(at(p.tables, 2)), Format(at(p.tables, 3))};
    const uint8_t* codes = p.codes;
    for (int64_t step = 0; step < p.columns / 4; step += 4 * kSteps, codes += kRowUnitBytes<kBits>)
      repeat<kSteps>([&](auto s) {
        int8x16_t rows[4];
        repeat<4>([&](auto r) {
          rows[r] = convert[r](Unit<kBits>(at(codes, r), 256, AsStored()).template codes<s>());
        });
        Order::store_rows(values, step + 4 * s, place, rows);
      });
  }
}

// Returns the steps that were written: all of the piece, and an even number.
template <class Format, class Order>
__attribute__((noinline)) int64_t unpack(const Piece& p, int half, uint8_t* values) {
  if constexpr (Format::kLanes == Lanes::kDword)
    unpack_dwords<Format, Order>(p, half, values);
  else
    unpack_rows<Format, Order>(p, values);
  return round_up(p.columns / 4, 2);
}

// ---- chunks ----

// The job's start is -offset * sum(q) for codes as stored. Bytes that lost 128 leave out
// 128 * sum(q): of a symmetric weight or a table that is the whole offset; where there are zeros
// the job's start is 0 and x_sum, exact below 2^24, is the sum.
template <class Format>
inline int32_t start_of(const LinearJob& job, int64_t at) {
  if (!Format::kMinus128) return job.q_init[at];
  return job.w->zero_bytes ? 128 * (int32_t)job.x_sum[at] : 0;
}

template <class Format>
inline void start_chunk(const Block& b, int64_t chunk, int32_t* sums) {
  for (int half = 0; half < b.halves(); ++half)
    for (int i = 0; i < b.rows; ++i, sums += kHalf) {
      const int32x4_t start =
          vdupq_n_s32(start_of<Format>(b.job, (b.m + i) * b.job.chunks + chunk));
      for (int v = 0; v < 4; ++v) vst1q_s32(sums + 4 * v, start);
    }
}

inline void end_chunk(const Block& b, int64_t g, int64_t chunk, const int32_t* sums, float* acc) {
  const LinearJob& job = b.job;
  const bool grouped = job.w->h.activations == QK_ACT_INT8_GROUP;
  for (int half = 0; half < b.halves(); ++half) {
    const GroupScales scales = scales_at(b, g, half);
    for (int i = 0; i < b.rows; ++i, sums += kHalf, acc += kHalf) {
      const int64_t at = (b.m + i) * job.chunks + chunk;
      Half sum;
      for (int v = 0; v < 4; ++v) sum.v[v] = vcvtq_f32_s32(vld1q_s32(sums + 4 * v));
      add_chunk(scales, sum, scales.asymmetric ? job.x_sum[at] : 0.f,
                grouped ? job.q_scale[at] : 1.f, acc);
    }
  }
}

// Level: Order; kDirectRows and add_direct(piece, half, rows, sums) for up to that many rows;
// add_rows(values, steps, rows, sums), [row][16] sums, for more.
template <class Format, class Level>
inline void compute_int8(const Block& b) {
  const LinearJob& job = b.job;
  const Packed& w = *job.w;
  alignas(64) uint8_t values[kScratchBytes];
  alignas(64) int32_t sums[2 * kRowBlock * kHalf];
  alignas(64) float acc[2 * kRowBlock * kHalf];
  const bool direct = b.rows <= Level::kDirectRows;
  const int64_t piece = direct ? kDirect : kPiece;
  memset(acc, 0, sizeof(float) * (size_t)(b.halves() * b.rows * kHalf));
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t padded = w.group_columns_padded(g);
    for (int64_t c = 0; c * job.chunk < padded; ++c) {
      const int64_t chunk = g * job.chunks_per_group + c;
      const int64_t end = min64(padded, (c + 1) * job.chunk);
      start_chunk<Format>(b, chunk, sums);
      for (int64_t k = c * job.chunk; k < end; k += piece) {
        const Piece p = piece_at(b, g, k, min64(piece, end - k));
        const Rows rows = {job.q + b.m * job.q_stride + g * w.group_padded + k, job.q_stride,
                           b.rows};
        for (int half = 0; half < p.halves; ++half) {
          int32_t* of_half = sums + half * b.rows * kHalf;
          if constexpr (Level::kDirectRows > 0)
            if (direct) {
              Level::template add_direct<Format>(p, half, rows, of_half);
              continue;
            }
          const int64_t steps = unpack<Format, typename Level::Order>(p, half, values);
          Level::template add_rows<Format::kLargest>(values, steps, rows, of_half);
        }
      }
      end_chunk(b, g, chunk, sums, acc);
    }
  }
  finish_block(b, acc);
}

template <class Format, class Level>
inline void linear_int8(const LinearJob& job, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  walk(job, m0, m1, p0, p1, kRowBlock, [](const Block& b) { compute_int8<Format, Level>(b); });
}

}  // namespace
}  // namespace qkern
