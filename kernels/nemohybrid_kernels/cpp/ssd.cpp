// What stands between the matrix products of the chunked scan: decays, layouts and the pass of states over chunks, forward
// and backward. The products themselves are torch's; ../ssd/cpp.py puts both together, ../ssd/reference.py explains them.
//
// i numbers the chunks of all rows, h heads, g groups, r heads of a group, q and j tokens of a chunk. All arrays are
// contiguous, except x, B, C and dy, which may be parts of wider rows.
#include "vectors.h"

struct Sizes {
  i64 batch, L, chunks, Q, G, R, P, N, threads;
};

namespace {

struct View {  // [batch, L, width]
  i64 batch_stride, stride;
};

// How far token q of chunk i is in the data; beyond L there is padding.
struct Chunk {
  i64 b, first, here;  // row, its token that begins the chunk, and how many tokens are real
  Chunk(const Sizes& z, i64 i) : b(i / z.chunks), first(i % z.chunks * z.Q) {
    here = first + z.Q <= z.L ? z.Q : z.L - first;
  }
};

// Where the P numbers of token q and head h are in [i, g, Q, R * P], and in [i, h, Q, P].
i64 folded(const Sizes& z, i64 i, i64 h, i64 q) { return (((i * z.G + h / z.R) * z.Q + q) * z.R + h % z.R) * z.P; }
i64 by_head(const Sizes& z, i64 i, i64 h, i64 q) { return ((i * z.G * z.R + h) * z.Q + q) * z.P; }

// The log decays of a head over a chunk, and which tokens of the chunk each token sees.
//
// lo[q]: the first token of the chunk in the document of q. a: sum of steps from there. w_in: decay of the state before
// the chunk until q, w_out: decay from q to the end of the chunk; 0 where another document lies between.
void decays(const Sizes& z, const Chunk& chunk, const float* dt, float A, const std::int32_t* lo, bool goes_on,
            float* a, float* w_in, float* w_out) {
  i64 H = z.G * z.R, last = z.Q - 1;
  double sum = 0.0, later = 0.0;
  for (i64 q = 0; q < z.Q; q++) {
    float step = q < chunk.here ? dt[q * H] * A : 0.f;
    sum = lo[q] == q ? double(step) : sum + step;
    a[q] = float(sum);
    w_in[q] = lo[q] == 0 && goes_on ? exponential(a[q]) : 0.f;
  }
  for (i64 q = last; q >= 0; q--) {
    w_out[q] = q >= lo[last] ? exponential(float(later)) : 0.f;
    later += q < chunk.here ? double(dt[q * H] * A) : 0.0;
  }
}

// starts [batch, L] or null -> lo of a chunk. Returns whether its first document began before it.
bool document_bounds(const Sizes& z, const Chunk& chunk, const std::int32_t* starts, std::int32_t* lo) {
  if (starts == nullptr) {
    std::memset(lo, 0, z.Q * sizeof(*lo));
    return true;
  }
  const std::int32_t* own = starts + chunk.b * z.L + chunk.first;
  for (i64 q = 0; q < z.Q; q++) {
    i64 start = own[q < chunk.here ? q : chunk.here - 1] - chunk.first;
    lo[q] = std::int32_t(start > 0 ? start : 0);
  }
  return own[0] < chunk.first;
}

// [batch, L, G, N] -> [i, g, Q, N]
template <class T>
void gather(const Sizes& z, i64 i, const T* from, View view, T* to) {
  Chunk chunk(z, i);
  for (i64 g = 0; g < z.G; g++)
    for (i64 q = 0; q < z.Q; q++) {
      T* row = to + ((i * z.G + g) * z.Q + q) * z.N;
      if (q < chunk.here)
        std::memcpy(row, from + chunk.b * view.batch_stride + (chunk.first + q) * view.stride + g * z.N, z.N * sizeof(T));
      else
        std::memset(row, 0, z.N * sizeof(T));
    }
}

template <class T>
void prepare(const Sizes& z, const T* x, View vx, const float* dt, const float* A, const T* B, View vB, const T* C,
             View vC, const std::int32_t* starts, std::int32_t* lo, float* a, float* w_in, float* w_out, T* u, T* u_out,
             T* B_chunks, T* C_chunks) {
  i64 H = z.G * z.R;
#pragma omp parallel for schedule(static) num_threads(z.threads)
  for (i64 i = 0; i < z.batch * z.chunks; i++) {
    Chunk chunk(z, i);
    bool goes_on = document_bounds(z, chunk, starts, lo + i * z.Q);
    gather(z, i, B, vB, B_chunks);
    gather(z, i, C, vC, C_chunks);
    const float* steps = dt + (chunk.b * z.L + chunk.first) * H;
    for (i64 h = 0; h < H; h++) {
      i64 at = (i * H + h) * z.Q;
      decays(z, chunk, steps + h, A[h], lo + i * z.Q, goes_on, a + at, w_in + at, w_out + at);
    }
    for (i64 q = 0; q < z.Q; q++)
      for (i64 h = 0; h < H; h++) {
        T *own = u + by_head(z, i, h, q), *out = u_out + folded(z, i, h, q);
        if (q >= chunk.here) {
          std::memset(own, 0, z.P * sizeof(T));
          std::memset(out, 0, z.P * sizeof(T));
          continue;
        }
        const T* from = x + chunk.b * vx.batch_stride + (chunk.first + q) * vx.stride + h * z.P;
        float step = steps[q * H + h], w = w_out[(i * H + h) * z.Q + q];
        each(z.P, [&](i64 p, auto width) {
          Floats scaled = load(from + p, width) * step;
          store(own + p, scaled, width);
          store(out + p, scaled * w, width);
        });
      }
  }
}

template <class T>
void weights(const Sizes& z, const float* a, const std::int32_t* lo, const T* CB, T* W) {
  i64 H = z.G * z.R;
#pragma omp parallel for schedule(static) num_threads(z.threads)
  for (i64 at = 0; at < z.batch * z.chunks * H; at++) {
    i64 i = at / H, g = at % H / z.R;
    const float* own = a + at * z.Q;
    for (i64 q = 0; q < z.Q; q++) {
      const T* products = CB + ((i * z.G + g) * z.Q + q) * z.Q;
      T* row = W + (at * z.Q + q) * z.Q;
      each(z.Q, [&](i64 j, auto width) {
        Ints token = count_from(j);
        Floats w = {};
        if (j <= q) w = exponential(own[q] - load(own + j, width)) * load(products + j, width);
        store(row + j, (token >= lo[i * z.Q + q]) & (token <= std::int32_t(q)) ? w : Floats{}, width);
      });
    }
  }
}

// state <- kept * state + gained, over the chunks of a row; `before` are the states in front of each.
template <class T>
void pass_states(const Sizes& z, const T* gained, const float* w_in, const float* initial, T* before, float* final) {
  i64 H = z.G * z.R, W = z.R * z.P;
#pragma omp parallel num_threads(z.threads)
  {
    std::vector<float> buffer(W);
    float* state = buffer.data();
#pragma omp for schedule(static)
    for (i64 at = 0; at < z.batch * z.G * z.N; at++) {
      i64 b = at / (z.G * z.N), g = at / z.N % z.G, n = at % z.N;
      for (i64 w = 0; w < W; w++) state[w] = initial ? initial[((b * H + g * z.R) * z.P + w) * z.N + n] : 0.f;
      for (i64 c = 0; c < z.chunks; c++) {
        i64 i = b * z.chunks + c, row = ((i * z.G + g) * z.N + n) * W;
        for (i64 r = 0; r < z.R; r++) {
          float kept = w_in[(i * H + g * z.R + r + 1) * z.Q - 1];
          float* own = state + r * z.P;
          const T* more = gained + row + r * z.P;
          T* out = before + row + r * z.P;
          each(z.P, [&](i64 p, auto width) {
            Floats was = load(own + p, width);
            store(out + p, was, width);
            store(own + p, was * kept + load(more + p, width), width);
          });
        }
      }
      for (i64 w = 0; w < W; w++) final[((b * H + g * z.R) * z.P + w) * z.N + n] = state[w];
    }
  }
}

template <class T>
void combine(const Sizes& z, const T* within, const T* carried, const float* w_in, const T* x, View vx, const float* D,
             T* y) {
  i64 H = z.G * z.R;
#pragma omp parallel for schedule(static) num_threads(z.threads)
  for (i64 at = 0; at < z.batch * z.L; at++) {
    i64 b = at / z.L, t = at % z.L, i = b * z.chunks + t / z.Q, q = t % z.Q;
    for (i64 h = 0; h < H; h++) {
      const T *near = within + by_head(z, i, h, q), *far = carried + folded(z, i, h, q);
      const T* skipped = x + b * vx.batch_stride + t * vx.stride + h * z.P;
      float w = w_in[(i * H + h) * z.Q + q], d = D ? D[h] : 0.f;
      T* out = y + (at * H + h) * z.P;
      each(z.P, [&](i64 p, auto width) {
        Floats sum = load(near + p, width) + w * load(far + p, width);
        store(out + p, D ? sum + d * load(skipped + p, width) : sum, width);
      });
    }
  }
}

// dy -> what the products of the way back multiply: dy by head, and decayed to the beginning of the chunk by group.
// Also the gradient of a by the decays w_in.
template <class T>
void prepare_back(const Sizes& z, const T* dy, View vd, const T* carried, const float* w_in, T* dwithin, T* dcarried,
                  float* da) {
  i64 H = z.G * z.R;
#pragma omp parallel for schedule(static) num_threads(z.threads)
  for (i64 i = 0; i < z.batch * z.chunks; i++) {
    Chunk chunk(z, i);
    for (i64 q = 0; q < z.Q; q++)
      for (i64 h = 0; h < H; h++) {
        bool real = q < chunk.here;
        const T* from = dy + chunk.b * vd.batch_stride + (chunk.first + q) * vd.stride + h * z.P;
        const T* far = carried + folded(z, i, h, q);
        T *own = dwithin + by_head(z, i, h, q), *out = dcarried + folded(z, i, h, q);
        float w = w_in[(i * H + h) * z.Q + q];
        Floats along = {};
        each(z.P, [&](i64 p, auto width) {
          Floats d = real ? load(from + p, width) : Floats{};
          store(own + p, d, width);
          store(out + p, d * w, width);
          along += d * load(far + p, width);
        });
        da[(i * H + h) * z.Q + q] = sum(along) * w;
      }
  }
}

// dW -> dCB, summed over the heads of a group, and the gradient of a. A token is not decayed on its way to itself, so the
// diagonal adds nothing to the latter: by adding and taking away it would drown the rest where decays are strong.
template <class T>
void weights_back(const Sizes& z, const T* dW, const T* CB, const float* a, const std::int32_t* lo, T* dCB, float* da) {
  i64 H = z.G * z.R, QQ = z.Q * z.Q;
#pragma omp parallel num_threads(z.threads)
  {
    std::vector<float> buffer(QQ + z.Q);
    float *sums = buffer.data(), *columns = buffer.data() + QQ;
#pragma omp for schedule(static)
    for (i64 at = 0; at < z.batch * z.chunks * z.G; at++) {
      i64 i = at / z.G, g = at % z.G;
      std::memset(sums, 0, QQ * sizeof(float));
      for (i64 h = g * z.R; h < (g + 1) * z.R; h++) {
        const float* own = a + (i * H + h) * z.Q;
        float* to = da + (i * H + h) * z.Q;
        std::memset(columns, 0, z.Q * sizeof(float));
        for (i64 q = 0; q < z.Q; q++) {
          const T *grad = dW + ((i * H + h) * z.Q + q) * z.Q, *products = CB + (at * z.Q + q) * z.Q;
          float* row = sums + q * z.Q;
          Floats total = {};
          each(q + 1, [&](i64 j, auto width) {
            Ints token = count_from(j);
            Floats d = load(grad + j, width) * exponential(own[q] - load(own + j, width));
            d = token >= lo[i * z.Q + q] ? d : Floats{};
            store(row + j, load(row + j, width) + d, width);
            Floats along = token < std::int32_t(q) ? d * load(products + j, width) : Floats{};
            store(columns + j, load(columns + j, width) + along, width);
            total += along;
          });
          to[q] += sum(total);
        }
        for (i64 q = 0; q < z.Q; q++) to[q] -= columns[q];
      }
      each(QQ, [&](i64 k, auto width) { store(dCB + at * QQ + k, load(sums + k, width), width); });
    }
  }
}

// The pass of states, backwards: gradients of what each chunk gained, of the initial state, and of what each chunk kept of
// the state before it, by n: dkept [i, h, N].
template <class T>
void pass_back(const Sizes& z, const T* dbefore, const T* before, const float* w_in, const float* dfinal, T* dgained,
               float* dkept, float* dinitial) {
  i64 H = z.G * z.R, W = z.R * z.P;
#pragma omp parallel num_threads(z.threads)
  {
    std::vector<float> buffer(W);
    float* state = buffer.data();
#pragma omp for schedule(static)
    for (i64 at = 0; at < z.batch * z.G * z.N; at++) {
      i64 b = at / (z.G * z.N), g = at / z.N % z.G, n = at % z.N;
      for (i64 w = 0; w < W; w++) state[w] = dfinal ? dfinal[((b * H + g * z.R) * z.P + w) * z.N + n] : 0.f;
      for (i64 c = z.chunks - 1; c >= 0; c--) {
        i64 i = b * z.chunks + c, row = ((i * z.G + g) * z.N + n) * W;
        for (i64 r = 0; r < z.R; r++) {
          float kept = w_in[(i * H + g * z.R + r + 1) * z.Q - 1];
          float* own = state + r * z.P;
          const T *was = before + row + r * z.P, *more = dbefore + row + r * z.P;
          T* out = dgained + row + r * z.P;
          Floats along = {};
          each(z.P, [&](i64 p, auto width) {
            Floats d = load(own + p, width);
            store(out + p, d, width);
            along += d * load(was + p, width);
            store(own + p, d * kept + load(more + p, width), width);
          });
          dkept[(i * H + g * z.R + r) * z.N + n] = sum(along) * kept;
        }
      }
      if (dinitial)
        for (i64 w = 0; w < W; w++) dinitial[((b * H + g * z.R) * z.P + w) * z.N + n] = state[w];
    }
  }
}

// [i, g, Q, N], a sum of two -> [batch, L, G, N]
template <class T>
void scatter(const Sizes& z, i64 i, const T* one, const T* other, T* to, View view) {
  Chunk chunk(z, i);
  for (i64 q = 0; q < chunk.here; q++)
    for (i64 g = 0; g < z.G; g++) {
      i64 from = ((i * z.G + g) * z.Q + q) * z.N;
      T* out = to + chunk.b * view.batch_stride + (chunk.first + q) * view.stride + g * z.N;
      each(z.N, [&](i64 n, auto width) {
        store(out + n, load(one + from + n, width) + load(other + from + n, width), width);
      });
    }
}

struct Sums {  // of a head over a chunk
  double dA, dD;
};

// The inputs of the last step of the way back, and its results.
template <class T>
struct Last {
  const Sizes& z;
  const T* x;
  View vx;
  const float *dt, *A, *D;
  const T* dy;
  View vd;
  const T *du_within, *du_out;
  const float* w_out;
  const std::int32_t* lo;
  float* da;
  const float* dkept;
  T* dx;
  View vdx;
  float* ddt;

