// Member of a team of threads that work on an item: buffers, and accessors of parameters and sums.
//
// Rows are widened as they are read, into buffers that stay in the cache. A buffer holds the whole item if that fits,
// else a ring of a few rows of a panel of columns.

#pragma once

#include "layout.h"

namespace {

constexpr int kRows = 4;           // rows computed together: each row that is read serves three of them
constexpr int kRing = 2 * kRows;   // rows in a ring
constexpr int64_t kMargin = 2;     // vectors that neighbouring panels share, on each side

// Allocator of aligned parts of a block of memory; without a block it only counts bytes.
struct Arena {
    char* base = nullptr;
    size_t used = 0;

    template <class U>
    U* take(int64_t count) {
        used = (used + 127) & ~size_t{127};
        char* part = base ? base + used : nullptr;
        used += static_cast<size_t>(count) * sizeof(U);
        return reinterpret_cast<U*>(part);
    }
};

// Consecutive rows of the slices (or bundles) of a panel: a ring, or all of them.
template <class A>
struct Buffer {
    A* data;  // vector 0 of the panel in the first slice of slot 0
    int64_t row_stride;
    int64_t mask;  // slots - 1 in a ring
    int64_t end;   // rows up to here are filled

    A* row(int64_t h) const { return data + ((h + 2) & mask) * row_stride; }
};

// Division of an item that fits the caches.
struct Tiling {
    bool resident;    // all rows stay in the buffers
    int64_t panels;   // of columns
    int64_t width;    // vectors in a panel
    int64_t margin;   // vectors left and right of it that are computed as well
    int64_t stride;   // vectors from slice to slice
    int64_t slots;    // rows in a buffer
};

// Coefficients of the current item, shared by a team: a number (contiguous) or a vector (channels-last) per slice, but
// vectors for values by column.
template <class A>
struct Shared {
    A *row_gate, *column_gate;
    A* rows[3];
    A *kernel, *kappa, *mean, *shift, *alpha, *offset, *corners, *constant;
    A *a1, *a2, *rstd, *shifted;  // by group and channel
};

// Buffers and sums of one thread.
template <class A>
struct Private {
    using V = typename Simd<A>::V;
    A* columns[3];
    V *moments, *dkernel, *correlation, *dconstant;
    A *x, *dy, *weights, *dlogit;  // memory of the buffers
    A *logit, *product;
    A *means, *gates, *dgates, *small;  // the first three by channel and position, padded with zeros
    A* gradients;
};

template <class A, bool Lanes>
struct Worker {
    using V = typename Simd<A>::V;
    using IV = typename Simd<A>::IV;
    static constexpr int L = Simd<A>::L;
    static constexpr int PS = Lanes ? L : 1;         // numbers per parameter of a slice
    static constexpr int64_t kStep = Lanes ? L : 1;  // numbers from column to column
    using Lane = std::make_integer_sequence<int, L>;

    const Call& call;
    const Geometry<A, Lanes>& g;
    const Format<A, Lanes>& format;
    const Tiling& tiling;
    const Shared<A>& shared;
    const Private<A>* const* team;  // of `size` members
    const int rank, size;
    const Private<A>& own;

    const A *w1, *b1, *w3, *b3, *gamma, *beta;
    A *means, *moments;
    int64_t Cg, H, W, positions, padded_rows, stride;
    Item item;
    int64_t top, bottom;    // this member's band of rows
    int64_t first, last;    // vectors of the panel
    IV in_last;             // lanes of the last vector that are columns of the image
    Buffer<A> x, dy, weights, dlogit;

