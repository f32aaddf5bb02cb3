// Convolutions and their gradients on the matrix unit of x86 processors (AMX), which multiplies bfloat16 and adds in
// float32. native_convolution.py compiles this file; images are [N, H, W, channels] in memory, and
//
//   BFLOAT16   0: images and gradients are float32, and those that are convolved are spikes; 1: bfloat16, of any value
//
// Weights are float32, and so is their gradient; with BFLOAT16 they are rounded. A float32 has 24 bits: three bfloat16 of 8 bits each make it up exactly, x = x0 + x1 + x2. A spike, or a sum of few,
// is one. So the products of a convolution of spikes are exact in three parts, and their sum is rounded as in float32:
//
//   output            s * w       s (w2 + w1 + w0)
//   gradient of w     s * g       s (g2 + g1 + g0)
//   gradient of s     g * w       g0 w2 + g0 w1 + g1 w1 + g1 w0 + g0 w0 + g2 w0, without what is below 2^-24 of it
//
// Of the tiles of the unit (native_tiles.h) four hold sums of 32 x 32 numbers, two and two what is multiplied.
// Rows are images: those of one place lie side by side in blocks of 32, so that image size and stride only say where a
// tile begins. Every sum is taken in one order, however many threads there are.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "native_tiles.h"

namespace {

using Half = uint16_t;  // a bfloat16
#if BFLOAT16
using Number = Half;
constexpr int WHOLE = 1;  // bfloat16 that make up a number
#else
using Number = float;
constexpr int WHOLE = 3;
#endif

constexpr int64_t BLOCK = 32;              // images, or channels
constexpr int64_t TILE = 16 * BLOCK;       // bfloat16 in a tile
constexpr int64_t PAIR = 2 * TILE;         // 32 x 32 of them, in two tiles
constexpr int64_t CHUNK = 1 << 20;         // bytes that the gradient of weights works on at once; should fit into a L2
constexpr int64_t PART = 1 << 23;          // numbers that are laid out at once, of spikes or of gradients
constexpr int64_t TAPS = 1024;             // most weights of a channel

int64_t blocks(int64_t number) { return (number + BLOCK - 1) / BLOCK; }

// Numbers `place ...` of a row of `count`: 16, or 0 beyond them.
__m512 load(const float* row, int64_t place, int64_t count) {
    if (count - place >= 16) return _mm512_loadu_ps(row + place);
    return _mm512_maskz_loadu_ps(count > place ? (1u << (count - place)) - 1 : 0, row + place);
}

// The parts of float32, the largest first.
template <int PARTS>
void split(__m512 rest, __m256i* part) {
    for (int p = 0; p < PARTS; ++p) {
        part[p] = (__m256i)_mm512_cvtneps_pbh(rest);
        if (p + 1 < PARTS)
            rest -= _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part[p]), 16));
    }
}

// The parts of numbers `place ...` of a row of `count`: 16, or 0 beyond them.
template <int PARTS>
void fetch(const float* row, int64_t place, int64_t count, __m256i* part) {
    split<PARTS>(load(row, place, count), part);
}
template <int PARTS>
void fetch(const Half* row, int64_t place, int64_t count, __m256i* part) {
    static_assert(PARTS == 1, "a bfloat16 is whole");
    const int64_t left = std::clamp<int64_t>(count - place, 0, 16);
    part[0] = left == 16 ? _mm256_loadu_si256((const __m256i*)(row + place))
                         : left == 0 ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16((1u << left) - 1, row + place);
}