  i64 heads() const { return z.G * z.R; }
  i64 token(const Chunk& chunk, i64 q) const { return (chunk.b * z.L + chunk.first + q) * heads(); }

  // dx, and what reaches dt and the decay w_out of token q and head h directly. Returns what reaches D.
  float direct(i64 i, const Chunk& chunk, i64 q, i64 h, float* by_w_out) {
    const T* own_x = x + chunk.b * vx.batch_stride + (chunk.first + q) * vx.stride + h * z.P;
    const T* own_dy = dy + chunk.b * vd.batch_stride + (chunk.first + q) * vd.stride + h * z.P;
    const T *near = du_within + by_head(z, i, h, q), *far = du_out + folded(z, i, h, q);
    i64 to = token(chunk, q) + h;
    float step = dt[to], w = w_out[(i * heads() + h) * z.Q + q], d = D ? D[h] : 0.f;
    T* own_dx = dx + chunk.b * vdx.batch_stride + (chunk.first + q) * vdx.stride + h * z.P;
    Floats by_dt = {}, by_decay = {}, skipped = {};
    each(z.P, [&](i64 p, auto width) {
      Floats input = load(own_x + p, width), grad = load(own_dy + p, width), outgoing = load(far + p, width) * w;
      Floats du = load(near + p, width) + outgoing;
      by_dt += du * input;
      by_decay += outgoing * input;
      skipped += grad * input;
      store(own_dx + p, du * step + d * grad, width);
    });
    ddt[to] = sum(by_dt);
    *by_w_out = sum(by_decay) * step;
    return sum(skipped);
  }

