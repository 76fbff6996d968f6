// Fused CPU kernels of EMA's short form, for both memory layouts; docs/ema.md derives the formulas and the names.
//
// One template serves both layouts, because both are rows of SIMD vectors in which a slice is what shares parameters:
//
//   contiguous     a slice is one channel, a vector L neighbouring columns; the column to the right is one number away;
//   channels-last  a slice is L channels, a vector one column of them; the column to the right is one vector away.
//
// Everything else that differs between them (Lanes == true is channels-last) is how rows are read and written, whether
// a parameter of a slice is a number or a vector, and how a group's channels are summed.
//
// A bundle is the smallest whole number of slices and of groups. An item, the unit of work, is one group if contiguous
// and one image (or a range of its bundles) if channels-last. Threads share the items, or all work on the same item,
// each on a band of rows, if there are too few. Rows are widened to the dtype of the arithmetic as they are read, into
// buffers that stay in the cache: of the whole item if that fits, else rings of a few rows, of a panel of columns.
// Sums are always taken in the same order, so that results repeat for a given number of threads.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include <omp.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using std::int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kRows = 4;                        // rows computed together, so that each row read serves three of them
constexpr int kRing = 2 * kRows;                // rows in a ring
constexpr int64_t kMargin = 2;                  // vectors that neighbouring panels share, on each side
constexpr int64_t kResidentBytes = 6 << 20;     // of buffers that hold a whole item: a core's share of its caches
constexpr int64_t kPanelBytes = 512 << 10;      // of buffers that hold a few rows of a panel
constexpr int64_t kMaxSlices = 32;              // of a channels-last item

template <class A>
struct Bits;
template <>
struct Bits<float> {
    using type = int32_t;
};
template <>
struct Bits<double> {
    using type = int64_t;
};

template <class A>
struct Simd {
    static constexpr int L = kVectorBytes / sizeof(A);
    using I = typename Bits<A>::type;
    typedef A V __attribute__((vector_size(kVectorBytes)));
    typedef I IV __attribute__((vector_size(kVectorBytes)));
};

template <class V, class A>
inline V load(const A* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class A>
inline void store(A* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// Makes the compiler keep in a register what is used several times; GCC prefers to load it each time.
template <class V>
inline void keep(V& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#else
    (void)v;
#endif
}

template <class T>
inline void prefetch(const T* at) {
    __builtin_prefetch(at, 0, 2);
}

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "reinterprets");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// ------------------------------------------------------------------------------------------------------ shuffles

template <class A, int... I>
inline typename Simd<A>::V pick(typename Simd<A>::V a, typename Simd<A>::V b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, typename Simd<A>::IV{I...});
#endif
}

// Lane j takes lane index[j].
template <class A>
inline typename Simd<A>::V permute(typename Simd<A>::V v, typename Simd<A>::IV index) {
#ifdef __clang__
    typename Simd<A>::V permuted;
    for (int j = 0; j < Simd<A>::L; ++j) permuted[j] = v[index[j]];
    return permuted;
#else
    return __builtin_shuffle(v, index);
#endif
}

// L lanes from lane N on of a and b, one after the other.
template <class A, int N, int... J>
inline typename Simd<A>::V slide(typename Simd<A>::V a, typename Simd<A>::V b, std::integer_sequence<int, J...>) {
    return pick<A>(a, b, std::integer_sequence<int, (N + J)...>());
}

// Lanes j with bit D unset take a's lane j or j + D, those with it set b's lane j - D or j.
template <class A, int D, bool High, int... J>
inline typename Simd<A>::V zip(typename Simd<A>::V a, typename Simd<A>::V b, std::integer_sequence<int, J...>) {
    constexpr int L = Simd<A>::L;
    return pick<A>(a, b, std::integer_sequence<int, ((J & D) ? L + J - (High ? 0 : D) : J + (High ? D : 0))...>());
}

// Sums N vectors over each run of N lanes: lane j of the result is the sum of vector j % N over the run of lane j.
template <class A, int N>
inline typename Simd<A>::V sum_runs(const typename Simd<A>::V* v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        using Lane = std::make_integer_sequence<int, Simd<A>::L>;
        const auto a = sum_runs<A, N / 2>(v), b = sum_runs<A, N / 2>(v + N / 2);
        return zip<A, N / 2, false>(a, b, Lane()) + zip<A, N / 2, true>(a, b, Lane());
    }
}