// Of 16 lanes each, `low` and `high` side by side: the pairs that the unit multiplies with pairs.
__m512i interleave(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

void transpose(__m512i* rows) {  // 16 x 16 words
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int half = 0; half < 16; half += 8)
        for (int i = 0; i < 4; ++i) {
            t[half + i] = _mm512_shuffle_i32x4(rows[half + i], rows[half + i + 4], 0x88);
            t[half + i + 4] = _mm512_shuffle_i32x4(rows[half + i], rows[half + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

struct Images {
    int64_t count, height, width, channels;
    int64_t places() const { return height * width; }
    int64_t size() const { return places() * channels; }
    template <typename Of>
    Of* row(Of* x, int64_t image, int64_t y, int64_t column) const {
        return x + ((image * height + y) * width + column) * channels;
    }
    // Channels of an image: none beyond the last.
    int64_t there(int64_t image) const { return image < count ? channels : 0; }
    int64_t place(int64_t block, int64_t y, int64_t column) const { return (block * height + y) * width + column; }
};

// What all functions are given: `Conv` in native_convolution.py. `out_*` are sizes of the output.
struct Conv {
    int64_t images, height, width, channels, out_height, out_width, out_channels;
    int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, threads;

    int64_t taps() const { return kernel_height * kernel_width; }
    Images input() const { return {images, height, width, channels}; }
    Images output() const { return {images, out_height, out_width, out_channels}; }

    // Images are taken in parts, so that what is laid out is small beside them; this many at once.
    int64_t together() const {
        const int64_t spikes = input().places() * blocks(channels);
        const int64_t grads = WHOLE * output().places() * blocks(out_channels);
        return std::max<int64_t>(1, PART / (std::max(spikes, grads) * PAIR)) * BLOCK;
    }
    Conv part(int64_t first) const {
        Conv conv = *this;
        conv.images = std::min(images - first, together());
        return conv;
    }

    // Numbers of what is laid out: spikes as they are, weights and gradients in parts, and sums for the weights.
    int64_t spikes() const { return blocks(part(0).images) * input().places() * blocks(channels) * PAIR; }
    int64_t grads() const { return WHOLE * blocks(part(0).images) * output().places() * blocks(out_channels) * PAIR; }
    int64_t sums() const { return blocks(out_channels) * taps() * blocks(channels) * PAIR; }
    int64_t weights() const { return WHOLE * sums(); }
};

// Adds to `bits` those that a bfloat16 of these numbers would lack; what is not finite counts as such.
void lack(const Half*, int64_t, int64_t, __m512i&) {}
void lack(const float* row, int64_t place, int64_t count, __m512i& bits) {
    constexpr int NOT_FINITE = 0x99;
    const __m512 value = load(row, place, count);
    const __m512i late = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0xFFFF));
    bits = _mm512_or_si512(bits, _mm512_mask_set1_epi32(late, _mm512_fpclass_ps_mask(value, NOT_FINITE), 1));
}

// Images as rows: [block of images][y][x][part][block of channels][32 images][32 channels]. Whether they are all there:
// in one part, what a bfloat16 cannot hold is not, and the rest is left out then.
template <int PARTS>
bool lay_rows(const Images& form, const Number* x, Half* to, int64_t threads) {
    const int64_t across = blocks(form.channels);
    bool inexact = false;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) reduction(|| : inexact)
    for (int64_t block = 0; block < blocks(form.count); ++block)
        for (int64_t y = 0; y < form.height; ++y) {
            if (inexact) continue;
            __m512i bits = _mm512_setzero_si512();
            for (int64_t i = 0; i < BLOCK; ++i)
                for (int64_t column = 0; column < form.width; ++column) {
                    const int64_t image = block * BLOCK + i;
                    const Number* from = form.row(x, image, y, column);
                    Half* place = to + form.place(block, y, column) * PARTS * across * PAIR + i * BLOCK;
                    for (int64_t c = 0; c < across; ++c, place += PAIR)
                        for (int64_t half = 0; half < BLOCK; half += 16) {
                            const int64_t channel = c * BLOCK + half;
                            if (PARTS == 1) lack(from, channel, form.there(image), bits);
                            __m256i part[PARTS];
                            fetch<PARTS>(from, channel, form.there(image), part);
                            for (int p = 0; p < PARTS; ++p)
                                _mm256_storeu_si256((__m256i*)(place + p * across * PAIR + half), part[p]);
                        }
                }
            inexact = inexact || _mm512_test_epi32_mask(bits, bits);
        }
    return !inexact;
}

// Images as columns: [block of images][y][x][block of channels][32 channels][32 images]. Whether they are all there.
bool lay_columns(const Images& form, const Number* x, Half* to, int64_t threads) {
    const int64_t across = blocks(form.channels);
    bool inexact = false;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) reduction(|| : inexact)
    for (int64_t block = 0; block < blocks(form.count); ++block)
        for (int64_t y = 0; y < form.height; ++y) {
            if (inexact) continue;
            __m512i bits = _mm512_setzero_si512();
            for (int64_t column = 0; column < form.width; ++column) {
                Half* place = to + form.place(block, y, column) * across * PAIR;
                for (int64_t c = 0; c < 2 * across; ++c, place += TILE) {
                    __m512i rows[16];
                    for (int i = 0; i < 16; ++i) {
                        __m256i half[2];
                        for (int j = 0; j < 2; ++j) {
                            const int64_t image = block * BLOCK + 2 * i + j;
                            const Number* from = form.row(x, image, y, column);
                            lack(from, 16 * c, form.there(image), bits);
                            fetch<1>(from, 16 * c, form.there(image), half + j);
                        }
                        rows[i] = interleave(half[0], half[1]);
                    }
                    transpose(rows);
                    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(place + i * BLOCK, rows[i]);
                }
            }
            inexact = inexact || _mm512_test_epi32_mask(bits, bits);
        }
    return !inexact;
}

