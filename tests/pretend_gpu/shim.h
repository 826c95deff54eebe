// What the CUDA text that TVM generates needs in order to be compiled for the CPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

// The text chooses between its variants by these.
#define __CUDA_ARCH__ 900
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("shim_shared")))
// g++ takes no alignas behind an attribute of its own.
#define alignas(n) __attribute__((aligned(n)))

// ---- half: g++ rounds _Float16 to nearest even after each operation (-fexcess-precision=16)
typedef _Float16 half;
typedef _Float16 __half;
static inline half __float2half(float x) { return (half)x; }
static inline half __float2half_rn(float x) { return (half)x; }
static inline float __half2float(half x) { return (float)x; }
struct alignas(4) half2 {
    half x, y;
    half2() = default;
    half2(half x, half y) : x(x), y(y) {}
};
typedef half2 __half2;
static inline half2 make_half2(half x, half y) { return {x, y}; }

// ---- bfloat16: computed in float, rounded to nearest even after each operation
struct nv_bfloat16 {
    uint16_t bits;
    nv_bfloat16() = default;
    nv_bfloat16(const nv_bfloat16 &) = default;
    nv_bfloat16(const volatile nv_bfloat16 &x) : bits(x.bits) {}
    nv_bfloat16 &operator=(const nv_bfloat16 &) = default;
    void operator=(const nv_bfloat16 &x) volatile { bits = x.bits; }
    nv_bfloat16(float x) : bits(rounded(x)) {}
    // Through a float rounded to odd, as a second rounding to nearest would be one too many.
    template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>>
    nv_bfloat16(T x) : bits(rounded(to_odd((long double)x))) {}
    operator float() const volatile { return widened(bits); }

