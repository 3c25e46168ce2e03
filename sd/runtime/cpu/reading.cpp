// Weights of a file in one reading: their CRC-32, the largest of them, and the same numbers in bf16; for AVX-512.
//
// Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009): a message is a
// polynomial whose coefficients are bits, and its CRC the rest of a division. Its beginning may be replaced by anything
// with the same rest, so 2048 bits at a time are multiplied with what takes them 2048 bits further, and added there.

#include <immintrin.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

constexpr uint32_t DIVISOR = 0xedb88320;       // of zip's CRC-32, the coefficient of x^0 in the highest bit
constexpr int64_t PART = 1 << 18;              // bytes: what is read once stays in a core's cache for the second use
constexpr int64_t FOLDED = 256;                // bytes that are taken further at a time
constexpr int64_t PAGE = 4096;

enum State : int32_t { WAITING, IN_WORK, DONE, FAILED };

// As `sd.runtime.loading_ahead.Job` has it.
struct Job {
    uint16_t *target;         // for the numbers in bf16; null: they are only looked at
    int64_t offset;           // of the first byte in the file
    int64_t bytes;
    int32_t file;             // its descriptor
    int32_t half;             // 0 for float32, 1 for numbers of 16 bits; with a target, float16
    uint32_t crc;             // found: CRC-32 of the bytes
    uint32_t largest;         // found: the bits of the largest number, signs left out; NaN is above infinity
    std::atomic<int32_t> state;
};

static constexpr uint32_t times_x(uint32_t rest) { return rest & 1 ? rest >> 1 ^ DIVISOR : rest >> 1; }

struct Table {
    uint32_t of_byte[256];
    constexpr Table() : of_byte() {
        for (uint32_t byte = 0; byte < 256; byte++) {
            of_byte[byte] = byte;
            for (int bit = 0; bit < 8; bit++) of_byte[byte] = times_x(of_byte[byte]);
        }
    }
};
static constexpr Table TABLE;

// The rest of x^n, for carry-less products of reflected numbers, which come out one bit too low.
static constexpr uint64_t power(int64_t n) {
    uint32_t rest = 0x80000000;
    while (n--) rest = times_x(rest);
    return static_cast<uint64_t>(rest) << 1;
}

static uint32_t crc_of_bytes(uint32_t crc, const uint8_t *from, int64_t count) {
    while (count--) crc = TABLE.of_byte[(crc ^ *from++) & 255] ^ crc >> 8;
    return crc;
}

static uint32_t crc_of(uint32_t crc, const uint8_t *from, int64_t count) {
    if (count < FOLDED) return crc_of_bytes(crc, from, count);
    constexpr uint64_t low = power(8 * FOLDED + 32), high = power(8 * FOLDED - 32);
    const __m512i further = _mm512_set_epi64(high, low, high, low, high, low, high, low);
    __m512i sums[4];
    for (int i = 0; i < 4; i++) sums[i] = _mm512_loadu_si512(from + 64 * i);
    sums[0] = _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(crc)));
    for (from += FOLDED, count -= FOLDED; count >= FOLDED; from += FOLDED, count -= FOLDED)
        for (int i = 0; i < 4; i++) {
            const __m512i lows = _mm512_clmulepi64_epi128(sums[i], further, 0x00);
            const __m512i highs = _mm512_clmulepi64_epi128(sums[i], further, 0x11);
            const __m512i here = _mm512_loadu_si512(from + 64 * i);
            sums[i] = _mm512_ternarylogic_epi64(lows, highs, here, 0x96);  // the sum of three
        }
    uint8_t left[FOLDED];
    memcpy(left, sums, FOLDED);
    return crc_of_bytes(crc_of_bytes(0, left, FOLDED), from, count);
}

// float32 -> bf16, to the nearest, of two the even one; not for NaN.
static inline __m256i rounded(__m512i x) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd), 16));
}

static uint32_t look_at_floats(const uint8_t *from, uint16_t *to, int64_t count, uint32_t largest) {
    __m512i most = _mm512_set1_epi32(static_cast<int>(largest));
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 there = count - i < 16 ? (1 << (count - i)) - 1 : 0xffff;
        const __m512i x = _mm512_maskz_loadu_epi32(there, from + 4 * i);
        most = _mm512_max_epu32(most, _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)));
        if (to) _mm256_mask_storeu_epi16(to + i, there, rounded(x));
    }
    return _mm512_reduce_max_epu32(most);
}

