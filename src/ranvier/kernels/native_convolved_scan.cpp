// Neurons that receive what a convolution gives, all steps in one pass on the matrix unit of x86 processors (AMX), without
// gradients: the currents never reach memory. native_convolved_scan.py compiles this file for one kind of neuron:
//
//   CHARGE, SOFT  see native_neuron.h
//   BURSTS        1: beyond a second threshold a spike is larger
//   CONVERTED     1: none of these, but neurons of converted networks, as in native_converted.cpp, which then are
//   SIGNED, BINARY   as there
//   TAKES_BYTES   0: what comes is bfloat16, and so are weights; 1: bytes, and weights of 8 bits with a sign
//   BYTES         1: spikes, and what is sent beside them, go out as bytes; 0: as bfloat16
//
// Images are [steps, N, H, W, channels] in memory. A row of what is multiplied is one place of the output, 64 bytes of its
// channels; 16 places that lie side by side make a tile. So that they do lie side by side, each image is laid out first,
// with its padding:
//
//   [plane of y][plane of x][block of channels][y][x][64 bytes]
//
// Every place of a plane is met by the same weights: rows of y = a, a + stride, ... are one plane, and so are columns where
// images are wide. Rows are then a little longer than those of the output, and what is summed beyond their end is not
// used. Narrow images have a plane of their own for each weight of a row, if that fits a cache; nothing is summed in vain.
//
// Sums of 32 places and 32 channels are turned into spikes before the next are begun, step after step.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>

#include "native_lines.h"
#if !CONVERTED
#include "native_neuron.h"
#endif
#include "native_tiles.h"

#if TAKES_BYTES
using Number = uint8_t;
using Sum = int32_t;
#else
using Number = uint16_t;
using Sum = float;
#endif

// What the function is given: `_Work` in native_convolved_scan.py.
struct Work {
    const Number* input;    // [steps, images, height, width, channels]
    const Sent* added;      // as the spikes, sent beside them, or null
    const uint16_t* joined; // bfloat16, of the shape of the spikes: what neurons get besides, or null
    const char* weights;    // [block of O][tap][block of C][two tiles][16][16 of O][4 bytes of C]
    const float* scale;     // [O, whole blocks], of bytes
    const float* bias;      // [O, whole blocks]
    const float* gain;      // [O, whole blocks], what a burst sends beyond a spike
    const float* threshold; // [O, whole blocks], of converted neurons, as the next two
    const float* shift;     // [O, whole blocks], `shift_apart` from step to step: what is taken from the current
    const float* start;     // [O, whole blocks], potential where there is no state
    const float* state;     // [images, out_height, out_width, out_channels], or null
    const float* emitted;   // the same, of signed neurons
    float* end;             // the same
    float* emitted_end;     // the same
    Sent* spikes;           // [steps, images, out_height, out_width, out_channels]
    char* scratch;          // for each thread so many bytes as `scratch_size` says
    int64_t steps, images, height, width, channels, out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, threads;
    int64_t shift_apart;
    float leak, v_threshold, v_burst;
};

namespace {

constexpr int64_t ROW = 64;                        // bytes
constexpr int64_t IN = ROW / sizeof(Number);       // channels of a row
constexpr int64_t OUT = 32;                        // channels of what is summed at once
constexpr int64_t TILE = 16 * ROW;                 // bytes
constexpr int64_t WIDE = 32;                       // places of a row from which a few in vain do not matter
constexpr int64_t NEAR = 1 << 20;                  // bytes laid out at once: they should stay in a L2
constexpr int64_t TAPS = 1024;                     // most weights of a channel, MOST_TAPS in native_convolution.py

// All that follows from the sizes.
struct Form {
    bool wide;
    int64_t taps, blocks, outs;                    // weights of a channel; blocks of channels that come and go
    int64_t planes_y, planes_x, rows, columns;     // of an image as it is laid out
    int64_t plane, step, image;                    // bytes of one block of a plane, of a step, of all steps
    int64_t tiles, pairs;                          // of places
    int64_t group, groups;                         // images that are laid out at once

