// How a neuron gathers and what a spike leaves behind, as in ranvier.dynamics, for
//
//   CHARGE     0 sum, 1 product, 2 quotient      h = v + x,  v + (x - v) leak,  v + (x - v) / leak
//   SOFT       reset: 0 hard, 1 soft             v = h (1 - fired),  h - v_threshold fired

#pragma once

#include "native_lines.h"

namespace {

INLINE Float charge(Float x, Float v, float leak) {
    return CHARGE == 0 ? v + x : CHARGE == 1 ? v + (x - v) * leak : v + (x - v) / leak;
}

INLINE Float reset(Float h, Float fired, float v_threshold) {
    return SOFT ? h - v_threshold * fired : h * (1 - fired);
}

}  // namespace
