// SPDX-License-Identifier: Apache-2.0
#include "codes.h"

#include "fit_args.h"

using namespace qkern;

namespace {

qk_status check_codes(const char* call, const void* codes, int64_t n, int64_t k,
                      int64_t codes_stride, int32_t bits, const void* stream,
                      int64_t stream_stride_bytes) {
  if (qk_status s = check_bits(call, bits, 1)) return s;
  if (qk_status s = check_rows(call, "codes", codes, n, k, codes_stride)) return s;
  return check_rows(call, "stream", stream, n, stream_bytes(k, bits), stream_stride_bytes);
}

}  // namespace

extern "C" {

qk_status qk_codes_pack(const uint8_t* codes, int64_t n, int64_t k, int64_t codes_stride,
                        int32_t bits, uint8_t* stream, int64_t stream_stride_bytes) {
  const char* call = "qk_codes_pack";
  if (qk_status s = check_codes(call, codes, n, k, codes_stride, bits, stream, stream_stride_bytes))
    return s;
  if (k == 0) return QK_OK;
  // All codes are looked at before the first byte is written.
  const int64_t bad = first_bad_row(nullptr, n, [&](int64_t row) {
    uint8_t seen = 0;
    for (int64_t c = 0; c < k; ++c) seen |= codes[row * codes_stride + c];
    return seen >> bits != 0;
  });
  if (bad < n) {
    const uint8_t* row = codes + bad * codes_stride;
    int64_t column = 0;
    while (row[column] >> bits == 0) ++column;
    return fail(QK_BAD_FORMAT, "%s: code %d in row %lld, column %lld does not fit %d bits", call,
                row[column], (long long)bad, (long long)column, bits);
  }
  const PackCodes pack = pack_codes_for(bits);
  parallel_for(nullptr, n, [&](int64_t row) {
    pack(codes + row * codes_stride, k, stream + row * stream_stride_bytes);
  });
  return QK_OK;
}

qk_status qk_codes_unpack(const uint8_t* stream, int64_t n, int64_t k, int64_t stream_stride_bytes,
                          int32_t bits, uint8_t* codes, int64_t codes_stride) {
  if (qk_status s = check_codes("qk_codes_unpack", codes, n, k, codes_stride, bits, stream,
                                stream_stride_bytes))
    return s;
  if (k == 0) return QK_OK;
  const UnpackCodes unpack = unpack_codes_for(bits);
  parallel_for(nullptr, n, [&](int64_t row) {
    unpack(stream + row * stream_stride_bytes, k, codes + row * codes_stride);
  });
  return QK_OK;
}
}
