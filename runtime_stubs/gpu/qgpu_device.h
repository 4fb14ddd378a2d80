/* What qgpu.c asks of a device: implemented by opencl.c and cuda.c, one of which is linked.
 *
 * A program has one arena, where everything that changes lies, and one block of constants. Functions that can fail
 * return 0, or else leave a message with `qgpu_fail` and return what that returns.
 */
#ifndef QGPU_DEVICE_H
#define QGPU_DEVICE_H

#include <stdint.h>

#if defined(__GNUC__)
#define QGPU_INTERNAL __attribute__((visibility("hidden")))
#else
#define QGPU_INTERNAL
#endif

typedef struct qgpu_program qgpu_program;

/* An argument of a kernel: so many bytes of the arena or of the constants. */
typedef struct {
    int64_t is_constant, offset, bytes;
} qgpu_argument;

typedef struct {
    const char *kernel;
    const int64_t *grid;  /* groups along x, y, z */
    const int64_t *block; /* work items of a group along x, y, z */
    int64_t count;
    const qgpu_argument *arguments;
} qgpu_launch;

/* Keep a message for `qgpu_error`; returns 1. */
QGPU_INTERNAL int qgpu_fail(const char *format, ...);

/* Find the driver and a device, the first time. */
QGPU_INTERNAL int qgpu_device_open(void);
QGPU_INTERNAL const char *qgpu_device_name(void);

QGPU_INTERNAL qgpu_program *qgpu_device_load(const void *code, int64_t code_bytes, const void *constants,
                                             int64_t constants_bytes, int64_t arena_bytes, int64_t launches,
                                             const qgpu_launch *launch);
QGPU_INTERNAL void qgpu_device_free(qgpu_program *program);
QGPU_INTERNAL int qgpu_device_write(qgpu_program *program, int64_t offset, const void *data, int64_t bytes);
QGPU_INTERNAL int qgpu_device_read(qgpu_program *program, int64_t offset, void *data, int64_t bytes);
QGPU_INTERNAL int qgpu_device_run(qgpu_program *program);

#endif
