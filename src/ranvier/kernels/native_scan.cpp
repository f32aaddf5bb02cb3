// All steps of a neuron, forward and backward, on a CPU. native_scan.py compiles this file for one kind of neuron:
//
//   CHARGE, SOFT: see native_neuron.h
//   DETACH     1: the gradient ignores the reset
//   SURROGATE  0 triangle, 1 atan, 2 sigmoid, 3 rectangle
//   LEARNS     0 nothing, 1 the leak, 2 what a burst sends
//   NORMED     1: what neurons receive is x scale + shift of each channel, as a batch normalisation has it; channels lie
//              side by side in memory, and there are whole lines of them. 2: of each channel and step
//   BFLOAT16, BYTES, STEPS: see native_lines.h; of bytes there is no backward
//
// A line of neurons goes through all steps while its potentials are in registers. Lines of all steps are then fetched
// side by side, which keeps the memory busier than one long run after another does.
//
// Order of operations as in ranvier.dynamics; compiled without fused multiply-adds.

#include "native_lines.h"
#include "native_neuron.h"

namespace {

// Sum of all lanes, in a tree: one after the other they would wait for each other.
INLINE double sum_of(Float value) {
    float lanes[LINE];
    std::memcpy(lanes, &value, sizeof value);
    for (int half = LINE / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE Float abs(Float u) { return (Float)((Bits)u & 0x7FFFFFFF); }

// e^x for x <= 0, to two units in the last place.
INLINE Float exponential(Float x) {
    Float y = x > -87.0f ? x : all(-87);
    Int whole = __builtin_convertvector(y * 1.44269504f - 0.5f, Int);  // rounds towards 0: to the nearest
    Float n = __builtin_convertvector(whole, Float);
    Float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    Float p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return x == x ? p * (Float)((whole + 127) << 23) : x;
}

// Derivative of the surrogate of ranvier.dynamics.surrogate; `number` is its width or alpha.
INLINE Float slope(Float u, float number) {
#if SURROGATE == 0
    Float height = 1 / number - abs(u) * (1 / (number * number));
    return height < 0 ? all(0) : height;  // as torch's clamp, lets NaN through: training stops at it
#elif SURROGATE == 1
    Float x = 1.57079632679489662f * number * u;
    return number / 2 / (1 + x * x);
#elif SURROGATE == 2
    Float e = exponential(-abs(number * u));
    return number * e / ((1 + e) * (1 + e));
#else
    return abs(u) < number ? all(1 / (2 * number)) : all(0);
#endif
}

}  // namespace

// What both functions are given: `_Work` in native_scan.py.
struct Work {
    const Element* current;  // [steps, numel], `apart` elements from step to step
    const float* state;      // [numel], or null
    const float* gain;       // what a burst sends beyond a spike, [columns + LINE], beginning anew at `columns`
    const float* scale;      // [columns] each, or [steps, columns], or null: see NORMED
    const float* shift;
    const float* mean;       // that backward takes deviations from
    const Element* added;    // [steps, numel], sent beside the spikes, or null; of normalised scans alone
    int64_t steps, numel, apart, columns, inner, chunks, threads, past_caches;
    float leak, v_threshold, v_burst, number;
};

namespace {

// Where a number of a channel stands among those of all channels, and of all steps where each has its own.
INLINE int64_t place_of(const Work& work, int64_t column, int64_t t) {
    return NORMED == 2 ? t * work.columns + column : column;
}

// How many sums a part has: two of each channel, and of each step where those have their own.
INLINE int64_t moments_of(const Work& work) { return 2 * (NORMED == 2 ? work.steps : 1) * work.columns; }

struct Affine {
    Float scale, shift;
};

INLINE Affine affine_of(const Work& work, int64_t column, int64_t t) {
    if (!NORMED) return Affine{all(1), all(0)};
    const int64_t place = place_of(work, column, t);
    return Affine{load(work.scale + place, LINE), load(work.shift + place, LINE)};
}

// What neurons receive of `from`.
INLINE Float receive(const Element* from, int64_t count, Affine affine) {
    const Float x = load(from, count);
    return NORMED ? x * affine.scale + affine.shift : x;
}

INLINE void add_to(float* sums, Float value) { store(sums, load(sums, LINE) + value, LINE); }

template <bool PAST_CACHES>
INLINE void forward_line(const Work& work, int64_t at, int64_t count, Sent* spikes, float* end) {
    Float v = work.state ? load(work.state + at, count) : all(0);
    const int64_t column = LEARNS == 2 || NORMED ? at % work.columns : 0;
    const Float gain = LEARNS == 2 ? load(work.gain + column, count) : all(0);
    const Affine first = affine_of(work, column, 0);
    const Element* x = work.current + at;
    Sent* sent = spikes + at;
    FOR_ALL_STEPS
    for (int64_t t = 0; t < (STEPS ? STEPS : work.steps); ++t, x += work.apart, sent += work.numel) {
        const Affine affine = NORMED == 2 ? affine_of(work, column, t) : first;
        const Float h = charge(receive(x, count, affine), v, work.leak);
        const Float fired = at_least(h - work.v_threshold);
        v = reset(h, fired, work.v_threshold);
        Float out = LEARNS == 2 ? fired + gain * at_least(h - work.v_burst) : fired;
        if (NORMED && work.added) out = out + load(work.added + t * work.numel + at, count);
        send<PAST_CACHES>(sent, out, count);
    }
    if (end) store(end + at, v, count);
}

struct Gradients {
    const Element* spikes;  // [steps, numel], `apart` elements from step to step, or null
    int64_t apart;
    const float* end;  // [numel], or null
    Element* current;  // [steps, numel]
    float* state;      // [numel], or null
};

const Element NONE[LINE] = {};

// `held` has room for 2 * steps * LINE numbers. The gradient of a leak is added to `rate`, that of what bursts send to
// `sums`, one for each channel.
template <bool PAST_CACHES>
INLINE void backward_line(const Work& work, int64_t at, int64_t count, const Gradients& gradients, float* held,
                          Float& rate, double* sums, float* moments) {
    const int64_t steps = STEPS ? STEPS : work.steps;
    Float registers[STEPS ? 2 * STEPS : 1];
    Float* potentials = STEPS ? registers : reinterpret_cast<Float*>(held);
    Float* drives = potentials + steps;  // x - v
    Float v = work.state ? load(work.state + at, count) : all(0);
    const int64_t column = LEARNS == 2 || NORMED ? at % work.columns : 0;
    const Float gain = LEARNS == 2 ? load(work.gain + column, count) : all(0);
    const Affine first = affine_of(work, column, 0);
    const Element* x = work.current + at;
    FOR_ALL_STEPS
    for (int64_t t = 0; t < steps; ++t, x += work.apart) {
        const Affine affine = NORMED == 2 ? affine_of(work, column, t) : first;
        const Float input = receive(x, count, affine), h = charge(input, v, work.leak);
        potentials[t] = h;
        if (LEARNS == 1) drives[t] = input - v;
        v = reset(h, at_least(h - work.v_threshold), work.v_threshold);
    }
    Float to_v = gradients.end ? load(gradients.end + at, count) : all(0);
    Float total = all(0), sum = all(0), product = all(0);
    const Float first_mean = NORMED ? load(work.mean + column, LINE) : all(0);
    float* products = NORMED ? moments + moments_of(work) / 2 : nullptr;
    const Element* upstream = gradients.spikes ? gradients.spikes + at : NONE;
    const int64_t apart = gradients.spikes ? gradients.apart : 0;
    FOR_ALL_STEPS
    for (int64_t t = steps - 1; t >= 0; --t) {
        const Float g = load(upstream + t * apart, count);
        const Float h = potentials[t], u = h - work.v_threshold, fired = at_least(u);
        const Float to_fired = SOFT ? -work.v_threshold * to_v : -to_v * h;
        Float to_h = SOFT ? to_v : to_v * (1 - fired);
        to_h += (DETACH ? g : g + to_fired) * slope(u, work.number);
        if (LEARNS == 2) {
            const Float above = h - work.v_burst;
            to_h += g * gain * slope(above, work.number);
            total += g * at_least(above);
        }
        if (LEARNS == 1) total += to_h * drives[t];
        const Float to_x = CHARGE == 0 ? to_h : CHARGE == 1 ? to_h * work.leak : to_h / work.leak;
        to_v = CHARGE == 0 ? to_h : to_h - to_x;
        if (NORMED) {
            const int64_t place = place_of(work, column, t);
            const Float mean = NORMED == 2 ? load(work.mean + place, LINE) : first_mean;
            const Float to_scale = to_x * (load(work.current + at + t * work.apart, count) - mean);
            if (NORMED == 2) {
                add_to(moments + place, to_x);
                add_to(products + place, to_scale);
            } else {
                sum += to_x;
                product += to_scale;
            }
        }
        send<PAST_CACHES>(gradients.current + t * work.numel + at, to_x, count);
    }
    if (gradients.state) store(gradients.state + at, to_v, count);
    if (NORMED == 1) {
        add_to(moments + column, sum);
        add_to(products + column, product);
    }
    if (LEARNS == 1) rate += total;
    if (LEARNS == 2) {
        if (column % work.inner + count <= work.inner) {  // all in one channel; lanes beyond `count` hold 0
            sums[column / work.inner] += sum_of(total);
        } else if (work.inner == 1 && column + count <= work.columns) {
            for (int64_t lane = 0; lane < count; ++lane) sums[column + lane] += total[lane];
        } else {
            for (int64_t lane = 0; lane < count; ++lane) sums[(column + lane) % work.columns / work.inner] += total[lane];
        }
    }
}

template <bool PAST_CACHES>
void forward_all(const Work* given, Sent* spikes, float* end) {
#pragma omp parallel for schedule(static) num_threads(given->threads)
    for (int64_t chunk = 0; chunk < given->chunks; ++chunk) {
        const Work work = *given;  // of this thread alone: the compiler then knows that no store changes it
        const int64_t last = begin_of(work.numel, work.chunks, chunk + 1);
        int64_t at = begin_of(work.numel, work.chunks, chunk);
        for (; at + LINE <= last; at += LINE) forward_line<PAST_CACHES>(work, at, LINE, spikes, end);
        if (at < last) forward_line<false>(work, at, last - at, spikes, end);
        settle(PAST_CACHES);
    }
}

template <bool PAST_CACHES>
void backward_all(const Work* given, const Gradients* grads, double* sums, float* moments) {
#pragma omp parallel num_threads(given->threads)
    {
        const Work work = *given;  // of this thread alone, as above
        const Gradients gradients = *grads;
        const int64_t channels = LEARNS == 2 ? work.columns / work.inner : 1;
        float* held = STEPS ? nullptr : static_cast<float*>(std::aligned_alloc(64, 2 * work.steps * sizeof(Float)));
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
            const int64_t last = begin_of(work.numel, work.chunks, chunk + 1);
            int64_t at = begin_of(work.numel, work.chunks, chunk);
            double* own = LEARNS ? sums + chunk * channels : nullptr;
            float* near = NORMED ? moments + chunk * moments_of(work) : nullptr;
            Float rate = all(0);
            for (; at + LINE <= last; at += LINE)
                backward_line<PAST_CACHES>(work, at, LINE, gradients, held, rate, own, near);
            if (at < last) backward_line<false>(work, at, last - at, gradients, held, rate, own, near);
            settle(PAST_CACHES);
            if (LEARNS == 1) own[0] = sum_of(rate);
        }
        std::free(held);
    }
}

#if NORMED
// Sums of x - pivot of each channel and of its square, [chunks, 2, columns] or [chunks, 2, steps, columns]. `pivot` is
// [columns] or [steps, columns].
void sum_all(const Work* given, const float* pivot, float* moments) {
#pragma omp parallel for schedule(static) num_threads(given->threads)
    for (int64_t chunk = 0; chunk < given->chunks; ++chunk) {
        const Work work = *given;
        const int64_t last = begin_of(work.numel, work.chunks, chunk + 1);
        float* sums = moments + chunk * moments_of(work);
        float* squares = sums + moments_of(work) / 2;
        for (int64_t at = begin_of(work.numel, work.chunks, chunk); at < last; at += LINE) {
            const int64_t column = at % work.columns;
            Float sum = all(0), square = all(0);
            for (int64_t t = 0; t < work.steps; ++t) {
                const Float from = load(pivot + place_of(work, column, t), LINE);
                const Float x = load(work.current + at + t * work.apart, LINE) - from;
                sum += x;
                square += x * x;
                if (NORMED == 1 && t + 1 < work.steps) continue;
                add_to(sums + place_of(work, column, t), sum);
                add_to(squares + place_of(work, column, t), square);
                sum = square = all(0);
            }
        }
    }
}

// gradient = gradient scale + x slope + shift, of each channel, and of each step where those have their own.
void combine_all(const Work* given, const float* slope, Element* gradient) {
#pragma omp parallel for schedule(static) num_threads(given->threads)
    for (int64_t chunk = 0; chunk < given->chunks; ++chunk) {
        const Work work = *given;
        const int64_t last = begin_of(work.numel, work.chunks, chunk + 1);
        for (int64_t t = 0; t < work.steps; ++t)
            for (int64_t at = begin_of(work.numel, work.chunks, chunk); at < last; at += LINE) {
                const int64_t place = place_of(work, at % work.columns, t);
                const Affine affine = affine_of(work, at % work.columns, t);
                const Float x = load(work.current + at + t * work.apart, LINE);
                Element* there = gradient + t * work.numel + at;
                send<false>(there, load(there, LINE) * affine.scale + x * load(slope + place, LINE) + affine.shift, LINE);
            }
    }
}
#endif

}  // namespace

// `end` is [numel], or null.
extern "C" void forward(const Work* work, Sent* spikes, float* end) {
    if (work->past_caches) forward_all<true>(work, spikes, end);
    else forward_all<false>(work, spikes, end);
}

// `sums`, [chunks, channels], takes the gradient of what is learned, for each chunk.
extern "C" void backward(const Work* work, const Element* grad_spikes, int64_t grad_apart, const float* grad_end,
                         Element* grad_current, float* grad_state, double* sums, float* moments) {
    const Gradients gradients{grad_spikes, grad_apart, grad_end, grad_current, grad_state};
    if (work->past_caches) backward_all<true>(work, &gradients, sums, moments);
    else backward_all<false>(work, &gradients, sums, moments);
}

#if NORMED
extern "C" void statistics(const Work* work, const float* pivot, float* moments) { sum_all(work, pivot, moments); }

extern "C" void combine(const Work* work, const float* slope, Element* gradient) { combine_all(work, slope, gradient); }
#endif
