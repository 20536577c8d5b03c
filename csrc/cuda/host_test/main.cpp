// SPDX-License-Identifier: Apache-2.0
// Host tests of the CUDA sources: `host_test layout|converters|schedules|kernels|others|gradient`.
#include <string.h>

#include "check.h"

int64_t checks_made = 0;

int main(int count, char** names) {
  const struct {
    const char* name;
    void (*run)();
  } parts[] = {{"layout", check_layout},        {"converters", check_converters},
               {"schedules", check_schedules},  {"kernels", check_kernels},
               {"others", check_other_kernels}, {"gradient", check_gradient}};
  for (const auto& part : parts) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted = wanted || strcmp(names[i], part.name) == 0;
    if (!wanted) continue;
    checks_made = 0;
    part.run();
    printf("%s %lld\n", part.name, (long long)checks_made);
  }
  return 0;
}
