// Head and soft-capped cross-entropy at once, for a chunk of tokens in bf16, through PyTorch's brgemm. Used by
// nanochat/kernels/head_loss.py; nanochat/kernels/cross_entropy.py has the formulas.
//
// Logits are made transposed, a row per word of the vocabulary and a lane per token, so that sums over the vocabulary are plain
// vectors, and two rows of gradients, interleaved, are what a product takes as its second factor:
//
//     product (M, N, K)                          first factor, rows of      second factor, in pairs of rows
//     z^T  = W x^T     (words, tokens, features)   words: W                   x packed by features
//     dx^T = W^T G^T   (features, tokens, words)   features: W transposed     G^T, interleaved
//     dW   = G^T x'    (words, features, tokens)   words: G^T                 x' packed by rows
//
// G is the gradient of the logits before the division by the sum of exp(s), which is known only when the whole vocabulary has
// been seen: dz = 4 G / sum. The factor 4 / sum goes to dx at its end, in fp32, and to x' = 4 x / sum. So a block of logits is
// read once, while it is in the cache. dz at a token's target depends on that sum too: G has 0 there, and the target's share of
// dx and dW, a row of W and of x, is added at the end, in fp32.
//
// A task of `head_loss` is a block of tokens, one of `head_weight_gradient` a tile of dW. Every sum is added in one order,
// whatever the number of tasks: the same bits for any number of threads.

#include <omp.h>

#include <cmath>

#include "bf16.h"
#include "brgemm.h"
#include "packing.h"
#include "softcap.h"

namespace {

constexpr int64_t WORDS = 256;          // of the vocabulary per product that makes dx; those that make z take 64
constexpr int64_t MOST_TOKENS = 256;    // of a task
constexpr int64_t CACHED = 200000;      // numbers of x that a task works on: with dx they take 6 bytes each of an L2 cache
constexpr int64_t TILE_WORDS = 128, TILE_FEATURES = 256, TILE_TOKENS = 512;  // of a product that makes dW

// Arguments, as 64-bit integers.
struct Problem {
    int64_t tokens, features, vocab;
    int64_t pitch;  // from a row of G^T to the next, in elements; tokens rounded up to 64, or more
};

// Tokens of a task: the more, the less often W is read; but each thread needs some tasks.
int64_t tokens_of_task(const Problem& p) {
    int64_t n = MOST_TOKENS;
    while (n > BLOCK && (n * p.features > CACHED || ceil_div(p.tokens, n) < 2 * omp_get_max_threads())) n /= 2;
    return n;
}

// What a task keeps of its tokens, a lane for each.
struct Tokens {
    alignas(64) float sums[MOST_TOKENS];         // of exp(s)
    alignas(64) float target_logit[MOST_TOKENS];
    alignas(64) float factor[MOST_TOKENS];       // 4 / sum
    alignas(64) float at_target[MOST_TOKENS];    // dz there
    alignas(64) float losses[MOST_TOKENS];
    __mmask16 counted[MOST_TOKENS / LANES];      // those with a target
};

// From the logits z (64 words, n tokens), of which `words` are of the vocabulary: exp(s), added to the sums, and G, interleaved
// and in rows. pitch: from a row of z, and a pair of rows of `interleaved`, to the next.
void exponentials(const float* z, int64_t pitch, int64_t words, int64_t n, float cap, Tokens& tokens, pair* interleaved, bf16* g,
                  int64_t g_pitch) {
    for (int64_t c = 0; c < n; c += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t r = 0; r < BLOCK; r += 2) {
            __m512 d[2];
            for (int i = 0; i < 2; i++) {
                const __mmask16 real = r + i < words ? 0xffff : 0;
                const __m512 ratio = r_of(_mm512_loadu_ps(z + (r + i) * pitch + c), cap), e = exp_of_capped(ratio, cap);
                sum = _mm512_mask_add_ps(sum, real, sum, e);
                d[i] = _mm512_maskz_mul_ps(real & tokens.counted[c / LANES], e, quarter_of_slope(ratio));
                store(g + (r + i) * g_pitch + c, d[i]);
            }
            store_interleaved(interleaved + r / 2 * pitch + c, d[0], d[1]);
        }
        _mm512_store_ps(tokens.sums + c, _mm512_add_ps(_mm512_load_ps(tokens.sums + c), sum));
    }
}