  // What reaches dt by the log decays. A step is in `a` of its own and of later tokens of the document, and in the way out
  // of all earlier tokens. Returns what reaches A.
  double through_decays(i64 i, const Chunk& chunk, i64 h, const float* by_w_out) {
    float* own = da + (i * heads() + h) * z.Q;
    double kept = 0.0, later = 0.0, earlier = 0.0, by_A = 0.0;
    for (i64 n = 0; n < z.N; n++) kept += dkept[(i * heads() + h) * z.N + n];
    own[z.Q - 1] += float(kept);
    for (i64 q = z.Q - 1; q >= 0; q--) {
      later += own[q];
      own[q] = float(later);
      if (lo[i * z.Q + q] == q) later = 0.0;
    }
    for (i64 q = 0; q < chunk.here; q++) {
      double dstep = double(own[q]) + earlier;
      earlier += by_w_out[q];
      ddt[token(chunk, q) + h] += float(dstep * A[h]);
      by_A += dstep * dt[token(chunk, q) + h];
    }
    return by_A;
  }

  // by_A, by_D [H]: sums over the chunk. by_w_out [H, Q]: room.
  void chunk(i64 i, double* by_A, double* by_D, float* by_w_out) {
    Chunk chunk(z, i);
    for (i64 h = 0; h < heads(); h++) by_D[h] = 0.0;
    for (i64 q = 0; q < chunk.here; q++)
      for (i64 h = 0; h < heads(); h++) by_D[h] += direct(i, chunk, q, h, by_w_out + h * z.Q + q);
    for (i64 h = 0; h < heads(); h++) by_A[h] = through_decays(i, chunk, h, by_w_out + h * z.Q);
  }
};

}  // namespace

