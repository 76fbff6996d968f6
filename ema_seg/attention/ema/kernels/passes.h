// Passes over an item's rows: means, moments, weights and output; sums and gradient of the input.

#pragma once

#include "worker.h"

namespace {

template <class A, bool Lanes>
inline void Worker<A, Lanes>::add_means() {
    std::memset(own.columns[0], 0, item.slices * g.vectors * L * sizeof(A));
    clear_rows(shared.rows[0]);
    for (int64_t i = 0; i < tiling.panels; ++i) {
        panel(i);
        begin(x, top);
        for_rows([&](int64_t s, int64_t h, auto rows) { add_means<rows()>(s, h); });
    }
}

template <class A, bool Lanes>
template <int R>
inline void Worker<A, Lanes>::add_means(int64_t s, int64_t h) const {
    A* column = own.columns[0] + (s * g.vectors + first) * L;
    const A* row[R];
    for (int r = 0; r < R; ++r) row[r] = input(h + r, s);
    V sums[kRows] = {};
    const int64_t count = last - first, step = input_step();
    for (int64_t v = 0; v < count; ++v) {
        V sum = {};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            V value = load<V>(row[r] + v * step);
            keep(value);
            sums[r] += value;
            sum += value;
        }
        store(column + v * L, load<V>(column + v * L) + sum);
    }
    add_rows(shared.rows[0], s, h, sums);
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::add_moments() {
    std::memset(own.moments, 0, item.slices * 4 * sizeof(V));
    for (int64_t i = 0; i < tiling.panels; ++i) {
        panel(i);
        begin(x, top);
        for_rows([&](int64_t s, int64_t h, auto rows) { add_moments<rows()>(s, h); });
    }
}

template <class A, bool Lanes>
template <int R>
inline void Worker<A, Lanes>::add_moments(int64_t s, int64_t h) {
    const A* column_gate = shared.column_gate + (s * g.vectors + first) * L;
    const V shift = param(shared.shift + s * PS);
    const A* row[R];
    V row_gate[R], sums[R] = {}, squares[R] = {};
    for (int r = 0; r < R; ++r) {
        row[r] = input(h + r, s);
        row_gate[r] = param(row_of(shared.row_gate, s, h + r));
    }
    const int64_t step = input_step();
    const auto add = [&](int64_t v, IV mask) {
        V gate = load<V>(column_gate + v * L);
        keep(gate);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const V d = gated(load<V>(row[r] + v * step), gate, row_gate[r]) - shift;
            const V kept = bits<V>(bits<IV>(d) & mask);
            sums[r] += kept;
            squares[r] += kept * kept;
        }
    };
    const bool cut = g.tail < L && last == g.vectors;
    const int64_t end = last - first - cut;
    for (int64_t v = 0; v < end; ++v) add(v, ~IV{});
    if (cut) add(end, in_last);
    for (int r = 0; r < R; ++r) {
        add_exactly(own.moments + 4 * s, sums[r]);
        add_exactly(own.moments + 4 * s + 2, squares[r]);
    }
}

template <class A, bool Lanes>
template <bool Backward>
inline void Worker<A, Lanes>::weigh(int64_t h, int64_t begin, int64_t end) {
    fill(x, call.x, h + kRows + 1);
    if (Backward) fill(dy, call.dy, h + kRows);
    for (int64_t b = 0; b < item.bundles; ++b) {
        const int64_t s = b * g.slices_per_bundle;
        mix<Backward, true>(s, h, begin, end);
        for (int64_t i = 1; i < g.slices_per_bundle; ++i) mix<Backward, false>(s + i, h, begin, end);
        if constexpr (Lanes) {
            switch (g.run) {
                case 1: activate<Backward, 1>(b, h, begin, end); break;
                case 2: activate<Backward, min_lane(2)>(b, h, begin, end); break;
                case 4: activate<Backward, min_lane(4)>(b, h, begin, end); break;
                case 8: activate<Backward, min_lane(8)>(b, h, begin, end); break;
                default: activate<Backward, min_lane(16)>(b, h, begin, end);
            }
        } else {
            activate<Backward, 1>(b, h, begin, end);
        }
    }
}

