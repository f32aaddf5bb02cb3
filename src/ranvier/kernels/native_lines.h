// What all kernels for CPUs are made of: lines of neurons, in memory and in registers. native_library.py compiles them with
//
//   BFLOAT16   type of what comes in and goes out: 0 float, 1 bfloat16
//   BYTES      1: spikes go out as bytes, 0 or 1
//   STEPS      T, so that loops unroll and what they hold stays in registers; 0: any T

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX__) && !defined(__clang__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#if STEPS
#define FOR_ALL_STEPS _Pragma("GCC unroll 32")
#else
#define FOR_ALL_STEPS
#endif

namespace {

#if BFLOAT16
using Element = uint16_t;
#else
using Element = float;
#endif
#if BYTES
using Sent = uint8_t;
#else
using Sent = Element;
#endif

// Neurons that are taken at once: those of the widest vectors that the processor has, since the compiler keeps no wider ones
// in registers.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int LINE = 8;
#else
constexpr int LINE = 16;
#endif
constexpr int64_t CACHE_LINE = 16;  // floats

// A line of neurons. The compiler maps arithmetic on them to what the processor has.
typedef float Float __attribute__((vector_size(4 * LINE)));
typedef int32_t Int __attribute__((vector_size(4 * LINE)));
typedef uint32_t Bits __attribute__((vector_size(4 * LINE)));
typedef uint16_t Half __attribute__((vector_size(2 * LINE)));
typedef uint8_t Byte __attribute__((vector_size(LINE)));

INLINE Float all(float value) { return value - Float{}; }  // + would not be left out, for the sake of -0

// The first `count` lanes from memory, 0 in the others; and to memory.
INLINE Float load(const float* from, int64_t count) {
    Float value{};
    std::memcpy(&value, from, count * sizeof *from);
    return value;
}
INLINE void store(float* to, Float value, int64_t count) { std::memcpy(to, &value, count * sizeof *to); }

#if BFLOAT16
INLINE Float load(const Element* from, int64_t count) {  // the upper half of a float
    Half half{};
    std::memcpy(&half, from, count * sizeof *from);
    return (Float)(__builtin_convertvector(half, Bits) << 16);
}
INLINE Half narrow(Float value) {  // to the nearest, ties to even; NaN stays NaN
    Bits bits = (Bits)value, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(value == value ? rounded : Bits{} + 0x7FC0, Half);
}
#else
INLINE Float narrow(Float value) { return value; }
#endif

// Writes what goes out. Past the caches, a whole line is not read before it is written; `to` must then be aligned.
template <bool PAST_CACHES>
INLINE void send(Element* to, Float value, int64_t count) {
    const auto sent = narrow(value);
#if defined(__clang__)
    if (PAST_CACHES && count == LINE) return __builtin_nontemporal_store(sent, (decltype(narrow(value))*)to);
#elif defined(__AVX512F__) && BFLOAT16
    if (PAST_CACHES && count == LINE) return _mm256_stream_si256((__m256i*)to, (__m256i)sent);
#elif defined(__AVX512F__)
    if (PAST_CACHES && count == LINE) return _mm512_stream_ps(to, (__m512)sent);
#elif defined(__AVX__) && BFLOAT16
    if (PAST_CACHES && count == LINE) return _mm_stream_si128((__m128i*)to, (__m128i)sent);
#elif defined(__AVX__)
    if (PAST_CACHES && count == LINE) return _mm256_stream_ps(to, (__m256)sent);
#endif
    std::memcpy(to, &sent, count * sizeof *to);
}

#if BYTES
template <bool PAST_CACHES>
INLINE void send(uint8_t* to, Float value, int64_t count) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)  // else the compiler takes lanes out one by one
    const __m256i above = (__m256i)(value > 0);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(above), _mm256_extracti128_si256(above, 1));
    const __m128i sent = _mm_and_si128(_mm_packs_epi16(halves, halves), _mm_set1_epi8(1));
#else
    const Byte sent = __builtin_convertvector((Bits)(value > 0) & 1, Byte);
#endif
    std::memcpy(to, &sent, count);
}
#endif

INLINE Float at_least(Float u) { return u >= 0 ? all(1) : all(0); }

// The first neuron of a chunk. All but the last chunk end with a cache line.
INLINE int64_t begin_of(int64_t numel, int64_t chunks, int64_t chunk) {
    const int64_t lines = (numel + CACHE_LINE - 1) / CACHE_LINE;
    const int64_t begin = (lines * chunk / chunks) * CACHE_LINE;
    return begin < numel ? begin : numel;
}

// What was written past the caches is seen by other threads from here on.
INLINE void settle(bool past_caches) {
#if defined(__AVX__) && !defined(__clang__)
    if (past_caches) _mm_sfence();
#else
    if (past_caches) __sync_synchronize();
#endif
}

}  // namespace
