// Algebra of a group's channels between the passes: gates, moments, mixed kernel, and their gradients.

#pragma once

#include <cmath>

#include "worker.h"

namespace {

template <class A>
inline A dot(const A* a, const A* b, int64_t n) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

template <class A>
inline void add_scaled(A* __restrict to, A scale, const A* __restrict from, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += scale * from[i];
}

// Compute R rows of out (., n) = matrix (., k) @ b (k, n); n is a multiple of L.
template <int R, class A>
inline void multiply_rows(A* out, const A* matrix, int64_t row, int64_t column, const A* b, int64_t k, int64_t n) {
    using V = typename Simd<A>::V;
    for (int64_t at = 0; at < n; at += Simd<A>::L) {
        V sums[R] = {};
        for (int64_t j = 0; j < k; ++j) {
            V v = load<V>(b + j * n + at);
            keep(v);
            for (int r = 0; r < R; ++r) sums[r] += matrix[r * row + j * column] * v;
        }
        for (int r = 0; r < R; ++r) store(out + r * n + at, sums[r]);
    }
}

// Compute out (m, n) = matrix (m, k) @ b (k, n), for a matrix with the strides `row` and `column`.
template <class A>
inline void multiply(A* out, const A* matrix, int64_t row, int64_t column, const A* b, int64_t m, int64_t k,
                     int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) multiply_rows<4>(out + i * n, matrix + i * row, row, column, b, k, n);
    for (; i < m; ++i) multiply_rows<1>(out + i * n, matrix + i * row, row, column, b, k, n);
}

// Compute out (m, k) += a (m, n) @ b (k, n) transposed.
template <class A>
inline void add_products(A* out, const A* a, const A* b, int64_t m, int64_t k, int64_t n) {
    using V = typename Simd<A>::V;
    constexpr int L = Simd<A>::L;
    for (int64_t i = 0; i < m; ++i) {
        int64_t j = 0;
        for (; j + L <= k; j += L) {
            V sums[L] = {};
            for (int64_t at = 0; at < n; at += L) {
                V v = load<V>(a + i * n + at);
                keep(v);
                for (int r = 0; r < L; ++r) sums[r] += v * load<V>(b + (j + r) * n + at);
            }
            store(out + i * k + j, load<V>(out + i * k + j) + sum_runs<A, L>(sums));
        }
        for (; j < k; ++j) out[i * k + j] += dot(a + i * n, b + j * n, n);
    }
}

template <class A>
inline void softmax(A* values, int64_t n) {
    A most = values[0], sum = 0;
    for (int64_t i = 1; i < n; ++i) most = values[i] > most ? values[i] : most;
    for (int64_t i = 0; i < n; ++i) sum += values[i] = std::exp(values[i] - most);
    for (int64_t i = 0; i < n; ++i) values[i] /= sum;
}

// Offsets of each parameter's gradient in one array, and of da1, the gradient of the static variant's a1.
struct Layout {
    int64_t w1, b1, w3, b3, gamma, beta, a1, size;
    explicit Layout(int64_t Cg)
        : w1(0), b1(Cg * Cg), w3(b1 + Cg), b3(w3 + 9 * Cg * Cg), gamma(b3 + Cg), beta(gamma + Cg), a1(beta + Cg),
          size(a1 + Cg) {}
};

