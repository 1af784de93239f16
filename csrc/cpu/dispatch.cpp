// Which instruction sets were compiled, and which of them this processor runs. Compiled once, for the baseline.
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rlfast {

namespace {

#define RLFAST_ROW(isa)              \
  {isa::token_logps_forward,         \
   isa::token_logps_backward,        \
   isa::linear_token_logps_forward,  \
   isa::linear_token_logps_backward, \
   isa::divergence_forward,          \
   isa::divergence_backward,         \
   isa::linear_divergence_forward,   \
   isa::linear_divergence_backward,  \
   isa::token_loss,                  \
   isa::pair_loss,                   \
   isa::unpaired_loss,               \
   isa::ranked_loss,                 \
   isa::affine_scan,                 \
   isa::group_advantage,             \
   isa::linear,                      \
   isa::paged_attention,             \
   isa::sample,                      \
   isa::read_sum},
const Kernels kTable[] = {RLFAST_ISAS(RLFAST_ROW)};
#undef RLFAST_ROW

#define RLFAST_STRING(isa) #isa,
const char* const kNames[] = {RLFAST_ISAS(RLFAST_STRING)};
#undef RLFAST_STRING

constexpr int kIsas = sizeof(kNames) / sizeof(kNames[0]);

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
#endif

bool processor_has(const char* name) {
  if (!std::strcmp(name, "baseline") || !std::strcmp(name, "neon")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // These also ask whether the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avx512_bf16")) return avx512 && has_avx512_bf16();
#endif
  return false;
}

}  // namespace

int isa_count() { return kIsas; }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

// Asked once: a virtual machine traps the instruction that tells, for some 20 µs.
bool isa_usable(Isa isa) {
  struct Usable {
    bool by_isa[kIsas];
    Usable() {
      for (int i = 0; i < kIsas; ++i) by_isa[i] = processor_has(kNames[i]);
    }
  };
  static const Usable usable;
  return usable.by_isa[static_cast<int>(isa)];
}

bool isa_from_name(const char* name, Isa* isa) {
  for (int i = 0; i < kIsas; ++i) {
    if (!std::strcmp(name, kNames[i])) {
      *isa = static_cast<Isa>(i);
      return isa_usable(*isa);
    }
  }
  return false;
}

const Kernels& kernels(Isa isa) { return kTable[static_cast<int>(isa)]; }

}  // namespace rlfast
