// Attention in bf16 for processors that multiply small matrices themselves (Intel AMX), or vectors of pairs (AVX512-BF16).
//
// For each head and each ROWS queries: scores of WIDTH keys (products), their exponentials, sums of values (products),
// then the next WIDTH keys, after Dao et al., "FlashAttention" (2022), algorithm 1. Keys and values of a head are laid out
// once as products want them. What the queries need at a time stays in the first cache: 64 keys are faster than more.
//
// Both kinds of products want pairs of numbers side by side. Tiles are 16 rows of 64 bytes; a product of tiles adds
// A (16 x 32, bf16) times B (32 x 16, bf16) to C (16 x 16, float), and B has 16 rows of 16 pairs. A product of vectors
// does so with one row of B, one pair of A, and one row of C. Intel, "Architecture Instruction Set Extensions", chapter 3.
//
// B batch, H heads, T queries, S keys, d width of a head.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <type_traits>

#include "vectors.h"

constexpr long ROWS = 32;                                 // queries at a time, two tiles
constexpr long WIDTH = 64;                                // keys at a time
constexpr long TOGETHER = 8;                              // of the queries, where products are of vectors
constexpr long SCORES = WIDTH + 16, WEIGHTS = WIDTH + 32; // row strides that do not fall on the same lines of a cache
constexpr float SLACK = 8;                                // weights may be 2^SLACK before rows are rescaled

// The compiler is not told that tile loads read memory.
static inline void fence() { asm volatile("" ::: "memory"); }

#ifdef __AMX_BF16__
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#endif

// One head of the arguments, and what a thread keeps.
struct Head {
    long S, d, padded, depth, columns;  // S up to a multiple of 32; tiles along d in the scores, and in the sums
    bf16 *keys, *values, *queries, *weights;
    float *scores, *sums;
    float top[ROWS];                                    // what is subtracted from a row's scores, in powers of two
    alignas(64) float totals[ROWS][16];                 // of its weights

    Head(char *memory, long S, long d)
        : S(S), d(d), padded(up(S, 32)), depth(up(d, 32) / 32), columns(up(d, 16) / 16) {
        auto take = [&](long bytes) { char *start = memory; memory += up(bytes, 64); return start; };
        memory = reinterpret_cast<char *>(up(reinterpret_cast<long>(memory), 64));
        keys = reinterpret_cast<bf16 *>(take(padded * depth * 64));
        values = reinterpret_cast<bf16 *>(take(padded * columns * 32));
        queries = reinterpret_cast<bf16 *>(take(ROWS * depth * 64));
        weights = reinterpret_cast<bf16 *>(take(ROWS * WEIGHTS * 2));
        scores = reinterpret_cast<float *>(take(ROWS * SCORES * 4));
        sums = reinterpret_cast<float *>(take(ROWS * columns * 64));
    }

    // Keys as B: pairs of numbers of 16 keys. k has S rows, `row` numbers from one to the next.
    void lay_out_keys(const bf16 *k, long row) {
        const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i offsets = _mm512_mullo_epi32(steps, _mm512_set1_epi32(row * 2));
        for (long s = 0; s < padded; s += 16) {
            const __mmask16 there = S - s >= 16 ? 0xffff : S > s ? (1 << (S - s)) - 1 : 0;
            for (long pair = 0; pair < depth * 16; pair++) {
                const __mmask16 used = 2 * pair < d ? there : 0;
                const __m512i numbers =
                    _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), used, offsets, k + s * row + 2 * pair, 1);
                _mm512_store_si512(keys + s * depth * 32 + pair * 32, numbers);
            }
        }
    }

    // Values as B: pairs of values, 16 columns at a time. A column of ones follows where the last tile has room for it.
    void lay_out_values(const bf16 *v, long row) {
        for (long s = 0; s < padded; s += 32)
            for (long column = 0; column < columns; column++) {
                const long left = d - column * 16;
                const __mmask16 used = left >= 16 ? 0xffff : (1 << left) - 1;
                const __m512i ones = _mm512_maskz_set1_epi32(left < 16 ? 1 << left : 0, 0x3f803f80);
                for (long pair = 0; pair < 16; pair++) {
                    const bf16 *first = v + (s + 2 * pair) * row + column * 16, *second = first + row;
                    const __m256i low = _mm256_maskz_loadu_epi16(s + 2 * pair < S ? used : 0, first);
                    const __m256i high = _mm256_maskz_loadu_epi16(s + 2 * pair + 1 < S ? used : 0, second);
                    const __m512i both =
                        _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
                    _mm512_store_si512(values + (s * columns + column * 32) * 16 + pair * 32, _mm512_or_si512(both, ones));
                }
            }
    }

    void take_queries(const bf16 *q, long row, long count) {
        memset(queries, 0, ROWS * depth * 64);
        for (long r = 0; r < count; r++) memcpy(queries + r * depth * 32, q + r * row, d * 2);
    }

