// Convolutions in float32 whose input is mostly zero, as spikes are, and the gradient of their weights, without reading what is
// zero. native_event_convolution.py compiles this file; images are [N, H, W, channels] in memory.
//
//   y[place, o]    = sum over taps and events (place + tap, c) of  w[o, tap, c] x[place + tap, c]
//   w'[o, tap, c]  = sum over events (place, c) of  x[place, c] y'[place - tap, o]
//
// An event is a number that is not zero, and where it stands.
//
// For the output, events of a row are listed place by place, 32 or 64 channels at a time, so that those that weights of one
// row meet follow each other. Each adds the weights of 32 or 64 filters to sums in registers; these weights are in the
// first-level cache while all places are gone through.
//
// For the gradient, events of a channel are listed, by the remainder of their place when it is divided by the stride,
// which says what weights they meet. Then the list is read once for each line of filters, 8 or 16 of them: sums for all
// their weights are in registers, and the part of the gradient of the output that is met is in the first-level cache, laid
// out with zeros around it. Images pass in segments, some rows of one or several whole ones, that fit there.
//
// Every sum is taken in one order, however many threads there are.

#include <omp.h>

#include <algorithm>

#include "native_lines.h"

// What the function is given: `_Work` in native_event_convolution.py.
struct Work {
    const float* input;  // [images, height, width, channels]
    float* output;       // [images, out_height, out_width, out_channels], or its gradient
    float* weight;       // [out_channels, kernel_height, kernel_width, channels], or its gradient
    const float* bias;   // [out_channels], or null
    float* packed;       // the weights as `forward` reads them, or null
    char* scratch;       // so many bytes as `scratch_size` says
    int64_t images, height, width, channels, out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, threads;
    float most;  // share of numbers that may be events
};

namespace {

constexpr int64_t NEAR = 24 << 10;   // bytes of a segment of the gradient: it should stay in a first-level cache
constexpr int64_t PART = 1 << 17;    // numbers whose events are listed at once
constexpr int64_t ITEMS = 32;        // pieces of work that there should be, for as many threads
constexpr int64_t MOST_SUMS = 12;    // that are held in registers, beside what is multiplied

// Events: how many floats what they meet is away from the first, and what is there.
struct Events {
    int32_t* at;
    float* values;

    INLINE Events from(int64_t first) const { return {at + first, values + first}; }
};

INLINE Float multiply_add(Float a, Float b, Float c) {
#if defined(__AVX512F__)
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// For each set of eight lanes, the numbers of those in it, one after the other.
struct Picked {
    int32_t lanes[256][8] = {};

    constexpr Picked() {
        for (int set = 0; set < 256; ++set)
            for (int lane = 0, count = 0; lane < 8; ++lane)
                if (set >> lane & 1) lanes[set][count++] = lane;
    }
};
constexpr Picked PICKED;

// Rows of eight become columns.
INLINE void transpose(__m256 (&rows)[8]) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int half = 0; half < 2; ++half) {
            fours[i + 2 * half] = _mm256_shuffle_ps(pairs[i + half], pairs[i + half + 2], 0x44);
            fours[i + 2 * half + 1] = _mm256_shuffle_ps(pairs[i + half], pairs[i + half + 2], 0xEE);
        }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

// Eight rows of eight numbers become columns; of both only those that are known exist.
INLINE void turn(const float* from, int64_t from_apart, int64_t rows, float* to, int64_t to_apart, int64_t columns) {
    __m256 values[8];
    for (int row = 0; row < 8; ++row) {
        values[row] = _mm256_setzero_ps();
        if (row < rows && columns == 8) values[row] = _mm256_loadu_ps(from + row * from_apart);
        else if (row < rows) std::memcpy(&values[row], from + row * from_apart, columns * sizeof *from);
    }
    transpose(values);
    for (int column = 0; column < columns; ++column) {
        if (rows == 8) _mm256_storeu_ps(to + column * to_apart, values[column]);
        else std::memcpy(to + column * to_apart, &values[column], rows * sizeof *to);
    }
}

// Takes aligned pieces of scratch, one after the other.
struct Pieces {
    char* from;
    int64_t size = 0;

