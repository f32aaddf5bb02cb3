// Convolutions of bytes with weights of 8 bits on the vector unit of x86 processors that have AVX2, without gradients.
// native_byte_convolution.py compiles this file; images are [N, H, W, channels] in memory.
//
//   y[o] = scale[o] (Q[o] x) + bias[o]       Q x in whole numbers
//
// One instruction multiplies 32 bytes with 32 weights and adds neighbours to sums of 16 bits. Bytes of networks of spikes are
// small, mostly 0 or 1, so that many such sums fit into 16 bits before they are added to those of 32: `chain` says how many.
//
// Each image is laid out with its padding first, so that every place of the output is met by the same weights, from
// one address on. A row of weights meets bytes that follow each other, a run, which is read in quads of four. Sums of 6
// places and 16 channels, in 12 registers, are finished before the next are begun. Whole numbers do not depend on the
// order in which they are added, nor on the number of threads.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

// What the function is given: `_Work` in native_byte_convolution.py.
struct Work {
    const uint8_t* input;   // [images, height, width, channels]
    const int8_t* weights;  // [block of O][run][quad][16 of O][4 bytes of C], filled up with zeros
    const float* scale;     // [O, whole blocks]
    const float* bias;      // [O, whole blocks]
    float* output;          // [images, out_height, out_width, out_channels]
    uint8_t* scratch;       // for each thread so many bytes as `scratch_size` says
    int64_t images, height, width, channels, out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, threads;
    int64_t most;           // no byte is larger
};

namespace {

constexpr int64_t PLACES = 6;           // of the output, and
constexpr int64_t OUT = 16;             // channels of what is summed at once
constexpr int64_t QUAD = 4;             // bytes
constexpr int64_t NEAR = 1 << 17;       // bytes laid out at once: they should stay in a L2, beside the weights
constexpr int64_t SLACK = 64;           // bytes that the last quad may read beyond the last image
constexpr int64_t RUNS = 1024;          // most of them, MOST_RUNS in native_byte_convolution.py
constexpr int64_t LARGEST_WEIGHT = 127;

// All that follows from the sizes.
struct Form {
    int64_t row, image;            // bytes of an image as it is laid out
    int64_t runs, quads;           // runs of a place; quads of a run
    int64_t chain;                 // quads whose products can be added in 16 bits
    int64_t outs, places;          // blocks of channels and places of an image that go out
    int64_t group, groups;         // images that are laid out at once

    explicit Form(const Work& work) {
        const bool whole = work.dilation_x == 1;  // a row of weights is one run
        row = (work.width + 2 * work.padding_x) * work.channels;
        image = (work.height + 2 * work.padding_y) * row;
        runs = work.kernel_height * (whole ? 1 : work.kernel_width);
        quads = (work.channels * (whole ? work.kernel_width : 1) + QUAD - 1) / QUAD;
        chain = INT16_MAX / (2 * LARGEST_WEIGHT * work.most);
        outs = (work.out_channels + OUT - 1) / OUT;
        places = work.out_height * work.out_width;
        group = std::clamp<int64_t>(NEAR / image, 1, (work.images + work.threads - 1) / work.threads);
        groups = (work.images + group - 1) / group;
    }

    int64_t near() const { return group * image + SLACK; }

    // Bytes from the first run of a place to another.
    int64_t offset(const Work& work, int64_t run) const {
        if (work.dilation_x == 1) return run * work.dilation_y * row;
        return run / work.kernel_width * work.dilation_y * row + run % work.kernel_width * work.dilation_x * work.channels;
    }
};

void lay_out(const Work& work, const Form& form, const uint8_t* from, uint8_t* to) {
    const int64_t left = work.padding_x * work.channels, inside = work.width * work.channels, edge = work.padding_y * form.row;
    std::memset(to, 0, edge);
    to += edge;
    for (int64_t y = 0; y < work.height; ++y, to += form.row, from += inside) {
        std::memset(to, 0, left);
        std::memcpy(to + left, from, inside);
        std::memset(to + left + inside, 0, left);
    }
    std::memset(to, 0, edge);
}

// Places of the output in a group of images that are laid out, one after the other.
struct Places {
    const Work& work;
    const Form& form;
    const uint8_t* images;
    int64_t image, y, x;

    Places(const Work& work, const Form& form, const uint8_t* images, int64_t place)
        : work(work), form(form), images(images), image(place / form.places),
          y(place % form.places / work.out_width), x(place % work.out_width) {}