    explicit Form(const Work& work) {
        taps = work.kernel_height * work.kernel_width;
        blocks = (work.channels + IN - 1) / IN;
        outs = (work.out_channels + OUT - 1) / OUT;
        wide = work.out_width >= WIDE ||
               work.steps * work.out_height * work.out_width * work.kernel_width * blocks * ROW > NEAR;
        planes_y = work.kernel_height == 1 ? 1 : work.stride_y;
        planes_x = wide && work.kernel_width > 1 ? work.stride_x : work.kernel_width;
        rows = work.out_height + (work.kernel_height - 1) * work.dilation_y / work.stride_y;
        columns = work.out_width + (wide ? (work.kernel_width - 1) * work.dilation_x / work.stride_x : 0);
        plane = rows * columns * ROW;
        step = planes_y * planes_x * blocks * plane;
        image = work.steps * step;
        tiles = ((work.out_height - 1) * columns + work.out_width + 15) / 16;
        pairs = (tiles + 1) / 2;
        group = std::max<int64_t>(1, std::min(work.images, NEAR / image));
        groups = (work.images + group - 1) / group;
    }

    // Bytes that a thread lays out at once. The last tile may reach beyond the last place.
    int64_t near() const { return group * image + 2 * TILE; }

    // Bytes from the first row of a tile of the output to the row that a weight meets.
    int64_t offset(const Work& work, int64_t tap) const {
        const int64_t a = tap / work.kernel_width * work.dilation_y, b = tap % work.kernel_width * work.dilation_x;
        const int64_t y = planes_y > 1 ? a % planes_y : 0;
        const int64_t x = !wide ? tap % work.kernel_width : planes_x > 1 ? b % planes_x : 0;
        return (y * planes_x + x) * blocks * plane + (a / work.stride_y * columns + (wide ? b / work.stride_x : 0)) * ROW;
    }
};

// A block of channels of `count` places, `apart` numbers from place to place, in rows that follow each other.
INLINE void copy_rows(const Number* from, int64_t apart, int64_t count, int64_t channels, char* to) {
    if (channels >= IN) {
        for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + i * ROW, _mm512_loadu_si512(from + i * apart));
    } else {
        for (int64_t i = 0; i < count; ++i) {
            _mm512_storeu_si512(to + i * ROW, _mm512_setzero_si512());
            std::memcpy(to + i * ROW, from + i * apart, channels * sizeof *from);
        }
    }
}

// Lays out a group of images, line by line: a line is a row of a plane of a step of an image.
void lay_out(const Work& work, const Form& form, int64_t begin, int64_t images, char* scratch) {
    const int64_t planes = form.planes_y * form.planes_x, lines = work.steps * planes * form.rows;
    for (int64_t line = 0; line < images * lines; ++line) {
        const int64_t image = line / lines, t = line % lines / (form.rows * planes);
        const int64_t plane = line / form.rows % planes, row = line % form.rows, px = plane % form.planes_x;
        const int64_t y = row * work.stride_y + plane / form.planes_x - work.padding_y;
        const int64_t x = (form.wide ? px : px * work.dilation_x) - work.padding_x;  // of the first column
        const int64_t before = std::clamp<int64_t>((work.stride_x - 1 - x) / work.stride_x, 0, form.columns);
        const int64_t reach = work.width > x ? (work.width - x - 1) / work.stride_x + 1 : 0;
        const int64_t after = y < 0 || y >= work.height ? before : std::clamp(reach, before, form.columns);
        const int64_t frame = t * work.images + begin + image;
        const Number* from = work.input + ((frame * work.height + y) * work.width + x) * work.channels;
        char* to = scratch + image * form.image + t * form.step + plane * form.blocks * form.plane;
        to += row * form.columns * ROW;
        const int64_t apart = work.stride_x * work.channels;
        for (int64_t block = 0; block < form.blocks; ++block, to += form.plane) {
            std::memset(to, 0, before * ROW);
            copy_rows(from + before * apart + block * IN, apart, after - before, work.channels - block * IN,
                      to + before * ROW);
            std::memset(to + after * ROW, 0, (form.columns - after) * ROW);
        }
    }
}