template <class A, bool Lanes>
inline void Worker<A, Lanes>::join_columns(int count) const {
    for (int64_t b = rank; b < item.bundles && size > 1; b += size) {
        const int64_t numbers = g.slices_per_bundle * g.vectors * L;
        for (int i = 0; i < count; ++i)
            for (int k = 1; k < size; ++k)
                add_scaled(team[0]->columns[i] + b * numbers, A(1), team[k]->columns[i] + b * numbers, numbers);
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::finish_means(int64_t i) const {
    for (int64_t c = 0; c < Cg; ++c) {
        A* mean = means_of(i) + c * positions;
        const A* rows = rows_of(shared.rows[0], i, c);
        const A* columns = columns_of(team[0]->columns[0], i, c);
        for (int64_t h = 0; h < H; ++h) mean[h] = rows[h * PS] / W;
        for (int64_t w = 0; w < W; ++w) mean[H + w] = columns[w * kStep] / H;
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::open_gates(int64_t i) const {
    const int64_t pitch = padded_positions(positions);
    for (int64_t c = 0; c < Cg; ++c)  // the rest of each row stays zero
        std::memcpy(own.means + c * pitch, means_of(i) + c * positions, positions * sizeof(A));
    multiply(own.gates, w1, Cg, 1, own.means, Cg, Cg, pitch);
    for (int64_t o = 0; o < Cg; ++o) {
        A* gate = own.gates + o * pitch;
        for (int64_t p = 0; p < pitch; p += L) store(gate + p, sigmoid<A>(load<V>(gate + p) + b1[o]));
        A* rows = rows_of(shared.row_gate, i, o);
        A* columns = columns_of(shared.column_gate, i, o);
        for (int64_t h = 0; h < H; ++h) rows[h * PS] = gate[h];
        for (int64_t w = 0; w < W; ++w) columns[w * kStep] = gate[H + w];
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::guess_moments(int64_t i) const {
    for (int64_t c = 0; c < Cg; ++c) {
        const A *mean = means_of(i) + c * positions, *gate = own.gates + c * padded_positions(positions);
        double all = 0, rows = 0, columns = 0, gated_rows = 0, gated_columns = 0;
        for (int64_t h = 0; h < H; ++h) {
            all += mean[h];
            rows += gate[h];
            gated_rows += static_cast<double>(mean[h]) * gate[h];
        }
        for (int64_t w = H; w < positions; ++w) {
            columns += gate[w];
            gated_columns += static_cast<double>(mean[w]) * gate[w];
        }
        rows /= H;
        columns /= W;
        const double guess = gated_rows / H * columns + rows * (gated_columns / W) - all / H * rows * columns;
        *param_of(shared.shift, i, c) = static_cast<A>(guess);
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::finish_moments(int64_t i) const {
    const int64_t count = g.B * g.G * Cg;
    A *mean = moments + index_of(i) * Cg, *rstd = mean + count;
    const double area = static_cast<double>(H) * W;
    for (int64_t c = 0; c < Cg; ++c) {
        const double difference = exact_sum_of(&Private<A>::moments, i, c, 2, 0) / area;
        const double variance = exact_sum_of(&Private<A>::moments, i, c, 2, 1) / area - difference * difference;
        mean[c] = static_cast<A>(*param_of(shared.shift, i, c) + difference);
        rstd[c] = static_cast<A>(1 / std::sqrt((variance < 0 ? 0 : variance) + call.eps));
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::mix_group(int64_t i) const {
    const int64_t n = index_of(i), channel = (item.group + i) * Cg;
    const double area = static_cast<double>(H) * W;
    A *a1 = shared.a1 + i * Cg, *a2 = shared.a2 + i * Cg, *rstd = shared.rstd + i * Cg;
    A* shifted = shared.shifted + i * Cg * 9;
    for (int64_t c = 0; c < Cg; ++c) {
        const A *rows = means_of(i) + c * positions, *columns = rows + H;
        double mean = 0;
        for (int64_t h = 0; h < H; ++h) mean += rows[h];
        mean /= H;
        for (int tap = 0; tap < 9; ++tap) {  // mean over the tap's window, times the window's share of the area
            const int dh = tap / 3, dw = tap % 3;
            const int64_t h = dh == 0 ? H - 1 : 0, w = dw == 0 ? W - 1 : 0;
            double value = mean;
            if (dh != 1) value -= static_cast<double>(rows[h]) / H;
            if (dw != 1) value -= static_cast<double>(columns[w]) / W;
            if (dh != 1 && dw != 1) value += format.at(g, call.x, item.image, channel + c, h, w) / area;
            shifted[c * 9 + tap] = static_cast<A>(value);
        }
        a1[c] = call.dynamic ? moments[n * Cg + c] : beta[c];
        rstd[c] = moments[(g.B * g.G + n) * Cg + c];
    }
    for (int64_t o = 0; o < Cg; ++o) a2[o] = b3[o] + dot(w3 + o * 9 * Cg, shifted, 9 * Cg);
    softmax(a1, Cg);
    softmax(a2, Cg);
    A* kernel = own.small;
    A constant = 0;
    std::memset(kernel, 0, Cg * 9 * sizeof(A));
    for (int64_t o = 0; o < Cg; ++o) {
        add_scaled(kernel, a1[o], w3 + o * 9 * Cg, 9 * Cg);
        constant += a1[o] * b3[o] + a2[o] * beta[o];
    }
    for (int64_t c = 0; c < Cg; ++c) {
        for (int tap = 0; tap < 9; ++tap) *param_of(shared.kernel, i, c, 9, tap) = kernel[c * 9 + tap];
        *param_of(shared.kappa, i, c) = a2[c] * gamma[c] * rstd[c];
        *param_of(shared.mean, i, c) = moments[n * Cg + c];
    }
    const int64_t lanes = Lanes ? g.run : 1;
    for (int64_t lane = 0; lane < lanes; ++lane)
        shared.constant[i / g.groups_per_bundle * PS + i % g.groups_per_bundle * lanes + lane] = constant;
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::differentiate_group(int64_t i) const {
    const Layout at(Cg);
    const A area = static_cast<A>(static_cast<double>(H) * W);
    const A *a1 = shared.a1 + i * Cg, *a2 = shared.a2 + i * Cg, *rstd = shared.rstd + i * Cg;
    const A* shifted = shared.shifted + i * Cg * 9;
    A *dkernel = own.small, *dshifted = dkernel + 9 * Cg, *q = dshifted + 9 * Cg, *da1 = q + Cg, *da2 = da1 + Cg;
    A* grads = own.gradients;

    // One number per group; channels-last, all lanes of the group hold it.
    double sum = 0;
    for (int k = 0; k < size; ++k) {
        const V v = team[k]->dconstant[i / g.groups_per_bundle];
        sum += Lanes ? v[i % g.groups_per_bundle * g.run] : fold<A, 1>(v)[0];
    }
    const A dconstant = static_cast<A>(sum);
    A weighted1 = 0, weighted2 = 0;
    for (int64_t c = 0; c < Cg; ++c) {
        for (int tap = 0; tap < 9; ++tap)
            dkernel[c * 9 + tap] = static_cast<A>(sum_of(&Private<A>::dkernel, i, c, 9, tap));
        q[c] = static_cast<A>(exact_sum_of(&Private<A>::correlation, i, c));
    }
    for (int64_t c = 0; c < Cg; ++c) {
        da1[c] = dot(w3 + c * 9 * Cg, dkernel, 9 * Cg) + b3[c] * dconstant;
        da2[c] = gamma[c] * rstd[c] * q[c] + beta[c] * dconstant;
        weighted1 += a1[c] * da1[c];
        weighted2 += a2[c] * da2[c];
        grads[at.gamma + c] += a2[c] * rstd[c] * q[c];
        grads[at.beta + c] += a2[c] * dconstant;
        grads[at.a1 + c] += da1[c];
    }
    std::memset(dshifted, 0, 9 * Cg * sizeof(A));
    for (int64_t o = 0; o < Cg; ++o) {
        const A dm2 = a2[o] * (da2[o] - weighted2);
        grads[at.b3 + o] += a1[o] * dconstant + dm2;
        add_scaled(grads + at.w3 + o * 9 * Cg, a1[o], dkernel, 9 * Cg);
        add_scaled(grads + at.w3 + o * 9 * Cg, dm2, shifted, 9 * Cg);
        add_scaled(dshifted, dm2 / area, w3 + o * 9 * Cg, 9 * Cg);
    }

    // Backward through the normalisation to the gated channels, then to the gates.
    for (int64_t c = 0; c < Cg; ++c) {
        const A kappa = *param_of(shared.kappa, i, c);
        const A alpha = -kappa * rstd[c] * rstd[c] * q[c] / area;
        const A dmean = call.dynamic ? a1[c] * (da1[c] - weighted1) : 0;
        const A offset = (dmean - kappa * dconstant) / area;
        *param_of(shared.alpha, i, c) = alpha;
        *param_of(shared.offset, i, c) = offset;
        A* dgate = own.dgates + c * padded_positions(positions);
        const auto combine = [&](A* to, int64_t n, int64_t step, const A* p, const A* e, const A* f,
                                 const A* gate) {
            for (int64_t k = 0; k < n; ++k, p += step, e += step, f += step, gate += step)
                to[k] = (kappa * *p + alpha * *e + offset * *f) * *gate * (1 - *gate);
        };
        combine(dgate, H, PS, rows_of(shared.rows[0], i, c), rows_of(shared.rows[1], i, c),
                rows_of(shared.rows[2], i, c), rows_of(shared.row_gate, i, c));
        const auto& columns = team[0]->columns;
        combine(dgate + H, W, kStep, columns_of(columns[0], i, c), columns_of(columns[1], i, c),
                columns_of(columns[2], i, c), columns_of(shared.column_gate, i, c));
    }
    const int64_t pitch = padded_positions(positions);
    for (int64_t c = 0; c < Cg; ++c)
        std::memcpy(own.means + c * pitch, means_of(i) + c * positions, positions * sizeof(A));
    add_products(grads + at.w1, own.dgates, own.means, Cg, Cg, pitch);
    for (int64_t o = 0; o < Cg; ++o) {
        V sum = {};
        for (int64_t p = 0; p < pitch; p += L) sum += load<V>(own.dgates + o * pitch + p);
        grads[at.b1 + o] += fold<A, 1>(sum)[0];
    }

    // Terms of the input's gradient that are constant along a row or a column, or belong to a corner.
    multiply(own.gates, w1, 1, Cg, own.dgates, Cg, Cg, pitch);
    for (int64_t c = 0; c < Cg; ++c) {
        const A* dmean = own.gates + c * pitch;
        const A* ds = dshifted + c * 9;
        A all = 0;
        for (int tap = 0; tap < 9; ++tap) all += ds[tap];
        A *rows = rows_of(shared.rows[0], i, c), *columns = columns_of(team[0]->columns[0], i, c);
        for (int64_t h = 0; h < H; ++h) rows[h * PS] = dmean[h] / W + all;
        for (int64_t w = 0; w < W; ++w) columns[w * kStep] = dmean[H + w] / H;
        rows[0] -= ds[6] + ds[7] + ds[8];
        rows[(H - 1) * PS] -= ds[0] + ds[1] + ds[2];
        columns[0] -= ds[2] + ds[5] + ds[8];
        columns[(W - 1) * kStep] -= ds[0] + ds[3] + ds[6];
        const int taps[4] = {8, 6, 2, 0};
        for (int corner = 0; corner < 4; ++corner) *param_of(shared.corners, i, c, 4, corner) = ds[taps[corner]];
    }
}

}  // namespace
