// SPDX-License-Identifier: Apache-2.0
// Converters: every code in every slot, among random neighbours, gives exactly its value in the
// register and position that the fragment tables ask for.
#include "../convert_tables.cuh"
#include "check.h"
#include "device.h"

using namespace qkern;
using namespace qkern::cuda;

namespace {

// The words of one lane's block whose codes are given.
struct LaneBlock {
  Vector vectors[8 * 32];
  template <class C>
  void fill(const int (*codes)[2][4][4]) {  // [i][h][j][s]
    memset(vectors, 0, sizeof vectors);
    for (int index = 0; index < 128; ++index) {
      const Slot c = {index >> 5, index >> 4 & 1, index >> 2 & 3, index & 3};
      for (int part = 0; part < place_count(C::kBits); ++part) {
        const Place p = place_of(C::kOrder, C::kBits, c, part);
        vectors[p.vector * 32].word[p.word] |=
            (uint32_t)(codes[c.i][c.h][c.j][c.s] >> p.low & ((1 << p.width) - 1)) << p.shift;
      }
    }
  }
};

void random_codes(Random& random, int bits, int (*codes)[2][4][4]) {
  for (int index = 0; index < 128; ++index)
    codes[index >> 5][index >> 4 & 1][index >> 2 & 3][index & 3] = random.below(1 << bits);
}

// `fragment(words, i, step, a)`; `expected(i, h, code)` as a 16-bit pattern.
template <class C, class Fragment, class Expected>
void check_16(Fragment&& fragment, Expected&& expected) {
  Random random(C::kBits);
  LaneBlock block;
  int codes[4][2][4][4];
  const auto verify = [&] {
    block.fill<C>(codes);
    for (int step = 0; step < 4; ++step) {
      const auto w = C::load(block.vectors, step);
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        fragment(w.tile[i], i, step, a);
        for (int h = 0; h < 2; ++h)
          for (int s = 0; s < 4; ++s) {
            const uint16_t got = (uint16_t)(a[h + 2 * (s >> 1)] >> (16 * (s & 1)));
            CHECK(got == expected(i, h, codes[i][h][step][s]), "bits %d code %d: %04x", C::kBits,
                  codes[i][h][step][s], got);
          }
      }
    }
  };
  for (int slot = 0; slot < 128; ++slot)
    for (int code = 0; code < 1 << C::kBits; ++code) {
      random_codes(random, C::kBits, codes);
      codes[slot >> 5][slot >> 4 & 1][slot >> 2 & 3][slot & 3] = code;
      verify();
    }
}

template <class T>
void check_integers() {
  check_16<Int4<T>>(
      [](const uint32_t* w, int, int step, uint32_t* a) { Int4<T>::fragment(w, step, a); },
      [](int, int, int code) { return T::from_float((float)(code - 8)); });
  check_16<Int8<T>>(
      [](const uint32_t* w, int, int step, uint32_t* a) { Int8<T>::fragment(w, step, a); },
      [](int, int, int code) { return T::from_float((float)(code - 128)); });
}

template <class T, int kBits>
void check_tables() {
  Random random(7);
  using C = Table<T, kBits, Tables::kRows>;
  uint16_t entries[8][1 << kBits];
  typename C::Registers tables[8];
  for (int r = 0; r < 8; ++r) {
    for (int e = 0; e < 1 << kBits; ++e) entries[r][e] = (uint16_t)random.next();
    tables[r] = make_row_table<typename C::Registers>(entries[r]);
  }
  check_16<C>([&](const uint32_t* w, int i, int step,
                  uint32_t* a) { C::fragment(w, step, tables + 2 * i, a); },
              [&](int i, int h, int code) { return entries[2 * i + h][code]; });
}

template <class T>
void check_pairs() {
  Random random(8);
  uint16_t entries[16];
  for (uint16_t& e : entries) e = (uint16_t)random.next();
  // Each lane reads its own copy alone.
  for (const int lane : {0, 1, 30, 31}) {
    std::vector<uint32_t> table(256 * 32);
    for (int e = 0; e < 256; ++e)
      table[(size_t)(e * 32 + lane)] = entries[e & 15] | (uint32_t)entries[e >> 4] << 16;
    check_16<Pairs4<T>>(
        [&](const uint32_t* w, int, int, uint32_t* a) {
          Pairs4<T>::fragment(w, (const uint8_t*)table.data(), lane, a);
        },
        [&](int, int, int code) { return entries[code]; });
  }
}

// `fragment(words, i, step, a)`; `expected(i, h, code)` as an integer.
template <class C, class Fragment, class Expected>
void check_8(Fragment&& fragment, Expected&& expected) {
  Random random(9);
  LaneBlock block;
  int codes[4][2][4][4];
  for (int slot = 0; slot < 128; ++slot)
    for (int code = 0; code < 1 << C::kBits; ++code) {
      random_codes(random, C::kBits, codes);
      codes[slot >> 5][slot >> 4 & 1][slot >> 2 & 3][slot & 3] = code;
      block.fill<C>(codes);
      for (int step = 0; step < 2; ++step) {
        const auto w = C::load(block.vectors, step);
        for (int i = 0; i < 4; ++i) {
          uint32_t a[4];
          fragment(w.tile[i], i, step, a);
          for (int r = 0; r < 4; ++r)
            for (int s = 0; s < 4; ++s) {
              const int got = (int8_t)(a[r] >> (8 * s));
              const int wanted = expected(i, r & 1, codes[i][r & 1][2 * step + (r >> 1)][s]);
              CHECK(got == wanted, "bits %d: %d for %d", C::kBits, got, wanted);
            }
        }
      }
    }
}

