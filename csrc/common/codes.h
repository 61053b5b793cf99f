// Elements of quantised tables, as the kernels see them; the formats are those of
// recsys_ops/embedding_bag_collection/row_quantization.py.
#pragma once

#include <cstdint>

namespace recsys_ops {

enum class CodeType { int8, int4, float8 };

struct Code8 {
  uint8_t bits;
};

// Two codes, the even column's in the low half.
struct Code4 {
  uint8_t bits;
};

// e4m3fn
struct Float8 {
  uint8_t bits;
};

// Calls f with a null pointer of the type of codes.
template <class F>
void dispatch(CodeType type, const F& f) {
  switch (type) {
    case CodeType::int8:
      return f(static_cast<Code8*>(nullptr));
    case CodeType::int4:
      return f(static_cast<Code4*>(nullptr));
    case CodeType::float8:
      return f(static_cast<Float8*>(nullptr));
  }
}

}  // namespace recsys_ops
