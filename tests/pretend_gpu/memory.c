// Blocks of pretend device memory and pinned memory: poisoned, between guard zones, counted.
#define _GNU_SOURCE
#include "pretend.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

// Both patterns are NaN in every floating type, so that what is read too early or too far shows in results.
#define POISON 0xFF
#define GUARD_WORD 0xFFFD
enum { GUARD = 4096 };
#define POISONED ((size_t)1 << 30)  // no more of a block, as poison makes the host's memory real

typedef struct {
    char *start;
    size_t size;
    int place;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block *blocks;  // sorted by address
static size_t n_blocks, room;
static size_t total_bytes = (size_t)8 << 30, current, peak;

static void poison(const Block *block) {
    memset(block->start, POISON, block->size < POISONED ? block->size : POISONED);
}

static void paint(char *zone) {
    uint16_t *words = (uint16_t *)zone;
    for (size_t i = 0; i < GUARD / 2; i++) words[i] = GUARD_WORD;
}

static long damage(const char *zone) {
    for (long i = 0; i < GUARD; i++)
        if ((unsigned char)zone[i] != (i % 2 ? GUARD_WORD >> 8 : GUARD_WORD & 0xFF)) return i;
    return -1;
}

// The guard behind a block begins at an even address, a byte after an odd size at most.
static char *behind(const Block *block) { return block->start + (block->size + 1) / 2 * 2; }

// The number of blocks that start at or below p.
static size_t upto(const void *p) {
    size_t low = 0, high = n_blocks;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle].start <= (const char *)p) low = middle + 1;
        else high = middle;
    }
    return low;
}

static Block *find(const void *p) {
    size_t n = upto(p);
    if (!n) return NULL;
    Block *block = &blocks[n - 1];
    size_t offset = (const char *)p - block->start;
    return offset < block->size || offset == 0 ? block : NULL;
}

static int check(Block *block, const char *when) {
    long before = damage(block->start - GUARD), after = damage(behind(block));
    if (before < 0 && after < 0) return OK;
    if (before >= 0)
        problem(0, "%s: a write %ld bytes before a block of %zu bytes", when, GUARD - before, block->size);
    if (after >= 0) problem(0, "%s: a write %ld bytes past a block of %zu bytes", when, after, block->size);
    paint(block->start - GUARD);
    paint(behind(block));
    return ILLEGAL_ADDRESS;
}

int block_new(void **out, size_t size, int place) {
    pthread_mutex_lock(&lock);
    char *raw = NULL;
    int error = OK;
    if (place == DEVICE && (size > total_bytes || current > total_bytes - size)) {
        error = problem(OUT_OF_MEMORY, "out of memory: %zu bytes asked for, %zu of %zu in use", size, current,
                        total_bytes);
    } else if (posix_memalign((void **)&raw, GUARD, size + 2 * GUARD + 2)) {
        error = problem(OUT_OF_MEMORY, "the host has no %zu bytes", size);
    } else {
        if (n_blocks == room) {
            room = room ? 2 * room : 256;
            blocks = realloc(blocks, room * sizeof *blocks);
        }
        Block block = {raw + GUARD, size, place};
        size_t at = upto(block.start);
        memmove(blocks + at + 1, blocks + at, (n_blocks++ - at) * sizeof *blocks);
        blocks[at] = block;
        poison(&block);
        paint(raw);
        paint(behind(&block));
        if (place == DEVICE) current += size;
        if (current > peak) peak = current;
        *out = block.start;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

int block_free(void *p, int place) {
    if (!p) return OK;
    pthread_mutex_lock(&lock);
    Block *block = find(p);
    int error = OK;
    if (!block || block->start != p || block->place != place) {
        const char *what = !block               ? "never allocated, or freed before"
                           : block->start != p ? "inside a block"
                                               : "of the other kind of memory";
        error = problem(INVALID_VALUE, "%s of %p, which is %s", place == DEVICE ? "cudaFree" : "cudaFreeHost", p,
                        what);
    } else {
        check(block, "at a free");
        if (place == DEVICE) current -= block->size;
        poison(block);  // what still reads it will show
        free(block->start - GUARD);
        memmove(block, block + 1, (--n_blocks - (block - blocks)) * sizeof *blocks);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

size_t block_extent(const void *p, int place) {
    pthread_mutex_lock(&lock);
    Block *block = find(p);
    size_t left = block && (place == ANY || block->place == place) ? block->start + block->size - (char *)p : 0;
    pthread_mutex_unlock(&lock);
    return left;
}

int block_here(const void *p) {
    pthread_mutex_lock(&lock);
    Block *block = find(p);
    int place = block ? block->place : ANY;
    pthread_mutex_unlock(&lock);
    return place;
}

int guards_check(const char *when) {
    int error = OK;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < n_blocks; i++)
        if (check(&blocks[i], when)) error = ILLEGAL_ADDRESS;
    pthread_mutex_unlock(&lock);
    return error;
}

void memory_info(size_t *available, size_t *total) {
    *available = total_bytes > current ? total_bytes - current : 0;
    *total = total_bytes;
}

EXPORT void pretend_set_memory(size_t total) { total_bytes = total; }
EXPORT size_t pretend_current(void) { return current; }
EXPORT size_t pretend_peak(void) { return peak; }
EXPORT void pretend_reset_peak(void) { peak = current; }
EXPORT size_t pretend_extent(const void *p) { return block_extent(p, DEVICE); }

EXPORT size_t pretend_blocks(void) {
    size_t n = 0;
    for (size_t i = 0; i < n_blocks; i++) n += blocks[i].place == DEVICE;
    return n;
}