    Worker(const Call& call, const Geometry<A, Lanes>& g, const Format<A, Lanes>& format, const Tiling& tiling,
           const Shared<A>& shared, const Private<A>* const* team, int rank, int size)
        : call(call), g(g), format(format), tiling(tiling), shared(shared), team(team), rank(rank), size(size),
          own(*team[rank]) {
        w1 = static_cast<const A*>(call.w1);
        b1 = static_cast<const A*>(call.b1);
        w3 = static_cast<const A*>(call.w3);
        b3 = static_cast<const A*>(call.b3);
        gamma = static_cast<const A*>(call.gamma);
        beta = static_cast<const A*>(call.beta);
        means = static_cast<A*>(call.means);
        moments = static_cast<A*>(call.moments);
        Cg = g.Cg;
        H = g.H;
        W = g.W;
        positions = H + W;
        padded_rows = padded(H);
        stride = tiling.stride * L;
        const int64_t share = ceil_div(ceil_div(H, size), kRows) * kRows;
        top = min(rank * share, H);
        bottom = min(top + share, H);
        for (int j = 0; j < L; ++j) in_last[j] = j < g.tail ? -1 : 0;
        const int64_t slices = g.slices_per_item(), bundles = g.bundles_per_item;
        x = buffer(own.x, slices);
        dy = buffer(own.dy, slices);
        weights = buffer(own.weights, bundles);
        dlogit = buffer(own.dlogit, bundles);
    }

    static int64_t padded(int64_t H) { return H + 4 * kRows; }  // kRows before, the rest behind

    Buffer<A> buffer(A* memory, int64_t slices) const {
        if (!memory) return {};
        const int64_t row = slices * stride;
        if (tiling.panels == 1) {  // nothing is ever written to the zeros left and right
            for (int64_t i = 0; i < tiling.slots * slices; ++i) store(memory + i * stride, V{});
            store(memory + tiling.slots * row, V{});
        }
        return {memory + tiling.margin * L, row, tiling.resident ? ~int64_t{0} : tiling.slots - 1, 0};
    }

    void barrier() const {
        if (size > 1) {
#pragma omp barrier
        }
    }

    // ------------------------------------------------------------------------------ access to parameters and sums

    static V param(const A* value) {
        if constexpr (Lanes) {
            return load<V>(value);
        } else {
            return *value - V{};
        }
    }

    // Slice and lane of channel c of group i of the item.
    int64_t slice_of(int64_t i, int64_t c) const {
        if constexpr (!Lanes) return i * Cg + c;
        return g.slices_per_bundle == 1 ? i / g.groups_per_bundle : i * g.slices_per_bundle + c / L;
    }

    int64_t lane_of(int64_t i, int64_t c) const {
        if constexpr (!Lanes) return 0;
        return g.slices_per_bundle == 1 ? i % g.groups_per_bundle * g.run + c : c % L;
    }

    A* param_of(A* values, int64_t i, int64_t c, int64_t count = 1, int64_t index = 0) const {
        return values + (slice_of(i, c) * count + index) * PS + lane_of(i, c);
    }

    A* row_of(A* rows, int64_t slice, int64_t h) const { return rows + (slice * padded_rows + kRows + h) * PS; }
    A* rows_of(A* rows, int64_t i, int64_t c) const { return row_of(rows, slice_of(i, c), 0) + lane_of(i, c); }
    A* columns_of(A* columns, int64_t i, int64_t c) const {
        return columns + slice_of(i, c) * g.vectors * L + lane_of(i, c);
    }

    // Sum over all threads of channel c in `values`, which holds `count` vectors per slice.
    double sum_of(V* Private<A>::*values, int64_t i, int64_t c, int64_t count = 1, int64_t index = 0) const {
        double sum = 0;
        for (int k = 0; k < size; ++k) {
            const V v = (team[k]->*values)[slice_of(i, c) * count + index];
            if constexpr (Lanes) {
                sum += v[lane_of(i, c)];
            } else {
                for (int j = 0; j < L; ++j) sum += v[j];
            }
        }
        return sum;
    }

    // The same for compensated sums.
    double exact_sum_of(V* Private<A>::*values, int64_t i, int64_t c, int64_t count = 1, int64_t index = 0) const {
        return sum_of(values, i, c, 2 * count, 2 * index) + sum_of(values, i, c, 2 * count, 2 * index + 1);
    }

    // Gate a value. Rounding the product before it is used makes a constant channel exactly equal to its mean.
    static V gated(V value, V column_gate, V row_gate) {
        V product = value * column_gate * row_gate;
        keep(product);
        return product;
    }

    struct Three {
        V left, mid, right;
    };

