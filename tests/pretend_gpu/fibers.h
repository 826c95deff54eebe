// Runs CUDA threads on one thread of the CPU: a fiber each where they synchronize, a plain loop where they don't.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;
static char *shim_dynamic;  // dynamic shared memory

// Static shared memory lies in a section of its own, so that every block can find it poisoned.
extern char __start_shim_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_shim_shared[] __attribute__((weak, visibility("hidden")));

namespace shim {

// Saves what the ABI makes a callee save, and continues on another stack. (swapcontext is 20 times slower.)
extern "C" void shim_switch(void **from, void *to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden shim_switch
.globl shim_switch
.type shim_switch, @function
shim_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size shim_switch, .-shim_switch
)");

enum State { RUNS, AT_BLOCK, AT_WARP, AT_MASK, DONE };

struct Fiber {
    void *stack;
    dim3 thread;
    State state;
    unsigned mask;  // of the barrier it waits at, or what __activemask() found
    // What a shuffle brings along, and what it gives the others once all are there. They all run, and take it,
    // before the next barrier opens.
    char brought[16], given[16];
    unsigned meeting;  // which barrier let it through
};

constexpr int MOST = 1024;
constexpr size_t STACK = 65536 + 832;  // not a power of two: the stacks' tops would share cache lines
static Fiber fibers[MOST];
static char *stacks;
static int current, n_threads;
static unsigned meetings;
static void *scheduler;
static void (*body)(void **);
static void **arguments;
static char message[256];

static inline void wait(State state, unsigned mask) {
    Fiber &self = fibers[current];
    self.state = state;
    self.mask = mask;
    shim_switch(&self.stack, scheduler);
}

static void enter() {
    body(arguments);
    wait(DONE, 0);
    abort();
}

static void prepare(int i) {
    void **top = (void **)(((uintptr_t)(stacks + (i + 1) * STACK)) & ~(uintptr_t)63);
    *--top = nullptr;         // where a return address would lie: the ABI wants the stack so at a function's start
    *--top = (void *)&enter;  // shim_switch returns there
    for (int k = 0; k < 6; k++) *--top = nullptr;
    fibers[i].stack = top;
    fibers[i].state = RUNS;
    fibers[i].meeting = 0;
}

static void resume(int i) {
    current = i;
    threadIdx = fibers[i].thread;
    shim_switch(&scheduler, fibers[i].stack);
}

// Runs a warp until all its threads have ended or wait for other warps.
static bool run_warp(int first) {
    int last = first + 32 < n_threads ? first + 32 : n_threads;
    for (;;) {
        unsigned warp = 0, mask = 0, done = 0;
        for (int i = first; i < last; i++)
            if (fibers[i].state == RUNS) resume(i);
        for (int i = first; i < last; i++) {
            unsigned bit = 1u << (i - first);
            if (fibers[i].state == AT_WARP) warp |= bit;
            if (fibers[i].state == AT_MASK) mask |= bit;
            if (fibers[i].state == DONE) done |= bit;
        }
        if (last - first < 32) done |= ~0u << (last - first);
        bool moved = false;
        for (int i = first; i < last; i++) {
            unsigned wanted = fibers[i].mask & ~done;
            if (fibers[i].state != AT_WARP || (wanted & ~warp)) continue;
            unsigned shared_mask = fibers[i].mask;
            meetings++;
            for (int k = first; k < last; k++)
                if (wanted >> (k - first) & 1) {
                    if (fibers[k].mask != shared_mask) {
                        snprintf(message, sizeof message, "lanes of one warp give the masks %x and %x", shared_mask,
                                 fibers[k].mask);
                        return false;
                    }
                    memcpy(fibers[k].given, fibers[k].brought, sizeof fibers[k].given);
                    fibers[k].meeting = meetings;
                    fibers[k].state = RUNS;
                }
            warp &= ~wanted;
            moved = true;
        }
        // Only then are the rest those that run together here.
        for (int i = first; !moved && i < last; i++)
            if (fibers[i].state == AT_MASK) fibers[i].state = RUNS, fibers[i].mask = mask;
        if (moved || mask) continue;
        if (!warp) return true;
        snprintf(message, sizeof message, "lanes %x of a warp wait for lanes that don't come", warp);
        return false;
    }
}

static bool run_block() {
    for (int i = 0; i < n_threads; i++) prepare(i);
    for (;;) {
        int done = 0;
        for (int first = 0; first < n_threads; first += 32)
            if (!run_warp(first)) return false;
        for (int i = 0; i < n_threads; i++) done += fibers[i].state == DONE;
        if (done == n_threads) return true;
        for (int i = 0; i < n_threads; i++)
            if (fibers[i].state == AT_BLOCK) fibers[i].state = RUNS;
    }
}

static inline void poison_shared(unsigned shared) {
    if (&__start_shim_shared[0]) memset(__start_shim_shared, 0xFF, __stop_shim_shared - __start_shim_shared);
    memset(shim_dynamic, 0xFF, shared);
}

static const char *launch(const unsigned *grid, const unsigned *block, unsigned shared, void (*kernel)(void **),
                          void **params, bool waits) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    n_threads = block[0] * block[1] * block[2];
    if (n_threads > MOST) return "too many threads";
    body = kernel;
    arguments = params;
    // A word behind the dynamic shared memory tells writes past it.
    shim_dynamic = (char *)aligned_alloc(1024, (shared + 8 + 1023) / 1024 * 1024);
    memset(shim_dynamic + shared, 0xFD, 8);
    if (!stacks && waits) stacks = (char *)malloc(MOST * STACK);
    dim3 t = {0, 0, 0};
    for (int i = 0; i < n_threads; i++) {
        fibers[i].thread = t;
        if (++t.x == block[0]) t.x = 0, ++t.y;
        if (t.y == block[1]) t.y = 0, ++t.z;
    }
    message[0] = 0;
    for (unsigned z = 0; z < grid[2] && !message[0]; z++)
        for (unsigned y = 0; y < grid[1] && !message[0]; y++)
            for (unsigned x = 0; x < grid[0] && !message[0]; x++) {
                blockIdx = {x, y, z};
                if (waits) {
                    poison_shared(shared);
                    run_block();
                    continue;
                }
                for (int i = 0; i < n_threads; i++) {
                    threadIdx = fibers[i].thread;
                    kernel(params);
                }
            }
    for (int i = 0; i < 8; i++)
        if ((unsigned char)shim_dynamic[shared + i] != 0xFD && !message[0])
            snprintf(message, sizeof message, "a write past the dynamic shared memory");
    free(shim_dynamic);
    return message[0] ? message : nullptr;
}

