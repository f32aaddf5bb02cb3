// The tiles of the matrix unit of x86 processors (AMX): eight of 16 rows of 64 bytes. native_tiles.py says where they are.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// What was written before is in memory. The instructions that load tiles do not tell the compiler what they read.
inline void settle_tiles() { asm volatile("" ::: "memory"); }

// Tells the unit that all tiles have 16 rows of 64 bytes, while it lives.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } form;
        settle_tiles();
        _tile_loadconfig(&form);
    }
    ~Tiles() { _tile_release(); }
};

}  // namespace
