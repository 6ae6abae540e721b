// Causal depthwise convolution over the length, then SiLU, forward and backward. See ../conv1d/reference.py.
//
// Rows of C channels; x may be part of wider rows (strides in elements). Weights come as [K][C], taps first.
// starts[b][t]: where the document of token t begins; below 0 where that was before the row, as is the history.
//
// A block of tokens is done sixteen channels at a time, from the first token to the last: the inputs that the taps see, and
// on the way back the gradients that an input gathers, slide through registers.
#include "vectors.h"

namespace {

constexpr i64 BLOCK = 32;  // tokens that share one partial sum of the weights' gradient, whatever the number of threads
constexpr i64 SLAB = 64;   // channels that are fetched together, few enough to stay in the first cache
constexpr int WIDEST = 16;

struct Shape {
  i64 B, L, C, K, silu, threads;
};

template <class T>
struct Row {  // one row of the batch, and what lies before it
  const T *x, *history;
  const std::int32_t* starts;
  i64 stride, C, before;

  // Sixteen channels of input s, which may lie before the row.
  template <class W>
  Floats input(i64 s, i64 c, W width) const {
    if (s >= 0) return load(x + s * stride + c, width);
    return history && s >= -before ? load(history + (s + before) * C + c, width) : Floats{};
  }

  bool sees(i64 t, i64 s) const { return starts == nullptr || s >= starts[t]; }
};

// FIXED taps, a number that the compiler knows, or else the K of the shape.
template <int FIXED>
struct Taps {
  Floats w[FIXED ? FIXED : WIDEST], bias;

  template <class W>
  Taps(const Shape& z, const float* weight, const float* bias_C, i64 c, W width)
      : bias(load(bias_C + c, width)) {
    const int K = number(z);
    for (int k = 0; k < K; k++) w[k] = load(weight + k * z.C + c, width);
  }

  static int number(const Shape& z) { return FIXED ? FIXED : int(z.K); }

