// 3x3 convolutions by Winograd's algorithm.
//
// Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1: a tile of 2x2 results sees 4x4
// inputs d. With g for a 3x3 window of weights and the matrices of their equation 8,
//
//     results = A' [ (G g G') . (B' d B) ] A,
//
// where the product in the middle is that of single numbers: 16 for four results, where the definition has 36. For all
// input and output channels at once, each of these 16 points is a product of matrices, tiles x inputs times inputs x
// outputs. A few tiles at a time go through all three parts, so that what lies between them stays in the second cache.
//
// Where the input is to be upsampled first, the two rows in the middle of d are one row of what is given, and so are the
// two columns: their differences are zero, and 9 points are left.
//
// Sums are float. In bf16, what is multiplied is rounded once more than in the definition.

#pragma once

#include <omp.h>

#include "vectors.h"

constexpr long POINTS = 16;
constexpr long PANEL = 64;  // output channels at a time, four vectors
constexpr long ROWS = 6;    // tiles at a time: so many sums are on their way at once, each a while until the next product
constexpr long TILES = 24;  // that go through all three parts together

alignas(64) static const char zeros[1 << 15] = {};  // a position outside of the input

// What a product takes at once: one float, or a pair of bf16 numbers.
template <class Number> struct Product;
template <> struct Product<float> {
    static constexpr long DEPTH = 1;
    using Vector = __m512;
    static inline Vector row(const float *from) { return _mm512_load_ps(from); }
    static inline Vector everywhere(const float *from) { return _mm512_set1_ps(*from); }
    static inline __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

#ifdef __AVX512BF16__
template <> struct Product<bf16> {
    static constexpr long DEPTH = 2;
    using Vector = __m512bh;
    static inline Vector row(const bf16 *from) { return pairs_at(from); }
    static inline Vector everywhere(const bf16 *from) { return ::everywhere(from); }
    static inline __m512 add(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// Whether a point, four to a row, is not zero for every input.
static inline bool counts(bool upsampled, long point) { return !upsampled || (point / 4 != 2 && point % 4 != 2); }

static inline long points(bool upsampled) { return upsampled ? 9 : POINTS; }

template <class Number> struct Convolution {
    const Number *x, *weights, *bias;
    Number *y;
    long batch, height, width, in, out;  // height and width of the result; numbers of channels
    bool upsampled;

    long down() const { return (height + 1) / 2; }
    long across() const { return (width + 1) / 2; }
    long tiles() const { return batch * down() * across(); }

    // B' d B of some tiles: u[point][tile][input channel]
    void read(long first, long count, Number *u) const {
        const long shift = upsampled ? 1 : 0;
        for (long t = 0; t < count; t++) {
            const long column = (first + t) % across() * 2 - 1, rest = (first + t) / across();
            const long row = rest % down() * 2 - 1, b = rest / down();
            const Number *from[4][4];
            for (long i = 0; i < 4; i++)
                for (long j = 0; j < 4; j++) {
                    const long r = row + i, c = column + j;
                    const long place = (b * (height >> shift) + (r >> shift)) * (width >> shift) + (c >> shift);
                    const bool inside = r >= 0 && r < height && c >= 0 && c < width;
                    from[i][j] = inside ? x + place * in : reinterpret_cast<const Number *>(zeros);
                }
            for (long k = 0; k < in; k += 16) {
                __m512 e[4][4];
                for (long j = 0; j < 4; j++) {
                    const __m512 a = widened(from[0][j] + k), b = widened(from[1][j] + k);
                    const __m512 c = widened(from[2][j] + k), d = widened(from[3][j] + k);
                    e[0][j] = _mm512_sub_ps(a, c);
                    e[1][j] = _mm512_add_ps(b, c);
                    e[2][j] = _mm512_sub_ps(c, b);
                    e[3][j] = _mm512_sub_ps(b, d);
                }
                for (long i = 0; i < 4; i++) {
                    if (!counts(upsampled, i * 4)) continue;
                    Number *to = u + (i * 4 * TILES + t) * in + k;
                    narrowed(to, _mm512_sub_ps(e[i][0], e[i][2]));
                    narrowed(to + TILES * in, _mm512_add_ps(e[i][1], e[i][2]));
                    if (!upsampled) narrowed(to + 2 * TILES * in, _mm512_sub_ps(e[i][2], e[i][1]));
                    narrowed(to + 3 * TILES * in, _mm512_sub_ps(e[i][1], e[i][3]));
                }
            }
        }
    }

    // The products of ROWS tiles for one point and PANEL outputs.
    void multiply_rows(const Number *u, const Number *panel, float *m) const {
        using Product = ::Product<Number>;
        __m512 sums[ROWS][4];
        for (long r = 0; r < ROWS; r++)
            for (long n = 0; n < 4; n++) sums[r][n] = _mm512_setzero_ps();
        for (long k = 0; k < in; k += Product::DEPTH, panel += PANEL * Product::DEPTH) {
            typename Product::Vector w[4];
            for (long n = 0; n < 4; n++) w[n] = Product::row(panel + n * 16 * Product::DEPTH);
#pragma GCC unroll 6
            for (long r = 0; r < ROWS; r++) {
                const auto given = Product::everywhere(u + r * in + k);
                for (long n = 0; n < 4; n++) sums[r][n] = Product::add(sums[r][n], given, w[n]);
            }
        }
        for (long r = 0; r < ROWS; r++)
            for (long n = 0; n < 4; n++) _mm512_store_ps(m + r * PANEL + n * 16, sums[r][n]);
    }

    // All products for PANEL outputs: m[point][tile][output]. Rows after the last tile are multiplied and ignored.
    void multiply(const Number *u, long count, long panel, float *m) const {
        const Number *from = weights + panel * points(upsampled) * in * PANEL;
        for (long p = 0; p < POINTS; p++) {
            if (!counts(upsampled, p)) continue;
            for (long t = 0; t < count; t += ROWS)
                multiply_rows(u + (p * TILES + t) * in, from, m + (p * TILES + t) * PANEL);
            from += in * PANEL;
        }
    }

    // A' m A, and the bias.
    void write(const float *m, long first, long count, long panel) const {
        for (long t = 0; t < count; t++) {
            const long column = (first + t) % across() * 2, rest = (first + t) / across();
            const long row = rest % down() * 2, b = rest / down();
            for (long n = 0; n < PANEL; n += 16) {
                const __m512 none = _mm512_setzero_ps(), more = widened(bias + panel * PANEL + n);
                __m512 s[2][4];
                for (long j = 0; j < 4; j++) {
                    const float *from = m + (j * TILES + t) * PANEL + n;
                    const auto at = [&](long i) {
                        return counts(upsampled, i * 4 + j) ? _mm512_load_ps(from + i * 4 * TILES * PANEL) : none;
                    };
                    s[0][j] = _mm512_add_ps(_mm512_add_ps(at(0), at(1)), at(2));
                    s[1][j] = _mm512_sub_ps(_mm512_sub_ps(at(1), at(2)), at(3));
                }
                for (long i = 0; i < 2 && row + i < height; i++) {
                    Number *to = y + ((b * height + row + i) * width + column) * out + panel * PANEL + n;
                    const __m512 left = _mm512_add_ps(_mm512_add_ps(s[i][0], s[i][1]), s[i][2]);
                    narrowed(to, _mm512_add_ps(left, more));
                    const __m512 right = _mm512_sub_ps(_mm512_sub_ps(s[i][1], s[i][2]), s[i][3]);
                    if (column + 1 < width) narrowed(to + out, _mm512_add_ps(right, more));
                }
            }
        }
    }

    // memory: for each thread as much as `sd_winograd_memory` says, at a multiple of 64
    void run(char *memory, long threads) const {
        const long chunks = up(tiles(), TILES) / TILES, products = POINTS * TILES * PANEL * sizeof(float);
        const long each = products + POINTS * TILES * in * sizeof(Number);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (long chunk = 0; chunk < chunks; chunk++) {
            char *mine = memory + omp_get_thread_num() * each;
            float *m = reinterpret_cast<float *>(mine);
            Number *u = reinterpret_cast<Number *>(mine + products);
            const long first = chunk * TILES, count = tiles() - first < TILES ? tiles() - first : TILES;
            read(first, count, u);
            for (long panel = 0; panel < out / PANEL; panel++) {
                multiply(u, count, panel, m);
                write(m, first, count, panel);
            }
        }
    }
};

// G g G' of the weights: to[panel][point][input][PANEL], or, for pairs, [input / 2][PANEL][2].
// w has 9 `in` numbers for each output, `next_input` from one input to the next, `next_place` from one of the 9 places.
template <class Number>
static void lay_out(const Number *w, Number *to, long in, long out, long next_input, long next_place, bool upsampled,
                    long threads) {
    constexpr long DEPTH = Product<Number>::DEPTH;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long panel = 0; panel < out / PANEL; panel++)
        for (long k = 0; k < in; k++)
            for (long n = 0; n < PANEL; n += 16) {
                alignas(64) Number g[9][16];
                for (long lane = 0; lane < 16; lane++) {
                    const Number *from = w + (panel * PANEL + n + lane) * in * 9 + k * next_input;
                    for (long i = 0; i < 9; i++) g[i][lane] = from[i * next_place];
                }
                const __m512 half = _mm512_set1_ps(0.5f);
                __m512 h[4][3];
                for (long j = 0; j < 3; j++) {
                    const __m512 a = widened(g[j]), b = widened(g[3 + j]), c = widened(g[6 + j]);
                    h[0][j] = a;
                    h[1][j] = _mm512_mul_ps(half, _mm512_add_ps(_mm512_add_ps(a, c), b));
                    h[2][j] = _mm512_mul_ps(half, _mm512_sub_ps(_mm512_add_ps(a, c), b));
                    h[3][j] = c;
                }
                Number *at = to + (panel * points(upsampled) * in + k / DEPTH * DEPTH) * PANEL + n * DEPTH + k % DEPTH;
                for (long p = 0; p < POINTS; p++) {
                    if (!counts(upsampled, p)) continue;
                    const __m512 *row = h[p / 4], ends = _mm512_add_ps(row[0], row[2]);
                    const __m512 all[4] = {row[0], _mm512_mul_ps(half, _mm512_add_ps(ends, row[1])),
                                           _mm512_mul_ps(half, _mm512_sub_ps(ends, row[1])), row[2]};
                    alignas(64) Number rounded[16];
                    narrowed(rounded, all[p % 4]);
                    for (long lane = 0; lane < 16; lane++) at[lane * DEPTH] = rounded[lane];
                    at += in * PANEL;
                }
            }
}