// Pairs of images: [block of images][y][x][part][block of channels][two tiles][16 pairs][16 channels][2].
void lay_pairs(const Images& form, const Number* x, Half* to, int64_t threads) {
    const int64_t across = blocks(form.channels);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks(form.count); ++block)
        for (int64_t y = 0; y < form.height; ++y)
            for (int64_t i = 0; i < 16; ++i)
                for (int64_t column = 0; column < form.width; ++column) {
                    Half* place = to + form.place(block, y, column) * WHOLE * across * PAIR + i * BLOCK;
                    for (int64_t c = 0; c < 2 * across; ++c, place += TILE) {
                        __m256i part[2][WHOLE];
                        for (int j = 0; j < 2; ++j) {
                            const int64_t image = block * BLOCK + 2 * i + j;
                            fetch<WHOLE>(form.row(x, image, y, column), 16 * c, form.there(image), part[j]);
                        }
                        for (int p = 0; p < WHOLE; ++p)
                            _mm512_storeu_si512(place + p * across * PAIR, interleave(part[0][p], part[1][p]));
                    }
                }
}

// Weights [O, taps, C] for the output: [block of O][tap][block of C][part][two tiles][16 pairs of C][16 of O][2].
void lay_weights(const float* weight, Half* to, int64_t outs, int64_t taps, int64_t ins, int64_t threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t o = 0; o < 2 * blocks(outs); ++o)
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t c = 0; c < blocks(ins); ++c) {
                __m512i rows[WHOLE][16];
                for (int64_t i = 0; i < 16; ++i) {
                    const int64_t out = 16 * o + i;
                    const float* from = weight + (out * taps + tap) * ins;
                    __m256i part[2][WHOLE];
                    for (int j = 0; j < 2; ++j) fetch<WHOLE>(from, c * BLOCK + 16 * j, out < outs ? ins : 0, part[j]);
                    for (int p = 0; p < WHOLE; ++p)
                        rows[p][i] = _mm512_inserti64x4(_mm512_castsi256_si512(part[0][p]), part[1][p], 1);
                }
                Half* place = to + (((o / 2) * taps + tap) * blocks(ins) + c) * WHOLE * PAIR + o % 2 * TILE;
                for (int p = 0; p < WHOLE; ++p) {
                    transpose(rows[p]);
                    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(place + p * PAIR + i * BLOCK, rows[p][i]);
                }
            }
}

