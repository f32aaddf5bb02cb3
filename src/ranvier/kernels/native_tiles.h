// The tiles of the matrix unit of x86 processors (AMX): eight of 16 rows of 64 bytes. native_tiles.py says where they are.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Tells the unit that all tiles have 16 rows of 64 bytes, while it lives.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } form;
        _tile_loadconfig(&form);
    }
    ~Tiles() { _tile_release(); }
};

}  // namespace
