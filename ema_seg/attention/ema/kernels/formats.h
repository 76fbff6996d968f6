// Numbers in memory: float, double, bfloat16 and half, widened to the dtype of the arithmetic.

#pragma once

#include "simd.h"

namespace {

enum class BFloat16 : uint16_t {};
enum class Half : uint16_t {};

template <class T>
struct Stored {  // float and double
    using A = T;
    using V = typename Simd<A>::V;
    static V read(const T* from) { return load<V>(from); }
    static void write(T* to, V v) { store(to, v); }
};

struct Narrow {  // shared by both 16-bit formats
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
        // 112 is the difference of the exponents' biases; subtracting 2^-14 corrects zero and denormals.
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
        const U half = U{} + (126u << 23);  // 0.5: its last bit is worth the smallest half
        const U denormal = bits<U>(bits<V>(magnitude) + bits<V>(half)) - half;
        const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        U h = magnitude < (113u << 23) ? denormal : normal;
        h = magnitude >= (143u << 23) ? U{} + 0x7c00u : h;
        h = magnitude > 0x7f800000u ? U{} + 0x7e00u : h;
        narrow(to, h | sign);
    }
};

// Read n numbers into a vector and zero the rest. Outside of larger functions, GCC turns the loop into one masked load.
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

}  // namespace