template <class A, bool Lanes>
template <bool Backward, bool First>
inline void Worker<A, Lanes>::mix(int64_t s, int64_t h, int64_t begin, int64_t end) {
    const A *row[kRows + 2], *dy_row[kRows];
    for (int i = 0; i < kRows + 2; ++i) row[i] = x.row(h - 1 + i) + s * stride + (begin - first) * L;
    if (Backward)
        for (int r = 0; r < kRows; ++r) dy_row[r] = dy.row(h + r) + s * stride + (begin - first) * L;
    const A* column_gate = shared.column_gate + (s * g.vectors + begin) * L;
    V kernel[9], gate[kRows];
    for (int i = 0; i < 9; ++i) kernel[i] = param(shared.kernel + (s * 9 + i) * PS);
    const V kappa = param(shared.kappa + s * PS);
    const V mean = param(shared.mean + s * PS);
    for (int r = 0; r < kRows; ++r) gate[r] = param(row_of(shared.row_gate, s, h + r));
    const int64_t size = (end - begin) * L;
    A *logits[kRows], *products[kRows];
    for (int r = 0; r < kRows; ++r) {
        logits[r] = own.logit + r * logit_stride();
        products[r] = own.product + r * logit_stride();
    }
    for (int64_t at = 0; at < size; at += L) {
        V logit[kRows], product[kRows];
        for (int r = 0; r < kRows; ++r) {
            logit[r] = First ? V{} : load<V>(logits[r] + at);
            if (Backward) product[r] = First ? V{} : load<V>(products[r] + at);
        }
        V column = load<V>(column_gate + at);
        keep(column);
        for_taps(row, at, [&](int r, int tap, const Three& read) {
            const V* weight = kernel + 3 * tap;
            logit[r] += read.left * weight[0];
            logit[r] += read.mid * weight[1];
            logit[r] += read.right * weight[2];
            if (tap == 1) {
                logit[r] += (gated(read.mid, column, gate[r]) - mean) * kappa;
                if (Backward) product[r] += read.mid * load<V>(dy_row[r] + at);
            }
        });
        for (int r = 0; r < kRows; ++r) {
            store(logits[r] + at, logit[r]);
            if (Backward) store(products[r] + at, product[r]);
        }
    }
}