// For the gradient of the input: [block of C][tap][block of O][part][two tiles][16 pairs of O][16 of C][2].
void lay_turned_weights(const float* weight, Half* to, int64_t outs, int64_t taps, int64_t ins, int64_t threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t c = 0; c < 2 * blocks(ins); ++c)
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t o = 0; o < 16 * blocks(outs); ++o) {  // pairs
                __m256i part[2][WHOLE];
                for (int j = 0; j < 2; ++j) {
                    const int64_t out = 2 * o + j;
                    fetch<WHOLE>(weight + (out * taps + tap) * ins, 16 * c, out < outs ? ins : 0, part[j]);
                }
                Half* block = to + (((c / 2) * taps + tap) * blocks(outs) + o / 16) * WHOLE * PAIR;
                Half* place = block + c % 2 * TILE + o % 16 * BLOCK;
                for (int p = 0; p < WHOLE; ++p) _mm512_storeu_si512(place + p * PAIR, interleave(part[0][p], part[1][p]));
            }
}

// Tiles 0 .. 3 are sums, 4 and 5 rows, 6 and 7 columns; the instructions take their numbers as constants.
#define CLEAR() do { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); } while (0)
// All rows of the sums alike.
#define BEGIN(row)                         \
    do {                                   \
        settle_tiles();                    \
        _tile_loadd(0, row, 0);            \
        _tile_loadd(1, (row) + 16, 0);     \
        _tile_loadd(2, row, 0);            \
        _tile_loadd(3, (row) + 16, 0);     \
    } while (0)
#define ROWS(from) do { const Half* at = from; _tile_loadd(4, at, 64); _tile_loadd(5, at + TILE, 64); } while (0)
#define COLUMNS(from) do { const Half* at = from; _tile_loadd(6, at, 64); _tile_loadd(7, at + TILE, 64); } while (0)
#define MULTIPLY() \
    do { _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); } while (0)

// Writes a tile of sums, 16 images by 16 channels, or those of them that exist; float32 goes there without a detour.
#define PUT(tile, image, channel)                                                          \
    do {                                                                                   \
        const int64_t rows = to.count - (image), columns = to.channels - (channel);        \
        if (!BFLOAT16 && rows >= 16 && columns >= 16) {                                    \
            _tile_stored(tile, to.row(sums, image, y, x) + (channel), 4 * apart);          \
        } else if (rows > 0 && columns > 0) {                                              \
            _tile_stored(tile, part, 64);                                                  \
            for (int64_t i = 0; i < std::min<int64_t>(rows, 16); ++i)                      \
                put(part + 16 * i, to.row(sums, (image) + i, y, x) + (channel), columns);  \
        }                                                                                  \
    } while (0)

// 16 sums, or those of them that exist.
void put(const float* sums, float* to, int64_t count) { std::memcpy(to, sums, 4 * std::min<int64_t>(count, 16)); }
void put(const float* sums, Half* to, int64_t count) {
    const __m256i numbers = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums));
    if (count >= 16) _mm256_storeu_si256((__m256i*)to, numbers);
    else _mm256_mask_storeu_epi16(to, (1u << count) - 1, numbers);
}