extern "C" void ssd_prepare(int is_bf16, const Sizes* z, const void* x, View vx, const float* dt, const float* A,
                            const void* B, View vB, const void* C, View vC, const std::int32_t* starts,
                            std::int32_t* lo, float* a, float* w_in, float* w_out, void* u, void* u_out, void* B_chunks,
                            void* C_chunks) {
  FOR_TYPE(is_bf16, prepare(*z, (const T*)x, vx, dt, A, (const T*)B, vB, (const T*)C, vC, starts, lo, a, w_in, w_out,
                            (T*)u, (T*)u_out, (T*)B_chunks, (T*)C_chunks));
}

extern "C" void ssd_weights(int is_bf16, const Sizes* z, const float* a, const std::int32_t* lo, const void* CB, void* W) {
  FOR_TYPE(is_bf16, weights(*z, a, lo, (const T*)CB, (T*)W));
}

extern "C" void ssd_pass_states(int is_bf16, const Sizes* z, const void* gained, const float* w_in, const float* initial,
                                void* before, float* final) {
  FOR_TYPE(is_bf16, pass_states(*z, (const T*)gained, w_in, initial, (T*)before, final));
}

extern "C" void ssd_combine(int is_bf16, const Sizes* z, const void* within, const void* carried, const float* w_in,
                            const void* x, View vx, const float* D, void* y) {
  FOR_TYPE(is_bf16, combine(*z, (const T*)within, (const T*)carried, w_in, (const T*)x, vx, D, (T*)y));
}

