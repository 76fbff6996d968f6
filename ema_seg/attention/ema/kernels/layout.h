// Memory layout of an item's channels; reading and writing of its rows.
//
// Channels-last, for float32 with vectors of L = 16 lanes and groups of Cg = 4 channels:
//
//   channel    0 …  3   4 …  7   8 … 11  12 … 15 | 16 … 19  20 … 23  24 … 27  28 … 31 | …
//   group         0        1        2        3   |    4        5        6        7    | …
//   slice      `-------------- 0 --------------´   `-------------- 1 --------------´
//   bundle     `-------------- 0 --------------´   `-------------- 1 --------------´
//   item       `------------------- up to 32 slices of one image ------------------- …
//
// A group has `run` lanes, the power of two from Cg on; for Cg = 3 the fourth lane stays zero. Groups of more than L
// channels are bundles of several slices.
//
// Contiguous, a group is a bundle and an item, and each of its channels is a slice:
//
//               vector 0    vector 1    …   last vector
//             +-----------+-----------+- - -+------+
//   row 0     | L columns | L columns |     | tail | ⎫
//     …       |           |           |     |      | ⎬ band of member 0 of the team
//             +-----------+-----------+- - -+------+
//             |           |           |     |      | ⎫
//     …       |           |           |     |      | ⎬ band of member 1
//   row H - 1 |           |           |     |      | ⎭
//             +-----------+-----------+- - -+------+
//             `------- panel 0 ------´ `- panel 1 -´

#pragma once

#include <cstddef>

#include "formats.h"

namespace {

constexpr int64_t kMaxSlices = 32;  // of a channels-last item

// Arguments of a call, as packed by cpp.py: integers and addresses of 8 bytes each.
struct Call {
    int64_t batch, channels, height, width, groups, dtype, channels_last, dynamic, threads;
    double eps;
    const void *x, *dy;
    void *out, *means, *moments;
    const void *w1, *b1, *w3, *b3, *gamma, *beta;
    void *dw1, *db1, *dw3, *db3, *dgamma, *dbeta;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Unit of work: consecutive bundles of an image, from `group` on.
struct Item {
    int64_t image, group, groups, bundles, slices;
};

// Sizes shared by all items.
template <class A, bool Lanes>
struct Geometry {
    static constexpr int L = Simd<A>::L;

    int64_t B, C, H, W, G, Cg;
    int64_t vectors;            // in a row of a slice
    int64_t tail;               // columns in the last of them
    int run;                    // lanes of a group: a power of two >= Cg, or all
    int64_t groups_per_bundle;  // one, unless a vector holds several
    int64_t slices_per_bundle;
    int64_t bundles_per_item, items_per_image;
    // For groups with unused lanes: each lane's index in memory, the mask of the used lanes, and the inverse of the index.
    typename Simd<A>::IV spread, taken, dense;

    explicit Geometry(const Call& call)
        : B(call.batch), C(call.channels), H(call.height), W(call.width), G(call.groups), Cg(C / G) {
        vectors = Lanes ? W : ceil_div(W, L);
        tail = Lanes ? L : W - (vectors - 1) * L;
        run = 1;
        while (run < Cg && run < L) run *= 2;
        groups_per_bundle = Lanes ? L / run : 1;
        slices_per_bundle = Lanes ? ceil_div(Cg, L) : Cg;
        const int64_t bundles = ceil_div(G, groups_per_bundle);
        const int64_t most = Lanes ? max(1, kMaxSlices / slices_per_bundle) : 1;
        items_per_image = ceil_div(bundles, most);
        bundles_per_item = ceil_div(bundles, items_per_image);
        items_per_image = ceil_div(bundles, bundles_per_item);
        for (int j = 0; j < L; ++j) {
            taken[j] = j % run < Cg ? -1 : 0;
            spread[j] = taken[j] ? j / run * Cg + j % run : 0;
            dense[j] = j < L / run * Cg ? j / Cg * run + j % Cg : 0;
        }
    }
    int64_t offset(int64_t image, int64_t channel, int64_t row, int64_t column) const {
        return Lanes ? ((image * H + row) * W + column) * C + channel : ((image * C + channel) * H + row) * W + column;
    }
    int64_t items() const { return B * items_per_image; }
    int64_t slices_per_item() const { return bundles_per_item * slices_per_bundle; }
    int64_t groups_per_item() const { return bundles_per_item * groups_per_bundle; }
    bool packed() const { return run == Cg || slices_per_bundle > 1; }  // a slice's channels are neighbours in memory
    // Number of an item's leading slices whose L channels are consecutive in memory.
    int64_t whole_slices(const Item& item) const {
        return run == Cg || Cg % L == 0 ? item.groups * Cg / L : 0;
    }
};

template <class A, bool Lanes>
Item item_of(const Geometry<A, Lanes>& geometry, int64_t index) {
    Item item;
    item.image = index / geometry.items_per_image;
    const int64_t first = index % geometry.items_per_image * geometry.bundles_per_item;
    item.group = first * geometry.groups_per_bundle;
    item.groups = min(geometry.groups_per_item(), geometry.G - item.group);
    item.bundles = ceil_div(item.groups, geometry.groups_per_bundle);
    item.slices = item.bundles * geometry.slices_per_bundle;
    return item;
}

// Functions that read and write rows of an item in the tensors' dtype.
template <class A, bool Lanes>
struct Format {
    // Read vectors [begin, end) of a row; vector `begin` of the first slice goes to `to`.
    void (*read)(const Geometry<A, Lanes>&, const Item&, const void*, int64_t row, int64_t begin, int64_t end, A* to,
                 int64_t slice_stride);
    // Write them, multiplied by `weights` (one row per bundle) unless these are null.
    void (*write)(const Geometry<A, Lanes>&, const Item&, void*, int64_t row, int64_t begin, int64_t end, const A* from,
                  const A* weights, int64_t slice_stride);
    A (*at)(const Geometry<A, Lanes>&, const void*, int64_t image, int64_t channel, int64_t row, int64_t column);
    size_t size;  // of a number in memory
};

// First channel of a slice, relative to the item's first, and number of its channels.
struct Span {
    int64_t channel, count;
};

template <class A>
inline Span span_of(const Geometry<A, true>& geometry, const Item& item, int64_t slice) {
    if (geometry.slices_per_bundle == 1) {
        const int64_t group = slice * geometry.groups_per_bundle;
        return {group * geometry.Cg, min(geometry.groups_per_bundle, item.groups - group) * geometry.Cg};
    }
    const int64_t part = slice % geometry.slices_per_bundle * geometry.L;
    return {slice / geometry.slices_per_bundle * geometry.Cg + part, min(geometry.L, geometry.Cg - part)};
}

template <class T, bool Lanes>
struct Rows {
    using A = typename Stored<T>::A;
    using V = typename Simd<A>::V;
    static constexpr int L = Simd<A>::L;
    using Geometry = ::Geometry<A, Lanes>;