static uint32_t look_at_halves(const uint8_t *from, uint16_t *to, int64_t count, uint32_t largest) {
    __m512i most = _mm512_set1_epi32(static_cast<int>(largest));
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 there = count - i < 16 ? (1 << (count - i)) - 1 : 0xffff;
        const __m256i x = _mm256_maskz_loadu_epi16(there, from + 2 * i);
        most = _mm512_max_epu32(most, _mm512_cvtepu16_epi32(_mm256_and_si256(x, _mm256_set1_epi16(0x7fff))));
        if (to) _mm256_mask_storeu_epi16(to + i, there, rounded(_mm512_castps_si512(_mm512_cvtph_ps(x))));
    }
    return _mm512_reduce_max_epu32(most);
}

static uint32_t look_at(const uint8_t *from, bool half, uint16_t *to, int64_t count, uint32_t largest) {
    return half ? look_at_halves(from, to, count, largest) : look_at_floats(from, to, count, largest);
}

// Bytes of the file are read, not mapped: a mapped file that somebody cuts off ends the process that looks at it.
static bool fetch(const Job &job, int64_t start, int64_t bytes, uint8_t *to) {
    while (bytes > 0) {
        const ssize_t count = pread(job.file, to, bytes, job.offset + start);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        start += count, to += count, bytes -= count;
    }
    return true;
}

static bool claim(Job &job) {
    int32_t expected = WAITING;
    return job.state.compare_exchange_strong(expected, IN_WORK);
}

static void finish(Job &job, bool complete, uint32_t crc, uint32_t largest) {
    job.crc = ~crc;
    job.largest = largest;
    job.state.store(complete ? DONE : FAILED);
}

static void work(Job &job) {
    const int64_t width = job.half ? 2 : 4, part = job.bytes < PART ? job.bytes : PART;
    uint8_t *buffer = static_cast<uint8_t *>(malloc(part));
    uint32_t crc = ~0u, largest = 0;
    bool complete = buffer;
    for (int64_t done = 0; complete && done < job.bytes; done += part) {
        const int64_t bytes = job.bytes - done < part ? job.bytes - done : part;
        if (!(complete = fetch(job, done, bytes, buffer))) break;
        crc = crc_of(crc, buffer, bytes);
        largest = look_at(buffer, job.half, job.target ? job.target + done / width : nullptr, bytes / width, largest);
    }
    free(buffer);
    finish(job, complete, crc, largest);
}

// All that waits, one after the other, until somebody sets `stopped`.
extern "C" void sd_read_all(Job *jobs, int64_t count, const std::atomic<int32_t> *stopped) {
    for (int64_t i = 0; i < count && !*stopped; i++)
        if (claim(jobs[i])) work(jobs[i]);
}

// Have the C library hold so much memory that it can give away at once, where it keeps what was freed; until `stopped`.
extern "C" void sd_take_memory(int64_t bytes, const std::atomic<int32_t> *stopped) {
    uint8_t *memory = static_cast<uint8_t *>(malloc(bytes));
    for (int64_t i = PAGE; memory && i < bytes && !*stopped; i += PAGE) *static_cast<volatile uint8_t *>(memory + i) = 0;
    free(memory);
}

// This one, by this thread or another.
extern "C" void sd_read_one(Job *job) {
    if (claim(*job)) return work(*job);
    while (job->state.load() == IN_WORK) sched_yield();
}

// This one, which has no target of its own and nobody else works on: the weight of a convolution, (outputs, inputs, window),
// in bf16 with the inputs side by side, (outputs, window, inputs).
extern "C" void sd_turn(Job *job, uint16_t *to, int64_t outputs, int64_t inputs, int64_t window) {
    job->state.store(IN_WORK);
    const int64_t count = inputs * window, row = count * (job->half ? 2 : 4), rows = row < PART ? PART / row : 1;
    uint8_t *buffer = static_cast<uint8_t *>(malloc(rows * row));
    uint16_t *one = static_cast<uint16_t *>(malloc(2 * count));
    uint32_t crc = ~0u, largest = 0;
    bool complete = buffer && one;
    for (int64_t output = 0; complete && output < outputs; output++, to += count) {
        const int64_t nth = output % rows, together = outputs - output < rows ? outputs - output : rows;
        if (nth == 0 && !(complete = fetch(*job, output * row, together * row, buffer))) break;
        const uint8_t *from = buffer + nth * row;
        crc = crc_of(crc, from, row);
        largest = look_at(from, job->half, one, count, largest);
        for (int64_t place = 0; place < window; place++)
            for (int64_t input = 0; input < inputs; input++) to[place * inputs + input] = one[input * window + place];
    }
    free(one);
    free(buffer);
    finish(*job, complete, crc, largest);
}