// Adds up the runs of D lanes.
template <class A, int D>
inline typename Simd<A>::V fold(typename Simd<A>::V v) {
    using Lane = std::make_integer_sequence<int, Simd<A>::L>;
    if constexpr (D >= Simd<A>::L) {
        return v;
    } else {
        return fold<A, 2 * D>(zip<A, D, false>(v, v, Lane()) + zip<A, D, true>(v, v, Lane()));
    }
}

// Adds v to a sum of two parts, the second of which is what rounding took from the first.
template <class V>
inline void add_exactly(V* sum, V v) {
    const V t = sum[0] + v, z = t - sum[0];
    sum[1] += (sum[0] - (t - z)) + (v - z);
    sum[0] = t;
}

// Every lane takes what lane P of its run of N lanes holds.
template <class A, int N, int P, int... J>
inline typename Simd<A>::V spread(typename Simd<A>::V v, std::integer_sequence<int, J...>) {
    return pick<A>(v, v, std::integer_sequence<int, ((J & ~(N - 1)) | P)...>());
}

// ------------------------------------------------------------------------------------------------------- sigmoid

template <class A>
inline typename Simd<A>::V sigmoid(typename Simd<A>::V x) {
    using V = typename Simd<A>::V;
    if constexpr (sizeof(A) == 8) {
        for (int j = 0; j < Simd<A>::L; ++j) x[j] = 1 / (1 + std::exp(-x[j]));
        return x;
    } else {
        using IV = typename Simd<A>::IV;
        // exp(-x) = 2^n exp(r) with |r| <= ln 2 / 2, and Cephes' polynomial for exp(r). NaN passes the comparisons.
        V t = -x;
        t = t > 88.0f ? V{} + 88.0f : t;
        t = t < -87.0f ? V{} - 87.0f : t;
        const V round = V{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
        const V shifted = t * 1.44269504f + round;
        const V n = shifted - round;
        const V r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
        V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + (r + 1.0f);
        const IV scale = (bits<IV>(shifted) - bits<IV>(round) + 127) << 23;
        return 1.0f / (p * bits<V>(scale) + 1.0f);
    }
}

// ---------------------------------------------------------------------------------------------- numbers in memory

enum class BFloat16 : uint16_t {};
enum class Half : uint16_t {};

template <class T>
struct Stored {  // float and double
    using A = T;
    using V = typename Simd<A>::V;
    static V read(const T* from) { return load<V>(from); }
    static void write(T* to, V v) { store(to, v); }
};

struct Narrow {  // what both 16-bit formats share
    using A = float;
    using V = Simd<A>::V;
    typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
    static U widen(const void* from) {
        U16 u;
        std::memcpy(&u, from, sizeof u);
        return __builtin_convertvector(u, U);
    }
    static void narrow(void* to, U u) {
        const U16 low = __builtin_convertvector(u, U16);
        std::memcpy(to, &low, sizeof low);
    }
};

template <>
struct Stored<BFloat16> : Narrow {
    static V read(const BFloat16* from) { return bits<V>(widen(from) << 16); }
    static void write(BFloat16* to, V v) {
        const U u = bits<U>(v);
        const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        narrow(to, bits<U>(v == v) != 0u ? rounded : U{} + 0x7fc0u);
    }
};

template <>
struct Stored<Half> : Narrow {
    static V read(const Half* from) {
        // 112 is the difference of the exponents' biases; zero and denormals become right by subtracting 2^-14.
        const U h = widen(from);
        const U magnitude = (h & 0x7fffu) << 13;
        const U exponent = magnitude & 0x0f800000u;
        const U normal = magnitude + (112u << 23);
        const U special = normal + (112u << 23);
        const V denormal = bits<V>(normal + (1u << 23)) - bits<V>(U{} + (113u << 23));
        U u = exponent == 0x0f800000u ? special : normal;
        u = exponent == 0u ? bits<U>(denormal) : u;
        return bits<V>(u | ((h & 0x8000u) << 16));
    }
    static void write(Half* to, V v) {
        // 113 and 143 are the exponents of the smallest normal half, 2^-14, and of the first number beyond all, 2^16.
        const U u = bits<U>(v);
        const U magnitude = u & 0x7fffffffu;
        const U sign = (u >> 16) & 0x8000u;
        const U half = U{} + (126u << 23);  // 0.5, the last bit of which is that of the smallest half
        const U denormal = bits<U>(bits<V>(magnitude) + bits<V>(half)) - half;
        const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        U h = magnitude < (113u << 23) ? denormal : normal;
        h = magnitude >= (143u << 23) ? U{} + 0x7c00u : h;
        h = magnitude > 0x7f800000u ? U{} + 0x7e00u : h;
        narrow(to, h | sign);
    }
};

// The first n of the numbers of a vector, the rest zero. By themselves, the loops become one masked instruction.
template <class T>
__attribute__((noinline)) typename Stored<T>::V read_some(const T* __restrict from, int n) {
    constexpr int L = Simd<typename Stored<T>::A>::L;
    T some[L];
    for (int j = 0; j < L; ++j) some[j] = j < n ? from[j] : T{};
    return Stored<T>::read(some);
}

template <class T>
__attribute__((noinline)) void write_some(T* __restrict to, typename Stored<T>::V v, int n) {
    constexpr int L = Simd<typename Stored<T>::A>::L;
    T some[L];
    Stored<T>::write(some, v);
    for (int j = 0; j < L; ++j)
        if (j < n) to[j] = some[j];
}

// ---------------------------------------------------------------------------------------------- the call, the item

// As packed by cpp.py: integers and addresses of 8 bytes each.
struct Call {
    int64_t batch, channels, height, width, groups, dtype, channels_last, dynamic, threads;
    double eps;
    const void *x, *dy;
    void *out, *means, *moments;
    const void *w1, *b1, *w3, *b3, *gamma, *beta;
    void *dw1, *db1, *dw3, *db3, *dgamma, *dbeta;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// One item: the bundles from one group of an image on.
struct Item {
    int64_t image, group, groups, bundles, slices;
};

// What does not change from item to item.
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
    // If groups have gaps between them: which of the numbers in memory each lane takes, if any, and the opposite.
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
    // How many of an item's slices are full, one after the other in memory.
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

// Reads and writes rows of an item in the tensors' dtype.
template <class A, bool Lanes>
struct Format {
    // Row `row`, vectors [begin, end), to `to`, which is where vector `begin` of the first slice goes.
    void (*read)(const Geometry<A, Lanes>&, const Item&, const void*, int64_t row, int64_t begin, int64_t end, A* to,
                 int64_t slice_stride);
    // The opposite; multiplied, if there are any, by weights, of which a bundle has one row.
    void (*write)(const Geometry<A, Lanes>&, const Item&, void*, int64_t row, int64_t begin, int64_t end, const A* from,
                  const A* weights, int64_t slice_stride);
    A (*at)(const Geometry<A, Lanes>&, const void*, int64_t image, int64_t channel, int64_t row, int64_t column);
    size_t size;  // of a number in memory
};

// Where a slice's channels lie, from the item's first, and how many there are.
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

    // Channels of a slice that is not full or has gaps between its groups.
    static V gather(const Geometry& g, const T* from, int64_t count) {
        const V v = read_some(from, static_cast<int>(count));
        if (g.packed()) return v;
        return bits<V>(bits<typename Simd<A>::IV>(permute<A>(v, g.spread)) & g.taken);
    }
    static void scatter(const Geometry& g, T* to, V v, int64_t count) {
        write_some(to, g.packed() ? v : permute<A>(v, g.dense), static_cast<int>(count));
    }
};

// -------------------------------------------------------------------------------------------------------- buffers

// Hands out aligned parts of a block of memory; without a block it only counts.
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

// Memory that a calling thread keeps for its next call.
struct Block {
    char* data = nullptr;
    size_t size = 0;

    ~Block() { std::free(data); }
    char* at_least(size_t wanted) {
        if (wanted > size) {
            std::free(data);
            data = static_cast<char*>(std::aligned_alloc(4096, (wanted + 4095) & ~size_t{4095}));
            size = data ? wanted : 0;
        }
        return data;
    }
};

thread_local Block block;

// Consecutive rows of the slices (or bundles) of a panel: a ring, or all of them.
template <class A>
struct Buffer {
    A* data;  // vector 0 of the panel in the first slice of slot 0
    int64_t row_stride;
    int64_t mask;  // slots - 1 in a ring
    int64_t end;   // rows up to here are filled

    A* row(int64_t h) const { return data + ((h + 2) & mask) * row_stride; }
};

// How an item is cut to fit the caches.
struct Tiling {
    bool resident;    // all rows stay in the buffers
    int64_t panels;   // of columns
    int64_t width;    // vectors in a panel
    int64_t margin;   // vectors left and right of it that are computed as well
    int64_t stride;   // vectors from slice to slice
    int64_t slots;    // rows in a buffer
};

// What the members of a team share: the small numbers of the item in work. Per slice a number (contiguous) or a
// vector (channels-last), but vectors where columns are involved.
template <class A>
struct Shared {
    A *row_gate, *column_gate;
    A* rows[3];
    A *kernel, *kappa, *mean, *shift, *alpha, *offset, *corners, *constant;
    A *a1, *a2, *rstd, *shifted;  // by group and channel
};

// What each thread has for itself.
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

// ------------------------------------------------------------------------------------------------------- the work

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

// R rows of out (., n) = matrix (., k) @ b (k, n), where n is a multiple of L.
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

// out (m, n) = matrix (m, k) @ b (k, n), where the matrix has these strides.
template <class A>
inline void multiply(A* out, const A* matrix, int64_t row, int64_t column, const A* b, int64_t m, int64_t k,
                     int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) multiply_rows<4>(out + i * n, matrix + i * row, row, column, b, k, n);
    for (; i < m; ++i) multiply_rows<1>(out + i * n, matrix + i * row, row, column, b, k, n);
}

