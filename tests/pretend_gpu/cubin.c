// Reads what a cubin says about its kernels: sizes of parameters, registers, shared memory, thread limits.
#define _GNU_SOURCE
#include "pretend.h"

#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CUDA_MACHINE = 190, FATBIN_MAGIC = 0xBA55ED50, FAT_ELF = 2, FAT_COMPRESSED = 0x2000 | 0x8000 };
enum { INFO_MAX_THREADS = 0x05, INFO_REQUIRED_THREADS = 0x10, INFO_PARAM = 0x17, INFO_REGISTERS = 0x2f };
enum { BYTES_FOLLOW = 4, RESERVED_SHARED = 1024 };  // a block's share that the system keeps from sm_90 on

struct Module {
    const char *elf;  // NULL where the code can't be read: PTX, compressed
    Function *functions[1024];
    int n_functions;
};

static const Elf64_Shdr *sections(const char *elf) {
    return (const Elf64_Shdr *)(elf + ((const Elf64_Ehdr *)elf)->e_shoff);
}

static const Elf64_Shdr *section(const char *elf, const char *prefix, const char *name) {
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)elf;
    const Elf64_Shdr *all = sections(elf);
    const char *names = elf + all[header->e_shstrndx].sh_offset;
    size_t n = strlen(prefix);
    for (int i = 0; i < header->e_shnum; i++) {
        const char *have = names + all[i].sh_name;
        if (!strncmp(have, prefix, n) && !strcmp(have + n, name)) return &all[i];
    }
    return NULL;
}

// Calls `each` for the entries of an .nv.info section that carry bytes.
static void entries(const char *elf, const Elf64_Shdr *info, void (*each)(int, const uint32_t *, void *), void *to) {
    if (!info) return;
    const char *p = elf + info->sh_offset, *end = p + info->sh_size;
    while (p + 4 <= end) {
        uint16_t size;
        memcpy(&size, p + 2, 2);
        if (p[0] != BYTES_FOLLOW) size = 0;  // the value lies in the entry itself
        if (size) {
            uint32_t words[4] = {0};
            memcpy(words, p + 4, size < 16 ? size : 16);
            each((unsigned char)p[1], words, to);
        }
        p += 4 + size;
    }
}

static void kernel_entry(int attribute, const uint32_t *words, void *to) {
    Facts *facts = to;
    if (attribute == INFO_MAX_THREADS) facts->max_threads = words[0] * words[1] * words[2];
    if (attribute == INFO_REQUIRED_THREADS) memcpy(facts->required, words, 12);
    unsigned ordinal = words[1] & 0xFFFF;
    if (attribute == INFO_PARAM && ordinal < MAX_PARAMS) {
        facts->sizes[ordinal] = words[2] >> 18;
        if (facts->n_params <= (int)ordinal) facts->n_params = ordinal + 1;
    }
}

typedef struct {
    const char *elf, *name;
    Facts *facts;
} Search;

static void module_entry(int attribute, const uint32_t *words, void *to) {
    Search *search = to;
    const Elf64_Shdr *symbols = section(search->elf, ".symtab", "");
    if (attribute != INFO_REGISTERS || !symbols) return;
    const Elf64_Sym *symbol = (const Elf64_Sym *)(search->elf + symbols->sh_offset) + words[0];
    const char *names = search->elf + sections(search->elf)[symbols->sh_link].sh_offset;
    if (!strcmp(names + symbol->st_name, search->name)) search->facts->registers = words[1];
}

static int fits(const char *elf) {
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)elf;
    // The number of the architecture moved to the second byte with the ELF format of CUDA 13.
    int sm = elf[EI_ABIVERSION] >= 8 ? (header->e_flags >> 8) & 0xFF : header->e_flags & 0xFF, cc = device_cc();
    return sm / 10 == cc / 10 && sm <= cc;
}

static const char *fat_member(const char *fat, int *error) {
    uint16_t header, kind;
    uint64_t length, size;
    uint32_t entry, flags;
    memcpy(&header, fat + 6, 2);
    memcpy(&length, fat + 8, 8);
    int compressed = 0;
    for (const char *p = fat + header, *end = p + length; p + 0x40 <= end; p += entry + size) {
        memcpy(&kind, p, 2);
        memcpy(&entry, p + 4, 4);
        memcpy(&size, p + 8, 8);
        memcpy(&flags, p + 0x28, 4);
        if (flags & FAT_COMPRESSED) compressed = 1;
        else if (kind == FAT_ELF && fits(p + entry)) return p + entry;
    }
    if (!compressed) *error = problem(NO_BINARY, "no binary of the module is for sm_%d", device_cc());
    return NULL;
}

Module *module_load(const void *image, int *error) {
    const char *elf = NULL;
    uint32_t magic;
    memcpy(&magic, image, 4);
    *error = OK;
    if (!memcmp(image, ELFMAG, SELFMAG)) {
        elf = image;
        if (((const Elf64_Ehdr *)elf)->e_machine != CUDA_MACHINE)
            *error = problem(INVALID_IMAGE, "the module is an ELF file of another machine");
        else if (!fits(elf))
            *error = problem(NO_BINARY, "the module's binary is not for sm_%d", device_cc());
    } else if (magic == FATBIN_MAGIC) {
        elf = fat_member(image, error);
    } else if (strncmp(image, "//", 2) && strncmp(image, "pretend", 7)) {
        *error = problem(INVALID_IMAGE, "the module is neither a cubin, a fat binary nor PTX");
    }
    if (*error) return NULL;
    Module *module = calloc(1, sizeof *module);
    module->elf = elf;
    return module;
}

int module_function(Module *module, const char *name, Function **out) {
    for (int i = 0; i < module->n_functions; i++)
        if (!strcmp(module->functions[i]->name, name)) return *out = module->functions[i], OK;
    if (module->n_functions == 1024 || strlen(name) > 255) return INVALID_VALUE;
    Function *function = calloc(1, sizeof *function);
    snprintf(function->name, sizeof function->name, "%s", name);
    Facts *facts = &function->facts;
    if (module->elf) {
        const char *elf = module->elf;
        if (!section(elf, ".text.", name)) {
            free(function);
            return problem(NOT_FOUND, "the module has no kernel %s", name);
        }
        entries(elf, section(elf, ".nv.info.", name), kernel_entry, facts);
        entries(elf, section(elf, ".nv.info", ""), module_entry, &(Search){elf, name, facts});
        const Elf64_Shdr *shared = section(elf, ".nv.shared.", name);
        if (shared) facts->static_shared = shared->sh_size;
        if (shared && section(elf, ".nv.shared.reserved.0", "") && facts->static_shared >= RESERVED_SHARED)
            facts->static_shared -= RESERVED_SHARED;
        facts->known = 1;
    }
    function->max_dynamic = 49152 > facts->static_shared ? 49152 - facts->static_shared : 0;
    module->functions[module->n_functions++] = function;
    *out = function;
    return OK;
}

void module_unload(Module *module) {
    for (int i = 0; i < module->n_functions; i++) free(module->functions[i]);
    free(module);
}
