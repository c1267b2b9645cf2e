// ldmatrix, mma.sync and cp.async on the CPU, written from the fragment tables of the PTX ISA and
// not from the kernels that use them. Stands in for the CUDA half of cuda/mma.cuh.
#pragma once

#include "emulation/simt.h"

namespace fusedmlp::cuda {

inline void cp_async16(void* to, const void* from, int bytes) {
    emulation::copy_async(to, from, bytes, 16);
}
inline void cp_async_commit() { emulation::copy_async_commit(); }
template <int GROUPS_LEFT>
void cp_async_wait() {
    emulation::copy_async_wait(GROUPS_LEFT);
}

// Lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix.
inline void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
    emulation::check_alignment(row, 16);
    const emulation::Exchange rows = emulation::exchange(&row, sizeof(row));
    const uint32_t lane = emulation::current.thread % 32;
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        const char* at;
        std::memcpy(&at, rows.lane[8 * matrix + lane / 4], sizeof(at));
        std::memcpy(&d[matrix], at + 4 * (lane % 4), sizeof(d[matrix]));
    }
}

// With g = lane / 4 and t = lane % 4, element i of a lane's fragment is
//   a[i], i < 8   row g + 8 (i in {2, 3, 6, 7}), column 2 t + i % 2 + 8 (i >= 4)
//   b[i], i < 4   row 2 t + i % 2 + 8 (i >= 2), column g
//   d[i], i < 4   row g + 8 (i >= 2), column 2 t + i % 2
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        T a[8], b[4];
    } mine;
    std::memcpy(mine.a, a, sizeof(mine.a));
    std::memcpy(mine.b, &b0, sizeof(b0));
    std::memcpy(mine.b + 2, &b1, sizeof(b1));
    static_assert(sizeof(mine) <= emulation::kExchangeBytes);
    const emulation::Exchange all = emulation::exchange(&mine, sizeof(mine));
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        Fragments f;
        std::memcpy(&f, all.lane[lane], sizeof(f));
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; ++i) {
            const bool lower = i == 2 || i == 3 || i == 6 || i == 7;
            left[g + (lower ? 8 : 0)][2 * t + i % 2 + (i >= 4 ? 8 : 0)] = to_float(f.a[i]);
        }
        for (int i = 0; i < 4; ++i)
            right[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] = to_float(f.b[i]);
    }
    const int lane = int(emulation::current.thread % 32), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; ++k)
            sum += double(left[row][k]) * double(right[k][column]);
        d[i] = float(sum);
    }
}

}  // namespace fusedmlp::cuda