#ifdef __AMX_BF16__
    // Tiles 0 and 1 are for the first 16 queries, 2 and 3 for the others, which are stored when the next keys have begun:
    // a product takes a while until it can be stored.
    void find_scores(long s, long width) {
        const bf16 *upper = queries, *lower = queries + 16 * depth * 32;
        float *below = scores + 16 * SCORES;
        fence();
        for (long n = 0; n < width; n += 32) {
            const bf16 *left = keys + (s + n) * depth * 32, *right = left + 16 * depth * 32;
            for (long k = 0; k < depth; k++) {
                if (k == 0) { _tile_zero(0); _tile_zero(1); }
                _tile_loadd(4, upper + k * 32, depth * 64);
                _tile_loadd(6, left + k * 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + k * 512, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, lower + k * 32, depth * 64);
                if (k == 0) {
                    if (n) { _tile_stored(2, below + n - 32, SCORES * 4); _tile_stored(3, below + n - 16, SCORES * 4); }
                    _tile_zero(2); _tile_zero(3);
                }
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, scores + n, SCORES * 4);
            _tile_stored(1, scores + n + 16, SCORES * 4);
        }
        _tile_stored(2, below + width - 32, SCORES * 4);
        _tile_stored(3, below + width - 16, SCORES * 4);
        leave_out(s, width);
    }
#else
    // TOGETHER queries and 32 keys at a time: so many sums are on their way at once, each a while until the next product.
    void find_scores(long s, long width) {
        for (long n = 0; n < width; n += 32)
            for (long r = 0; r < ROWS; r += TOGETHER) {
                const bf16 *left = keys + (s + n) * depth * 32, *right = left + 16 * depth * 32;
                __m512 a[TOGETHER], b[TOGETHER];
                for (long i = 0; i < TOGETHER; i++) a[i] = b[i] = _mm512_setzero_ps();
                for (long pair = 0; pair < d / 2; pair++) {
                    const __m512bh first = pairs_at(left + pair * 32), second = pairs_at(right + pair * 32);
                    for (long i = 0; i < TOGETHER; i++) {
                        const __m512bh query = everywhere(queries + (r + i) * depth * 32 + pair * 2);
                        a[i] = _mm512_dpbf16_ps(a[i], query, first);
                        b[i] = _mm512_dpbf16_ps(b[i], query, second);
                    }
                }
                for (long i = 0; i < TOGETHER; i++) {
                    _mm512_store_ps(scores + (r + i) * SCORES + n, a[i]);
                    _mm512_store_ps(scores + (r + i) * SCORES + n + 16, b[i]);
                }
            }
        leave_out(s, width);
    }
