// SPDX-License-Identifier: Apache-2.0
#include "activations.h"

#include <cstring>
#include <new>

#include "error.h"

namespace qkern {
namespace {

int32_t sum_int8(const int8_t* q, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += q[i];
  return sum;
}

// Sixteen partial sums, folded in order: the lane sum of the contract.
float lane_sum(const float* x, int64_t count) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += x[i + l];
  for (int l = 0; i + l < count; ++l) lanes[l] += x[i + l];
  float sum = lanes[0];
  for (int l = 1; l < 16; ++l) sum += lanes[l];
  return sum;
}

// Calls fn(chunk index, first packed column, columns) for every chunk of a row.
template <class Fn>
void for_chunks(const RowLayout& l, const Packed& w, const Fn& fn) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t columns = w.group_columns_padded(g);
    for (int64_t c = 0; c * l.chunk < columns; ++c)
      fn(g * l.chunks_per_group + c, g * w.group_padded + c * l.chunk,
         min64(l.chunk, columns - c * l.chunk));
  }
}

void prepare_int8(const RowLayout& l, const Packed& w, const void* dense, qk_dtype dtype, int8_t* q,
                  float* scales, int32_t* init, float* sums) {
  const bool grouped = w.h.activations == QK_ACT_INT8_GROUP;
  const int64_t group = !grouped ? w.h.k : w.groups > 1 ? w.h.group : l.chunk;
  if (grouped || w.groups == 1 || w.group_padded == w.h.group) {
    const int64_t stride = grouped && w.groups > 1 ? w.group_padded : group;
    l.quantize->quantize(dense, dtype, w.h.k, group, q, stride, scales);
  } else {
    // One scale for the row, but padded groups: quantize densely, then spread from the back.
    l.quantize->quantize(dense, dtype, w.h.k, w.h.k, q, w.h.k, scales);
    for (int64_t g = w.groups - 1; g > 0; --g)
      std::memmove(q + g * w.group_padded, q + g * w.h.group, (size_t)w.group_columns(g));
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t columns = w.group_columns(g);
    std::memset(q + g * w.group_padded + columns, 0, (size_t)(w.group_columns_padded(g) - columns));
  }
  std::memset(q + w.k_padded, 0, (size_t)(l.row_stride - w.k_padded));
  for (int64_t i = 0; i < l.scales; ++i) scales[i] *= w.h.table_scale;
  const int32_t offset = code_offset(w);
  for_chunks(l, w, [&](int64_t chunk, int64_t column, int64_t columns) {
    const int32_t sum = sum_int8(q + column, columns);
    // A sum that a valid column count allows can still exceed int32 when multiplied; the wrapped
    // value is what wrapping accumulation needs.
    init[chunk] = (int32_t)(0u - (uint32_t)offset * (uint32_t)sum);
    if (sums) sums[chunk] = (float)sum;
  });
}

void prepare_float(const RowLayout& l, const Packed& w, const void* dense, qk_dtype dtype,
                   float* x) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t columns = w.group_columns(g), padded = w.group_columns_padded(g);
    float* to = x + g * w.group_padded;
    if (dtype == QK_F32)
      std::memcpy(to, (const float*)dense + g * w.h.group, (size_t)columns * 4);
    else if (w.group_padded != w.h.group || g == 0) {
      // Converted in one piece where groups are not padded.
      const int64_t count = w.group_padded != w.h.group ? columns : w.h.k;
      l.convert->convert((const uint16_t*)dense + g * w.h.group, dtype, count, to);
    }
    std::memset(to + columns, 0, (size_t)(padded - columns) * 4);
  }
  std::memset(x + w.k_padded, 0, (size_t)(l.row_stride - w.k_padded) * 4);
}

// Scratch that the library keeps for a thread that brings none.
struct Scratch {
  void* data = nullptr;
  int64_t bytes = 0;

  void* at_least(int64_t wanted) {
    if (wanted > bytes) {
      ::operator delete(data, std::align_val_t(64));
      data = ::operator new((size_t)wanted, std::align_val_t(64), std::nothrow);
      bytes = data ? wanted : 0;
    }
    return data;
  }
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
};

thread_local Scratch scratch;

}  // namespace

