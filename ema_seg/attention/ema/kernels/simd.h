// SIMD vectors of the processor: shuffles, sums over lanes, the sigmoid.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

using std::int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

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

// Force a value into a register: GCC would load a value that is used several times again each time.
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

// Permute: lane j takes lane index[j].
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

// Take L lanes of the concatenation of a and b, from lane N on.
template <class A, int N, int... J>
inline typename Simd<A>::V slide(typename Simd<A>::V a, typename Simd<A>::V b, std::integer_sequence<int, J...>) {
    return pick<A>(a, b, std::integer_sequence<int, (N + J)...>());
}

// Interleave: lanes j with bit D unset take lane j (High: j + D) of a, the others lane j - D (High: j) of b.
template <class A, int D, bool High, int... J>
inline typename Simd<A>::V zip(typename Simd<A>::V a, typename Simd<A>::V b, std::integer_sequence<int, J...>) {
    constexpr int L = Simd<A>::L;
    return pick<A>(a, b, std::integer_sequence<int, ((J & D) ? L + J - (High ? 0 : D) : J + (High ? D : 0))...>());
}

// Sum N vectors over each run of N lanes: lane j of the result is the sum of vector j % N over the run of lane j.
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

// Sum over the runs of D lanes: each lane gets the sum of all lanes at its place in a run.
template <class A, int D>
inline typename Simd<A>::V fold(typename Simd<A>::V v) {
    using Lane = std::make_integer_sequence<int, Simd<A>::L>;
    if constexpr (D >= Simd<A>::L) {
        return v;
    } else {
        return fold<A, 2 * D>(zip<A, D, false>(v, v, Lane()) + zip<A, D, true>(v, v, Lane()));
    }
}

// Compensated (two-sum) addition: sum[1] collects the rounding errors of sum[0].
template <class V>
inline void add_exactly(V* sum, V v) {
    const V t = sum[0] + v, z = t - sum[0];
    sum[1] += (sum[0] - (t - z)) + (v - z);
    sum[0] = t;
}

// Broadcast lane P of each run of N lanes to the run.
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

}  // namespace