#endif

    // Columns after the last key get no weight.
    void leave_out(long s, long width) {
        for (long n = S - s; n < width; n++)
            for (long r = 0; r < ROWS; r++) scores[r * SCORES + n] = -INFINITY;
    }

    // Weights of one row; returns the largest exponent of each lane.
    template <bool COUNT> __m512 weigh(long r, long width, float scale, __m512 *total) {
        const __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(top[r]);
        const float *row = scores + r * SCORES;
        __m512 most = _mm512_setzero_ps();
        for (long n = 0; n < width; n += 32) {
            const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(row + n), by, less);
            const __m512 y = _mm512_fmsub_ps(_mm512_load_ps(row + n + 16), by, less);
            const __m512 a = power_of_two(x), b = power_of_two(y);
            most = _mm512_max_ps(most, _mm512_max_ps(x, y));
            if (COUNT) *total = _mm512_add_ps(*total, _mm512_add_ps(a, b));
            _mm512_store_si512(weights + r * WEIGHTS + n, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        return most;
    }

    // Softmax of WIDTH scores, with what is subtracted taken from the first ones: nothing else changes with it as long as
    // no weight is too large. If one is, the row and its sums so far are rescaled.
    template <bool COUNT, class Width> void find_weights(bool first, Width width, float scale) {
        for (long r = 0; first && r < ROWS; r++) {
            __m512 most = _mm512_load_ps(scores + r * SCORES);
            for (long n = 16; n < width; n += 16) most = _mm512_max_ps(most, _mm512_load_ps(scores + r * SCORES + n));
            top[r] = _mm512_reduce_max_ps(most) * scale;
            _mm512_store_ps(totals[r], _mm512_setzero_ps());
        }
        for (long r = 0; r < ROWS; r++) {
            __m512 total = COUNT ? _mm512_load_ps(totals[r]) : _mm512_setzero_ps();
            const __m512 most = weigh<COUNT>(r, width, scale, &total);
            if (__builtin_expect(_mm512_cmp_ps_mask(most, _mm512_set1_ps(SLACK), _CMP_GT_OQ), 0)) {
                const float more = _mm512_reduce_max_ps(most);
                const __m512 factor = _mm512_set1_ps(exp2f(-more));
                float *sum = sums + r * columns * 16;
                for (long n = 0; n < columns * 16; n += 16)
                    _mm512_store_ps(sum + n, _mm512_mul_ps(_mm512_load_ps(sum + n), factor));
                top[r] += more;
                total = _mm512_mul_ps(_mm512_load_ps(totals[r]), factor);
                weigh<COUNT>(r, width, scale, &total);
            }
            if (COUNT) _mm512_store_ps(totals[r], total);
        }
    }

#ifdef __AMX_BF16__
    // Sums of weighted values in N columns of tiles, 0 to 2 for the first 16 queries and 3 to 5 for the others.
    template <int N> void add_columns(bool first, long s, long width, long column) {
        const long stride = columns * 64;
        float *upper = sums + column * 16, *lower = upper + 16 * columns * 16;
        const bf16 *v = values + (s * columns + column * 32) * 16;
        if (first) {
            _tile_zero(0); _tile_zero(3);
            if (N > 1) { _tile_zero(1); _tile_zero(4); }
            if (N > 2) { _tile_zero(2); _tile_zero(5); }
        } else {
            _tile_loadd(0, upper, stride); _tile_loadd(3, lower, stride);
            if (N > 1) { _tile_loadd(1, upper + 16, stride); _tile_loadd(4, lower + 16, stride); }
            if (N > 2) { _tile_loadd(2, upper + 32, stride); _tile_loadd(5, lower + 32, stride); }
        }
        for (long n = 0; n < width; n += 32, v += columns * 512) {
            _tile_loadd(6, v, 64);
            _tile_loadd(7, weights + n, WEIGHTS * 2);
            _tile_dpbf16ps(0, 7, 6);
            if (N > 1) { _tile_loadd(6, v + 512, 64); _tile_dpbf16ps(1, 7, 6); }
            if (N > 2) { _tile_loadd(6, v + 1024, 64); _tile_dpbf16ps(2, 7, 6); }
            _tile_loadd(7, weights + 16 * WEIGHTS + n, WEIGHTS * 2);
            if (N > 2) { _tile_dpbf16ps(5, 7, 6); _tile_loadd(6, v + 512, 64); }
            if (N > 1) { _tile_dpbf16ps(4, 7, 6); _tile_loadd(6, v, 64); }
            _tile_dpbf16ps(3, 7, 6);
        }
        _tile_stored(0, upper, stride); _tile_stored(3, lower, stride);
        if (N > 1) { _tile_stored(1, upper + 16, stride); _tile_stored(4, lower + 16, stride); }
        if (N > 2) { _tile_stored(2, upper + 32, stride); _tile_stored(5, lower + 32, stride); }
    }
#else
    // Sums of weighted values in N columns of vectors.
    template <int N> void add_columns(bool first, long s, long width, long column) {
        for (long r = 0; r < ROWS; r += TOGETHER) {
            float *to = sums + r * columns * 16 + column * 16;
            __m512 sum[TOGETHER][N];
            for (long i = 0; i < TOGETHER; i++)
                for (long c = 0; c < N; c++)
                    sum[i][c] = first ? _mm512_setzero_ps() : _mm512_load_ps(to + (i * columns + c) * 16);
            for (long n = 0; n < width; n += 32) {
                const bf16 *v = values + ((s + n) * columns + column * 32) * 16;
                for (long pair = 0; pair < 16; pair++) {
                    __m512bh row[N];
                    for (long c = 0; c < N; c++) row[c] = pairs_at(v + c * 512 + pair * 32);
                    for (long i = 0; i < TOGETHER; i++) {
                        const __m512bh weight = everywhere(weights + (r + i) * WEIGHTS + n + pair * 2);
                        for (long c = 0; c < N; c++) sum[i][c] = _mm512_dpbf16_ps(sum[i][c], weight, row[c]);
                    }
                }
            }
            for (long i = 0; i < TOGETHER; i++)
                for (long c = 0; c < N; c++) _mm512_store_ps(to + (i * columns + c) * 16, sum[i][c]);
        }
    }
#endif

    void add_values(bool first, long s, long width) {
        fence();
        long column = 0;
        for (; column + 3 <= columns; column += 3) add_columns<3>(first, s, width, column);
        if (columns - column == 2) add_columns<2>(first, s, width, column);
        if (columns - column == 1) add_columns<1>(first, s, width, column);
        fence();
    }

    // COUNT: weights are added up by themselves. Else the column of ones has done that, with the weights as rounded.
    template <bool COUNT> void attend(float scale, bf16 *out, long row, long count) {
        for (long s = 0; s < padded; s += WIDTH) {
            const long width = padded - s < WIDTH ? padded - s : WIDTH;
            find_scores(s, width);
            if (width == WIDTH) find_weights<COUNT>(s == 0, std::integral_constant<long, WIDTH>{}, scale);
            else find_weights<COUNT>(s == 0, width, scale);
            add_values(s == 0, s, width);
        }
        for (long r = 0; r < count; r++) {
            const float *sum = sums + r * columns * 16;
            const float total = COUNT ? _mm512_reduce_add_ps(_mm512_load_ps(totals[r])) : sum[d];
            for (long n = 0; n < d; n += 16) {
                const __mmask16 used = d - n >= 16 ? 0xffff : (1 << (d - n)) - 1;
                const __m512 mean = _mm512_div_ps(_mm512_load_ps(sum + n), _mm512_set1_ps(total));
                _mm256_mask_storeu_epi16(out + r * row + n, used, (__m256i)_mm512_cvtneps_pbh(mean));
            }
        }
    }
};