    template <typename T>
    T* take(int64_t count) {
        T* piece = (T*)(from + size);
        size += ceil_of(count * sizeof(T), 64) * 64;
        return piece;
    }
};

// ------------------------------------------------------------------------------------------------------------- the output

constexpr int64_t WIDE = 4 * LINE;              // filters whose sums are taken at once
constexpr int64_t CHUNK = LINE == 8 ? 64 : 32;  // channels that are listed together
constexpr int64_t LINES_OF_CACHE = 16;
constexpr int64_t TILE = 256;                   // places of the output that are gone through together

struct Spread {
    int64_t chunk, chunks;    // channels that are listed together; how often
    int64_t blocks;           // of filters
    int64_t slab, weights;    // floats of the weights of a row that a block of filters has for a chunk; of all weights
    int64_t part;             // images whose events are listed at once
    int64_t list, starts;     // room for events of a row and chunk; for the places where those of each place begin
    int64_t rows;             // of the output in a tile

    explicit Spread(const Work& work) {
        chunk = std::min(CHUNK, ceil_of(work.channels, 8) * 8);
        chunks = ceil_of(work.channels, chunk);
        blocks = ceil_of(work.out_channels, WIDE);
        slab = work.kernel_width * chunk * WIDE;
        weights = blocks * chunks * work.kernel_height * slab;
        part = std::clamp<int64_t>(PART / (work.height * work.width * work.channels), 1, work.images);
        list = work.width * chunk + 8;
        starts = work.width + 1;
        rows = std::max<int64_t>(1, TILE / work.out_width);
    }
};

struct SpreadScratch {
    float* weights;   // [blocks][chunks][kernel_height][kernel_width][chunk][WIDE]
    Events events;    // [part][height][chunks][list]
    int32_t* starts;  // [part][height][chunks][starts]
    float* near;      // [threads][tile][WIDE]
    int64_t size;

    SpreadScratch(const Work& work, const Spread& form) {
        Pieces pieces{work.scratch};
        const int64_t lists = form.part * work.height * form.chunks;
        weights = work.packed ? work.packed : pieces.take<float>(form.weights);
        near = pieces.take<float>(work.threads * form.rows * work.out_width * WIDE);
        starts = pieces.take<int32_t>(lists * form.starts);
        events.at = pieces.take<int32_t>(lists * form.list);
        events.values = pieces.take<float>(lists * form.list);
        size = pieces.size;
    }
};

// Weights of a block of filters, in the order in which they are read.
void lay_out_weights(const Work& work, const Spread& form, float* to, int64_t block) {
    const int64_t taps = work.kernel_height * work.kernel_width, first = block * WIDE;
    for (int64_t of_chunk = 0; of_chunk < form.chunks; ++of_chunk)
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t c = 0; c < form.chunk; c += 8)
                for (int64_t o = 0; o < WIDE; o += 8) {
                    const int64_t channel = of_chunk * form.chunk + c, filter = first + o;
                    float* place = to + ((of_chunk * taps + tap) * form.chunk + c) * WIDE + o;
                    const int64_t known = std::clamp<int64_t>(work.out_channels - filter, 0, 8);
                    if (known < 8)
                        for (int64_t i = 0; i < 8; ++i) std::memset(place + i * WIDE, 0, 8 * sizeof *place);
                    turn(work.weight + (filter * taps + tap) * work.channels + channel, taps * work.channels, known, place,
                         WIDE, std::clamp<int64_t>(work.channels - channel, 0, 8));
                }
}

// Lists the events of a row and a chunk of channels, place by place. Returns how many there are.
int64_t list_row(const Work& work, const Spread& form, const float* from, int64_t of_chunk, Events events, int32_t* starts) {
    const int64_t known = std::min(form.chunk, work.channels - of_chunk * form.chunk);
    const __m256i lanes = _mm256_setr_epi32(0, WIDE, 2 * WIDE, 3 * WIDE, 4 * WIDE, 5 * WIDE, 6 * WIDE, 7 * WIDE);
    int32_t count = 0;
    from += of_chunk * form.chunk;
    for (int64_t x = 0; x < work.width; ++x, from += work.channels) {
        starts[x] = count;
        for (int64_t c = 0; c < known; c += 8) {
            __m256 values = _mm256_setzero_ps();
            if (known - c >= 8) values = _mm256_loadu_ps(from + c);
            else std::memcpy(&values, from + c, (known - c) * sizeof *from);
            const int found = _mm256_movemask_ps(_mm256_cmp_ps(values, _mm256_setzero_ps(), _CMP_NEQ_UQ));
            const __m256i picked = _mm256_loadu_si256((const __m256i*)PICKED.lanes[found]);
            const __m256i at = _mm256_add_epi32(_mm256_set1_epi32((x * form.chunk + c) * WIDE), lanes);
            _mm256_storeu_si256((__m256i*)(events.at + count), _mm256_permutevar8x32_epi32(at, picked));
            _mm256_storeu_ps(events.values + count, _mm256_permutevar8x32_ps(values, picked));
            count += __builtin_popcount(found);
        }
    }
    starts[work.width] = count;
    return count;
}

