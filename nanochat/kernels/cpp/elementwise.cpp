// What a layer computes between its matrix products, in bf16: each a single pass over memory, in fp32, rounded once. Used by
// nanochat/kernels/elementwise.py, which also has the reference implementations.
//
// A row is computed by one thread in one order, so the bits are the same for any number of threads.

#include <algorithm>
#include <cmath>

#include "bf16.h"

namespace {

constexpr int64_t TASK = 2048;  // vectors that a thread takes at once: 64 KiB of bf16

inline __mmask16 first(int64_t n) { return n >= LANES ? 0xffff : (1u << std::max<int64_t>(n, 0)) - 1; }

// f(row) for all rows on all threads, in tasks that whoever is free takes: a busy neighbour delays one task, not half of them.
template <class F>
void for_rows(int64_t rows, int64_t width, F f) {
    const int64_t each = std::max<int64_t>(1, TASK * LANES / std::max<int64_t>(width, 1)), tasks = (rows + each - 1) / each;
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1)
    for (int64_t task = 0; task < tasks; task++)
        for (int64_t row = task * each; row < std::min(rows, (task + 1) * each); row++) f(row);
}

inline float one_over_rms(__m512 squares, int64_t width, float eps) {
    return 1 / std::sqrt(_mm512_reduce_add_ps(squares) / (float)width + eps);
}

}  // namespace

// All arrays of one row after the other are contiguous, unless a stride is given, in elements.

// mixed = a x + b y and normed = mixed / rms(mixed), (rows, width). Without y (null) only `normed` of x is written.
extern "C" void sum_and_norm(int64_t rows, int64_t width, const bf16* x, const bf16* y, float a, float b, float eps, bf16* mixed,
                             bf16* normed) {
    for_rows(rows, width, [&](int64_t row) {
        const bf16* from = x + row * width;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES) {
            const __mmask16 mask = first(width - i);
            __m512 m = load(from + i, mask);
            if (y) {
                m = _mm512_fmadd_ps(_mm512_set1_ps(a), m, _mm512_mul_ps(_mm512_set1_ps(b), load(y + row * width + i, mask)));
                const __m256i bits = rounded(m);
                _mm256_mask_storeu_epi16(mixed + row * width + i, mask, bits);
                m = widened(bits);
            }
            squares = _mm512_fmadd_ps(m, m, squares);
        }
        const __m512 r = _mm512_set1_ps(one_over_rms(squares, width, eps));
        if (y) from = mixed + row * width;
        for (int64_t i = 0; i < width; i += LANES) {
            const __mmask16 mask = first(width - i);
            store(normed + row * width + i, _mm512_mul_ps(load(from + i, mask), r), mask);
        }
    });
}

// y = max(x, 0)^2, n numbers.
extern "C" void relu_square(int64_t n, const bf16* x, bf16* y) {
    for_rows((n + LANES - 1) / LANES, LANES, [&](int64_t row) {
        const __mmask16 mask = first(n - row * LANES);
        const __m512 v = _mm512_max_ps(_mm512_setzero_ps(), load(x + row * LANES, mask));
        store(y + row * LANES, _mm512_mul_ps(v, v), mask);
    });
}

// Rotary positions and norm of heads: with z = (x1 cos + x2 sin, x2 cos - x1 sin) of a head's halves x1 and x2,
// y = scale z r, r = 1 / rms(z). x: (tokens, H, D) with strides, D a multiple of 32; token t has position t % T in cos and sin
// (T, D / 2). y (tokens, H, D), r (tokens, H).
extern "C" void rotary_norm_forward(int64_t tokens, int64_t T, int64_t H, int64_t D, const bf16* x, int64_t token, int64_t head,
                                    const bf16* cos, const bf16* sin, float scale, float eps, bf16* y, float* r) {
    const int64_t half = D / 2;
    for_rows(tokens, H * D, [&](int64_t t) {
        const bf16 *c = cos + t % T * half, *s = sin + t % T * half;
        for (int64_t h = 0; h < H; h++) {
            const bf16* from = x + t * token + h * head;
            auto rotated = [&](int64_t d, __m512& z1, __m512& z2) __attribute__((always_inline)) {
                const __m512 x1 = load(from + d), x2 = load(from + half + d), cd = load(c + d), sd = load(s + d);
                z1 = _mm512_fmadd_ps(x1, cd, _mm512_mul_ps(x2, sd));
                z2 = _mm512_fmsub_ps(x2, cd, _mm512_mul_ps(x1, sd));
            };
            __m512 squares = _mm512_setzero_ps(), z1, z2;
            for (int64_t d = 0; d < half; d += LANES) {
                rotated(d, z1, z2);
                squares = _mm512_fmadd_ps(z1, z1, _mm512_fmadd_ps(z2, z2, squares));
            }
            const float by = one_over_rms(squares, D, eps);
            r[t * H + h] = by;
            bf16* to = y + (t * H + h) * D;
            for (int64_t d = 0; d < half; d += LANES) {
                rotated(d, z1, z2);
                store(to + d, _mm512_mul_ps(z1, _mm512_set1_ps(by * scale)));
                store(to + half + d, _mm512_mul_ps(z2, _mm512_set1_ps(by * scale)));
            }
        }
    });
}

// The gradient dx (tokens, H, D) of x, from y and r of the forward pass and the gradient dy, with strides.
// With n = y / scale and g = scale dy: dz = r (g - n mean(g n)), and dx is dz rotated back.
extern "C" void rotary_norm_backward(int64_t tokens, int64_t T, int64_t H, int64_t D, const bf16* y, const float* r,
                                     const bf16* dy, int64_t token, int64_t head, const bf16* cos, const bf16* sin, float scale,
                                     bf16* dx) {
    const int64_t half = D / 2;
    for_rows(tokens, H * D, [&](int64_t t) {
        const bf16 *c = cos + t % T * half, *s = sin + t % T * half;
        for (int64_t h = 0; h < H; h++) {
            const bf16 *from = y + (t * H + h) * D, *g = dy + t * token + h * head;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < D; d += LANES) sum = _mm512_fmadd_ps(load(from + d), load(g + d), sum);
            // r g = r scale dy; r n mean(g n) = y r / scale mean(y dy)
            const __m512 of_g = _mm512_set1_ps(r[t * H + h] * scale);
            const __m512 of_y = _mm512_set1_ps(r[t * H + h] / scale * _mm512_reduce_add_ps(sum) / (float)D);
            bf16* to = dx + (t * H + h) * D;
            for (int64_t d = 0; d < half; d += LANES) {
                const __m512 z1 = _mm512_fmsub_ps(load(g + d), of_g, _mm512_mul_ps(load(from + d), of_y));
                const __m512 z2 = _mm512_fmsub_ps(load(g + half + d), of_g, _mm512_mul_ps(load(from + half + d), of_y));
                const __m512 cd = load(c + d), sd = load(s + d);
                store(to + d, _mm512_fmsub_ps(z1, cd, _mm512_mul_ps(z2, sd)));
                store(to + half + d, _mm512_fmadd_ps(z1, sd, _mm512_mul_ps(z2, cd)));
            }
        }
    });
}