template <class C>
void check_bytes() {
  check_8<C>([](const uint32_t* w, int, int step, uint32_t* a) { C::fragment(w, step, a); },
             [](int, int, int code) { return (code - (1 << (C::kBits - 1))) * (1 << C::kShift); });
}

template <int kBits>
void check_byte_tables() {
  Random random(11);
  using C = ByteTable<kBits, Tables::kRows>;
  int8_t entries[8][1 << kBits];
  typename C::Registers tables[8];
  for (int r = 0; r < 8; ++r) {
    float table[1 << kBits];
    uint16_t rounded[1 << kBits];
    for (int e = 0; e < 1 << kBits; ++e) {
      entries[r][e] = (int8_t)random.next();
      table[e] = entries[r][e];
    }
    CHECK(round_table<S8>(table, 1 << kBits, false, rounded) == 1.f, "integers are not divided");
    tables[r] = make_row_table<typename C::Registers>(rounded);
  }
  check_8<C>([&](const uint32_t* w, int i, int step,
                 uint32_t* a) { C::fragment(w, step, tables + 2 * i, a); },
             [&](int i, int h, int code) { return (int)entries[2 * i + h][code]; });
}

// Block tables: stored byte by byte, loaded in parts, every byte of every table in its place once.
template <class Registers>
void check_block_tables() {
  constexpr int kBytes = sizeof(Registers);
  for (const bool shared : {false, true}) {
    const int g_count = shared ? 1 : 8;
    alignas(16) uint8_t block[8 * 8 * kBytes];
    std::vector<char> used(sizeof block);
    for (int r = 0; r < 8; ++r)
      for (int g = 0; g < g_count; ++g)
        for (int i = 0; i < kBytes; ++i) {
          const int at = table_byte(kBytes, r, g, shared, i);
          CHECK(at >= 0 && at < 8 * g_count * kBytes && !used[(size_t)at], "byte %d", at);
          used[(size_t)at] = 1;
          block[at] = (uint8_t)(7 * i + 31 * r + 97 * g);
        }
    for (int g = 0; g < 8; ++g) {
      Registers tables[8];
      load_tables(block, g, shared, tables);
      for (int r = 0; r < 8; ++r)
        for (int i = 0; i < kBytes; ++i)
          CHECK(((const uint8_t*)(tables + r))[i] ==
                    (uint8_t)(7 * i + 31 * r + 97 * (shared ? 0 : g)),
                "r %d g %d byte %d", r, g, i);
    }
  }
}

template <class T>
void check_rounding(float precision) {
  Random random(10);
  for (int round = 0; round < 2000; ++round) {
    float table[16], largest = 0;
    const float size = ldexpf(1.f, random.below(200) - 100);
    for (float& entry : table) {
      entry = random.uniform() * size * (round % 3 ? 1.f : random.uniform());
      largest = fmaxf(largest, fabsf(entry));
    }
    uint16_t rounded[16];
    const float factor = round_table<T>(table, 16, false, rounded);
    for (int e = 0; e < 16; ++e) {
      const float back = T::to_float(rounded[e]) * factor;
      // Half an ulp of the entry, and of the smallest float16 where the entry is far below the
      // largest one.
      const float bound = precision * fabsf(table[e]) + 0x1p-25f * largest;
      CHECK(fabsf(back - table[e]) <= bound, "%g became %g", table[e], back);
    }
  }
  const float zeros[4] = {0, 0, 0, 0};
  uint16_t rounded[4];
  CHECK(round_table<T>(zeros, 4, false, rounded) == 1.f && rounded[0] == 0, "a table of zeros");
  const float integers[4] = {-2, -1, 0, 1};
  CHECK(round_table<T>(integers, 4, true, rounded) == 1.f && T::to_float(rounded[0]) == -2.f,
        "integers are not divided");
}

}  // namespace

// A shift that is a product on the device.
template <int kBits>
void check_shifts() {
  Random random(12);
  for (int round = 0; round < 1000; ++round) {
    const uint32_t x = (uint32_t)random.next();
    CHECK(shift_right<kBits>(x) == x >> kBits, "%08x", x);
  }
}

void check_converters() {
  check_shifts<1>();
  check_shifts<17>();
  check_shifts<31>();
  for (uint32_t selector = 0; selector < 65536; ++selector) {
    const uint32_t a = 0x83c20140u, b = 0x77f6a504u;
    uint32_t expected = 0;
    const uint8_t bytes[8] = {0x40, 0x01, 0xc2, 0x83, 0x04, 0xa5, 0xf6, 0x77};
    for (int i = 0; i < 4; ++i) {
      const int n = (int)(selector >> (4 * i) & 15u);
      const uint32_t byte = n & 8 ? (bytes[n & 7] & 128 ? 255u : 0u) : bytes[n];
      expected |= byte << (8 * i);
    }
    CHECK(prmt(a, b, selector) == expected, "selector %04x", selector);
  }
  check_integers<F16>();
  check_integers<BF16>();
  check_tables<F16, 2>();
  check_tables<F16, 3>();
  check_tables<F16, 4>();
  check_tables<BF16, 4>();
  check_pairs<F16>();
  check_bytes<Bytes8>();
  check_bytes<Bytes4>();
  check_byte_tables<2>();
  check_byte_tables<3>();
  check_byte_tables<4>();
  check_block_tables<RowTable<2, 1>>();
  check_block_tables<RowTable<3, 1>>();
  check_block_tables<RowTable<4, 1>>();
  check_block_tables<RowTable<2, 2>>();
  check_block_tables<RowTable<3, 2>>();
  check_block_tables<RowTable<4, 2>>();
  check_rounding<F16>(0x1p-11f);
  check_rounding<BF16>(0x1p-8f);
}