// Adds the weights that events `first ... last` meet, times what is there, to the sums of a place, of LINES lines of filters.
template <int LINES>
INLINE void add_weights(Events events, int64_t first, int64_t last, const float* weights, float* sums) {
    constexpr int APART = LINES > 2 ? 2 : 4;  // some of each, or every sum would wait for the one before
    Float held[APART][LINES] = {};
    for (int line = 0; line < LINES; ++line) held[0][line] = load(sums + line * LINE, LINE);
    const auto add = [&](int64_t i, Float(&to)[LINES]) __attribute__((always_inline)) {
        const float* here = weights + events.at[i];
        const Float value = all(events.values[i]);
#pragma GCC unroll 4
        for (int line = 0; line < LINES; ++line) to[line] = multiply_add(load(here + line * LINE, LINE), value, to[line]);
    };
    for (; first + APART <= last; first += APART)
#pragma GCC unroll 4
        for (int apart = 0; apart < APART; ++apart) add(first + apart, held[apart]);
    for (; first < last; ++first) add(first, held[0]);
    for (int line = 0; line < LINES; ++line) {
        Float total = held[0][line];
        for (int apart = 1; apart < APART; ++apart) total += held[apart][line];
        store(sums + line * LINE, total, LINE);
    }
}

// Finds rows `first ... last` of the output of images that are listed, for LINES lines of a block of filters; rows of images
// follow each other.
template <int LINES>
void find_rows(const Work& work, const Spread& form, const SpreadScratch& scratch, int64_t begin, int64_t block, int64_t first,
               int64_t last, float* near) {
    const int64_t filter = block * WIDE, known = std::min(WIDE, work.out_channels - filter);
    float bias[WIDE] = {};
    if (work.bias) std::memcpy(bias, work.bias + filter, known * sizeof *bias);
    const int64_t places = (last - first) * work.out_width;
    for (int64_t place = 0; place < places; ++place) std::memcpy(near + place * WIDE, bias, sizeof bias);
    for (int64_t of_chunk = 0; of_chunk < form.chunks; ++of_chunk)
        for (int64_t tap = 0; tap < work.kernel_height; ++tap) {
            const float* slab = scratch.weights + ((block * form.chunks + of_chunk) * work.kernel_height + tap) * form.slab;
            const int64_t ahead = ceil_of(form.slab, (last - first) * LINES_OF_CACHE) * LINES_OF_CACHE;
            for (int64_t row = first; row < last; ++row) {
                const float* next = slab + form.slab + (row - first) * ahead;
                for (int64_t i = 0; i < ahead; i += LINES_OF_CACHE) __builtin_prefetch(next + i, 0, 2);
                const int64_t y = row % work.out_height * work.stride_y + tap - work.padding_y;
                if (y < 0 || y >= work.height) continue;
                const int64_t number = (row / work.out_height * work.height + y) * form.chunks + of_chunk;
                const int32_t* starts = scratch.starts + number * form.starts;
                const Events events = scratch.events.from(number * form.list);
                float* sums = near + (row - first) * work.out_width * WIDE;
                for (int64_t place = 0; place < work.out_width; ++place, sums += WIDE) {
                    const int64_t x = place * work.stride_x - work.padding_x;
                    const int64_t from = std::clamp<int64_t>(x, 0, work.width);
                    const int64_t to = std::clamp<int64_t>(x + work.kernel_width, from, work.width);
                    add_weights<LINES>(events, starts[from], starts[to], slab - x * form.chunk * WIDE, sums);
                }
            }
        }
    float* to = work.output + (begin * work.out_height + first) * work.out_width * work.out_channels + filter;
    for (int64_t place = 0; place < places; ++place, to += work.out_channels)
        std::memcpy(to, near + place * WIDE, known * sizeof *to);
}