#if TAKES_BYTES
#define MULTIPLY(sum, row, column) _tile_dpbusd(sum, row, column)
#else
#define MULTIPLY(sum, row, column) _tile_dpbf16ps(sum, row, column)
#endif
// Sums of one or two tiles of places with 32 channels, [32 places][32 channels].
template <bool TWO>
INLINE void multiply(const char* one, const char* other, const int64_t* offsets, const char* weights, const Form& form,
                     Sum* sums) {
    settle_tiles();
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) _tile_zero(2);
    if (TWO) _tile_zero(3);
    for (int64_t tap = 0; tap < form.taps; ++tap) {
        const char *first = one + offsets[tap], *second = other + offsets[tap];
        for (int64_t block = 0; block < form.blocks; ++block) {
            _tile_loadd(6, weights, ROW);
            _tile_loadd(4, first, ROW);
            MULTIPLY(0, 4, 6);
            _tile_loadd(7, weights + TILE, ROW);
            MULTIPLY(1, 4, 7);
            if (TWO) {
                _tile_loadd(5, second, ROW);
                MULTIPLY(2, 5, 6);
                MULTIPLY(3, 5, 7);
            }
            weights += 2 * TILE, first += form.plane, second += form.plane;
        }
    }
    _tile_stored(0, sums, 4 * OUT);
    _tile_stored(1, sums + 16, 4 * OUT);
    if (TWO) _tile_stored(2, sums + 16 * OUT, 4 * OUT);
    if (TWO) _tile_stored(3, sums + 16 * OUT + 16, 4 * OUT);
}

INLINE Float read(const Sum* from) {
#if TAKES_BYTES
    return (Float)_mm512_cvtepi32_ps(_mm512_loadu_si512(from));
#else
    return (Float)_mm512_loadu_ps(from);
#endif
}

// Numbers of 32 channels.
struct Channels {
    Float low, high;
};

// From a table of whole blocks.
INLINE Channels of_channels(const float* table, int64_t out) {
    return {load(table + out * OUT, LINE), load(table + out * OUT + 16, LINE)};
}

// Those of `there`, and 0 for others.
#if BYTES
INLINE Channels fetch(const uint8_t* from, __mmask32 there) {
    const __m256i numbers = _mm256_maskz_loadu_epi8(there, from);
    const __m128i low = _mm256_castsi256_si128(numbers), high = _mm256_extracti128_si256(numbers, 1);
    return {(Float)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(low)), (Float)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(high))};
}
#endif
INLINE Channels fetch(const uint16_t* from, __mmask32 there) {
    const __m512i numbers = _mm512_maskz_loadu_epi16(there, from);
    const __m256i low = _mm512_castsi512_si256(numbers), high = _mm512_extracti64x4_epi64(numbers, 1);
    return {(Float)_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16),
            (Float)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)};
}

INLINE void put(Sent* to, Channels numbers, __mmask32 there) {
#if BYTES
    const __m128i low = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)numbers.low));
    const __m128i high = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)numbers.high));
    _mm256_mask_storeu_epi8(to, there, _mm256_set_m128i(high, low));
#else
    _mm512_mask_storeu_epi16(to, there, (__m512i)_mm512_cvtne2ps_pbh((__m512)numbers.high, (__m512)numbers.low));
#endif
}

// Those places of a tile that are places of the output: their rows in the tile, and where they stand in an image.
struct Places {
    int64_t count = 0, row[16], place[16];

    Places(const Work& work, const Form& form, int64_t tile) {
        int64_t y = 16 * tile / form.columns, x = 16 * tile % form.columns;
        for (int64_t i = 0; i < 16 && y < work.out_height; ++i) {
            if (x < work.out_width) row[count] = i, place[count++] = y * work.out_width + x;
            if (++x == form.columns) x = 0, ++y;
        }
    }
};

// What 16 neurons remember: rows of a tile of places and 32 channels.
struct Memory {
    float* v;
    float* emitted;  // spikes less those taken back, of signed neurons

    INLINE Memory from(int64_t at) const { return {v + at, emitted + at}; }
};

// What is known of 16 channels, in whole blocks.
struct Constants {
    Float bias, scale, gain, threshold;