    // Load the vectors one column to the left, here, and one column to the right.
    static Three neighbours(const A* at) {
        V left = load<V>(at - L), mid = load<V>(at), right = load<V>(at + L);
        keep(left), keep(mid), keep(right);
        if constexpr (Lanes) return {left, mid, right};
        return {slide<A, L - 1>(left, mid, Lane()), mid, slide<A, 1>(mid, right, Lane())};
    }

    // Call `visit(r, tap, neighbours)` for rows r = 0 to 3 and the row above (tap 0), the row itself (1) and the row
    // below (2). Each row is read once.
    template <class Visit>
    static void for_taps(const A* const* rows, int64_t at, Visit visit) {
#pragma GCC unroll 6
        for (int i = 0; i < kRows + 2; ++i) {
            const Three read = neighbours(rows[i] + at);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
                if (r <= i && i <= r + 2) visit(r, i - r, read);
        }
    }

    // Add the totals of four rows of a slice.
    void add_rows(A* rows, int64_t slice, int64_t h, const V* sums) const {
        A* to = row_of(rows, slice, h);
        if constexpr (Lanes) {
            for (int r = 0; r < kRows; ++r) store(to + r * L, load<V>(to + r * L) + sums[r]);
        } else if constexpr (L >= kRows) {
            const V totals = fold<A, kRows>(sum_runs<A, kRows>(sums));
            for (int r = 0; r < kRows; ++r) to[r] += totals[r];
        } else {
            for (int r = 0; r < kRows; ++r) to[r] += fold<A, 1>(sums[r])[0];
        }
    }

    // --------------------------------------------------------------------------------------------- items and panels

    void start(int64_t index) {
        item = item_of(g, index);
        x.end = dy.end = dlogit.end = -1;
        if (tiling.resident) clear_dlogit(-1), clear_dlogit(H);
    }

    void clear_dlogit(int64_t h) const {
        if (!dlogit.data) return;
        for (int64_t b = 0; b < item.bundles; ++b)
            for (int64_t v = 0; v < g.vectors; ++v) store(dlogit.row(h) + b * stride + v * L, V{});
    }

    void panel(int64_t index) {
        first = index * tiling.width;
        last = min(first + tiling.width, g.vectors);
    }

    void begin(Buffer<A>& buffer, int64_t row) const {
        if (!tiling.resident) buffer.end = row;
    }

    void fill(Buffer<A>& buffer, const void* tensor, int64_t upto) const {
        const int64_t margin = tiling.panels == 1 ? 0 : tiling.margin;
        for (; buffer.end < upto; ++buffer.end)
            format.read(g, item, tensor, buffer.end, first - margin, last + margin, buffer.row(buffer.end) - margin * L,
                        stride);
    }

    // ------------------------------------------------------------------------------------------- passes over the rows

    // Sums without neighbours read x in place, unless the buffer must keep it or its rows need widening.
    bool direct() const {
        const bool whole = Lanes ? g.whole_slices(item) == item.slices : g.tail == L;
        return !tiling.resident && whole && format.size == sizeof(A);
    }

    const A* input(int64_t h, int64_t s) const {
        if (!direct()) return x.row(h) + s * stride;
        return static_cast<const A*>(call.x) +
               g.offset(item.image, item.group * Cg + s * (Lanes ? L : 1), h, first * (Lanes ? 1 : L));
    }

    int64_t input_step() const { return Lanes && direct() ? g.C : L; }

    // Call `work` for each slice of four rows at a time, and row by row for the rest.
    template <class Work>
    void for_rows(Work work) {
        for (int64_t h = top; h < bottom;) {
            const bool four = h + kRows <= bottom;
            if (!direct()) fill(x, call.x, h + (four ? kRows : 1));
            for (int64_t s = 0; s < item.slices; ++s) {
                if (four) {
                    work(s, h, std::integral_constant<int, kRows>());
                } else {
                    work(s, h, std::integral_constant<int, 1>());
                }
            }
            h += four ? kRows : 1;
        }
    }

    void add_means();
    template <int R>
    void add_means(int64_t s, int64_t h) const;