using FindRows = void (*)(const Work&, const Spread&, const SpreadScratch&, int64_t, int64_t, int64_t, int64_t, float*);
constexpr FindRows FIND_ROWS[WIDE / LINE] = {find_rows<1>, find_rows<2>, find_rows<3>, find_rows<4>};

// --------------------------------------------------------------------------------------------- the gradient of the weights

// All that follows from the sizes.
struct Form {
    int64_t reach_y, reach_x;   // most weights of a remainder, of y and x
    int64_t kinds;              // remainders
    int64_t columns;            // of a segment of the gradient as it is laid out
    int64_t cuts, rows;         // segments of an image; rows of the input in one
    int64_t frames, segments;   // images of a segment; segments
    int64_t tall, room;         // rows of the gradient for an image of a segment; floats of a segment
    int64_t capacity;           // events of a list, and 8 that may be written beyond
    int64_t part;               // segments whose events are listed at once
    int64_t blocks, slices;     // lines of filters; pieces in which segments are summed apart
    int64_t weights;            // floats of a line of filters

    explicit Form(const Work& work) {
        const int64_t sy = work.stride_y, sx = work.stride_x;
        reach_y = ceil_of(work.kernel_height, sy);
        reach_x = ceil_of(work.kernel_width, sx);
        kinds = sy * sx;
        columns = (work.width + work.padding_x - 1) / sx + reach_x;
        const int64_t line = columns * LINE * sizeof(float);
        tall = (work.height - 1 + work.padding_y) / sy - work.padding_y / sy + reach_y;
        frames = std::clamp<int64_t>(NEAR / (tall * line), 1, work.images);
        cuts = 1, rows = work.height;
        if (tall * line > NEAR) {
            const int64_t fit = std::max<int64_t>(1, NEAR / line - reach_y);  // rows of the gradient, less those beside it
            cuts = ceil_of(rows, fit * sy);
            rows = ceil_of(rows, cuts);
            cuts = ceil_of(work.height, rows);
        }
        if (cuts > 1) frames = 1, tall = (rows - 1 + sy - 1) / sy + reach_y;
        segments = cuts > 1 ? work.images * cuts : ceil_of(work.images, frames);
        room = frames * tall * columns * LINE;
        capacity = frames * ceil_of(rows, sy) * ceil_of(work.width, sx) + 8;
        part = std::max<int64_t>(1, PART / (frames * rows * work.width * work.channels));
        blocks = ceil_of(work.out_channels, LINE);
        slices = std::min(ceil_of(ITEMS, blocks), std::min(part, segments));
        weights = work.channels * work.kernel_height * work.kernel_width * LINE;
    }
};

// Rows of one image, or several images.
struct Segment {
    int64_t image, frames, first, rows;
    int64_t base;  // row of the gradient with which what is laid out begins

    Segment(const Work& work, const Form& form, int64_t number) {
        if (form.cuts > 1) image = number / form.cuts, frames = 1, first = number % form.cuts * form.rows;
        else image = number * form.frames, frames = std::min(form.frames, work.images - image), first = 0;
        rows = std::min(form.rows, work.height - first);
        base = (first + work.padding_y) / work.stride_y - (form.reach_y - 1);
    }
};