// out (m, k) += a (m, n) @ b (k, n) transposed.
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

// Offsets in the gradients of the parameters, one after the other, and of `da1`, which the static variant sums.
struct Layout {
    int64_t w1, b1, w3, b3, gamma, beta, a1, size;
    explicit Layout(int64_t Cg)
        : w1(0), b1(Cg * Cg), w3(b1 + Cg), b3(w3 + 9 * Cg * Cg), gamma(b3 + Cg), beta(gamma + Cg), a1(beta + Cg),
          size(a1 + Cg) {}
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
    // A sum of channel c over all threads' vectors, of which there are `count` for each slice.
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

    // The same of sums in two parts.
    double exact_sum_of(V* Private<A>::*values, int64_t i, int64_t c, int64_t count = 1, int64_t index = 0) const {
        return sum_of(values, i, c, 2 * count, 2 * index) + sum_of(values, i, c, 2 * count, 2 * index + 1);
    }

    // A gated value, rounded before anything is done with it, so that a constant channel is exactly equal to its mean.
    static V gated(V value, V column_gate, V row_gate) {
        V product = value * column_gate * row_gate;
        keep(product);
        return product;
    }

    struct Three {
        V left, mid, right;
    };
    // The vectors one column to the left, here, and one column to the right.
    static Three neighbours(const A* at) {
        V left = load<V>(at - L), mid = load<V>(at), right = load<V>(at + L);
        keep(left), keep(mid), keep(right);
        if constexpr (Lanes) return {left, mid, right};
        return {slide<A, L - 1>(left, mid, Lane()), mid, slide<A, 1>(mid, right, Lane())};
    }

