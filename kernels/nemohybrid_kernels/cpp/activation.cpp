// relu(h)^2, forward and backward, each in one pass.
#include "vectors.h"

namespace {

constexpr i64 BLOCK = 4096;

template <class F>
void blocks(i64 n, int threads, F f) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 first = 0; first < n; first += BLOCK)
    each(n - first < BLOCK ? n - first : BLOCK, [&](i64 i, auto width) { f(first + i, width); });
}

static inline Floats positive(Floats x) { return x < all(0.f) ? all(0.f) : x; }

}  // namespace

extern "C" void squared_relu_forward(int is_bf16, const void* h, void* y, i64 n, int threads) {
  FOR_TYPE(is_bf16, blocks(n, threads, [=](i64 i, auto width) {
             Floats x = positive(load((const T*)h + i, width));
             store((T*)y + i, x * x, width);
           }));
}

extern "C" void squared_relu_backward(int is_bf16, const void* h, const void* dy, void* dh, i64 n, int threads) {
  FOR_TYPE(is_bf16, blocks(n, threads, [=](i64 i, auto width) {
             Floats x = positive(load((const T*)h + i, width));
             store((T*)dh + i, 2.f * x * load((const T*)dy + i, width), width);
           }));
}