// Lists what is not zero of `there` places and 8 channels, of which `known` exist: a place is `apart` floats from the next,
// and its event LINE. Lists are `capacity` from each other, and may be written to 8 beyond their end.
INLINE void list_few(const float* from, int64_t apart, int64_t there, int64_t known, int32_t at, Events events,
                     int64_t capacity, int32_t* counts) {
    __m256 values[8];
    for (int place = 0; place < 8; ++place) {
        values[place] = _mm256_setzero_ps();
        if (place < there && known == 8) values[place] = _mm256_loadu_ps(from + place * apart);
        else if (place < there) std::memcpy(&values[place], from + place * apart, known * sizeof *from);
    }
    transpose(values);
    const __m256i places = _mm256_add_epi32(_mm256_set1_epi32(at), _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                                                                     _mm256_set1_epi32(LINE)));
    for (int64_t channel = 0; channel < known; ++channel) {
        const int found = _mm256_movemask_ps(_mm256_cmp_ps(values[channel], _mm256_setzero_ps(), _CMP_NEQ_UQ));
        const __m256i lanes = _mm256_loadu_si256((const __m256i*)PICKED.lanes[found]);
        const Events end = events.from(channel * capacity + counts[channel]);
        _mm256_storeu_si256((__m256i*)end.at, _mm256_permutevar8x32_epi32(places, lanes));
        _mm256_storeu_ps(end.values, _mm256_permutevar8x32_ps(values[channel], lanes));
        counts[channel] += __builtin_popcount(found);
    }
}
// Lists the events of a segment; `counts` are those of each kind and channel. Returns how many there are.
int64_t list(const Work& work, const Form& form, const Segment& segment, Events events, int32_t* counts) {
    std::memset(counts, 0, form.kinds * work.channels * sizeof *counts);
    const int64_t apart = work.stride_x * work.channels;
    for (int64_t frame = 0; frame < segment.frames; ++frame)
        for (int64_t row = 0; row < segment.rows; ++row) {
            const int64_t y = segment.first + row + work.padding_y;
            const float* from =
                work.input + ((segment.image + frame) * work.height + segment.first + row) * work.width * work.channels;
            const int64_t line = (frame * form.tall + y / work.stride_y - segment.base) * form.columns + form.reach_x - 1;
            for (int64_t first = 0; first < std::min(work.stride_x, work.width); ++first) {
                const int64_t x = first + work.padding_x, places = ceil_of(work.width - first, work.stride_x);
                const int64_t kind = y % work.stride_y * work.stride_x + x % work.stride_x;
                for (int64_t place = 0; place < places; place += 8)
                    for (int64_t c = 0; c < work.channels; c += 8) {
                        const int64_t of = kind * work.channels + c;
                        list_few(from + first * work.channels + place * apart + c, apart, std::min<int64_t>(8, places - place),
                                 std::min<int64_t>(8, work.channels - c), (line + x / work.stride_x + place) * LINE,
                                 events.from(of * form.capacity), form.capacity, counts + of);
                    }
            }
        }
    int64_t total = 0;
    for (int64_t i = 0; i < form.kinds * work.channels; ++i) total += counts[i];
    return total;
}

// Lays out the gradient of a segment, of one line of filters, with zeros around it.
void lay_out(const Work& work, const Form& form, const Segment& segment, int64_t block, float* to) {
    const int64_t known = std::min<int64_t>(LINE, work.out_channels - block * LINE);
    const int64_t left = form.reach_x - 1, inside = std::min(work.out_width, form.columns - left);
    for (int64_t frame = 0; frame < segment.frames; ++frame)
        for (int64_t row = 0; row < form.tall; ++row, to += form.columns * LINE) {
            const int64_t y = segment.base + row;
            if (y < 0 || y >= work.out_height) {
                std::memset(to, 0, form.columns * LINE * sizeof *to);
                continue;
            }
            const float* from = work.output + block * LINE +
                                ((segment.image + frame) * work.out_height + y) * work.out_width * work.out_channels;
            float* place = to + left * LINE;
            std::memset(to, 0, left * LINE * sizeof *to);
            if (known == LINE)
                for (int64_t x = 0; x < inside; ++x) store(place + x * LINE, load(from + x * work.out_channels, LINE), LINE);
            else
                for (int64_t x = 0; x < inside; ++x) store(place + x * LINE, load(from + x * work.out_channels, known), LINE);
            std::memset(place + inside * LINE, 0, (form.columns - left - inside) * LINE * sizeof *to);
        }
}

// Sums of ROWS x COLUMNS weights over a list of events, added to `sums`: those of columns are `across` floats apart, those of
// rows `down`.
template <int ROWS, int COLUMNS>
void add_events(Events events, int64_t count, const float* grad, int64_t row, float* sums, int64_t down, int64_t across) {
    constexpr int APART = ROWS * COLUMNS <= MOST_SUMS / 3 ? 3 : 1;  // with few sums each would wait for itself
    Float held[APART][ROWS][COLUMNS] = {};
    const auto add = [&](int64_t i, Float(&to)[ROWS][COLUMNS]) __attribute__((always_inline)) {
        const float* from = grad + events.at[i];
        const Float value = all(events.values[i]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; ++c)
                to[r][c] = multiply_add(load(from - r * row - c * LINE, LINE), value, to[r][c]);
    };
    int64_t i = 0;
    for (; i + APART <= count; i += APART)
#pragma GCC unroll 3
        for (int apart = 0; apart < APART; ++apart) add(i + apart, held[apart]);
    for (; i < count; ++i) add(i, held[0]);
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) {
            Float total = held[0][r][c];
            for (int apart = 1; apart < APART; ++apart) total += held[apart][r][c];
            float* to = sums + r * down + c * across;
            store(to, load(to, LINE) + total, LINE);
        }
}

