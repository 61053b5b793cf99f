#include "simd_level.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace recsys_ops {
namespace {

constexpr int unset = -1;
std::atomic<int> current{unset};

SimdLevel level_named(const std::string& name) {
  std::string known;
  for (SimdLevel level : simd_levels()) {
    if (name == simd_level_name(level)) {
      return level;
    }
    known += (known.empty() ? "" : ", ") + std::string(simd_level_name(level));
  }
  throw std::runtime_error(
      "recsys_ops: expected RECSYS_OPS_SIMD to be one of the levels of this machine (" + known + "), got '" +
      name + "'");
}

}  // namespace

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::scalar:
      return "scalar";
    case SimdLevel::neon:
      return "neon";
    case SimdLevel::avx2:
      return "avx2";
    case SimdLevel::avx512:
      return "avx512";
  }
  return "";
}

std::vector<SimdLevel> simd_levels() {
  std::vector<SimdLevel> levels;
#if defined(RECSYS_OPS_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    levels.push_back(SimdLevel::avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    levels.push_back(SimdLevel::avx2);
  }
#elif defined(RECSYS_OPS_ARM)
  levels.push_back(SimdLevel::neon);
#endif
  levels.push_back(SimdLevel::scalar);
  return levels;
}

SimdLevel simd_level() {
  int level = current.load(std::memory_order_relaxed);
  if (level == unset) {
    const char* forced = std::getenv("RECSYS_OPS_SIMD");
    level = static_cast<int>(forced && *forced ? level_named(forced) : simd_levels().front());
    current.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

void set_simd_level(const std::string& name) {
  current.store(static_cast<int>(level_named(name)), std::memory_order_relaxed);
}

}  // namespace recsys_ops
