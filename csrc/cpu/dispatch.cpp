// SPDX-License-Identifier: Apache-2.0
// The registry as a table, and the choice of a row.

#include <atomic>
#include <cstdio>
#include <cstring>

#include "cpu_features.h"
#include "error.h"
#include "kernels.h"
#include "structs.h"

namespace qkern {

#define QKERN_LINEAR(name, ...) void name(const LinearJob&, int64_t, int64_t, int64_t, int64_t);
#define QKERN_QUANTIZE(name) \
  void name(const void*, qk_dtype, int64_t, int64_t, int8_t*, int64_t, float*);
#define QKERN_CONVERT(name) void name(const void*, qk_dtype, int64_t, float*);
#define QKERN_DEQUANTIZE(name, ...) void name(const DequantizeRow&);
#define QKERN_MATMUL(name, turn_rows) \
  void name(const MatmulJob&, int64_t, int64_t, int64_t, int64_t);
#define QKERN_UNPACK(name) \
  void name(const Packed&, const uint8_t*, int, int, int64_t, int64_t, uint8_t*, int64_t);
#include "kernels.inc"
#undef QKERN_LINEAR
#undef QKERN_QUANTIZE
#undef QKERN_CONVERT
#undef QKERN_DEQUANTIZE
#undef QKERN_MATMUL
#undef QKERN_UNPACK

namespace {

constexpr struct {
  const char* name;
  qk_isa isa;
} kIsas[] = {
    {"scalar", QK_ISA_SCALAR},         {"avx2", QK_ISA_AVX2},           {"avx512", QK_ISA_AVX512},
    {"avx512vnni", QK_ISA_AVX512VNNI}, {"avx512amx", QK_ISA_AVX512AMX}, {"neon", QK_ISA_NEON},
    {"neondot", QK_ISA_NEONDOT},       {"neoni8mm", QK_ISA_NEONI8MM},
};

constexpr bool same(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

// The level that a kernel's name ends in.
constexpr qk_isa isa_of(const char* name) {
  const char* suffix = name;
  for (const char* p = name; *p; ++p)
    if (*p == '_') suffix = p + 1;
  for (const auto& isa : kIsas)
    if (same(suffix, isa.name)) return isa.isa;
  return QK_ISA_AUTO;
}

// The cap as a level; starts as what the machine has.
std::atomic<qk_isa>& cap() {
  static std::atomic<qk_isa> value{detect_isa()};
  return value;
}

thread_local const char* last_kernel = "";

bool serves(const KernelRow& row, Op op, uint32_t kind, uint32_t bits) {
  return row.op == op && row.kinds >> kind & 1 && row.bits >> bits & 1;
}

const KernelRow* find(Op op, const char* name, qk_status* status) {
  for (int i = 0; i < kKernelCount; ++i)
    if (kKernels[i].op == op && std::strcmp(kKernels[i].name, name) == 0) {
      if (isa_usable(kKernels[i].isa)) return &kKernels[i];
      *status = fail(QK_UNSUPPORTED, "kernel %s needs %s, and %s is in force", name,
                     qk_isa_name(kKernels[i].isa), qk_isa_name(cap().load()));
      return nullptr;
    }
  *status = fail(QK_INVALID_ARGUMENT,
                 "no kernel is called %s for this operation; qk_kernel_at lists them", name);
  return nullptr;
}

}  // namespace

const KernelRow kKernels[] = {
#define QKERN_LINEAR(name, kinds, lanes, bits, activations)  \
  {Op::kLinear, #name, isa_of(#name), kinds,   lanes,  bits, \
   activations, name,  nullptr,       nullptr, nullptr},
#define QKERN_QUANTIZE(name) \
  {Op::kQuantize, #name, isa_of(#name), 0, 0, 0, kInt8, nullptr, name, nullptr, nullptr},
#define QKERN_CONVERT(name) \
  {Op::kConvert, #name, isa_of(#name), 0, 0, 0, kFloat, nullptr, nullptr, name, nullptr},
#define QKERN_DEQUANTIZE(name, kinds, bits)                           \
  {Op::kDequantize, #name,   isa_of(#name), kinds,   kAnyLanes, bits, \
   kFloat | kInt8,  nullptr, nullptr,       nullptr, name},
#define QKERN_MATMUL(name, turn_rows)                                                   \
  {Op::kMatmul, #name,   isa_of(#name), 0,       0,    0,       bits_mask(QK_ACT_INT8), \
   nullptr,     nullptr, nullptr,       nullptr, name, nullptr, turn_rows},
#define QKERN_UNPACK(name)                                                                  \
  {Op::kUnpack, #name,   isa_of(#name), kInt | kTable, kAnyLanes, kAllBits, kFloat | kInt8, \
   nullptr,     nullptr, nullptr,       nullptr,       nullptr,   name},
#include "kernels.inc"
};
const int kKernelCount = (int)(sizeof kKernels / sizeof kKernels[0]);

bool isa_usable(qk_isa isa) {
  const qk_isa now = cap().load(std::memory_order_relaxed);
  if (isa == QK_ISA_SCALAR) return true;
  return isa / 16 == now / 16 && isa <= now;
}

void set_last_kernel(const char* name) { last_kernel = name; }

const char* kernel_refuses(const KernelRow& row, const Packed& w) {
  if (!isa_usable(row.isa)) return "its instruction set is not there or is capped";
  if (!(row.kinds >> w.h.kind & 1)) return "it reads the other kind of weight (int or table)";
  if (!(row.lanes & lanes_mask(w)))
    return row.lanes & kDwordLanes ? "it wants one table per tensor"
           : row.lanes & kRowLanes ? "it wants tables per row"
                                   : "it wants tables per tile";
  if (!(row.bits >> w.h.bits & 1)) return "it reads codes of another width";
  if (!(row.activations >> w.h.activations & 1)) return "it works in another activation mode";
  return nullptr;
}

const KernelRow& select_row(Op op) {
  int i = 0;
  while (kKernels[i].op != op || !isa_usable(kKernels[i].isa)) ++i;  // a scalar row is always there
  return kKernels[i];
}

const KernelRow* select_named(Op op, const char* name, qk_status* status) {
  return name ? find(op, name, status) : &select_row(op);
}

const KernelRow* select_linear(const Packed& w, const char* name, qk_status* status) {
  if (name) {
    const KernelRow* row = find(Op::kLinear, name, status);
    if (!row) return nullptr;
    if (const char* reason = kernel_refuses(*row, w)) {
      *status = fail(QK_UNSUPPORTED, "kernel %s cannot run this weight: %s", name, reason);
      return nullptr;
    }
    return row;
  }
  for (int i = 0; i < kKernelCount; ++i)
    if (kKernels[i].op == Op::kLinear && !kernel_refuses(kKernels[i], w)) return &kKernels[i];
  *status = fail(QK_UNSUPPORTED, "no kernel reads this weight");
  return nullptr;
}

const KernelRow* select_dequantize(qk_kind kind, int bits, const char* name, qk_status* status) {
  if (name) {
    const KernelRow* row = find(Op::kDequantize, name, status);
    if (row && !serves(*row, Op::kDequantize, (uint32_t)kind, (uint32_t)bits)) {
      *status = fail(QK_UNSUPPORTED, "kernel %s cannot read this weight", name);
      return nullptr;
    }
    return row;
  }
  for (int i = 0; i < kKernelCount; ++i)
    if (serves(kKernels[i], Op::kDequantize, (uint32_t)kind, (uint32_t)bits) &&
        isa_usable(kKernels[i].isa))
      return &kKernels[i];
  *status = fail(QK_UNSUPPORTED, "no kernel reads this weight");
  return nullptr;
}

}  // namespace qkern

using namespace qkern;

namespace {

// What a row reads, in words.
void describe_weights(const KernelRow& row, char* text, size_t capacity) {
  if (!row.kinds) return;
  char bits[32] = "";
  for (int b = 1; b <= 8; ++b)
    if (row.bits >> b & 1)
      std::snprintf(bits + std::strlen(bits), sizeof bits - std::strlen(bits), "%s%d",
                    *bits ? "," : "", b);
  std::snprintf(text, capacity, "%s bits:%s%s%s%s", row.bits == kAllBits ? "1-8" : bits,
                row.kinds & kInt && row.lanes & kDwordLanes ? " int" : "",
                row.kinds & kTable && row.lanes & kDwordLanes ? " table" : "",
                row.kinds & kTable && row.lanes & kRowLanes ? " row-table" : "",
                row.kinds & kTable && row.lanes & kTileTables ? " tile-table" : "");
}

const char* weights_in_words(int index) {
  static char texts[sizeof kKernels / sizeof kKernels[0]][96];
  static const bool described = [] {
    for (int i = 0; i < kKernelCount; ++i) describe_weights(kKernels[i], texts[i], sizeof texts[i]);
    return true;
  }();
  return described ? texts[index] : "";
}

const char* op_name(Op op) {
  switch (op) {
    case Op::kLinear:
      return "linear";
    case Op::kQuantize:
      return "quantize_activations";
    case Op::kConvert:
      return "convert";
    case Op::kMatmul:
      return "int8_matmul";
    case Op::kUnpack:
      return "unpack";
    default:
      return "dequantize";
  }
}

}  // namespace

extern "C" {

qk_isa qk_detected_isa(void) {
  static const qk_isa detected = detect_isa();
  return detected;
}

qk_isa qk_active_isa(void) { return cap().load(); }

qk_status qk_set_isa(qk_isa isa) {
  const qk_isa have = qk_detected_isa();
  if (isa == QK_ISA_AUTO) {
    cap().store(have);
    return QK_OK;
  }
  if (!qk_isa_name(isa)) return fail(QK_INVALID_ARGUMENT, "no instruction set has number %d", isa);
  if (isa != QK_ISA_SCALAR && (isa / 16 != have / 16 || isa > have))
    return fail(QK_UNSUPPORTED, "this machine has no %s; its best level is %s", qk_isa_name(isa),
                qk_isa_name(have));
  cap().store(isa);
  return QK_OK;
}

const char* qk_isa_name(qk_isa isa) {
  for (const auto& known : kIsas)
    if (known.isa == isa) return known.name;
  return nullptr;
}

const char* qk_last_kernel(void) { return last_kernel; }

int32_t qk_kernel_count(void) { return kKernelCount; }

qk_status qk_kernel_at(int32_t index, qk_kernel_info* info) {
  if (index < 0 || index >= kKernelCount)
    return fail(QK_INVALID_ARGUMENT, "kernel index must be 0..%d, got %d", kKernelCount - 1, index);
  if (qk_status s = check_struct("qk_kernel_info", info)) return s;
  const KernelRow& row = kKernels[index];
  qk_kernel_info known = {};
  known.isa = row.isa;
  known.name = row.name;
  known.op = op_name(row.op);
  known.weights = weights_in_words(index);
  known.activations = row.activations == (kFloat | kInt8) ? "float, int8, int8_group"
                      : row.activations == kFloat         ? "float"
                      : row.activations == kInt8          ? "int8, int8_group"
                                                          : "int8";
  known.usable = isa_usable(row.isa);
  write_struct(known, info);
  return QK_OK;
}

int64_t qk_linear_explain(const void* packed, int64_t bytes, char* text, int64_t capacity) {
  Packed w = {};
  if (packed_open(packed, bytes, &w)) return -1;
  int64_t length = 0;
  bool chosen = false;
  for (int i = 0; i < kKernelCount; ++i) {
    if (kKernels[i].op != Op::kLinear) continue;
    const char* reason = kernel_refuses(kKernels[i], w);
    const char* verdict = !reason && !chosen ? "runs" : "no";
    if (!reason) reason = chosen ? "a better one runs" : "first in the list that can";
    chosen = chosen || *verdict == 'r';
    char line[256];
    const int n =
        std::snprintf(line, sizeof line, "%s\t%s\t%s\n", kKernels[i].name, verdict, reason);
    if (text && length + n < capacity) std::memcpy(text + length, line, (size_t)n + 1);
    length += n;
  }
  return length;
}
}