// The value of another lane; NaN where that lane takes no part, as CUDA leaves it undefined.
template <class T> static inline T exchange(unsigned mask, T value, int from) {
    static_assert(sizeof(T) <= 16, "a shuffle moves 16 bytes at most");
    memcpy(fibers[current].brought, (const void *)&value, sizeof(T));
    wait(AT_WARP, mask);
    const Fiber &self = fibers[current], &other = fibers[(current & ~31) + from];
    T out;
    if ((current & ~31) + from < n_threads && other.meeting == self.meeting)
        memcpy((void *)&out, other.given, sizeof(T));
    else
        memset((void *)&out, 0xFF, sizeof(T));
    return out;
}

// Lets the lanes of a warp that run together here catch up with each other.
static inline void converge() { wait(AT_MASK, 0); }

// Volatile shared memory: reductions of 16-bit types expect that a warp's lanes execute each access together.
template <class T> struct Lockstep {
    T *p;
    struct Element {
        T *p;
        operator T() const {
            converge();
            T value = *p;
            converge();
            return value;
        }
        void operator=(T value) {
            converge();
            *p = value;
            converge();
        }
    };
    template <class I> Element operator[](I index) const { return {p + index}; }
};
template <class T> static inline Lockstep<T> lockstep(T *p) { return {p}; }

}  // namespace shim

static inline void __syncthreads() { shim::wait(shim::AT_BLOCK, 0); }
static inline void __syncwarp(unsigned mask = ~0u) { shim::wait(shim::AT_WARP, mask); }
static inline unsigned __activemask() {
    shim::wait(shim::AT_MASK, 0);
    return shim::fibers[shim::current].mask;
}
template <class T> static inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return shim::exchange(mask, value, (shim::current & 31 & ~(width - 1)) | (lane & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    int lane = shim::current & 31, from = lane ^ bits;
    return shim::exchange(mask, value, from / width > lane / width ? lane : from);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, int by, int width = 32) {
    int lane = shim::current & 31, from = lane + by;
    return shim::exchange(mask, value, from / width == lane / width ? from : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, int by, int width = 32) {
    int lane = shim::current & 31, from = lane - by;
    return shim::exchange(mask, value, from >= 0 && from / width == lane / width ? from : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned out = 0;
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) out |= (unsigned)(__shfl_sync(mask, (int)(predicate != 0), lane) == 1) << lane;
    return out;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