// Sums over all taps and channels for every place of the output; BACK: of the input, from the gradient of the output.
template <bool BACK>
void gather(const Conv& conv, const Half* rows, const Half* weights, const float* bias, Number* sums) {
    const Images from = BACK ? conv.output() : conv.input(), to = BACK ? conv.input() : conv.output();
    constexpr int PARTS = BACK ? WHOLE : 1;
    const int64_t taps = conv.taps(), across = blocks(from.channels);
    const int64_t apart = to.places() * to.channels;
#pragma omp parallel num_threads(conv.threads)
    {
        const Tiles tiles;
        alignas(64) float part[256], begin[BLOCK];
        int64_t place[TAPS], tap[TAPS];
#pragma omp for collapse(3) schedule(static)
        for (int64_t out = 0; out < blocks(to.channels); ++out)
            for (int64_t block = 0; block < blocks(to.count); ++block)
                for (int64_t y = 0; y < to.height; ++y) {
                    for (int64_t half = 0; half < BLOCK; half += 16)
                        _mm512_store_ps(begin + half, load(bias, out * BLOCK + half, bias ? to.channels : 0));
                    for (int64_t x = 0; x < to.width; ++x) {
                        int count = 0;
                        for (int64_t a = 0; a < conv.kernel_height; ++a)
                            for (int64_t b = 0; b < conv.kernel_width; ++b) {
                                int64_t v, u;
                                if (BACK) {
                                    v = y + conv.padding_y - a, u = x + conv.padding_x - b;
                                    if (v < 0 || u < 0 || v % conv.stride_y || u % conv.stride_x) continue;
                                    v /= conv.stride_y, u /= conv.stride_x;
                                } else {
                                    v = y * conv.stride_y + a - conv.padding_y;
                                    u = x * conv.stride_x + b - conv.padding_x;
                                }
                                if (v < 0 || u < 0 || v >= from.height || u >= from.width) continue;
                                place[count] = from.place(block, v, u) * PARTS * across * PAIR;
                                tap[count++] = a * conv.kernel_width + b;
                            }
                        BEGIN(begin);
                        for (int k = 0; k < count; ++k) {
                            const Half* s = rows + place[k];
                            const Half* w = weights + (out * taps + tap[k]) * across * WHOLE * PAIR;
                            for (int64_t c = 0; c < across; ++c, s += PAIR, w += WHOLE * PAIR) {
                                ROWS(s);
                                if (WHOLE == 3) {
                                    COLUMNS(w + 2 * PAIR);
                                    MULTIPLY();
                                    COLUMNS(w + PAIR);
                                    MULTIPLY();
                                }
                                if (PARTS == 3) {
                                    ROWS(s + across * PAIR);
                                    MULTIPLY();
                                }
                                COLUMNS(w);
                                MULTIPLY();
                                if (PARTS == 3) {
                                    ROWS(s);
                                    MULTIPLY();
                                    ROWS(s + 2 * across * PAIR);
                                    MULTIPLY();
                                }
                            }
                        }
                        const int64_t image = block * BLOCK, channel = out * BLOCK;
                        PUT(0, image, channel);
                        PUT(1, image, channel + 16);
                        PUT(2, image + 16, channel);
                        PUT(3, image + 16, channel + 16);
                    }
                }
    }
}

// Adds to, or begins, sums over all images and places for each weight: [block of C][block of O][tap][two][two tiles].
void accumulate(const Conv& conv, const Half* columns, const Half* grads, float* sums, bool begins) {
    const Images in = conv.input(), out = conv.output();
    const int64_t taps = conv.taps(), ins = blocks(in.channels), outs = blocks(out.channels);
    const int64_t row = 2 * PAIR * out.width * (WHOLE * outs + conv.stride_y * conv.stride_x * ins);
    const int64_t rows = std::max<int64_t>(1, std::min(out.height, CHUNK / row));
#pragma omp parallel num_threads(conv.threads)
    {
        const Tiles tiles;
        settle_tiles();
        for (int64_t block = 0; block < blocks(in.count); ++block)
            for (int64_t begin = 0; begin < out.height; begin += rows) {
                // A thread has the same sums in every round, so none waits for another.
#pragma omp for collapse(3) schedule(static) nowait
                for (int64_t c = 0; c < ins; ++c)
                    for (int64_t o = 0; o < outs; ++o)
                        for (int64_t tap = 0; tap < taps; ++tap) {
                            float* sum = sums + ((c * outs + o) * taps + tap) * PAIR;
                            if (begins && block + begin == 0) {
                                CLEAR();
                            } else {
                                _tile_loadd(0, sum, 64);
                                _tile_loadd(1, sum + 256, 64);
                                _tile_loadd(2, sum + 512, 64);
                                _tile_loadd(3, sum + 768, 64);
                            }
                            const int64_t a = tap / conv.kernel_width - conv.padding_y;
                            const int64_t b = tap % conv.kernel_width - conv.padding_x;
                            for (int64_t y = begin; y < std::min(begin + rows, out.height); ++y) {
                                const int64_t v = y * conv.stride_y + a;
                                if (v < 0 || v >= in.height) continue;
                                for (int64_t x = 0; x < out.width; ++x) {
                                    const int64_t u = x * conv.stride_x + b;
                                    if (u < 0 || u >= in.width) continue;
                                    const Half* g = grads + (out.place(block, y, x) * WHOLE * outs + o) * PAIR;
                                    ROWS(columns + (in.place(block, v, u) * ins + c) * PAIR);
                                    for (int p = WHOLE - 1; p >= 0; --p) {
                                        COLUMNS(g + p * outs * PAIR);
                                        MULTIPLY();
                                    }
                                }
                            }
                            _tile_stored(0, sum, 64);
                            _tile_stored(1, sum + 256, 64);
                            _tile_stored(2, sum + 512, 64);
                            _tile_stored(3, sum + 768, 64);
                        }
            }
    }
}

}  // namespace