using AddEvents = void (*)(Events, int64_t, const float*, int64_t, float*, int64_t, int64_t);
constexpr int64_t MOST_ROWS = 3, MOST_COLUMNS = 4;
constexpr AddEvents ADD_EVENTS[MOST_ROWS][MOST_COLUMNS] = {
    {add_events<1, 1>, add_events<1, 2>, add_events<1, 3>, add_events<1, 4>},
    {add_events<2, 1>, add_events<2, 2>, add_events<2, 3>, add_events<2, 4>},
    {add_events<3, 1>, add_events<3, 2>, add_events<3, 3>, add_events<3, 4>},
};

// Adds what the events of a segment give for one line of filters to `sums`, [channels, kernel_height, kernel_width, LINE];
// `grad` is the gradient of the output as it is laid out.
void add_segment(const Work& work, const Form& form, Events events, const int32_t* counts, const float* grad, float* sums) {
    const int64_t taps = work.kernel_height * work.kernel_width;
    const int64_t down = work.stride_y * work.kernel_width * LINE, across = work.stride_x * LINE, row = form.columns * LINE;
    for (int64_t c = 0; c < work.channels; ++c)
        for (int64_t kind = 0; kind < form.kinds; ++kind) {
            const int64_t first_y = kind / work.stride_x, first_x = kind % work.stride_x;
            const int64_t high = ceil_of(work.kernel_height - first_y, work.stride_y);
            const int64_t wide = ceil_of(work.kernel_width - first_x, work.stride_x);
            const Events own = events.from((kind * work.channels + c) * form.capacity);
            const int64_t count = counts[kind * work.channels + c];
            float* to = sums + (c * taps + first_y * work.kernel_width + first_x) * LINE;
            if (count == 0) continue;
            for (int64_t r = 0; r < high; r += MOST_ROWS)
                for (int64_t k = 0; k < wide; k += MOST_COLUMNS) {
                    const int64_t rows = std::min(MOST_ROWS, high - r), columns = std::min(MOST_COLUMNS, wide - k);
                    const AddEvents add = ADD_EVENTS[rows - 1][columns - 1];
                    add(own, count, grad - r * row - k * LINE, row, to + r * down + k * across, down, across);
                }
        }
}

// Where everything lies in the scratch.
struct Scratch {
    Events events;    // [part][kinds][channels][capacity]
    int32_t* counts;  // [part][kinds][channels]
    float* sums;      // [slices][blocks][weights]
    float* near;      // [threads][room]
    int64_t size;

    Scratch(const Work& work, const Form& form) {
        Pieces pieces{work.scratch};
        const int64_t lists = std::min(form.part, form.segments) * form.kinds * work.channels;
        sums = pieces.take<float>(form.slices * form.blocks * form.weights);
        near = pieces.take<float>(work.threads * form.room);
        counts = pieces.take<int32_t>(lists);
        events.at = pieces.take<int32_t>(lists * form.capacity);
        events.values = pieces.take<float>(lists * form.capacity);
        size = pieces.size;
    }
};

// Gradients of a line of filters: the sums of all slices, in order. Those of the others are lost.
void write(const Work& work, const Form& form, const Scratch& scratch, int64_t block) {
    const int64_t taps = work.kernel_height * work.kernel_width;
    float* sums = scratch.sums + block * form.weights;
    for (int64_t slice = 1; slice < form.slices; ++slice)
        for (int64_t i = 0; i < form.weights; i += LINE)
            store(sums + i, load(sums + i, LINE) + load(sums + slice * form.blocks * form.weights + i, LINE), LINE);
    for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < work.channels; c += 8)
            for (int64_t lane = 0; lane < LINE; lane += 8) {
                const int64_t filter = block * LINE + lane, known = std::clamp<int64_t>(work.out_channels - filter, 0, 8);
                turn(sums + (c * taps + tap) * LINE + lane, taps * LINE, std::min<int64_t>(8, work.channels - c),
                     work.weight + (filter * taps + tap) * work.channels + c, taps * work.channels, known);
            }
}

}  // namespace

// Floats of packed weights, which depend on nothing but the weights.
extern "C" int64_t packed_size(const Work* work) { return Spread(*work).weights; }