    static A at(const Geometry& g, const void* tensor, int64_t image, int64_t channel, int64_t row, int64_t column) {
        return read_some(static_cast<const T*>(tensor) + g.offset(image, channel, row, column), 1)[0];
    }

    static void read(const Geometry& g, const Item& item, const void* tensor, int64_t row, int64_t begin, int64_t end,
                     A* to, int64_t stride) {
        const T* base = static_cast<const T*>(tensor);
        const bool outside = row < 0 || row >= g.H;
        const int64_t first = outside ? end : max(begin, 0), last = outside ? end : min(end, g.vectors);
        for (int64_t s = 0; s < item.slices; ++s) {
            for (int64_t v = begin; v < first; ++v) store(to + s * stride + (v - begin) * L, V{});
            for (int64_t v = last; v < end; ++v) store(to + s * stride + (v - begin) * L, V{});
        }
        if (first >= last) return;
        to += (first - begin) * L;
        if constexpr (Lanes) {
            const int64_t slices = item.slices, whole = g.whole_slices(item), pitch = g.W * g.C;
            const T* from = base + g.offset(item.image, item.group * g.Cg, row, first);
            for (int64_t w = first; w < last; ++w, from += g.C, to += L) {
                int64_t s = 0;
                for (; s < whole; ++s) {
                    prefetch(from + s * L + pitch);  // of the next row
                    store(to + s * stride, Stored<T>::read(from + s * L));
                }
                for (; s < slices; ++s) {
                    const Span span = span_of(g, item, s);
                    store(to + s * stride, gather(g, from + span.channel, span.count));
                }
            }
        } else {
            for (int64_t s = 0; s < item.slices; ++s) {
                const T* from = base + g.offset(item.image, item.group * g.Cg + s, row, first * L);
                A* target = to + s * stride;
                const int64_t whole = last == g.vectors && g.tail < L ? last - 1 : last;
                int64_t v = first;
                for (; v < whole; ++v, from += L, target += L) {
                    prefetch(from + g.W);  // of the next row
                    store(target, Stored<T>::read(from));
                }
                for (; v < last; ++v) store(target, read_some(from, static_cast<int>(g.tail)));
            }
        }
    }

    static void write(const Geometry& g, const Item& item, void* tensor, int64_t row, int64_t begin, int64_t end,
                      const A* from, const A* weights, int64_t stride) {
        T* base = static_cast<T*>(tensor);
        const int64_t spb = g.slices_per_bundle;
        const auto value = [&](int64_t s, int64_t at) {
            const V v = load<V>(from + s * stride + at);
            const int64_t bundle = !Lanes ? 0 : spb == 1 ? s : s / spb;
            return weights ? v * load<V>(weights + bundle * stride + at) : v;
        };
        if constexpr (Lanes) {
            const int64_t slices = item.slices, whole = g.whole_slices(item);
            T* to = base + g.offset(item.image, item.group * g.Cg, row, begin);
            for (int64_t w = begin; w < end; ++w, to += g.C) {
                const int64_t at = (w - begin) * L;
                int64_t s = 0;
                for (; s < whole; ++s) Stored<T>::write(to + s * L, value(s, at));
                for (; s < slices; ++s) {
                    const Span span = span_of(g, item, s);
                    scatter(g, to + span.channel, value(s, at), span.count);
                }
            }
        } else {
            for (int64_t s = 0; s < item.slices; ++s) {
                T* to = base + g.offset(item.image, item.group * g.Cg + s, row, begin * L);
                const int64_t whole = end == g.vectors && g.tail < L ? end - 1 : end;
                int64_t v = begin;
                for (; v < whole; ++v, to += L) Stored<T>::write(to, value(s, (v - begin) * L));
                for (; v < end; ++v) write_some(to, value(s, (v - begin) * L), static_cast<int>(g.tail));
            }
        }
    }

    // Read or write a slice with fewer than L channels or with unused lanes between its groups.
    static V gather(const Geometry& g, const T* from, int64_t count) {
        const V v = read_some(from, static_cast<int>(count));
        if (g.packed()) return v;
        return bits<V>(bits<typename Simd<A>::IV>(permute<A>(v, g.spread)) & g.taken);
    }
    static void scatter(const Geometry& g, T* to, V v, int64_t count) {
        write_some(to, g.packed() ? v : permute<A>(v, g.dense), static_cast<int>(count));
    }
};

}  // namespace