    Constants(const Work& work, int64_t channel)
        : bias(load(work.bias + channel, LINE)),
          scale(TAKES_BYTES ? load(work.scale + channel, LINE) : all(1)),
          gain(BURSTS ? load(work.gain + channel, LINE) : all(0)),
          threshold(CONVERTED ? load(work.threshold + channel, LINE) : all(0)) {}
};

// A step of 16 neurons that get `x`: what they send.
#if CONVERTED
INLINE Float step(const Work&, const Constants& known, Float x, Float shift, Memory memory) {
    const Float h = load(memory.v, LINE) + (x - shift);
    Float fired = h >= known.threshold ? all(1) : all(0);
    if (SIGNED) {
        const Float emitted = load(memory.emitted, LINE);
        fired -= ((h < 0) & (emitted > 0)) ? all(1) : all(0);
        store(memory.emitted, emitted + fired, LINE);
    }
    const Float y = known.threshold * fired;
    store(memory.v, h - y, LINE);
    return BINARY ? fired : y;
}
#else
INLINE Float step(const Work& work, const Constants& known, Float x, Float, Memory memory) {
    const Float h = charge(x, load(memory.v, LINE), work.leak), fired = at_least(h - work.v_threshold);
    store(memory.v, reset(h, fired, work.v_threshold), LINE);
    return BURSTS ? fired + known.gain * at_least(h - work.v_burst) : fired;
}
#endif

INLINE Float current(const Constants& known, const Sum* sums) {
    return TAKES_BYTES ? read(sums) * known.scale + known.bias : read(sums) + known.bias;
}

// Step `t` of an image for the neurons of a tile of places; `sums` and what they remember are [16 places][32 channels].
INLINE void fire(const Work& work, const Places& places, int64_t out, int64_t t, int64_t image, const Sum* sums,
                 Memory memory) {
    const int64_t channels = work.out_channels, left = channels - out * OUT;
    const int64_t first = (t * work.images + image) * work.out_height * work.out_width * channels + out * OUT;
    const __mmask32 there = left >= OUT ? ~0u : (1u << left) - 1;
    const Constants low(work, out * OUT), high(work, out * OUT + 16);
    const Channels taken = CONVERTED ? of_channels(work.shift + t * work.shift_apart, out) : Channels{};
    const Sent* added = work.added ? work.added + first : nullptr;
    const uint16_t* joined = work.joined ? work.joined + first : nullptr;
    Sent* spikes = work.spikes + first;
    for (int64_t i = 0; i < places.count; ++i) {
        const int64_t at = places.place[i] * channels, from = places.row[i] * OUT;
        Channels x{current(low, sums + from), current(high, sums + from + 16)};
        if (joined) {
            const Channels beside = fetch(joined + at, there);
            x.low = x.low + beside.low, x.high = x.high + beside.high;
        }
        Channels sent{step(work, low, x.low, taken.low, memory.from(from)),
                      step(work, high, x.high, taken.high, memory.from(from + 16))};
        if (added) {
            const Channels beside = fetch(added + at, there);
            sent.low = sent.low + beside.low, sent.high = sent.high + beside.high;
        }
        put(spikes + at, sent, there);
    }
}

// What the neurons of a tile of places remember, [16 places][32 channels], of an image in memory.
struct Carried {
    const Places& places;
    int64_t first, channels, there;

    Carried(const Work& work, const Places& places, int64_t out, int64_t image)
        : places(places),
          first(image * work.out_height * work.out_width * work.out_channels + out * OUT),
          channels(work.out_channels),
          there(4 * std::min(OUT, work.out_channels - out * OUT)) {}

    void read(const float* from, float* to) const {
        for (int64_t i = 0; i < places.count; ++i)
            std::memcpy(to + places.row[i] * OUT, from + first + places.place[i] * channels, there);
    }
    void write(const float* from, float* to) const {
        for (int64_t i = 0; i < places.count; ++i)
            std::memcpy(to + first + places.place[i] * channels, from + places.row[i] * OUT, there);
    }
};