RowLayout row_layout(const Packed& w, int64_t rows, bool stored) {
  const PackedHeader& h = w.h;
  RowLayout l = {};
  l.quantize = &select_row(Op::kQuantize);
  l.convert = &select_row(Op::kConvert);
  l.int8 = h.activations != QK_ACT_FLOAT;
  l.sums = h.zero_stored >= 0;
  l.rows = rows;
  const bool grouped = h.activations == QK_ACT_INT8_GROUP;
  l.chunk = !l.int8        ? kFloatChunk
            : !grouped     ? kIntChunk
            : w.groups > 1 ? w.group_padded
                           : round_up(kActivationGroup, w.unit);
  l.chunks_per_group = ceil_div(w.group_padded, l.chunk);
  l.chunks = (w.groups - 1) * l.chunks_per_group + ceil_div(w.last_padded, l.chunk);
  l.scales = grouped ? l.chunks : 1;
  // 64 bytes more than the columns: rows then never lie a multiple of 4 KiB apart, where they
  // would share cache sets.
  l.row_stride = l.int8 ? round_up(w.k_padded, 64) + kReadPadding
                        : round_up(w.k_padded, 16) + kReadPadding / 4;
  auto take = [&](int64_t bytes) {
    const int64_t begin = l.bytes;
    l.bytes = round_up(begin + bytes, 64);
    return begin;
  };
  l.rows_at = take(stored ? rows * l.row_stride * (l.int8 ? 1 : 4) : 0);
  l.scales_at = take(l.int8 ? rows * l.scales * 4 : 0);
  l.init_at = take(l.int8 ? rows * l.chunks * 4 : 0);
  l.sums_at = take(l.sums ? rows * l.chunks * 4 : 0);
  return l;
}

void sum_row(const RowLayout& l, const Packed& w, const float* x, uint8_t* block, int64_t r) {
  if (!l.sums) return;
  float* sums = reinterpret_cast<float*>(block + l.sums_at) + r * l.chunks;
  for_chunks(l, w, [&](int64_t chunk, int64_t column, int64_t columns) {
    sums[chunk] = lane_sum(x + column, columns);
  });
}

void prepare_row(const RowLayout& l, const Packed& w, const void* dense, qk_dtype dtype,
                 uint8_t* block, int64_t r) {
  if (l.int8) {
    float* sums = l.sums ? reinterpret_cast<float*>(block + l.sums_at) + r * l.chunks : nullptr;
    prepare_int8(l, w, dense, dtype, (int8_t*)block + l.rows_at + r * l.row_stride,
                 (float*)(block + l.scales_at) + r * l.scales,
                 (int32_t*)(block + l.init_at) + r * l.chunks, sums);
    return;
  }
  float* ready = reinterpret_cast<float*>(block + l.rows_at) + r * l.row_stride;
  prepare_float(l, w, dense, dtype, ready);
  sum_row(l, w, ready, block, r);
}

LinearJob job_of(const RowLayout& l, const Packed& w, const uint8_t* block, int64_t first,
                 int64_t rows) {
  LinearJob job = {};
  job.w = &w;
  job.m = rows;
  job.chunk = l.chunk;
  job.chunks_per_group = l.chunks_per_group;
  job.chunks = l.chunks;
  if (l.int8) {
    job.q = (const int8_t*)(block + l.rows_at) + first * l.row_stride;
    job.q_stride = l.row_stride;
    job.q_scale = (const float*)(block + l.scales_at) + first * l.scales;
    job.q_init = (const int32_t*)(block + l.init_at) + first * l.chunks;
  } else {
    job.x = (const float*)(block + l.rows_at) + first * l.row_stride;
    job.x_stride = l.row_stride;
  }
  job.x_sum = l.sums ? (const float*)(block + l.sums_at) + first * l.chunks : nullptr;
  return job;
}

bool is_float(qk_dtype d) { return d == QK_F32 || d == QK_F16 || d == QK_BF16; }

bool copies_bias(const void* bias, qk_dtype dtype) {
  return bias && (dtype != QK_F32 || reinterpret_cast<uintptr_t>(bias) % 4 != 0);
}

const float* float_bias(const void* bias, qk_dtype dtype, int64_t n, float* to) {
  if (!copies_bias(bias, dtype)) return static_cast<const float*>(bias);
  for (int64_t i = 0; i < n; ++i) to[i] = load_float(bias, dtype, i);
  return to;
}

void gather_elements(const uint8_t* from, int64_t step, const int32_t* order, int64_t count,
                     int size, uint8_t* dense) {
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = (order ? order[k] : k) * step;
    if (size == 4)
      std::memcpy(dense + 4 * k, from + 4 * at, 4);
    else
      std::memcpy(dense + 2 * k, from + 2 * at, 2);
  }
}

uint8_t* workspace_of(const char* op, void* given, int64_t given_bytes, int64_t needed,
                      qk_status* status) {
  // A call that needs none still gets an address, which tells success from failure.
  void* workspace = given ? given : scratch.at_least(max64(needed, 64));
  if (!workspace)
    *status =
        fail(QK_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch", op, (long long)needed);
  else if (given && (given_bytes < needed || reinterpret_cast<uintptr_t>(given) % 64)) {
    *status = fail(QK_INVALID_ARGUMENT,
                   "%s: expected a 64-byte aligned workspace of %lld bytes, got %lld bytes", op,
                   (long long)needed, (long long)given_bytes);
    return nullptr;
  }
  return static_cast<uint8_t*>(workspace);
}

}  // namespace qkern