    // Sum (gated - shift) and its square. The shift is near the mean, so that the variance does not cancel.
    void add_moments();
    template <int R>
    void add_moments(int64_t s, int64_t h);

    // Compute the weights of rows [h, h + 4), vectors [begin, end); in the backward also the gradient of the logits.
    template <bool Backward>
    void weigh(int64_t h, int64_t begin, int64_t end);
    static constexpr int min_lane(int n) { return n < L ? n : L; }
    // Add one slice to the logits (without their constant) and, in the backward, to the sum of x * dy.
    template <bool Backward, bool First>
    void mix(int64_t s, int64_t h, int64_t begin, int64_t end);
    int64_t logit_stride() const { return (tiling.width + 2 * kMargin + L) * L; }
    // Sum over the N lanes of each group, take the sigmoid, and broadcast it to the lanes.
    template <bool Backward, int N>
    void activate(int64_t b, int64_t h, int64_t begin, int64_t end);
    template <int N, int... P>
    static void store_runs(A* to, V v, int64_t count, std::integer_sequence<int, P...>) {
        if (count == N) {
            (store(to + P * L, spread<A, N, P>(v, Lane())), ...);
        } else {
            ((P < count ? store(to + P * L, spread<A, N, P>(v, Lane())) : void()), ...);
        }
    }

    void write_output();

    // Compute all sums over the map that the backward needs.
    void add_sums();
    void clear_rows(A* rows) const {
        for (int64_t s = 0; s < item.slices; ++s)
            std::memset(row_of(rows, s, top), 0, ceil_div(bottom - top, kRows) * kRows * PS * sizeof(A));
    }

    void add_constant(int64_t b, int64_t h) const;
    void add_kernel(int64_t s, int64_t b, int64_t h) const;
    void add_gates(int64_t s, int64_t b, int64_t h) const;
    void write_input_gradient();
    void weigh_with_margins(int64_t h);

    // Replace dy by dx in the buffer, for rows [h, h + 4) of a slice.
    void differentiate(int64_t s, int64_t h) const;
    void add_corners(int64_t h) const;

    // ---------------------------------------------------------------------------------------- algebra of a group

    // Call `work` for this member's share of the item's groups, in whole bundles.
    template <class Work>
    void for_groups(Work work) const {
        for (int64_t b = rank; b < item.bundles; b += size) {
            const int64_t begin = b * g.groups_per_bundle;
            for (int64_t i = begin; i < min(begin + g.groups_per_bundle, item.groups); ++i) work(i);
        }
    }

    // Sum the members' column sums into the first member's, for this member's share of the bundles.
    void join_columns(int count) const;
    int64_t index_of(int64_t i) const { return item.image * g.G + item.group + i; }
    A* means_of(int64_t i) const { return means + index_of(i) * Cg * positions; }
    void finish_means(int64_t i) const;
    void open_gates(int64_t i) const;
    static int64_t padded_positions(int64_t positions) { return ceil_div(positions, L) * L; }
    // Estimate the gated channels' means; exact if x is a function of the row plus one of the column.
    void guess_moments(int64_t i) const;
    void finish_moments(int64_t i) const;

    // Compute the coefficients that mix the weight map from the channels.
    void mix_group(int64_t i) const;

    // Compute the gradients of the parameters and the coefficients of the input's gradient from the sums over the map.
    void differentiate_group(int64_t i) const;

    // ----------------------------------------------------------------------------------------------- the two functions

    void forward(int64_t index) {
        start(index);
        add_means();
        barrier();
        join_columns(1);
        for_groups([&](int64_t i) {
            finish_means(i);
            open_gates(i);
            guess_moments(i);
        });
        barrier();
        add_moments();
        barrier();
        for_groups([&](int64_t i) {
            finish_moments(i);
            mix_group(i);
        });
        barrier();
        write_output();
    }

    void backward(int64_t index) {
        start(index);
        for_groups([&](int64_t i) {
            open_gates(i);
            mix_group(i);
        });
        barrier();
        add_sums();
        barrier();
        join_columns(3);
        for_groups([&](int64_t i) { differentiate_group(i); });
        barrier();
        write_input_gradient();
        barrier();
    }
};

}  // namespace
