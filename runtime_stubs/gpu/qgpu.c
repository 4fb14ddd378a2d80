/* Programs of GPU regions: reads them, keeps those that are loaded, and hands them to the device.
 *
 * A program is a table of int64 in the byte order of this machine, and what it points to:
 *
 *     magic, identity, arena bytes, offset and bytes of the constants, offset and bytes of the code,
 *     offset of the names, number of inputs, outputs, launches, whether launches may overlap
 *     for each input and output: offset in the arena, bytes
 *     for each launch: offset of the kernel's name among the names, grid x y z, block x y z, number of arguments, and
 *         for each of those whether it is a constant, its offset in the constants or in the arena, its bytes
 *
 * The arena is all zeros at first: where kernels count and add up, they leave zeros.
 *
 * The code is OpenCL C or what the CUDA driver loads (cubin, fatbin, PTX). `qcompiler/backends/gpu_program.py` writes it.
 */
#include "qgpu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qgpu_device.h"

enum { QGPU_MAGIC = 0x55504751 }; /* "QGPU" */
enum { MAGIC, IDENTITY, ARENA, CONSTANTS, CONSTANTS_BYTES, CODE, CODE_BYTES, NAMES, INPUTS, OUTPUTS, LAUNCHES, OVERLAPS, HEADER };
enum { LAUNCH_WORDS = 8, ARGUMENT_WORDS = 3 };

typedef struct {
    int32_t region;
    int64_t identity;
    qgpu_port *ports; /* a copy: inputs, then outputs */
    qgpu_program *program;
} loaded_region;

static loaded_region *regions;
static size_t region_count;
static loaded_region *current, *last;
static int failed;
static char message[1024];

int qgpu_fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    failed = 1;
    return 1;
}

static qgpu_program *load(const int64_t *table, const qgpu_port *ports) {
    const char *base = (const char *)table;
    const int64_t *word = table + HEADER + 2 * (table[INPUTS] + table[OUTPUTS]);
    qgpu_launch *launches = calloc((size_t)table[LAUNCHES] + 1, sizeof *launches);
    qgpu_source source = {base + table[CODE], base + table[CONSTANTS], table[CODE_BYTES], table[CONSTANTS_BYTES],
                          table[ARENA], table[OVERLAPS], table[INPUTS], table[OUTPUTS], table[LAUNCHES], ports, launches};
    qgpu_program *program = NULL;
    if (launches == NULL) {
        qgpu_fail("out of memory");
        return NULL;
    }
    for (int64_t i = 0; i < table[LAUNCHES]; ++i) {
        launches[i].kernel = base + table[NAMES] + word[0];
        launches[i].grid = word + 1;
        launches[i].block = word + 4;
        launches[i].count = word[7];
        /* Three int64 each, as the struct has them. */
        launches[i].arguments = (const qgpu_argument *)(word + LAUNCH_WORDS);
        word += LAUNCH_WORDS + ARGUMENT_WORDS * launches[i].count;
    }
    program = qgpu_device_load(&source);
    free(launches);
    return program;
}

static loaded_region *region_slot(int32_t region) {
    loaded_region *grown;
    for (size_t i = 0; i < region_count; ++i)
        if (regions[i].region == region) return &regions[i];
    grown = realloc(regions, (region_count + 1) * sizeof *regions);
    if (grown == NULL) return NULL;
    regions = grown;
    memset(&regions[region_count], 0, sizeof *regions);
    regions[region_count].region = region;
    return &regions[region_count++];
}

int32_t qgpu_open(int32_t region, const void *data) {
    const int64_t *table = data;
    loaded_region *slot;
    size_t ports;
    current = last = NULL;
    failed = 0;
    message[0] = 0;
    if (table[MAGIC] != QGPU_MAGIC) return qgpu_fail("region %d has no GPU program", (int)region);
    if (qgpu_device_open()) return 1;
    slot = region_slot(region);
    if (slot == NULL) return qgpu_fail("out of memory");
    if (slot->program == NULL || slot->identity != table[IDENTITY]) {
        if (slot->program != NULL) qgpu_device_free(slot->program);
        slot->program = NULL;
        free(slot->ports);
        ports = (size_t)(table[INPUTS] + table[OUTPUTS]) * sizeof *slot->ports;
        slot->ports = malloc(ports + 1);
        if (slot->ports == NULL) return qgpu_fail("out of memory");
        memcpy(slot->ports, table + HEADER, ports);
        slot->program = load(table, slot->ports);
        if (slot->program == NULL) return 1;
        slot->identity = table[IDENTITY];
    }
    current = slot;
    return 0;
}

int32_t qgpu_write(int32_t input, const void *data) {
    return failed || current == NULL ? 1 : qgpu_device_write(current->program, input, data);
}

int32_t qgpu_run(void) { return failed || current == NULL ? 1 : qgpu_device_run(current->program); }

int32_t qgpu_read(int32_t output, void *data) {
    return failed || current == NULL ? 1 : qgpu_device_read(current->program, output, data);
}

int32_t qgpu_close(void) {
    int32_t result = failed || current == NULL;
    last = current;
    current = NULL;
    return result;
}

int32_t qgpu_measure(int32_t repeat, float *each, float *all) {
    if (failed || last == NULL) return 1;
    return qgpu_device_open() || qgpu_device_measure(last->program, repeat, each, all);
}

const char *qgpu_problem(void) {
    failed = 0;
    message[0] = 0;
    return qgpu_device_open() ? message : NULL;
}

const char *qgpu_device(void) { return qgpu_problem() == NULL ? qgpu_device_name() : ""; }

const char *qgpu_error(void) { return message; }