    // Adds the totals of four rows of a slice.
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

    // For the sums that need no neighbours, x need not pass through the buffer, unless to stay there.
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

    // Calls `work` for each slice of four rows at a time, and for what is left row by row.
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

    void add_means() {
        std::memset(own.columns[0], 0, item.slices * g.vectors * L * sizeof(A));
        clear_rows(shared.rows[0]);
        for (int64_t i = 0; i < tiling.panels; ++i) {
            panel(i);
            begin(x, top);
            for_rows([&](int64_t s, int64_t h, auto rows) { add_means<rows()>(s, h); });
        }
    }

    template <int R>
    void add_means(int64_t s, int64_t h) const {
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

    // Sums of (gated - shift) and of its square, where the shift is near the mean, so that nothing cancels.
    void add_moments() {
        std::memset(own.moments, 0, item.slices * 4 * sizeof(V));
        for (int64_t i = 0; i < tiling.panels; ++i) {
            panel(i);
            begin(x, top);
            for_rows([&](int64_t s, int64_t h, auto rows) { add_moments<rows()>(s, h); });
        }
    }

    template <int R>
    void add_moments(int64_t s, int64_t h) {
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

    // The weights of rows [h, h + 4), vectors [begin, end), and from them in the backward the logit's gradient.
    template <bool Backward>
    void weigh(int64_t h, int64_t begin, int64_t end) {
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
    static constexpr int min_lane(int n) { return n < L ? n : L; }

    // Adds one slice to the logits without their constant, and to the sum of x * dy.
    template <bool Backward, bool First>
    void mix(int64_t s, int64_t h, int64_t begin, int64_t end) {
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
#pragma GCC unroll 6
            for (int i = 0; i < kRows + 2; ++i) {
                const auto [left, mid, right] = neighbours(row[i] + at);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    if (i < r || i > r + 2) continue;
                    const V* tap = kernel + 3 * (i - r);
                    logit[r] += left * tap[0];
                    logit[r] += mid * tap[1];
                    logit[r] += right * tap[2];
                    if (i == r + 1) {
                        logit[r] += (gated(mid, column, gate[r]) - mean) * kappa;
                        if (Backward) product[r] += mid * load<V>(dy_row[r] + at);
                    }
                }
            }
            for (int r = 0; r < kRows; ++r) {
                store(logits[r] + at, logit[r]);
                if (Backward) store(products[r] + at, product[r]);
            }
        }
    }
    int64_t logit_stride() const { return (tiling.width + 2 * kMargin + L) * L; }

    // Sums over the N lanes of each group, takes the sigmoid and gives it to the lanes again.
    template <bool Backward, int N>
    void activate(int64_t b, int64_t h, int64_t begin, int64_t end) {
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

    template <int N, int... P>
    static void store_runs(A* to, V v, int64_t count, std::integer_sequence<int, P...>) {
        if (count == N) {
            (store(to + P * L, spread<A, N, P>(v, Lane())), ...);
        } else {
            ((P < count ? store(to + P * L, spread<A, N, P>(v, Lane())) : void()), ...);
        }
    }

    void write_output() {
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

    // All the sums over the map that the backward needs.
    void add_sums() {
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

    void clear_rows(A* rows) const {
        for (int64_t s = 0; s < item.slices; ++s)
            std::memset(row_of(rows, s, top), 0, ceil_div(bottom - top, kRows) * kRows * PS * sizeof(A));
    }

    void add_constant(int64_t b, int64_t h) const {
        V sum = {};
        for (int r = 0; r < kRows; ++r) {
            const A* row = dlogit.row(h + r) + b * stride;
            for (int64_t at = 0; at < (last - first) * L; at += L) sum += load<V>(row + at);
        }
        own.dconstant[b] += sum;
    }

    void add_kernel(int64_t s, int64_t b, int64_t h) const {
        const A *row[kRows + 2], *d_row[kRows];
        for (int i = 0; i < kRows + 2; ++i) row[i] = x.row(h - 1 + i) + s * stride;
        for (int r = 0; r < kRows; ++r) d_row[r] = dlogit.row(h + r) + b * stride;
        const int64_t size = (last - first) * L;
        V sums[9] = {};
        for (int64_t at = 0; at < size; at += L) {
            V d[kRows];
            for (int r = 0; r < kRows; ++r) keep(d[r] = load<V>(d_row[r] + at));
#pragma GCC unroll 6
            for (int i = 0; i < kRows + 2; ++i) {
                const auto [left, mid, right] = neighbours(row[i] + at);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    if (i < r || i > r + 2) continue;
                    V* tap = sums + 3 * (i - r);
                    tap[0] += d[r] * left;
                    tap[1] += d[r] * mid;
                    tap[2] += d[r] * right;
                }
            }
        }
        for (int i = 0; i < 9; ++i) own.dkernel[9 * s + i] += sums[i];
    }

    void add_gates(int64_t s, int64_t b, int64_t h) const {
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

    void write_input_gradient() {
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

    void weigh_with_margins(int64_t h) {
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

    // Turns dy of rows [h, h + 4) of a slice, in its buffer, into dx.
    void differentiate(int64_t s, int64_t h) const {
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
#pragma GCC unroll 6
            for (int i = 0; i < kRows + 2; ++i) {
                const auto [left, mid, right] = neighbours(d_row[i] + at);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    if (i < r || i > r + 2) continue;
                    const V* tap = kernel + 3 * (r + 2 - i);
                    sum[r] += right * tap[0];
                    sum[r] += mid * tap[1];
                    sum[r] += left * tap[2];
                    if (i == r + 1) d[r] = mid;
                }
            }
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

    void add_corners(int64_t h) const {
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

    // ---------------------------------------------------------------------------------------- what is small: by group

    // Calls `work` for this member's share of the item's groups, whole bundles of them.
    template <class Work>
    void for_groups(Work work) const {
        for (int64_t b = rank; b < item.bundles; b += size) {
            const int64_t begin = b * g.groups_per_bundle;
            for (int64_t i = begin; i < min(begin + g.groups_per_bundle, item.groups); ++i) work(i);
        }
    }

    // Adds up the members' sums of columns, for this member's share of the bundles, in the first member's.
    void join_columns(int count) const {
        for (int64_t b = rank; b < item.bundles && size > 1; b += size) {
            const int64_t numbers = g.slices_per_bundle * g.vectors * L;
            for (int i = 0; i < count; ++i)
                for (int k = 1; k < size; ++k)
                    add_scaled(team[0]->columns[i] + b * numbers, A(1), team[k]->columns[i] + b * numbers, numbers);
        }
    }

    int64_t index_of(int64_t i) const { return item.image * g.G + item.group + i; }
    A* means_of(int64_t i) const { return means + index_of(i) * Cg * positions; }

    void finish_means(int64_t i) const {
        for (int64_t c = 0; c < Cg; ++c) {
            A* mean = means_of(i) + c * positions;
            const A* rows = rows_of(shared.rows[0], i, c);
            const A* columns = columns_of(team[0]->columns[0], i, c);
            for (int64_t h = 0; h < H; ++h) mean[h] = rows[h * PS] / W;
            for (int64_t w = 0; w < W; ++w) mean[H + w] = columns[w * kStep] / H;
        }
    }

    void open_gates(int64_t i) const {
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
    static int64_t padded_positions(int64_t positions) { return ceil_div(positions, L) * L; }

    // Near the mean of the gated channel: exact if x is a sum of a function of the row and one of the column.
    void guess_moments(int64_t i) const {
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

    void finish_moments(int64_t i) const {
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

    // How the weight map is mixed from the channels.
    void mix_group(int64_t i) const {
        const int64_t n = index_of(i), channel = (item.group + i) * Cg;
        const double area = static_cast<double>(H) * W;
        A *a1 = shared.a1 + i * Cg, *a2 = shared.a2 + i * Cg, *rstd = shared.rstd + i * Cg;
        A* shifted = shared.shifted + i * Cg * 9;
        for (int64_t c = 0; c < Cg; ++c) {
            const A *rows = means_of(i) + c * positions, *columns = rows + H;
            double mean = 0;
            for (int64_t h = 0; h < H; ++h) mean += rows[h];
            mean /= H;
            for (int tap = 0; tap < 9; ++tap) {  // the mean over what the tap sees, times its share of the area
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

    // The gradients of the parameters, and what the gradient of the input needs, from the sums over the map.
    void differentiate_group(int64_t i) const {
        const Layout at(Cg);
        const A area = static_cast<A>(static_cast<double>(H) * W);
        const A *a1 = shared.a1 + i * Cg, *a2 = shared.a2 + i * Cg, *rstd = shared.rstd + i * Cg;
        const A* shifted = shared.shifted + i * Cg * 9;
        A *dkernel = own.small, *dshifted = dkernel + 9 * Cg, *q = dshifted + 9 * Cg, *da1 = q + Cg, *da2 = da1 + Cg;
        A* grads = own.gradients;

        // One number for the group, which all its lanes have if channels-last.
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

        // Through the normalisation to the gated channels, and on to the gates.
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

        // What each row, column and corner adds to the gradient of the input.
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

// ---------------------------------------------------------------------------------------------------------- a call

template <class A, bool Lanes>
struct Plan {
    using V = typename Simd<A>::V;
    static constexpr int L = Simd<A>::L;
    using Worker = ::Worker<A, Lanes>;

    const Call& call;
    const bool backward;
    const Geometry<A, Lanes> g;
    int threads;
    bool together;  // all threads on one item
    Tiling tiling;

    Plan(const Call& call, bool backward) : call(call), backward(backward), g(call) {
        const int64_t items = g.items(), most = max(call.threads, 1);
        const int64_t vectors = g.slices_per_item() * g.vectors * g.H;
        // Together if that takes less time than the rounds of whole items, and is worth the waiting for each other.
        together = items % most != 0 && 5 * items < 4 * most * ceil_div(items, most) && g.H >= 2 * kRows * most &&
                   vectors >= 4096 * most;
        threads = static_cast<int>(together ? most : max(min(items, most), 1));

        // Bytes of one vector column of one row, in all buffers.
        const int64_t column = (g.slices_per_item() + g.bundles_per_item) * (backward ? 2 : 1) * kVectorBytes;
        const int64_t all_rows = g.H + 2 + 2 * kRows;
        tiling.resident = !together && all_rows * (g.vectors + 1) * column <= kResidentBytes;
        const int64_t widest = max(kPanelBytes / (kRing * column), 16);
        tiling.panels = tiling.resident ? 1 : ceil_div(g.vectors, widest);
        tiling.width = ceil_div(g.vectors, tiling.panels);
        tiling.panels = ceil_div(g.vectors, tiling.width);
        tiling.margin = tiling.panels == 1 ? 1 : kMargin;
        tiling.stride = tiling.width + (tiling.panels == 1 ? 1 : 2 * kMargin);
        tiling.slots = tiling.resident ? all_rows : kRing;
    }

    Shared<A> take_shared(Arena& arena) const {
        const int64_t slices = g.slices_per_item(), numbers = slices * Worker::PS;
        const int64_t rows = numbers * Worker::padded(g.H), columns = slices * g.vectors * L;
        const int64_t channels = g.groups_per_item() * g.Cg;
        Shared<A> s = {};
        s.row_gate = arena.take<A>(rows);
        s.column_gate = arena.take<A>(columns);
        for (int i = 0; i < (backward ? 3 : 1); ++i) s.rows[i] = arena.take<A>(rows);
        s.kernel = arena.take<A>(9 * numbers);
        for (A** each : {&s.kappa, &s.mean, &s.shift, &s.alpha, &s.offset}) *each = arena.take<A>(numbers);
        s.corners = arena.take<A>(4 * numbers);
        s.constant = arena.take<A>(g.bundles_per_item * Worker::PS);
        for (A** each : {&s.a1, &s.a2, &s.rstd}) *each = arena.take<A>(channels);
        s.shifted = arena.take<A>(9 * channels);
        return s;
    }

    Private<A> take_private(Arena& arena) const {
        const int64_t slices = g.slices_per_item(), bundles = g.bundles_per_item;
        const int64_t gates = g.Cg * Worker::padded_positions(g.H + g.W);
        const int64_t slot = tiling.slots * tiling.stride * L, logits = kRows * (tiling.width + 2 * kMargin + L) * L;
        Private<A> p = {};
        for (int i = 0; i < (backward ? 3 : 1); ++i) p.columns[i] = arena.take<A>(slices * g.vectors * L);
        p.moments = arena.take<V>(4 * slices);
        p.x = arena.take<A>(slices * slot + L);
        p.weights = arena.take<A>(bundles * slot + L);
        p.logit = arena.take<A>(logits);
        p.means = arena.take<A>(gates);
        p.gates = arena.take<A>(gates);
        p.small = arena.take<A>(21 * g.Cg);
        if (!backward) return p;
        p.dkernel = arena.take<V>(9 * slices);
        p.correlation = arena.take<V>(2 * slices);
        p.dconstant = arena.take<V>(bundles);
        p.dy = arena.take<A>(slices * slot + L);
        p.dlogit = arena.take<A>(bundles * slot + L);
        p.product = arena.take<A>(logits);
        p.dgates = arena.take<A>(gates);
        p.gradients = arena.take<A>(Layout(g.Cg).size);
        return p;
    }

    // 0, or 1 if there is not enough memory.
    int run(const Format<A, Lanes>& format) const {
        Arena arena;
        take_shared(arena);
        const size_t shared_size = (arena.used + 4095) & ~size_t{4095};
        arena.used = 0;
        take_private(arena);
        const size_t private_size = (arena.used + 4095) & ~size_t{4095};
        const int teams = together ? 1 : threads;
        const size_t table = (threads * (sizeof(Private<A>) + sizeof(Private<A>*)) + 4095) & ~size_t{4095};
        char* memory = block.at_least(table + teams * shared_size + threads * private_size);
        if (!memory) return 1;
        auto* privates = reinterpret_cast<Private<A>*>(memory);
        auto** team = reinterpret_cast<Private<A>**>(privates + threads);
        char* shareds = memory + table;
        for (int k = 0; k < threads; ++k) {
            Arena part{shareds + teams * shared_size + k * private_size};
            privates[k] = take_private(part);
            team[k] = privates + k;
        }
        const int64_t gates = g.Cg * Worker::padded_positions(g.H + g.W);
        for (int k = 0; k < threads; ++k) {
            std::memset(privates[k].means, 0, gates * sizeof(A));
            if (!backward) continue;
            std::memset(privates[k].dgates, 0, gates * sizeof(A));
            std::memset(privates[k].gradients, 0, Layout(g.Cg).size * sizeof(A));
        }

#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const int rank = omp_get_thread_num(), size = omp_get_num_threads();
            Arena part{shareds + (together ? 0 : rank) * shared_size};
            const Shared<A> shared = take_shared(part);
            // Lanes without a channel, columns beyond the last and rows outside the image keep these zeros.
            if (!together || rank == 0) std::memset(shareds + (together ? 0 : rank) * shared_size, 0, shared_size);
            if (together) {
#pragma omp barrier
            }
            Worker worker(call, g, format, tiling, shared, together ? team : team + rank, together ? rank : 0,
                          together ? size : 1);
            const int64_t items = g.items();
            const int64_t begin = together ? 0 : items * rank / size;
            const int64_t end = together ? items : items * (rank + 1) / size;
            for (int64_t index = begin; index < end; ++index)
                backward ? worker.backward(index) : worker.forward(index);
        }
        if (backward) write_gradients(privates);
        return 0;
    }

    void write_gradients(const Private<A>* privates) const {
        const Layout at(g.Cg);
        A* sum = privates[0].gradients;
        for (int k = 1; k < threads; ++k) add_scaled(sum, A(1), privates[k].gradients, at.size);
        if (!call.dynamic) {  // all groups have the same a1, the softmax of beta
            A* a1 = privates[0].small;
            std::memcpy(a1, call.beta, g.Cg * sizeof(A));
            softmax(a1, g.Cg);
            const A weighted = dot(a1, sum + at.a1, g.Cg);
            for (int64_t c = 0; c < g.Cg; ++c) sum[at.beta + c] += a1[c] * (sum[at.a1 + c] - weighted);
        }
        const auto copy = [&](void* to, int64_t from, int64_t n) { std::memcpy(to, sum + from, n * sizeof(A)); };
        copy(call.dw1, at.w1, g.Cg * g.Cg);
        copy(call.db1, at.b1, g.Cg);
        copy(call.dw3, at.w3, 9 * g.Cg * g.Cg);
        copy(call.db3, at.b3, g.Cg);
        copy(call.dgamma, at.gamma, g.Cg);
        copy(call.dbeta, at.beta, g.Cg);
    }
};

// Asks for large pages, which are several times faster than small ones for memory that is written for the first time.
void prefer_large_pages(void* data, size_t size) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = uintptr_t{2} << 20, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) & ~(page - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)size;
#endif
}

template <class T, bool Lanes>
int run_as(const Call& call, bool backward) {
    using A = typename Stored<T>::A;
    prefer_large_pages(call.out, call.batch * call.channels * call.height * call.width * sizeof(T));
    using Rows = ::Rows<T, Lanes>;
    return Plan<A, Lanes>(call, backward).run({Rows::read, Rows::write, Rows::at, sizeof(T)});
}

template <bool Lanes>
int run_in(const Call& call, bool backward) {
    switch (call.dtype) {
        case 0: return run_as<float, Lanes>(call, backward);
        case 1: return run_as<double, Lanes>(call, backward);
        case 2: return run_as<BFloat16, Lanes>(call, backward);
        default: return run_as<Half, Lanes>(call, backward);
    }
}

}  // namespace

// Both return 0, or 1 if there is not enough memory.
extern "C" int ema_forward(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    return c.channels_last ? run_in<true>(c, false) : run_in<false>(c, false);
}

extern "C" int ema_backward(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    return c.channels_last ? run_in<true>(c, true) : run_in<false>(c, true);
}
