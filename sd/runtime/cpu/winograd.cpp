// What Python calls of winograd.h, in float32 for processors with AVX-512, in bf16 for those with AVX512-BF16.

#include "winograd.h"

// Bytes that each thread needs, for numbers of so many bytes.
extern "C" long sd_winograd_memory(long in, long bytes) { return POINTS * TILES * (in * bytes + PANEL * 4); }

// `in` a multiple of 16, at most 8192, and `out` one of 64. to: 16 numbers for each 9, upsampled 9
#define WEIGHTS(Number) \
    const Number *w, Number *to, long in, long out, long next_input, long next_place, long upsampled, long threads
extern "C" void sd_winograd_weights_float(WEIGHTS(float)) {
    lay_out(w, to, in, out, next_input, next_place, upsampled, threads);
}

// sizes: batch, height and width of the result, in, out, upsampled; x and y with the channels of a position side by side
#define CONVOLUTION(Number) \
    const Number *x, const Number *weights, const Number *bias, Number *y, const long *sizes, char *memory, long threads
template <class Number> static void convolve(CONVOLUTION(Number)) {
    const long *s = sizes;
    Convolution<Number>{x, weights, bias, y, s[0], s[1], s[2], s[3], s[4], s[5] != 0}.run(memory, threads);
}
extern "C" void sd_winograd_float(CONVOLUTION(float)) { convolve(x, weights, bias, y, sizes, memory, threads); }

#ifdef __AVX512BF16__
extern "C" void sd_winograd_weights_bf16(WEIGHTS(bf16)) {
    lay_out(w, to, in, out, next_input, next_place, upsampled, threads);
}
extern "C" void sd_winograd_bf16(CONVOLUTION(bf16)) { convolve(x, weights, bias, y, sizes, memory, threads); }
#endif
