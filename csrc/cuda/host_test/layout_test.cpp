// SPDX-License-Identifier: Apache-2.0
// The layout: a bijection, inverted exactly, made of the fragments of the PTX manual; packing and
// unpacking are inverse for every format; dtype changes are exact.
#include "device.h"
#include "weights.h"

using namespace qkern;
using namespace qkern::cuda;

static const struct {
  Order order;
  int bits;
} kOrders[] = {{Order::kSplit, 4},    {Order::kSplit, 8},    {Order::kAdjacent, 2},
               {Order::kAdjacent, 3}, {Order::kAdjacent, 4}, {Order::kByte, 4},
               {Order::kByte, 8},     {Order::kLookup, 2},   {Order::kLookup, 3},
               {Order::kLookup, 4}};

static void check_places() {
  for (const auto& o : kOrders) {
    // Every bit of a lane's vectors is one bit of one code, and slot_of says which.
    bool used[8][4][32] = {};
    int count = 0;
    for (int index = 0; index < 128; ++index) {
      const Slot slot = {index >> 5, index >> 4 & 1, index >> 2 & 3, index & 3};
      int seen = 0;
      for (int part = 0; part < place_count(o.bits); ++part) {
        const Place p = place_of(o.order, o.bits, slot, part);
        for (int b = 0; b < p.width; ++b) {
          CHECK(!used[p.vector][p.word][p.shift + b], "order %d bits %d", (int)o.order, o.bits);
          used[p.vector][p.word][p.shift + b] = true;
          ++count;
          seen |= 1 << (p.low + b);
          const SlotBit back = slot_of(o.order, o.bits, p.vector, p.word, p.shift + b);
          CHECK(back.slot.i == slot.i && back.slot.h == slot.h && back.slot.j == slot.j &&
                    back.slot.s == slot.s && back.bit == p.low + b,
                "order %d bits %d slot %d", (int)o.order, o.bits, index);
        }
      }
      CHECK(seen == (1 << o.bits) - 1, "order %d bits %d", (int)o.order, o.bits);
    }
    CHECK(count == o.bits * 128, "order %d bits %d", (int)o.order, o.bits);
  }
}

// A lane's codes are the elements of its A fragments: steps of 16 columns with 16-bit types, of 32
// columns with bytes.
static void check_fragments() {
  bool seen[3][64][64] = {};
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j)
        for (int h = 0; h < 2; ++h)
          for (int s = 0; s < 4; ++s) {
            const Slot slot = {i, h, j, s};
            const int row = block_row(slot, lane);
            // Element of m16n8k16: register h + 2 (s >> 1), half s & 1.
            const int e16 = 2 * (h + 2 * (s >> 1)) + (s & 1);
            CHECK(row == 16 * i + Fragment16::a_row(lane, e16), "lane %d", lane);
            const int column = block_column(Order::kSplit, slot, lane);
            CHECK(column == 16 * j + Fragment16::a_column(lane, e16), "lane %d", lane);
            CHECK(block_column(Order::kAdjacent, slot, lane) == column, "lane %d", lane);
            // Element of m16n8k32: register h + 2 (j & 1), byte s.
            const int e8 = 4 * (h + 2 * (j & 1)) + s;
            CHECK(row == 16 * i + Fragment8::a_row(lane, e8), "lane %d", lane);
            const int column8 = block_column(Order::kByte, slot, lane);
            CHECK(column8 == 32 * (j >> 1) + Fragment8::a_column(lane, e8), "lane %d", lane);
            CHECK(block_column(Order::kLookup, slot, lane) == column8, "lane %d", lane);
            for (const Order order : {Order::kSplit, Order::kByte}) {
              const int c = block_column(order, slot, lane);
              CHECK(!seen[(int)order][row][c], "row %d column %d", row, c);
              seen[(int)order][row][c] = true;
              int back_lane;
              const Slot back = slot_at(order, row, c, &back_lane);
              CHECK(back_lane == lane && back.i == i && back.h == h && back.j == j && back.s == s,
                    "row %d column %d", row, c);
            }
          }
  for (int row = 0; row < 64; ++row) {
    CHECK(scale_row(scale_place(row)) == row, "row %d", row);
    // A lane's eight rows are neighbours, in the order i, h.
    CHECK(scale_place(row) == 8 * (row & 7) + 2 * (row >> 4) + (row >> 3 & 1), "row %d", row);
  }
}

static void check_columns(const Layout& l) {
  int64_t real = 0;
  for (int64_t padded = 0; padded < l.k_padded; ++padded) {
    const int64_t column = l.column_of(padded);
    if (column < 0) continue;
    ++real;
    CHECK(column < l.k && l.padded_column(column) == padded, "k %lld group %lld column %lld",
          (long long)l.k, (long long)l.group, (long long)column);
    if (l.groups > 1)
      CHECK(padded / l.group_padded == column / l.group, "a group starts at its padded multiple");
  }
  CHECK(real == l.k && l.group_padded % l.unit == 0 && l.k_padded % 64 == 0, "k %lld group %lld",
        (long long)l.k, (long long)l.group);
}