extern "C" void ssd_prepare_back(int is_bf16, const Sizes* z, const void* dy, View vd, const void* carried,
                                 const float* w_in, void* dwithin, void* dcarried, float* da) {
  FOR_TYPE(is_bf16, prepare_back(*z, (const T*)dy, vd, (const T*)carried, w_in, (T*)dwithin, (T*)dcarried, da));
}

extern "C" void ssd_weights_back(int is_bf16, const Sizes* z, const void* dW, const void* CB, const float* a,
                                 const std::int32_t* lo, void* dCB, float* da) {
  FOR_TYPE(is_bf16, weights_back(*z, (const T*)dW, (const T*)CB, a, lo, (T*)dCB, da));
}

extern "C" void ssd_pass_back(int is_bf16, const Sizes* z, const void* dbefore, const void* before, const float* w_in,
                              const float* dfinal, void* dgained, float* dkept, float* dinitial) {
  FOR_TYPE(is_bf16, pass_back(*z, (const T*)dbefore, (const T*)before, w_in, dfinal, (T*)dgained, dkept, dinitial));
}

extern "C" void ssd_finish(int is_bf16, const Sizes* z, const void* x, View vx, const float* dt, const float* A,
                           const float* D, const void* dy, View vd, const void* du_within, const void* du_out,
                           const float* w_out, const std::int32_t* lo, float* da, const float* dkept, const void* dB_near,
                           const void* dB_far, const void* dC_near, const void* dC_far, void* dx, View vdx, float* ddt,
                           float* dA, float* dD, void* dB, View vdB, void* dC, View vdC) {
  i64 H = z->G * z->R, all = z->batch * z->chunks;
  std::vector<double> sums(2 * all * H);
#pragma omp parallel num_threads(z->threads)
  {
    std::vector<float> by_w_out(H * z->Q);
#pragma omp for schedule(static)
    for (i64 i = 0; i < all; i++) {
      FOR_TYPE(is_bf16, {
        Last<T> last{*z,    (const T*)x,         vx,                  dt,    A,  D,  (const T*)dy, vd,
                     (const T*)du_within, (const T*)du_out, w_out, lo, da, dkept, (T*)dx, vdx, ddt};
        last.chunk(i, sums.data() + i * H, sums.data() + (all + i) * H, by_w_out.data());
        scatter(*z, i, (const T*)dB_near, (const T*)dB_far, (T*)dB, vdB);
        scatter(*z, i, (const T*)dC_near, (const T*)dC_far, (T*)dC, vdC);
      });
    }
  }
  for (i64 h = 0; h < H; h++) {
    double by_A = 0.0, by_D = 0.0;
    for (i64 i = 0; i < all; i++) {
      by_A += sums[i * H + h];
      by_D += sums[(all + i) * H + h];
    }
    dA[h] = float(by_A);
    dD[h] = float(by_D);
  }
}