template <class A, bool Lanes>
template <bool Backward, int N>
inline void Worker<A, Lanes>::activate(int64_t b, int64_t h, int64_t begin, int64_t end) {
    const V constant = param(shared.constant + b * PS);
    for (int r = 0; r < kRows; ++r) {
        A* logit = own.logit + r * logit_stride();
        A* product = own.product + r * logit_stride();
        A* to = weights.row(h + r) + b * stride + (begin - first) * L;
        A* dto = Backward ? dlogit.row(h + r) + b * stride + (begin - first) * L : nullptr;
        for (int64_t v = 0; v < end - begin; v += N) {
            V runs[N], druns[N];
            const int64_t count = min(N, end - begin - v);
            for (int i = 0; i < N; ++i) {
                runs[i] = i < count ? load<V>(logit + (v + i) * L) : V{};
                if (Backward) druns[i] = i < count ? load<V>(product + (v + i) * L) : V{};
            }
            const V weight = sigmoid<A>(sum_runs<A, N>(runs) + constant);
            store_runs<N>(to + v * L, weight, count, std::make_integer_sequence<int, N>());
            if constexpr (Backward) {
                V d = sum_runs<A, N>(druns) * weight * ((V{} + 1) - weight);
                if (!Lanes && v + begin == g.vectors - 1) d = bits<V>(bits<IV>(d) & in_last);
                store_runs<N>(dto + v * L, d, count, std::make_integer_sequence<int, N>());
            }
        }
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::write_output() {
    for (int64_t i = 0; i < tiling.panels; ++i) {
        panel(i);
        begin(x, top - 1);
        for (int64_t h = top; h < bottom; h += kRows) {
            weigh<false>(h, first, last);
            for (int64_t r = h; r < min(h + kRows, bottom); ++r)
                format.write(g, item, call.out, r, first, last, x.row(r), weights.row(r), stride);
        }
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::add_sums() {
    for (A* columns : own.columns) std::memset(columns, 0, item.slices * g.vectors * L * sizeof(A));
    for (A* rows : shared.rows) clear_rows(rows);
    std::memset(own.dkernel, 0, item.slices * 9 * sizeof(V));
    std::memset(own.correlation, 0, item.slices * 2 * sizeof(V));
    std::memset(own.dconstant, 0, item.bundles * sizeof(V));
    for (int64_t i = 0; i < tiling.panels; ++i) {
        panel(i);
        begin(x, top - 1);
        begin(dy, top);
        for (int64_t h = top; h < bottom; h += kRows) {
            weigh<true>(h, first, last);
            for (int64_t b = 0; b < item.bundles; ++b) {
                add_constant(b, h);
                for (int64_t s = b * g.slices_per_bundle; s < (b + 1) * g.slices_per_bundle; ++s) {
                    add_kernel(s, b, h);
                    add_gates(s, b, h);
                }
            }
        }
    }
    if (tiling.resident) dlogit.end = H + kRows + 1;
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::add_constant(int64_t b, int64_t h) const {
    V sum = {};
    for (int r = 0; r < kRows; ++r) {
        const A* row = dlogit.row(h + r) + b * stride;
        for (int64_t at = 0; at < (last - first) * L; at += L) sum += load<V>(row + at);
    }
    own.dconstant[b] += sum;
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::add_kernel(int64_t s, int64_t b, int64_t h) const {
    const A *row[kRows + 2], *d_row[kRows];
    for (int i = 0; i < kRows + 2; ++i) row[i] = x.row(h - 1 + i) + s * stride;
    for (int r = 0; r < kRows; ++r) d_row[r] = dlogit.row(h + r) + b * stride;
    const int64_t size = (last - first) * L;
    V sums[9] = {};
    for (int64_t at = 0; at < size; at += L) {
        V d[kRows];
        for (int r = 0; r < kRows; ++r) keep(d[r] = load<V>(d_row[r] + at));
        for_taps(row, at, [&](int r, int tap, const Three& read) {
            V* sum = sums + 3 * tap;
            sum[0] += d[r] * read.left;
            sum[1] += d[r] * read.mid;
            sum[2] += d[r] * read.right;
        });
    }
    for (int i = 0; i < 9; ++i) own.dkernel[9 * s + i] += sums[i];
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::add_gates(int64_t s, int64_t b, int64_t h) const {
    const A *row[kRows], *d_row[kRows];
    V row_gate[kRows], p[kRows] = {}, e[kRows] = {}, f[kRows] = {}, q[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
        row[r] = x.row(h + r) + s * stride;
        d_row[r] = dlogit.row(h + r) + b * stride;
        row_gate[r] = param(row_of(shared.row_gate, s, h + r));
    }
    const V mean = param(shared.mean + s * PS);
    const int64_t offset = (s * g.vectors + first) * L;
    const A* gates = shared.column_gate + offset;
    A *pw = own.columns[0] + offset, *ew = own.columns[1] + offset, *fw = own.columns[2] + offset;
    const int64_t size = (last - first) * L;
    for (int64_t at = 0; at < size; at += L) {
        V column_gate = load<V>(gates + at);
        keep(column_gate);
        V column_p = load<V>(pw + at), column_e = load<V>(ew + at), column_f = load<V>(fw + at);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            V v = load<V>(row[r] + at), d = load<V>(d_row[r] + at);
            keep(v), keep(d);
            const V by_column = v * column_gate, by_row = v * row_gate[r];
            const V centred = gated(v, column_gate, row_gate[r]) - mean;
            q[r] += d * centred;
            p[r] += d * by_column;
            e[r] += centred * by_column;
            f[r] += by_column;
            column_p += d * by_row;
            column_e += centred * by_row;
            column_f += by_row;
        }
        store(pw + at, column_p);
        store(ew + at, column_e);
        store(fw + at, column_f);
    }
    for (int r = 0; r < kRows; ++r) add_exactly(own.correlation + 2 * s, q[r]);
    add_rows(shared.rows[0], s, h, p);
    add_rows(shared.rows[1], s, h, e);
    add_rows(shared.rows[2], s, h, f);
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::write_input_gradient() {
    for (int64_t i = 0; i < tiling.panels; ++i) {
        panel(i);
        begin(x, top - 2);
        begin(dy, top - 1);
        begin(dlogit, top - 1);
        for (int64_t h = top; h < bottom; h += kRows) {
            while (dlogit.end <= h + kRows) {
                weigh_with_margins(dlogit.end);
                dlogit.end += kRows;
            }
            for (int64_t s = 0; s < item.slices; ++s) differentiate(s, h);
            for (int64_t r = h; r < min(h + kRows, bottom); ++r) {
                if (r == 0 || r == H - 1) add_corners(r);
                format.write(g, item, call.out, r, first, last, dy.row(r), nullptr, stride);
            }
        }
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::weigh_with_margins(int64_t h) {
    const int64_t margin = tiling.panels == 1 ? 0 : 1;
    weigh<true>(h, max(first - margin, 0), min(last + margin, g.vectors));
    if (!margin) return;
    for (int r = 0; r < kRows; ++r) {
        for (int64_t b = 0; b < item.bundles; ++b) {
            A* row = dlogit.row(h + r) + b * stride;
            if (first == 0) store(row - L, V{});
            if (last == g.vectors) store(row + (last - first) * L, V{});
        }
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::differentiate(int64_t s, int64_t h) const {
    const int64_t b = s / g.slices_per_bundle;
    const A *x_row[kRows], *weight_row[kRows], *d_row[kRows + 2];
    A* row[kRows];
    for (int i = 0; i < kRows + 2; ++i) d_row[i] = dlogit.row(h - 1 + i) + b * stride;
    V row_gate[kRows], row_term[kRows], kernel[9];
    for (int r = 0; r < kRows; ++r) {
        x_row[r] = x.row(h + r) + s * stride;
        weight_row[r] = weights.row(h + r) + b * stride;
        row[r] = dy.row(h + r) + s * stride;
        row_gate[r] = param(row_of(shared.row_gate, s, h + r));
        row_term[r] = param(row_of(shared.rows[0], s, h + r));
    }
    for (int i = 0; i < 9; ++i) kernel[i] = param(shared.kernel + (s * 9 + i) * PS);
    const V kappa = param(shared.kappa + s * PS), alpha = param(shared.alpha + s * PS);
    const V mean = param(shared.mean + s * PS), offset = param(shared.offset + s * PS);
    const A* column_gates = shared.column_gate + (s * g.vectors + first) * L;
    const A* column_terms = team[0]->columns[0] + (s * g.vectors + first) * L;
    const int64_t size = (last - first) * L;
    for (int64_t at = 0; at < size; at += L) {
        V column_gate = load<V>(column_gates + at), column_term = load<V>(column_terms + at);
        keep(column_gate), keep(column_term);
        V sum[kRows], d[kRows];
        for (int r = 0; r < kRows; ++r) sum[r] = column_term + row_term[r];
        for_taps(d_row, at, [&](int r, int tap, const Three& read) {
            const V* weight = kernel + 3 * (2 - tap);  // the convolution's transpose
            sum[r] += read.right * weight[0];
            sum[r] += read.mid * weight[1];
            sum[r] += read.left * weight[2];
            if (tap == 1) d[r] = read.mid;
        });
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const V gate = column_gate * row_gate[r];
            const V centred = gated(load<V>(x_row[r] + at), column_gate, row_gate[r]) - mean;
            const V du = d[r] * kappa + (centred * alpha + offset);
            sum[r] += gate * du;
            sum[r] += load<V>(row[r] + at) * load<V>(weight_row[r] + at);
            store(row[r] + at, sum[r]);
        }
    }
}

template <class A, bool Lanes>
inline void Worker<A, Lanes>::add_corners(int64_t h) const {
    for (int64_t s = 0; s < item.slices; ++s) {
        for (int corner = 0; corner < 4; ++corner) {
            const int64_t w = corner % 2 ? W - 1 : 0;
            const int64_t vector = Lanes ? w : w / L;
            if (h != (corner < 2 ? 0 : H - 1) || vector < first || vector >= last) continue;
            A* at = dy.row(h) + s * stride + (w - first * (Lanes ? 1 : L)) * kStep;
            for (int j = 0; j < PS; ++j) at[j] += shared.corners[(s * 4 + corner) * PS + j];
        }
    }
}

}  // namespace