  // What enters the activation of token t, whose inputs are window[0 .. K-1], the latest last.
  template <class T>
  Floats convolve(const Shape& z, const Row<T>& row, i64 t, const Floats* window) const {
    const int K = number(z);
    Floats result = bias;
    for (int k = 0; k < K; k++)
      if (row.sees(t, t - (K - 1) + k)) result += w[k] * window[k];
    return result;
  }
};

static inline void slide(Floats* window, int K, Floats next) {
  for (int k = 0; k + 1 < K; k++) window[k] = window[k + 1];
  window[K - 1] = next;
}

template <int FIXED, class T, class W>
void forward_channels(const Shape& z, const Row<T>& row, const float* weight, const float* bias, i64 first, i64 end,
                      i64 c, W width, T* y) {
  Taps<FIXED> taps(z, weight, bias, c, width);
  const int K = taps.number(z);
  Floats window[FIXED ? FIXED : WIDEST];
  for (int k = 1; k < K; k++) window[k] = row.input(first - K + k, c, width);
  for (i64 t = first; t < end; t++) {
    slide(window, K, row.input(t, c, width));
    Floats pre = taps.convolve(z, row, t, window);
    store(y + t * z.C + c, z.silu ? pre * sigmoid(pre) : pre, width);
  }
}

// d of the weights and the bias, [K + 1][C], by tokens first .. end, and of the inputs there (and, from token 0 on, of the
// history). Gradients reach an input from the K - 1 tokens behind it, so those are gone through as well.
template <int FIXED, class T, class W>
void backward_channels(const Shape& z, const Row<T>& row, const float* weight, const float* bias, const T* dy,
                       i64 dy_stride, i64 first, i64 end, i64 c, W width, T* dx, i64 dx_stride, T* dhistory,
                       float* sums) {
  Taps<FIXED> taps(z, weight, bias, c, width);
  const int K = taps.number(z);
  Floats window[FIXED ? FIXED : WIDEST], gradients[FIXED ? FIXED : WIDEST], dw[FIXED ? FIXED : WIDEST], dbias = {};
  for (int k = 0; k < K; k++) gradients[k] = dw[k] = Floats{};
  for (int k = 1; k < K; k++) window[k] = row.input(first - K + k, c, width);
  for (i64 t = first; t < end + K - 1; t++) {
    Floats d = {};
    if (t < z.L) {
      slide(window, K, row.input(t, c, width));
      d = load(dy + t * dy_stride + c, width);
      if (z.silu) {
        Floats pre = taps.convolve(z, row, t, window), s = sigmoid(pre);
        d *= s * (1.f + pre * (1.f - s));
      }
    }
    if (t < end) {
      dbias += d;
      for (int k = 0; k < K; k++)
        if (row.sees(t, t - (K - 1) + k)) dw[k] += d * window[k];
    }
    slide(gradients, K, d);  // of tokens s .. s + K - 1, which see input s through their taps K - 1 .. 0
    i64 s = t - (K - 1);
    T* to = s >= first ? dx + s * dx_stride + c : (s < 0 && dhistory ? dhistory + (s + K - 1) * z.C + c : nullptr);
    if (to == nullptr) continue;
    Floats total = {};
    for (int k = 0; k < K; k++)
      if (s + k < z.L && row.sees(s + k < 0 ? 0 : s + k, s)) total += taps.w[K - 1 - k] * gradients[k];
    store(to, total, width);
  }
  for (int k = 0; k < K; k++) store(sums + k * z.C + c, dw[k], width);
  store(sums + K * z.C + c, dbias, width);
}

// f(row of the batch, number of the block, its first token, the token behind it), shared by the threads
template <class F>
void blocks_of_tokens(const Shape& z, F f) {
  i64 blocks = (z.L + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(z.threads)
  for (i64 at = 0; at < z.B * blocks; at++) {
    i64 first = at % blocks * BLOCK;
    f(at / blocks, at, first, first + BLOCK < z.L ? first + BLOCK : z.L);
  }
}

template <class T>
Row<T> row_of(const Shape& z, i64 b, const T* x, i64 batch_stride, i64 stride, const T* history,
              const std::int32_t* starts) {
  return {x + b * batch_stride, history ? history + b * (z.K - 1) * z.C : nullptr, starts ? starts + b * z.L : nullptr,
          stride, z.C, z.K - 1};
}

template <class T>
void forward(const Shape& z, const T* x, i64 batch_stride, i64 stride, const T* history, const std::int32_t* starts,
             const float* w, const float* bias, T* y) {
  blocks_of_tokens(z, [&](i64 b, i64, i64 first, i64 end) {
    Row<T> row = row_of(z, b, x, batch_stride, stride, history, starts);
    T* out = y + b * z.L * z.C;
    each(z.C, [&](i64 c, auto width) {
      if (c % SLAB == 0) fetch(row.x + first * stride + c, stride, end - first, z.C - c < SLAB ? z.C - c : SLAB);
      if (z.K == 4)
        forward_channels<4>(z, row, w, bias, first, end, c, width, out);
      else
        forward_channels<0>(z, row, w, bias, first, end, c, width, out);
    });
  });
}

template <class T>
void backward(const Shape& z, const T* x, i64 batch_stride, i64 stride, const T* history, const std::int32_t* starts,
              const float* w, const float* bias, const T* dy, i64 dy_batch, i64 dy_stride, T* dx, i64 dx_batch, i64 dx_stride,
              T* dhistory, float* dw, float* dbias) {
  i64 blocks = z.B * ((z.L + BLOCK - 1) / BLOCK), size = (z.K + 1) * z.C;
  std::vector<float> partial(blocks * size);
  blocks_of_tokens(z, [&](i64 b, i64 at, i64 first, i64 end) {
    Row<T> row = row_of(z, b, x, batch_stride, stride, history, starts);
    const T* d = dy + b * dy_batch;
    T *out = dx + b * dx_batch, *out_history = dhistory ? dhistory + b * (z.K - 1) * z.C : nullptr;
    float* sums = partial.data() + at * size;
    i64 read = end + z.K - 1 < z.L ? end + z.K - 1 : z.L;
    each(z.C, [&](i64 c, auto width) {
      if (c % SLAB == 0) {
        i64 channels = z.C - c < SLAB ? z.C - c : SLAB;
        fetch(row.x + first * stride + c, stride, read - first, channels);
        fetch(d + first * dy_stride + c, dy_stride, read - first, channels);
      }
      if (z.K == 4)
        backward_channels<4>(z, row, w, bias, d, dy_stride, first, end, c, width, out, dx_stride, out_history, sums);
      else
        backward_channels<0>(z, row, w, bias, d, dy_stride, first, end, c, width, out, dx_stride, out_history, sums);
    });
  });
  std::vector<double> total(size, 0.0);
  for (i64 at = 0; at < blocks; at++)
    for (i64 i = 0; i < size; i++) total[i] += partial[at * size + i];
  for (i64 i = 0; i < size; i++) (i < z.K * z.C ? dw[i] : dbias[i - z.K * z.C]) = float(total[i]);
}

}  // namespace

extern "C" void conv1d_forward(int is_bf16, const void* x, i64 batch_stride, i64 stride, const void* history,
                               const std::int32_t* starts, const float* w, const float* bias, void* y, i64 B, i64 L,
                               i64 C, i64 K, int silu, int threads) {
  Shape z{B, L, C, K, silu, threads};
  FOR_TYPE(is_bf16, forward(z, (const T*)x, batch_stride, stride, (const T*)history, starts, w, bias, (T*)y));
}

extern "C" void conv1d_backward(int is_bf16, const void* x, i64 batch_stride, i64 stride, const void* history,
                                const std::int32_t* starts, const float* w, const float* bias, const void* dy,
                                i64 dy_batch, i64 dy_stride, void* dx, i64 dx_batch, i64 dx_stride, void* dhistory,
                                float* dw, float* dbias, i64 B, i64 L, i64 C, i64 K, int silu, int threads) {
  Shape z{B, L, C, K, silu, threads};
  FOR_TYPE(is_bf16, backward(z, (const T*)x, batch_stride, stride, (const T*)history, starts, w, bias, (const T*)dy,
                             dy_batch, dy_stride, (T*)dx, dx_batch, dx_stride, (T*)dhistory, dw, dbias));
}
