// Fused CPU kernels of EMA's short form, for both memory layouts; docs/ema.md derives the formulas and the names.
//
// One template serves both layouts: both are rows of SIMD vectors, and the channels of a slice share parameters:
//
//   contiguous     a slice is one channel, a vector L neighbouring columns; the column to the right is one number away;
//   channels-last  a slice is L channels, a vector one column of them; the column to the right is one vector away.
//
// The layouts (Lanes == true is channels-last) also differ in how rows are read and written, in whether a parameter of
// a slice is a number or a vector, and in how a group's channels are summed.
//
// A bundle is the smallest whole number of slices and of groups. An item, the unit of work, is one group if contiguous
// and one image (or a range of its bundles) if channels-last. Threads share the items, or all work on the same item,
// each on a band of rows, if there are too few. Sums are always taken in the same order, so that results repeat for a
// given number of threads.
//
//   simd.h     vectors, shuffles, sigmoid           formats.h  numbers in memory
//   layout.h   items and their rows, with a picture worker.h   a thread's buffers and accessors
//   passes.h   passes over the rows                 groups.h   the algebra of a group between them
//
// This file is the driver: it divides items to fit the caches, assigns them to threads, and exports the two functions.
// All files are one translation unit in an unnamed namespace, so that the compiler sees all callers.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <omp.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "groups.h"
#include "passes.h"

namespace {

constexpr int64_t kResidentBytes = 6 << 20;  // of buffers that hold a whole item: a core's share of its caches
constexpr int64_t kPanelBytes = 512 << 10;   // of buffers that hold a few rows of a panel

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
        // Work together if that is faster than rounds of whole items, and if an item is large enough for the barriers.
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

    // Run the call; return 0, or 1 if there is not enough memory.
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
            // Unused lanes, columns beyond the last and rows outside the image keep these zeros.
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

// Ask for large pages: first writes to them are several times faster than to small ones.
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
