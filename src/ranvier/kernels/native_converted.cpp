// All steps of converted neurons on a CPU, without gradients. native_converted.py compiles this file with
//
//   SIGNED   1: a neuron that fired too often takes a spike back
//   BINARY   1: a spike goes out as 1, not as the threshold
//   BFLOAT16, BYTES, STEPS: see native_lines.h
//
// As in native_scan.cpp, a line of neurons goes through all steps while its potentials are in registers. Order of
// operations as in ranvier.dynamics; compiled without fused multiply-adds.

#include "native_lines.h"

// What `run` is given: `_Work` in native_converted.py. Where lines lie in one channel each (`inner` neighbours in memory
// share one, a multiple of a line), tables hold a number for each channel. Else `inner` is 0, and they hold one for each
// of `columns` neurons that lie side by side, and after them, beginning anew, for those of a line more.
struct Work {
    const Element* current;  // [steps, numel], `apart` elements from step to step
    const float* v;          // [numel], or null: it starts at `v_init`
    const float* emitted;    // [numel], or null: nothing so far
    const float* threshold;  // table
    const float* bias;       // tables, `bias_apart` from step to step
    const float* v_init;     // table, or null
    int64_t steps, numel, apart, bias_apart, columns, inner, chunks, threads, past_caches;
};

namespace {

// What a table says of a line.
INLINE Float look_up(const Work& work, const float* place) { return work.inner ? all(*place) : load(place, LINE); }

template <bool PAST_CACHES>
INLINE void line(const Work& work, int64_t at, int64_t count, Sent* sent, float* v_end, float* emitted_end) {
    const int64_t column = at % work.columns, place = work.inner ? column / work.inner : column;
    const Float threshold = look_up(work, work.threshold + place);
    Float v = work.v ? load(work.v + at, count) : look_up(work, work.v_init + place);
    Float emitted = SIGNED && work.emitted ? load(work.emitted + at, count) : all(0);
    const Element* x = work.current + at;
    const float* bias = work.bias + place;
    sent += at;
    FOR_ALL_STEPS
    for (int64_t t = 0; t < (STEPS ? STEPS : work.steps); ++t) {
        const Float h = v + (load(x, count) - look_up(work, bias));
        Float fired = h >= threshold ? all(1) : all(0);
        if (SIGNED) {
            fired -= ((h < 0) & (emitted > 0)) ? all(1) : all(0);
            emitted += fired;
        }
        const Float y = threshold * fired;
        v = h - y;
        send<PAST_CACHES>(sent, BINARY ? fired : y, count);
        x += work.apart, bias += work.bias_apart, sent += work.numel;
    }
    if (v_end) store(v_end + at, v, count);
    if (SIGNED && emitted_end) store(emitted_end + at, emitted, count);
}

template <bool PAST_CACHES>
void run_all(const Work* given, Sent* sent, float* v_end, float* emitted_end) {
#pragma omp parallel for schedule(static) num_threads(given->threads)
    for (int64_t chunk = 0; chunk < given->chunks; ++chunk) {
        const Work work = *given;  // of this thread alone: the compiler then knows that no store changes it
        const int64_t last = begin_of(work.numel, work.chunks, chunk + 1);
        int64_t at = begin_of(work.numel, work.chunks, chunk);
        for (; at + LINE <= last; at += LINE) line<PAST_CACHES>(work, at, LINE, sent, v_end, emitted_end);
        if (at < last) line<false>(work, at, last - at, sent, v_end, emitted_end);
        settle(PAST_CACHES);
    }
}

}  // namespace

// `sent` is [steps, numel], `v_end` and, where SIGNED, `emitted_end` are [numel], or null.
extern "C" void run(const Work* work, Sent* sent, float* v_end, float* emitted_end) {
    if (work->past_caches) run_all<true>(work, sent, v_end, emitted_end);
    else run_all<false>(work, sent, v_end, emitted_end);
}
