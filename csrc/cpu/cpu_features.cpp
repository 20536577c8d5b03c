// SPDX-License-Identifier: Apache-2.0
#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qkern {

#if defined(__x86_64__)

namespace {

// XCR0: which register state the operating system saves. By encoding, so that this file needs no
// flag.
uint64_t xcr0() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

bool bit(uint32_t word, int i) { return word >> i & 1; }

bool vendor_is_intel() {
  uint32_t a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == 0x756e6547 && d == 0x49656e69 && c == 0x6c65746e;
}

// Linux wants to be asked before a process first touches tile data, once for all of its threads: it
// makes room for them in signal frames. It says no where an alternate signal stack is too small.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool decoding_takes_multiply_ports() {
  static const bool intel = vendor_is_intel();
  return intel;
}

qk_isa detect_isa() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return QK_ISA_SCALAR;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!osxsave || !avx || !fma || !f16c) return QK_ISA_SCALAR;
  const uint64_t state = xcr0();
  if ((state & 0x6) != 0x6) return QK_ISA_SCALAR;  // xmm and ymm
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(b, 5)) return QK_ISA_SCALAR;
  const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
  if (!f || !dq || !bw || !vl || (state & 0xe6) != 0xe6) return QK_ISA_AVX2;  // opmask and zmm
  if (!bit(c, 11)) return QK_ISA_AVX512;
  const bool tiles = bit(d, 24) && bit(d, 25) && (state >> 17 & 3) == 3;
  return tiles && tiles_granted() ? QK_ISA_AVX512AMX : QK_ISA_AVX512VNNI;
}

#elif defined(__aarch64__)

namespace {

qk_isa level(bool dot, bool i8mm) {
  return !dot ? QK_ISA_NEON : i8mm ? QK_ISA_NEONI8MM : QK_ISA_NEONDOT;
}

#if defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

}  // namespace

qk_isa detect_isa() {
#if defined(__linux__)  // HWCAP_ASIMDDP and HWCAP2_I8MM, which older headers do not name
  return level(getauxval(AT_HWCAP) >> 20 & 1, getauxval(AT_HWCAP2) >> 13 & 1);
#elif defined(__APPLE__)
  return level(has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"));
#else
  return level(false, false);
#endif
}

#else

qk_isa detect_isa() { return QK_ISA_SCALAR; }

#endif

}  // namespace qkern
