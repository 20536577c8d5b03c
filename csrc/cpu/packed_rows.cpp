// SPDX-License-Identifier: Apache-2.0
// Rows of the packed layout as floats: a span of columns at a time, which is small enough for the
// first level of cache, its codes are unpacked to bytes and its scales, zeros and tables laid out
// by row; the kernel that serves canonical storage does the rest.
//
// One core of a Zen 4 server, 4096 x 4096, 4 bits in groups of 64: float32 in 10 ms, float16 in 7
// ms (from canonical storage 4 and 3 ms; a copy of as many floats 6.3 and 3.4 ms); 1024 single rows
// 9 ms.
//
// Many rows of a half: all sixteen are unpacked by a kernel. Few (an embedding): a row's bytes are
// picked out of the blocks, a plane of a lane at a time; that reads all sixteen rows' cache lines,
// which is the price of the layout.

#include "packed_rows.h"

#include <cstring>

namespace qkern {
namespace {

constexpr int64_t kSpan = 1024;                        // columns; whole units
constexpr int64_t kLargestUnit = 128;                  // columns of padding behind them
constexpr int64_t kCodes = kSpan + kLargestUnit + 64;  // bytes of a row; not a power of two apart
constexpr int64_t kSpanGroups = kSpan / 8;             // shorter groups make shorter spans
constexpr int64_t kPickAhead = 32;  // units: a row takes a few bytes of each of its lines
constexpr int kFewRows = 4;         // picked out one by one

// A plane of kBits bits of one lane: the fields of `Word` after Word of the lane.
template <class Word, int kBits>
void pick_plane(const uint8_t* block, int64_t block_bytes, int64_t blocks, int shift, bool first,
                uint8_t* out, int64_t lane_bytes) {
  const Word mask = (Word)((Word)-1 / 255 * ((1 << kBits) - 1));
  for (int64_t b = 0; b < blocks; ++b, block += block_bytes)
    for (int64_t part = 0; part < lane_bytes; part += (int64_t)sizeof(Word)) {
      Word word;
      std::memcpy(&word, block + part, sizeof word);
      for (int i = 0; i < 8 / kBits; ++i) {
        uint8_t* to = out + (b * (8 / kBits) + i) * lane_bytes + part;
        Word field = (Word)((word >> (i * kBits) & mask) << shift), old = 0;
        if (!first) std::memcpy(&old, to, sizeof old);
        field |= old;
        std::memcpy(to, &field, sizeof field);
      }
    }
}

template <class Word>
void pick_row(const Packed& w, const uint8_t* codes, int half, int halves, int r, int64_t k0,
              int64_t columns, uint8_t* out) {
  const Planes planes = planes_of(w.h.bits);
  const int64_t block_bytes = kHalf * w.lane_bytes;
  const int64_t unit_bytes = (int64_t)w.unit * kHalf * w.h.bits / 8;
  for (int64_t u = k0 / w.unit; u < (k0 + columns) / w.unit; ++u, out += w.unit) {
    const uint8_t* at = codes + (u * halves + half) * unit_bytes + lane_offset(w.lanes, r);
    for (int64_t line = 0; line < unit_bytes; line += block_bytes)
      __builtin_prefetch(at + kPickAhead * unit_bytes * halves + line);
    for (int p = 0, shift = 0; p < planes.count; shift += planes.bits[p], ++p) {
      const int64_t blocks = w.unit * planes.bits[p] / (8 * w.lane_bytes);
      const bool first = p == 0;
      switch (planes.bits[p]) {
        case 8:
          pick_plane<Word, 8>(at, block_bytes, blocks, shift, first, out, w.lane_bytes);
          break;
        case 4:
          pick_plane<Word, 4>(at, block_bytes, blocks, shift, first, out, w.lane_bytes);
          break;
        case 2:
          pick_plane<Word, 2>(at, block_bytes, blocks, shift, first, out, w.lane_bytes);
          break;
        default:
          pick_plane<Word, 1>(at, block_bytes, blocks, shift, first, out, w.lane_bytes);
      }
      at += blocks * block_bytes;
    }
  }
}

template <class T>
void scatter_elements(const void* values, int64_t count, const int32_t* to, void* out) {
  for (int64_t i = 0; i < count; ++i)
    static_cast<T*>(out)[to[i]] = static_cast<const T*>(values)[i];
}

// Element r of each of `groups` arrays of 16 that lie `step` bytes apart.
template <class T>
void copy_column(const uint8_t* from, int64_t step, int64_t groups, int r, uint8_t* to) {
  for (int64_t g = 0; g < groups; ++g)
    std::memcpy(to + g * sizeof(T), from + g * step + r * sizeof(T), sizeof(T));
}

void copy_column(int size, const uint8_t* from, int64_t step, int64_t groups, int r, uint8_t* to) {
  if (size == 4)
    copy_column<uint32_t>(from, step, groups, r, to);
  else if (size == 2)
    copy_column<uint16_t>(from, step, groups, r, to);
  else
    copy_column<uint8_t>(from, step, groups, r, to);
}

}  // namespace

void scatter(const void* values, qk_dtype dtype, int64_t count, const int32_t* to, void* out) {
  if (dtype == QK_F32)
    scatter_elements<uint32_t>(values, count, to, out);
  else
    scatter_elements<uint16_t>(values, count, to, out);
}

struct PackedDecoder::Scratch {
  uint8_t codes[kHalf][kCodes];
  uint8_t scales[kHalf][4 * kSpanGroups], zeros[kHalf][4 * kSpanGroups];
  float tables[kHalf][256];
  float values[kSpan];  // of a row in stored order, where it is permuted
};

// Columns of some rows: whole groups, or a part of one.
struct PackedDecoder::Span {
  const uint8_t* panel;
  int halves, half, row, count;  // rows row .. row + count - 1 of the half
  int64_t group, groups;
  int64_t skip, columns;  // of the first group; together
  int64_t begin;          // first column of the weight
};

int64_t PackedDecoder::scratch_bytes() { return round_up((int64_t)sizeof(Scratch), 64); }

PackedDecoder::PackedDecoder(const Packed& w, DequantizeKernel dequantize, UnpackKernel unpack,
                             qk_dtype dtype, bool past_caches, uint8_t* scratch)
    : w_(w),
      dequantize_(dequantize),
      unpack_(unpack),
      dtype_(dtype),
      past_caches_(past_caches),
      s_(*reinterpret_cast<Scratch*>(scratch)) {
  if (w.h.kind == QK_KIND_TABLE && w.h.table_per == QK_TABLE_PER_TENSOR)
    packed_table(w, static_cast<const uint8_t*>(w.table), 0, s_.tables[0]);
}

// Groups are padded to units; each begins where the one before really ends.
void PackedDecoder::read_codes(const Span& span) {
  for (int64_t i = 0; i < span.groups; ++i) {
    const int64_t g = span.group + i;
    const uint8_t* codes = w_.codes_of(w_.group_block(span.panel, g, span.halves));
    const int64_t columns = round_up(span.groups > 1 ? w_.group_columns(g) : span.columns, w_.unit);
    const int64_t at = i * w_.h.group;
    if (span.count >= kFewRows) {
      unpack_(w_, codes, span.half, span.halves, span.skip, columns, s_.codes[0] + at, kCodes);
      continue;
    }
    for (int r = span.row; r < span.row + span.count; ++r)
      if (w_.lanes == Lanes::kRow)
        pick_row<uint64_t>(w_, codes, span.half, span.halves, r, span.skip, columns,
                           s_.codes[r] + at);
      else
        pick_row<uint32_t>(w_, codes, span.half, span.halves, r, span.skip, columns,
                           s_.codes[r] + at);
  }
}

void PackedDecoder::read_numbers(const Span& span) {
  // The last group may be shorter than others, so its block is looked at by itself.
  const int64_t whole = min64(span.groups, w_.groups - 1 - span.group);
  for (int64_t begin = 0; begin < span.groups; begin += max64(whole, 1)) {
    const int64_t g = span.group + begin, groups = begin < whole ? whole : 1;
    const uint8_t* block = w_.group_block(span.panel, g, span.halves);
    const int64_t step = w_.group_bytes * span.halves;
    for (int r = span.row; r < span.row + span.count; ++r) {
      if (w_.scale_bytes) {
        const int size = dtype_size(w_.h.scale_stored);
        copy_column(size, w_.scales_of(block, g, span.halves) + span.half * w_.scale_bytes, step,
                    groups, r, s_.scales[r] + begin * size);
      }
      if (w_.zero_bytes) {
        const int size = dtype_size(w_.h.zero_stored);
        copy_column(size, w_.zeros_of(block, g, span.halves) + span.half * w_.zero_bytes, step,
                    groups, r, s_.zeros[r] + begin * size);
      }
    }
  }
}

void PackedDecoder::write(const Span& span, uint8_t* out, int64_t stride_bytes) {
  const int64_t size = dtype_size(dtype_);
  for (int r = span.row; r < span.row + span.count; ++r, out += stride_bytes) {
    DequantizeRow row = {};
    row.codes = s_.codes[r];
    row.bits = w_.h.bits;
    row.stream_bits = 8;
    row.k = span.columns;
    row.group = w_.h.group;
    row.scales = w_.scale_bytes ? s_.scales[r] : nullptr;
    row.scale_dtype = w_.h.scale_stored;
    row.zeros = w_.zero_bytes ? s_.zeros[r] : nullptr;
    row.zero_dtype = w_.h.zero_stored;
    if (w_.h.kind == QK_KIND_TABLE)
      row.table = s_.tables[w_.h.table_per == QK_TABLE_PER_TENSOR ? 0 : r];
    row.table_scale = w_.h.table_scale;
    row.out = w_.perm ? static_cast<void*>(s_.values) : out + span.begin * size;
    row.out_dtype = dtype_;
    row.past_caches = past_caches_ && !w_.perm;
    dequantize_(row);
    if (w_.perm) scatter(s_.values, dtype_, span.columns, w_.perm + span.begin, out);
  }
}

void PackedDecoder::rows(int64_t n, int count, uint8_t* out, int64_t stride_bytes) {
  const int64_t half_index = n / kHalf, p = half_index / w_.panel_halves;
  Span span = {};
  span.panel = w_.panel(p);
  span.halves = w_.halves_of(p);
  span.half = (int)(half_index % w_.panel_halves);
  span.row = (int)(n % kHalf);
  span.count = count;
  const bool table = w_.h.kind == QK_KIND_TABLE;
  const bool table_per_row = table && w_.h.table_per == QK_TABLE_PER_ROW;
  const bool table_per_group = table && w_.h.table_per >= QK_TABLE_PER_GROUP;  // or tile
  const auto read_tables = [&] {
    const uint8_t* tables = w_.half_tables(span.panel, span.group, span.halves, span.half);
    for (int r = span.row; r < span.row + count; ++r) packed_table(w_, tables, r, s_.tables[r]);
  };
  if (table_per_row) read_tables();
  const int64_t most = table_per_group ? 1 : max64(1, min64(kSpanGroups, kSpan / w_.h.group));
  for (span.group = 0; span.group < w_.groups; span.group += span.groups) {
    span.groups = min64(most, w_.groups - span.group);
    const int64_t first = span.group * w_.h.group;
    const int64_t end = min64(w_.h.k, first + span.groups * w_.h.group) - first;
    if (table_per_group) read_tables();
    read_numbers(span);
    for (span.skip = 0; span.skip < end; span.skip += kSpan) {
      span.columns = min64(kSpan, end - span.skip);
      span.begin = first + span.skip;
      read_codes(span);
      write(span, out, stride_bytes);
    }
  }
}

}  // namespace qkern