// What neurons of a tile remember before the first step.
INLINE void begin(const Work& work, const Carried& carried, int64_t out, Memory memory) {
    const Channels first = CONVERTED && work.start ? of_channels(work.start, out) : Channels{};
    for (int64_t row = 0; row < 16; ++row) {
        store(memory.v + row * OUT, first.low, LINE);
        store(memory.v + row * OUT + 16, first.high, LINE);
    }
    if (work.state) carried.read(work.state, memory.v);
    if (SIGNED) std::memset(memory.emitted, 0, 16 * OUT * sizeof *memory.emitted);
    if (SIGNED && work.emitted) carried.read(work.emitted, memory.emitted);
}

// The same after the last step.
INLINE void finish(const Work& work, const Carried& carried, Memory memory) {
    if (work.end) carried.write(memory.v, work.end);
    if (SIGNED && work.emitted_end) carried.write(memory.emitted, work.emitted_end);
}

// Does parts `first ... last` of a group: a part is a pair of tiles of an image, all steps, with 32 channels.
void run_parts(const Work& work, const Form& form, int64_t first_image, int64_t images, int64_t first, int64_t last,
               const char* scratch) {
    alignas(64) Sum sums[32 * OUT];
    alignas(64) float v[32 * OUT], emitted[SIGNED ? 32 * OUT : 1];
    const Memory memory{v, emitted}, beyond{v + 16 * OUT, SIGNED ? emitted + 16 * OUT : emitted};
    const Sum* more = sums + 16 * OUT;
    int64_t offsets[TAPS];
    for (int64_t tap = 0; tap < form.taps; ++tap) offsets[tap] = form.offset(work, tap);
    const int64_t stride = form.taps * form.blocks * 2 * TILE;
    for (int64_t part = first; part < last; ++part) {
        const int64_t out = part / (images * form.pairs), image = part / form.pairs % images, pair = part % form.pairs;
        const Places one(work, form, 2 * pair), other(work, form, 2 * pair + 1);
        const bool two = 2 * pair + 1 < form.tiles;
        const int64_t number = first_image + image;
        const Carried of_one(work, one, out, number), of_other(work, other, out, number);
        begin(work, of_one, out, memory);
        if (two) begin(work, of_other, out, beyond);
        const char* weights = work.weights + out * stride;
        const char* from = scratch + image * form.image + 2 * pair * TILE;
        for (int64_t t = 0; t < work.steps; ++t, from += form.step) {
            if (two) {
                multiply<true>(from, from + TILE, offsets, weights, form, sums);
                fire(work, one, out, t, number, sums, memory);
                fire(work, other, out, t, number, more, beyond);
            } else if (t + 1 < work.steps) {  // of two steps at once
                multiply<true>(from, from + form.step, offsets, weights, form, sums);
                fire(work, one, out, t, number, sums, memory);
                fire(work, one, out, ++t, number, more, memory);
                from += form.step;
            } else {
                multiply<false>(from, from, offsets, weights, form, sums);
                fire(work, one, out, t, number, sums, memory);
            }
        }
        finish(work, of_one, memory);
        if (two) finish(work, of_other, beyond);
    }
}

}  // namespace

// Bytes of scratch for each thread.
extern "C" int64_t scratch_size(const Work* work) { return Form(*work).near(); }

extern "C" void run(const Work* given) {
    const Form form(*given);
#pragma omp parallel num_threads(given->threads)
    {
        const Work work = *given;  // of this thread alone: the compiler then knows that no store changes it
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const bool apart = form.groups % threads == 0 || form.groups >= 4 * threads;
        const Tiles tiles;
        char* scratch = work.scratch + thread * form.near();
        for (int64_t group = apart ? thread : 0; group < form.groups; group += apart ? threads : 1) {
            const int64_t begin = group * form.group, images = std::min(form.group, work.images - begin);
            const int64_t parts = form.outs * images * form.pairs;
            const int64_t first = apart ? 0 : parts * thread / threads, last = apart ? parts : parts * (thread + 1) / threads;
            if (first == last) continue;
            lay_out(work, form, begin, images, scratch);
            run_parts(work, form, begin, images, first, last, scratch);
        }
    }
}
