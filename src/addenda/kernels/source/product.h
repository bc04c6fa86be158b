// Small dense products in float32, for operands that lie in a core's own cache.
#pragma once
#include "common.h"

#ifdef __AVX512F__
static const int WIDE = 4;  // columns of a tile, in v16: 4 rows of 4 fill half of the 32 registers
#else
static const int WIDE = 1;
#endif
static const int ROWS = 4;

// c (ROWS x 16 VECS) = or += a (ROWS x depth) b (depth x 16 VECS); a's element (r, k) lies at a[r * row + k * step].
template <int VECS>
static inline void tile(float* c, long ldc, const float* a, long row, long step, const float* b, long ldb, long depth,
                        bool add) {
    v16 total[ROWS][VECS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) total[r][v] = add ? load(c + r * ldc + 16 * v) : v16(0.0f);
    for (long k = 0; k < depth; k++) {
        v16 line[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) line[v] = load(b + k * ldb + 16 * v);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            v16 factor = a[r * row + k * step];
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) total[r][v] += factor * line[v];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) store(c + r * ldc + 16 * v, total[r][v]);
}

// ROWS rows by any number of v16 columns.
static inline void strip(float* c, long ldc, const float* a, long row, long step, const float* b, long ldb, long depth,
                         int vecs, bool add) {
    int v = 0;
    for (; v + WIDE <= vecs; v += WIDE) tile<WIDE>(c + 16 * v, ldc, a, row, step, b + 16 * v, ldb, depth, add);
    if (WIDE > 1 && v + 2 <= vecs) {
        tile<2>(c + 16 * v, ldc, a, row, step, b + 16 * v, ldb, depth, add);
        v += 2;
    }
    for (; v < vecs; v++) tile<1>(c + 16 * v, ldc, a, row, step, b + 16 * v, ldb, depth, add);
}