    static float widened(uint16_t bits) {
        uint32_t wide = (uint32_t)bits << 16;
        float out;
        memcpy(&out, &wide, 4);
        return out;
    }
    static uint16_t rounded(float x) {
        uint32_t wide;
        memcpy(&wide, &x, 4);
        if (x != x) return 0x7FFF;
        return (uint16_t)((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
    }
    static float to_odd(long double x) {
        float near = (float)x;
        if ((long double)near == x || near != near) return near;
        uint32_t bits;
        memcpy(&bits, &near, 4);
        if (std::fabs((long double)near) > std::fabs(x)) bits--;
        bits |= 1;
        memcpy(&near, &bits, 4);
        return near;
    }
};
typedef nv_bfloat16 __nv_bfloat16;
struct alignas(4) nv_bfloat162 {
    nv_bfloat16 x, y;
    nv_bfloat162() = default;
    nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};
typedef nv_bfloat162 __nv_bfloat162;
#define SHIM_OPERATOR(op) \
    static inline nv_bfloat16 operator op(nv_bfloat16 a, nv_bfloat16 b) { return (float)a op(float) b; } \
    static inline nv_bfloat16 &operator op##=(nv_bfloat16 &a, nv_bfloat16 b) { return a = a op b; }
SHIM_OPERATOR(+)
SHIM_OPERATOR(-)
SHIM_OPERATOR(*)
SHIM_OPERATOR(/)
#define SHIM_COMPARISON(op) \
    static inline bool operator op(nv_bfloat16 a, nv_bfloat16 b) { return (float)a op(float) b; }
SHIM_COMPARISON(<)
SHIM_COMPARISON(>)
SHIM_COMPARISON(<=)
SHIM_COMPARISON(>=)
SHIM_COMPARISON(==)
SHIM_COMPARISON(!=)
static inline nv_bfloat16 operator-(nv_bfloat16 a) { return -(float)a; }
static inline nv_bfloat16 __float2bfloat16(float x) { return x; }
static inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
static inline float __bfloat162float(nv_bfloat16 x) { return x; }

// ---- functions of both
#define SHIM_OF_BOTH(result, name, expression) \
    static inline result name(half a) { float x = (float)a; return (expression); } \
    static inline result name(nv_bfloat16 a) { float x = (float)a; return (expression); }
#define SHIM_UNARY(name, expression) \
    static inline half name(half a) { float x = (float)a; return (half)(float)(expression); } \
    static inline nv_bfloat16 name(nv_bfloat16 a) { float x = (float)a; return nv_bfloat16((float)(expression)); }
#define SHIM_BINARY(result, name, expression) \
    static inline result(half) name(half a, half b) { return (result(half))(expression); } \
    static inline result(nv_bfloat16) name(nv_bfloat16 a, nv_bfloat16 b) { return (result(nv_bfloat16))(expression); }
#define SHIM_SAME(type) type
#define SHIM_BOOL(type) bool
SHIM_UNARY(hexp, std::exp(x))
SHIM_UNARY(hexp2, std::exp2(x))
SHIM_UNARY(hexp10, std::pow(10.f, x))
SHIM_UNARY(hlog, std::log(x))
SHIM_UNARY(hlog2, std::log2(x))
SHIM_UNARY(hlog10, std::log10(x))
SHIM_UNARY(hsqrt, std::sqrt(x))
SHIM_UNARY(hrsqrt, 1 / std::sqrt(x))
SHIM_UNARY(hrcp, 1 / x)
SHIM_UNARY(hsin, std::sin(x))
SHIM_UNARY(hcos, std::cos(x))
SHIM_UNARY(htanh, std::tanh(x))
SHIM_UNARY(hfloor, std::floor(x))
SHIM_UNARY(hceil, std::ceil(x))
SHIM_UNARY(htrunc, std::trunc(x))
SHIM_UNARY(hrint, std::nearbyint(x))
SHIM_UNARY(__habs, std::fabs(x))
SHIM_UNARY(fabs, std::fabs(x))
SHIM_UNARY(__hneg, -x)
SHIM_OF_BOTH(bool, __hisnan, x != x)
SHIM_OF_BOTH(bool, __hisinf, std::isinf(x))
SHIM_BINARY(SHIM_SAME, __hadd, a + b)
SHIM_BINARY(SHIM_SAME, __hsub, a - b)
SHIM_BINARY(SHIM_SAME, __hmul, a *b)
SHIM_BINARY(SHIM_SAME, __hdiv, a / b)
SHIM_BINARY(SHIM_SAME, __hmax, a != a || b > a ? b : a)
SHIM_BINARY(SHIM_SAME, __hmin, a != a || b < a ? b : a)
SHIM_BINARY(SHIM_BOOL, __hgt, a > b)
SHIM_BINARY(SHIM_BOOL, __hge, a >= b)
SHIM_BINARY(SHIM_BOOL, __hlt, a < b)
SHIM_BINARY(SHIM_BOOL, __hle, a <= b)
SHIM_BINARY(SHIM_BOOL, __heq, a == b)
SHIM_BINARY(SHIM_BOOL, __hne, a != b)
static inline half __hfma(half a, half b, half c) { return (half)((double)a * (double)b + (double)c); }
static inline nv_bfloat16 __hfma(nv_bfloat16 a, nv_bfloat16 b, nv_bfloat16 c) {
    return (double)(float)a * (float)b + (float)c;
}

// ---- vectors
#define SHIM_VECTORS(name, type) \
    struct name##1 { type x; }; \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
    struct name##3 { type x, y, z; }; \
    struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
    static inline name##1 make_##name##1(type x) { return {x}; } \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
    static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SHIM_VECTORS(char, signed char)
SHIM_VECTORS(uchar, unsigned char)
SHIM_VECTORS(short, short)
SHIM_VECTORS(ushort, unsigned short)
SHIM_VECTORS(int, int)
SHIM_VECTORS(uint, unsigned)
SHIM_VECTORS(long, long)
SHIM_VECTORS(ulong, unsigned long)
SHIM_VECTORS(longlong, long long)
SHIM_VECTORS(ulonglong, unsigned long long)
SHIM_VECTORS(float, float)
SHIM_VECTORS(double, double)

// ---- functions of the other types
#define SHIM_EXTREMES(type) \
    static inline type max(type a, type b) { return b != b || a > b ? a : b; } \
    static inline type min(type a, type b) { return b != b || a < b ? a : b; }
SHIM_EXTREMES(float)
SHIM_EXTREMES(double)
SHIM_EXTREMES(int)
SHIM_EXTREMES(unsigned)
SHIM_EXTREMES(long)
SHIM_EXTREMES(unsigned long)
SHIM_EXTREMES(long long)
SHIM_EXTREMES(unsigned long long)
using std::isfinite;
using std::isinf;
using std::isnan;
// glibc declares some of these names itself.
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
static inline double rsqrt(double x) { return 1 / std::sqrt(x); }
static inline float shim_exp(float x) { return std::exp(x); }
static inline float shim_exp10(float x) { return std::pow(10.f, x); }
static inline float shim_log(float x) { return std::log(x); }
static inline float shim_log2(float x) { return std::log2(x); }
static inline float shim_log10(float x) { return std::log10(x); }
static inline float shim_pow(float x, float y) { return std::pow(x, y); }
static inline float shim_sin(float x) { return std::sin(x); }
static inline float shim_cos(float x) { return std::cos(x); }
static inline float shim_tan(float x) { return std::tan(x); }
#define __expf shim_exp
#define __exp10f shim_exp10
#define __logf shim_log
#define __log2f shim_log2
#define __log10f shim_log10
#define __powf shim_pow
#define __sinf shim_sin
#define __cosf shim_cos
#define __tanf shim_tan
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fsqrt_rn(float x) { return std::sqrt(x); }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T atomicAdd(T *p, T x) {
    T old = *p;
    *p = old + x;
    return old;
}
template <class T> static inline T atomicMax(T *p, T x) {
    T old = *p;
    if (x > old) *p = x;
    return old;
}