    // The first byte that the next place is made of.
    INLINE const uint8_t* next() {
        const uint8_t* from = images + image * form.image + y * work.stride_y * form.row + x * work.stride_x * work.channels;
        if (++x == work.out_width) {
            x = 0;
            if (++y == work.out_height) y = 0, ++image;
        }
        return from;
    }
};

using Sums = __m256i[PLACES][2];

// Adds the products of some quads of six places to sums of 16 bits.
INLINE void multiply(const uint8_t* const* from, int64_t offset, int64_t quads, const int8_t* weights, Sums& sums) {
    const uint8_t *a = from[0] + offset, *b = from[1] + offset, *c = from[2] + offset;
    const uint8_t *d = from[3] + offset, *e = from[4] + offset, *f = from[5] + offset;
    for (int64_t quad = 0; quad < quads; ++quad, weights += QUAD * OUT) {
        __m256i low = _mm256_load_si256((const __m256i*)weights), high = _mm256_load_si256((const __m256i*)weights + 1);
        asm("" : "+x"(low), "+x"(high));  // in registers: from memory they would be read for each place again
        auto add = [&](const uint8_t* bytes, int place) __attribute__((always_inline)) {
            int32_t four;
            std::memcpy(&four, bytes + QUAD * quad, QUAD);
            const __m256i x = _mm256_set1_epi32(four);
            sums[place][0] = _mm256_add_epi16(sums[place][0], _mm256_maddubs_epi16(x, low));
            sums[place][1] = _mm256_add_epi16(sums[place][1], _mm256_maddubs_epi16(x, high));
        };
        add(a, 0), add(b, 1), add(c, 2), add(d, 3), add(e, 4), add(f, 5);
    }
}

// Adds sums of 16 bits to those of 32, and begins anew.
INLINE void collect(Sums& sums, Sums& totals) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int place = 0; place < PLACES; ++place)
        for (int half = 0; half < 2; ++half) {
            totals[place][half] = _mm256_add_epi32(totals[place][half], _mm256_madd_epi16(sums[place][half], ones));
            sums[place][half] = _mm256_setzero_si256();
        }
}

// Sums of six places and 16 channels. A function of its own, which has all registers for itself.
__attribute__((noinline)) void sum(const Form& form, const int64_t* offsets, const uint8_t* const* from, const int8_t* weights, Sums& totals) {
    Sums sums;
    for (int place = 0; place < PLACES; ++place)
        for (int half = 0; half < 2; ++half) totals[place][half] = sums[place][half] = _mm256_setzero_si256();
    int64_t left = form.chain;
    for (int64_t run = 0; run < form.runs; ++run) {
        for (int64_t quad = 0; quad < form.quads;) {
            const int64_t count = std::min(form.quads - quad, left);
            multiply(from, offsets[run] + QUAD * quad, count, weights, sums);
            weights += count * QUAD * OUT, quad += count, left -= count;
            if (left == 0) collect(sums, totals), left = form.chain;
        }
    }
    collect(sums, totals);
}

// Does places `first ... last` of a block of channels, of a group of images.
void run_places(const Work& work, const Form& form, const int64_t* offsets, const uint8_t* images, float* output, int64_t out,
                int64_t first, int64_t last) {
    const int64_t channel = out * OUT, left = work.out_channels - channel;
    const int8_t* weights = work.weights + out * form.runs * form.quads * QUAD * OUT;
    const __m256 scale[2] = {_mm256_loadu_ps(work.scale + channel), _mm256_loadu_ps(work.scale + channel + 8)};
    const __m256 bias[2] = {_mm256_loadu_ps(work.bias + channel), _mm256_loadu_ps(work.bias + channel + 8)};
    Places places(work, form, images, first);
    for (int64_t place = first; place < last; place += PLACES) {
        const int64_t count = std::min(PLACES, last - place);
        const uint8_t* from[PLACES];
        for (int64_t i = 0; i < PLACES; ++i) from[i] = i < count ? places.next() : from[0];
        Sums totals;
        sum(form, offsets, from, weights, totals);
        float* to = output + place * work.out_channels + channel;
        for (int64_t i = 0; i < count; ++i, to += work.out_channels) {
            float y[OUT];
            for (int half = 0; half < 2; ++half)
                _mm256_storeu_ps(y + 8 * half,
                                 _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(totals[i][half]), scale[half]), bias[half]));
            std::memcpy(to, y, sizeof *to * std::min(OUT, left));
        }
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
        // With few groups each is shared by all threads, which lay it out for themselves.
        const bool apart = form.groups % threads == 0 || form.groups >= 4 * threads;
        int64_t offsets[RUNS];
        for (int64_t run = 0; run < form.runs; ++run) offsets[run] = form.offset(work, run);
        uint8_t* scratch = work.scratch + thread * form.near();
        for (int64_t group = apart ? thread : 0; group < form.groups; group += apart ? threads : 1) {
            const int64_t begin = group * form.group, images = std::min(form.group, work.images - begin);
            for (int64_t image = 0; image < images; ++image)
                lay_out(work, form, work.input + (begin + image) * work.height * work.width * work.channels,
                        scratch + image * form.image);
            const int64_t places = images * form.places, tiles = (places + PLACES - 1) / PLACES, parts = form.outs * tiles;
            const int64_t first = apart ? 0 : parts * thread / threads;
            const int64_t last = apart ? parts : parts * (thread + 1) / threads;
            float* output = work.output + begin * form.places * work.out_channels;
            for (int64_t out = first / tiles; out * tiles < last; ++out) {
                const int64_t from = std::max<int64_t>(first - out * tiles, 0), to = std::min(last - out * tiles, tiles);
                run_places(work, form, offsets, scratch, output, out, from * PLACES, std::min(to * PLACES, places));
            }
        }
    }
}
