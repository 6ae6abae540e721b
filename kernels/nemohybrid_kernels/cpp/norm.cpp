// Root-mean-square norms, plain and gated, forward and backward. See ../norm/reference.py for what they compute.
//
// Rows of D channels in groups of `group`; x and z may be parts of wider rows (strides in elements).
#include "vectors.h"

namespace {

constexpr i64 BLOCK = 64;  // rows that share one partial sum of the weight's gradient, whatever the number of threads

// g = x silu(z), or x without z; s = sigmoid(z). Returns the sum of g^2.
template <class T>
float gated(const T* x, const T* z, i64 n, float* g, float* s) {
  Floats squares = {};
  each(n, [&](i64 i, auto width) {
    Floats own = load(x + i, width);
    if (z) {
      Floats gate = load(z + i, width), open = sigmoid(gate);
      own *= gate * open;
      store(s + i, open, width);
    }
    store(g + i, own, width);
    squares += own * own;
  });
  return sum(squares);
}

template <class T>
void forward(const T* x, i64 x_stride, const T* z, i64 z_stride, const float* w, T* y, float* scale, i64 rows, i64 D,
             i64 group, float eps, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(2 * group);
    float *g = buffer.data(), *s = g + group;
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row++)
      for (i64 first = 0; first < D; first += group) {
        float squares = gated(x + row * x_stride + first, z ? z + row * z_stride + first : nullptr, group, g, s);
        float factor = 1.f / __builtin_sqrtf(squares / float(group) + eps);
        scale[row * (D / group) + first / group] = factor;
        each(group, [&](i64 i, auto width) {
          store(y + row * D + first + i, load(g + i, width) * factor * load(w + first + i, width), width);
        });
      }
  }
}

// One group of a row: dx, dz, and dw added to `dw`.
template <class T>
void backward_group(const T* x, const T* z, const float* w, float scale, const T* dy, T* dx, T* dz, float* dw, i64 n,
                    float* g, float* s) {
  gated(x, z, n, g, s);
  Floats products = {};
  each(n, [&](i64 i, auto width) { products += load(dy + i, width) * load(w + i, width) * load(g + i, width); });
  float back = sum(products) * scale * scale / float(n);
  each(n, [&](i64 i, auto width) {
    Floats grad = load(dy + i, width), own = load(g + i, width);
    store(dw + i, load(dw + i, width) + grad * own * scale, width);
    Floats dg = (grad * load(w + i, width) - own * back) * scale;
    if (z) {
      Floats gate = load(z + i, width), open = load(s + i, width);
      store(dz + i, dg * load(x + i, width) * open * (1.f + gate * (1.f - open)), width);
      dg *= gate * open;
    }
    store(dx + i, dg, width);
  });
}

template <class T>
void backward(const T* x, i64 x_stride, const T* z, i64 z_stride, const float* w, const float* scale, const T* dy,
              i64 dy_stride, T* dx, T* dz, i64 dz_stride, float* dw, i64 rows, i64 D, i64 group, int threads) {
  i64 blocks = (rows + BLOCK - 1) / BLOCK;
  std::vector<float> partial(blocks * D, 0.f);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(2 * group);
#pragma omp for schedule(static)
    for (i64 block = 0; block < blocks; block++)
      for (i64 row = block * BLOCK; row < rows && row < (block + 1) * BLOCK; row++)
        for (i64 first = 0; first < D; first += group)
          backward_group(x + row * x_stride + first, z ? z + row * z_stride + first : nullptr, w + first,
                         scale[row * (D / group) + first / group], dy + row * dy_stride + first, dx + row * D + first,
                         z ? dz + row * dz_stride + first : nullptr, partial.data() + block * D + first, group, buffer.data(),
                         buffer.data() + group);
  }
  std::vector<double> total(D, 0.0);
  for (i64 block = 0; block < blocks; block++)
    for (i64 i = 0; i < D; i++) total[i] += partial[block * D + i];
  for (i64 i = 0; i < D; i++) dw[i] = float(total[i]);
}

}  // namespace

extern "C" void norm_forward(int is_bf16, const void* x, i64 x_stride, const void* z, i64 z_stride, const float* w,
                             void* y, float* scale, i64 rows, i64 D, i64 group, float eps, int threads) {
  FOR_TYPE(is_bf16,
           forward((const T*)x, x_stride, (const T*)z, z_stride, w, (T*)y, scale, rows, D, group, eps, threads));
}

extern "C" void norm_backward(int is_bf16, const void* x, i64 x_stride, const void* z, i64 z_stride, const float* w,
                              const float* scale, const void* dy, i64 dy_stride, void* dx, void* dz, i64 dz_stride,
                              float* dw, i64 rows, i64 D, i64 group, int threads) {
  FOR_TYPE(is_bf16, backward((const T*)x, x_stride, (const T*)z, z_stride, w, scale, (const T*)dy, dy_stride, (T*)dx,
                             (T*)dz, dz_stride, dw, rows, D, group, threads));
}