static void check_round_trips() {
  uint64_t seed = 1;
  for (const int activations : {QK_ACT_FLOAT, QK_ACT_INT8})
    for (const int kind : {QK_KIND_INT, QK_KIND_TABLE})
      for (const int bits : {2, 3, 4, 8})
        for (const int64_t k : {1, 7, 64, 65, 100, 130})
          for (const int64_t group : {0, 8, 16, 24, 32, 64, 100})
            for (const int64_t n : {1, 63, 65}) {
              Case c = {kind, bits, activations, n, k, group};
              c.exact = false;
              const int pick = (int)(seed % 5);
              c.scale_dtype = kind == QK_KIND_TABLE && pick == 4
                                  ? -1
                                  : (const int[]){QK_F32, QK_F16, QK_BF16, QK_E8M0, QK_E4M3}[pick];
              if (kind == QK_KIND_INT)
                c.zero_dtype = (const int[]){-1, QK_U8, QK_F16, QK_F32, QK_BF16}[seed / 2 % 5];
              c.table_per = (int)(seed % (bits == 3 ? 4 : 3));
              const HostWeight h = make_weight(c, seed++);
              const Layout& l = h.layout;
              check_columns(l);
              const int64_t row_bytes = (k * bits + 7) / 8;
              for (int64_t row = 0; row < n; ++row) {
                for (int64_t byte = 0; byte < row_bytes; ++byte) {
                  uint8_t mask = 0xff;
                  if (byte == row_bytes - 1 && k * bits % 8)
                    mask = (uint8_t)((1 << k * bits % 8) - 1);
                  CHECK(unpack_codes_byte(l, h.packed.data, row, byte) ==
                            (h.codes[row * h.w.codes_stride_bytes + byte] & mask),
                        "bits %d k %lld group %lld row %lld", bits, (long long)k, (long long)group,
                        (long long)row);
                }
                for (int64_t g = 0; g < l.groups; ++g)
                  for (int part = 0; part < 2; ++part) {
                    const bool has = part ? h.w.zeros != nullptr : h.w.scales != nullptr;
                    if (!has) continue;
                    const qk_dtype dtype = part ? l.zero_dtype : l.scale_dtype;
                    const uint8_t* from = part ? h.zeros.data : h.scales.data;
                    uint8_t back[4];
                    convert_number(h.packed.data + (part ? l.zeros_offset : l.scales_offset),
                                   part ? l.zero_stored : l.scale_stored, l.scale_index(row, g),
                                   back, dtype, 0);
                    const int size = dtype_size(dtype);
                    CHECK(memcmp(back, from + (row * l.groups + g) * size, (size_t)size) == 0,
                          "dtype %d", dtype);
                  }
              }
            }
}

// Scales of one byte keep their value and come back, all 256 of them.
static void check_small_types() {
  for (int v = 0; v < 256; ++v) {
    const uint8_t byte = (uint8_t)v;
    uint8_t back = 0;
    uint16_t h = 0;
    convert_number(&byte, QK_E8M0, 0, &h, QK_BF16, 0);
    CHECK(float_bits(BF16::to_float(h)) == float_bits(e8m0_to_float(byte)), "e8m0 %d", v);
    convert_number(&h, QK_BF16, 0, &back, QK_E8M0, 0);
    CHECK(back == byte, "e8m0 %d", v);
    convert_number(&byte, QK_E4M3, 0, &h, QK_F16, 0);
    const float value = e4m3_to_float(byte), stored = F16::to_float(h);
    CHECK(value != value ? stored != stored : float_bits(value) == float_bits(stored), "e4m3 %d",
          v);
    convert_number(&h, QK_F16, 0, &back, QK_E4M3, 0);
    CHECK(back == byte, "e4m3 %d", v);
    convert_number(&byte, QK_U8, 0, &h, QK_F16, 0);
    CHECK(F16::to_float(h) == (float)v, "u8 %d", v);
    convert_number(&h, QK_F16, 0, &back, QK_U8, 0);
    CHECK(back == byte, "u8 %d", v);
  }
}

// Offsets stay right where 32 bits would not do.
static void check_large_sizes() {
  for (const int64_t delta : {-1, 0, 1}) {
    qk_weight w = {};
    w.struct_size = sizeof w;
    w.kind = QK_KIND_INT;
    w.bits = 8;
    w.n = ((int64_t)1 << 31) / 4096 + delta;
    w.k = 4096;
    w.group = 128;
    const float one = 1;
    w.scales = &one;
    Layout l;
    CHECK(!make_layout(w, &l), "a large weight has a layout");
    CHECK(l.total_bytes >= w.n * w.k && l.scales_offset >= w.n * w.k, "%lld",
          (long long)l.total_bytes);
    int shift, width, low;
    const int64_t last = l.code_byte(w.n - 1, w.k - 1, 0, &shift, &width, &low);
    CHECK(last < l.scales_offset && last >= (w.n - 64) * w.k, "%lld", (long long)last);
  }
}

void check_layout() {
  check_places();
  check_fragments();
  check_round_trips();
  check_small_types();
  check_large_sizes();
}