// Factors, dz at the targets and losses of n tokens, when the sums are complete.
void finish(int64_t n, float cap, Tokens& tokens) {
    for (int64_t c = 0; c < n; c += LANES) {
        const __mmask16 counted = tokens.counted[c / LANES];
        const __m512 r = r_of(_mm512_load_ps(tokens.target_logit + c), cap), slope = quarter_of_slope(r);
        const __m512 sum = _mm512_load_ps(tokens.sums + c), less = _mm512_sub_ps(exp_of_capped(r, cap), sum);
        const __m512 factor = _mm512_maskz_div_ps(counted, _mm512_set1_ps(4), sum);
        _mm512_store_ps(tokens.factor + c, factor);
        _mm512_store_ps(tokens.at_target + c, _mm512_maskz_mul_ps(counted, _mm512_mul_ps(less, slope), factor));
        alignas(64) float s[LANES];
        _mm512_store_ps(s, _mm512_fnmadd_ps(_mm512_set1_ps(2 * cap), r, _mm512_set1_ps(cap)));
        for (int64_t i = 0; i < LANES; i++) tokens.losses[c + i] = counted >> i & 1 ? std::log(tokens.sums[c + i]) - s[i] : 0;
    }
}

// dx (rows, D) = factor * out^T + dz at the target * the target's row of W
void store_dx(const Problem& p, const float* out, int64_t pitch, int64_t rows, const Tokens& tokens, const int64_t* targets,
              const bf16* w, bf16* dx) {
    const int64_t D = p.features;
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t d = 0; d < D; d += LANES) {
            __m512i v[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) v[i] = _mm512_loadu_si512(out + (d + i) * pitch + r);
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                if (r + i >= rows) break;
                const int64_t token = r + i, target = targets[token];
                __m512 sum = _mm512_mul_ps(_mm512_castsi512_ps(v[i]), _mm512_set1_ps(tokens.factor[token]));
                if (target >= 0) sum = _mm512_fmadd_ps(_mm512_set1_ps(tokens.at_target[token]), load(w + target * D + d), sum);
                store(dx + token * D + d, sum);
            }
        }
}

// x' packed by rows, of a block of tokens; `scaled` has space for it before.
void pack_scaled(const bf16* x, int64_t rows, int64_t D, const float* factor, bf16* scaled, pair* y) {
    for (int64_t r = 0; r < std::min(rows, BLOCK); r++)
        for (int64_t d = 0; d < D; d += LANES)  // 0 where a token has no target, also if its x is no number
            store(scaled + r * padded(D) + d,
                  _mm512_maskz_mul_ps(factor[r] != 0 ? 0xffff : 0, load(x + r * D + d), _mm512_set1_ps(factor[r])));
    pack_rows(scaled, padded(D), rows, D, y, padded(D));
}

// All of the tokens from `from` on, `rows` of them.
void token_block(const Problem& p, int64_t from, int64_t rows, const bf16* x, const bf16* w, const int64_t* targets, float cap,
                 float* losses, float* at_target, bf16* dx, bf16* g, pair* x_scaled) {
    const int64_t D = p.features, n = ceil_div(rows, BLOCK) * BLOCK, pitch = padded(n);
    scratch.reserve(D / 2 * pitch * 4 + BLOCK * pitch * 4 + D * pitch * 4 + WORDS / 2 * pitch * 4 + BLOCK * padded(D) * 2 +
                    D * padded(WORDS) * 2 + sizeof(Tokens));
    pair* x_features = scratch.take<pair>(D / 2 * pitch);
    float* z = scratch.take<float>(BLOCK * pitch);
    float* out = scratch.take<float>(D * pitch);  // dx transposed
    pair* interleaved = scratch.take<pair>(WORDS / 2 * pitch);
    bf16* w_rows = scratch.take<bf16>(BLOCK * padded(D));
    bf16* w_transposed = scratch.take<bf16>(D * padded(WORDS));
    Tokens& tokens = *scratch.take<Tokens>(1);
    x += from * D, dx += from * D, targets += from;

    for (int64_t t = 0; t < n; t += BLOCK) pack_features(x + t * D, D, rows - t, D, x_features + t, pitch);
    for (int64_t i = 0; i < n; i++) tokens.sums[i] = tokens.target_logit[i] = 0;
    for (int64_t c = 0; c < n; c += LANES) {
        __mmask16& counted = tokens.counted[c / LANES] = 0;
        for (int64_t i = 0; i < LANES; i++) counted |= (c + i < rows && targets[c + i] >= 0) << i;
    }
    for (int64_t v = 0; v < p.vocab; v += WORDS) {
        const int64_t count = std::min(WORDS, ceil_div(p.vocab - v, BLOCK) * BLOCK);
        for (int64_t u = v; u < v + count; u += BLOCK) {
            const int64_t words = std::min(BLOCK, p.vocab - u);
            pair* rows_of_g = interleaved + (u - v) / 2 * pitch;
            copy_rows(w + u * D, D, words, D, w_rows, padded(D));
            pack_transposed(w_rows, padded(D), BLOCK, D, w_transposed + u - v, padded(WORDS));
            product(BLOCK, n, D, w_rows, padded(D), x_features, pitch, z, pitch, false);
            exponentials(z, pitch, words, n, cap, tokens, rows_of_g, g + u * p.pitch + from, p.pitch);
            for (int64_t i = 0; i < rows; i++) {
                const int64_t word = targets[i] - u;
                if (word < 0 || word >= words) continue;
                tokens.target_logit[i] = z[word * pitch + i];
                ((bf16*)(rows_of_g + word / 2 * pitch + i))[word % 2] = g[targets[i] * p.pitch + from + i] = 0;
            }
        }
        product(D, n, count, w_transposed, padded(WORDS), interleaved, pitch, out, pitch, v > 0);
    }
    finish(n, cap, tokens);
    std::copy_n(tokens.losses, rows, losses + from);
    std::copy_n(tokens.at_target, rows, at_target + from);
    store_dx(p, out, pitch, rows, tokens, targets, w, dx);
    for (int64_t t = 0; t < n; t += BLOCK)
        pack_scaled(x + t * D, rows - t, D, tokens.factor + t, w_rows, x_scaled + (from + t) / 2 * padded(D));
}

}  // namespace

