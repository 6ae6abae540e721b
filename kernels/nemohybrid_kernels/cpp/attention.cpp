// The softmax between the two products of attention, forward and backward. ../attention/cpp.py has the products.
//
// Rows of scores [n * R, L, L]: n rows of the batch times heads of keys, R heads of queries each. Token t sees keys
// max(0, starts[t]) .. t. fp32 in between.
#include "vectors.h"

namespace {

struct Seen {
  i64 first, end;
};

Seen keys_of(const std::int32_t* starts, i64 b, i64 t, i64 L) {
  i64 start = starts ? starts[b * L + t] : 0;
  return {start > 0 ? start : 0, t + 1};
}

// scores = high + low, two parts where one has too few digits -> weights, in place of high; zeros where nothing is seen.
template <class T>
void forward(T* high, const T* low, const std::int32_t* starts, i64 rows, i64 L, i64 rows_of_batch, float scale,
             int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(L + LANES);
    float* scores = buffer.data();
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row++) {
      T* own = high + row * L;
      const T* more = low ? low + row * L : nullptr;
      Seen seen = keys_of(starts, row / rows_of_batch, row % L, L);
      i64 n = seen.end - seen.first;
      Floats most = all(-__builtin_inff());
      each(n, [&](i64 j, auto width) {
        Floats s = load(own + seen.first + j, width);
        if (more) s += load(more + seen.first + j, width);
        s = count_from(j) < std::int32_t(n) ? s * scale : all(-__builtin_inff());
        store(scores + j, s, All{});
        most = most < s ? s : most;
      });
      float top = most[0];
      for (i64 i = 1; i < LANES; i++) top = top < most[i] ? most[i] : top;
      Floats total = {};
      each(n, [&](i64 j, auto width) {
        Floats e = exponential(load(scores + j, All{}) - top);
        e = count_from(j) < std::int32_t(n) ? e : Floats{};
        store(scores + j, e, All{});
        total += e;
      });
      float factor = 1.f / sum(total);
      std::memset(own, 0, seen.first * sizeof(T));
      each(n, [&](i64 j, auto width) { store(own + seen.first + j, load(scores + j, width) * factor, width); });
      std::memset(own + seen.end, 0, (L - seen.end) * sizeof(T));
    }
  }
}

// Gradients of the weights -> gradients of the scores before scaling, in their place.
template <class T>
void backward(const T* weights, T* grads, const std::int32_t* starts, i64 rows, i64 L, i64 rows_of_batch, float scale,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 row = 0; row < rows; row++) {
    Seen seen = keys_of(starts, row / rows_of_batch, row % L, L);
    const T* w = weights + row * L + seen.first;
    T* d = grads + row * L;
    i64 n = seen.end - seen.first;
    Floats along = {};
    each(n, [&](i64 j, auto width) { along += load(w + j, width) * load(d + seen.first + j, width); });
    float mean = sum(along);
    std::memset(d, 0, seen.first * sizeof(T));
    each(n, [&](i64 j, auto width) {
      Floats grad = load(d + seen.first + j, width) - mean;
      store(d + seen.first + j, grad * load(w + j, width) * scale, width);
    });
    std::memset(d + seen.end, 0, (L - seen.end) * sizeof(T));
  }
}

}  // namespace

extern "C" void softmax_forward(int is_bf16, void* high, const void* low, const std::int32_t* starts, i64 rows, i64 L,
                                i64 rows_of_batch, float scale, int threads) {
  FOR_TYPE(is_bf16, forward((T*)high, (const T*)low, starts, rows, L, rows_of_batch, scale, threads));
}

extern "C" void softmax_backward(int is_bf16, const void* weights, void* grads, const std::int32_t* starts, i64 rows,
                                 i64 L, i64 rows_of_batch, float scale, int threads) {
  FOR_TYPE(is_bf16, backward((const T*)weights, (T*)grads, starts, rows, L, rows_of_batch, scale, threads));
}