// The functions below are given numbers of bfloat16 for themselves: so many of them.
extern "C" int64_t scratch_forward(const Conv* conv) { return conv->spikes() + conv->weights(); }
extern "C" int64_t scratch_grad_spikes(const Conv* conv) { return conv->grads() + conv->weights(); }
extern "C" int64_t scratch_grad_weight(const Conv* conv) { return conv->spikes() + conv->grads() + 2 * conv->sums(); }

// `bias` may be null. 0, and not all of the output, where spikes are none, but numbers that a bfloat16 cannot hold.
extern "C" int64_t forward(const Conv* conv, const Number* spikes, const float* weight, const float* bias, Number* output,
                           Half* scratch) {
    Half* weights = scratch + conv->spikes();
    for (int64_t first = 0; first < conv->images; first += conv->together()) {
        const Conv part = conv->part(first);
        const Images from = part.input(), to = part.output();
        if (!lay_rows<1>(from, spikes + first * from.size(), scratch, part.threads)) return 0;
        if (first == 0) lay_weights(weight, weights, to.channels, part.taps(), from.channels, part.threads);
        gather<false>(part, scratch, weights, bias, output + first * to.size());
    }
    return 1;
}

extern "C" void grad_spikes(const Conv* conv, const Number* grad, const float* weight, Number* to_spikes, Half* scratch) {
    Half* weights = scratch + conv->grads();
    lay_turned_weights(weight, weights, conv->out_channels, conv->taps(), conv->channels, conv->threads);
    for (int64_t first = 0; first < conv->images; first += conv->together()) {
        const Conv part = conv->part(first);
        const Images from = part.output(), to = part.input();
        lay_rows<WHOLE>(from, grad + first * from.size(), scratch, part.threads);
        gather<true>(part, scratch, weights, nullptr, to_spikes + first * to.size());
    }
}

// 0, and no gradient, where the spikes are none.
extern "C" int64_t grad_weight(const Conv* conv, const Number* grad, const Number* spikes, float* to, Half* scratch) {
    Half* grads = scratch + conv->spikes();
    float* sums = (float*)(grads + conv->grads());
    const Images in = conv->input(), out = conv->output();
    const int64_t taps = conv->taps(), ins = blocks(in.channels), outs = blocks(out.channels);
    for (int64_t first = 0; first < conv->images; first += conv->together()) {
        const Conv part = conv->part(first);
        if (!lay_columns(part.input(), spikes + first * in.size(), scratch, part.threads)) return 0;
        lay_pairs(part.output(), grad + first * out.size(), grads, part.threads);
        accumulate(part, scratch, grads, sums, first == 0);
    }
#pragma omp parallel for collapse(2) schedule(static) num_threads(conv->threads)
    for (int64_t o = 0; o < 2 * outs; ++o)
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t c = 0; c < 2 * ins; ++c) {
                __m512i rows[16];
                const float* sum = sums + ((c / 2 * outs + o / 2) * taps + tap) * PAIR + (c % 2 * 2 + o % 2) * 256;
                for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(sum + 16 * i);
                transpose(rows);
                const int64_t count = std::min<int64_t>(16, in.channels - 16 * c);
                for (int64_t i = 0; i < 16 && 16 * o + i < out.channels && count > 0; ++i)
                    _mm512_mask_storeu_epi32(to + ((16 * o + i) * taps + tap) * in.channels + 16 * c,
                                             (__mmask16)((1u << count) - 1), rows[i]);
            }
    return 1;
}
