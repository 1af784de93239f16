// Memory that is about to be touched for the first time.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace rlfast {
namespace RLFAST_ISA_NS {

// A hint: pages of 2 MiB where the system has them. Else the page faults of 100 MB of logits and 113 MB of a weight's
// gradient take a tenth of the head's forward and backward, and those of 200 MB of a gradient two fifths of token_logps'.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