// Bytes of memory that each thread needs.
extern "C" long sd_attention_memory(long S, long d) {
    return up(S, 32) * (up(d, 32) + up(d, 16)) * 2 + ROWS * (up(d, 32) * 2 + up(d, 16) * 4 + WEIGHTS * 2 + SCORES * 4) + 448;
}

// Linux lets a process use tiles once it has asked. Returns whether it may.
extern "C" int sd_attention_permitted() {
#ifndef __AMX_BF16__
    return 1;
#endif
    const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// q (B, T, H * d), k and v (B, S, H * d) and out (B, T, H * d), with strides of batch and row in numbers; S > 0, d even.
extern "C" void sd_attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, long B, long H, long T, long S, long d,
                             const long *strides, float scale, char *memory, long threads) {
    const long blocks = up(T, ROWS) / ROWS, all = B * H * blocks;
    const float in_powers_of_two = scale * 1.44269504f;
#pragma omp parallel num_threads(threads)
    {
        const long number = omp_get_thread_num(), count = omp_get_num_threads();
        Head head(memory + number * sd_attention_memory(S, d), S, d);
#ifdef __AMX_BF16__
        const TileShapes shapes;
        fence();
        _tile_loadconfig(&shapes);
#endif
        long laid_out = -1;
        for (long i = all * number / count; i < all * (number + 1) / count; i++) {
            const long which = i / blocks, first = i % blocks * ROWS, b = which / H, start = which % H * d;
            const long rows = T - first < ROWS ? T - first : ROWS;
            if (which != laid_out) {
                head.lay_out_keys(k + b * strides[2] + start, strides[3]);
                head.lay_out_values(v + b * strides[4] + start, strides[5]);
                laid_out = which;
            }
            head.take_queries(q + b * strides[0] + first * strides[1] + start, strides[1], rows);
            bf16 *to = out + b * strides[6] + first * strides[7] + start;
            if (d % 16) head.attend<false>(in_powers_of_two, to, strides[7], rows);
            else head.attend<true>(in_powers_of_two, to, strides[7], rows);
        }
#ifdef __AMX_BF16__
        _tile_release();
#endif
    }
}