// x (tokens, features), w (at least vocab, features), dx like x: bf16, contiguous. targets (tokens,): -1 = ignored. losses
// (tokens,): in nats, 0 if ignored. at_target (tokens,): dz there. g: G^T, vocab rounded up to 64 rows of `pitch`. x_scaled: x'
// packed, tokens rounded up to 64 rows of padded(features). features must be a multiple of 32. Returns the number of invalid
// targets; if there are any, nothing is done.
extern "C" int64_t head_loss(const Problem* problem, const bf16* x, const bf16* w, const int64_t* targets, float cap,
                             float* losses, float* at_target, bf16* dx, bf16* g, pair* x_scaled) {
    const Problem& p = *problem;
    int64_t wrong = 0;
    for (int64_t i = 0; i < p.tokens; i++) wrong += targets[i] < -1 || targets[i] >= p.vocab;
    if (wrong) return wrong;
    const int64_t each = tokens_of_task(p), tasks = ceil_div(p.tokens, each);
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        token_block(p, task * each, std::min(each, p.tokens - task * each), x, w, targets, cap, losses, at_target, dx, g,
                    x_scaled);
        at::native::cpublas::brgemm_release(true);
    }
    return 0;
}

// dw (at least vocab, features) fp32 += dz^T x, from what `head_loss` left in at_target, g and x_scaled.
extern "C" void head_weight_gradient(const Problem* problem, const bf16* x, const int64_t* targets, const float* at_target,
                                     const bf16* g, const pair* x_scaled, float* dw) {
    const Problem& p = *problem;
    const int64_t D = p.features, across = ceil_div(D, TILE_FEATURES), tokens = ceil_div(p.tokens, BLOCK) * BLOCK;
    const int64_t tasks = ceil_div(p.vocab, TILE_WORDS) * across;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t word = task / across * TILE_WORDS, d = task % across * TILE_FEATURES;
        const int64_t m = std::min(TILE_WORDS, p.vocab - word), n = std::min(TILE_FEATURES, D - d);
        for (int64_t t = 0; t < tokens; t += TILE_TOKENS)
            product(m, n, std::min(TILE_TOKENS, tokens - t), g + word * p.pitch + t, p.pitch, x_scaled + t / 2 * padded(D) + d,
                    padded(D), dw + word * D + d, D, true);
        for (int64_t t = 0; t < p.tokens; t++) {
            if (targets[t] < word || targets[t] >= word + m) continue;
            float* row = dw + targets[t] * D + d;
            for (int64_t i = 0; i < n; i += LANES)
                _mm512_storeu_ps(
                    row + i, _mm512_fmadd_ps(_mm512_set1_ps(at_target[t]), load(x + t * D + d + i), _mm512_loadu_ps(row + i)));
        }
        at::native::cpublas::brgemm_release(true);
    }
}