extern "C" int64_t pack(const Work* work) {
    const Spread form(*work);
#pragma omp parallel for schedule(static) num_threads(work->threads)
    for (int64_t block = 0; block < form.blocks; ++block)
        lay_out_weights(*work, form, work->packed + block * (form.weights / form.blocks), block);
    return 1;
}

// Bytes of scratch.
extern "C" int64_t scratch_forward(const Work* work) { return SpreadScratch(*work, Spread(*work)).size; }
extern "C" int64_t scratch_grad_weight(const Work* work) { return Scratch(*work, Form(*work)).size; }

// Both return 0, with nothing written, where more than `most` of what is read first are events; else 1.
extern "C" int64_t forward(const Work* given) {
    const Spread form(*given);
    const SpreadScratch scratch(*given, form);
    int64_t found = 0;
    bool dense = false;
#pragma omp parallel num_threads(given->threads)
    {
        const Work work = *given;  // of this thread alone: the compiler then knows that no store changes it
        float* near = scratch.near + omp_get_thread_num() * form.rows * work.out_width * WIDE;
        for (int64_t begin = 0; begin < work.images && !dense; begin += form.part) {
            const int64_t images = std::min(form.part, work.images - begin), lists = images * work.height * form.chunks;
#pragma omp for schedule(static) reduction(+ : found)
            for (int64_t number = 0; number < lists; ++number) {
                const int64_t row = begin * work.height + number / form.chunks;
                found += list_row(work, form, work.input + row * work.width * work.channels, number % form.chunks,
                                  scratch.events.from(number * form.list), scratch.starts + number * form.starts);
            }
            if (begin == 0) {
#pragma omp single
                dense = found > work.most * images * work.height * work.width * work.channels;
                if (dense) break;
                if (!work.packed) {
#pragma omp for schedule(static)
                    for (int64_t block = 0; block < form.blocks; ++block)
                        lay_out_weights(work, form, scratch.weights + block * (form.weights / form.blocks), block);
                }
            }
            const int64_t rows = images * work.out_height, tiles = ceil_of(rows, form.rows);
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < tiles * form.blocks; ++item) {
                const int64_t first = item % tiles * form.rows, block = item / tiles;
                const int64_t lines = ceil_of(std::min(WIDE, work.out_channels - block * WIDE), LINE);
                FIND_ROWS[lines - 1](work, form, scratch, begin, block, first, std::min(first + form.rows, rows), near);
            }
        }
    }
    return !dense;
}

extern "C" int64_t grad_weight(const Work* given) {
    const Form form(*given);
    const Scratch scratch(*given, form);
    const int64_t lists = form.kinds * given->channels, items = form.slices * form.blocks;
    int64_t found = 0, read = 0;
    bool dense = false;
#pragma omp parallel num_threads(given->threads)
    {
        const Work work = *given;  // of this thread alone: the compiler then knows that no store changes it
        float* near = scratch.near + omp_get_thread_num() * form.room;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; ++item)
            std::memset(scratch.sums + item * form.weights, 0, form.weights * sizeof(float));
        for (int64_t begin = 0; begin < form.segments && !dense; begin += form.part) {
            const int64_t end = std::min(begin + form.part, form.segments);
            const auto first_list = [&](int64_t number) { return (number - begin) * lists; };
            const auto events_of = [&](int64_t number) { return scratch.events.from(first_list(number) * form.capacity); };
            const auto counts_of = [&](int64_t number) { return scratch.counts + first_list(number); };
#pragma omp for schedule(static) reduction(+ : found, read)
            for (int64_t number = begin; number < end; ++number) {
                const Segment segment(work, form, number);
                found += list(work, form, segment, events_of(number), counts_of(number));
                read += segment.frames * segment.rows * work.width * work.channels;
            }
            if (begin == 0) {
#pragma omp single
                dense = found > work.most * read;
                if (dense) break;
            }
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < items; ++item) {
                const int64_t block = item / form.slices, slice = item % form.slices;
                for (int64_t number = begin + slice; number < end; number += form.slices) {
                    lay_out(work, form, Segment(work, form, number), block, near);
                    add_segment(work, form, events_of(number), counts_of(number), near,
                                scratch.sums + (slice * form.blocks + block) * form.weights);
                }
            }
        }
        if (!dense) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < form.blocks; ++block) write(work, form, scratch, block);
        }
    }
    return !dense;
}
