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

/* An input or output: so many bytes of the arena. */
typedef struct {
    int64_t offset, bytes;
} qgpu_port;

/* What a program is made of. Valid while it is loaded; ports, inputs first, as long as the program. */
typedef struct {
    const void *code, *constants;
    int64_t code_bytes, constants_bytes, arena_bytes;
    int64_t overlaps; /* whether kernels may start before the one before is done, for which they wait themselves */
    int64_t inputs, outputs, launches;
    const qgpu_port *ports;
    const qgpu_launch *launch;
} qgpu_source;

/* Keep a message for `qgpu_error`; returns 1. */
QGPU_INTERNAL int qgpu_fail(const char *format, ...);

/* Find the driver and a device, the first time. */
QGPU_INTERNAL int qgpu_device_open(void);
QGPU_INTERNAL const char *qgpu_device_name(void);

/* The arena is to be all zeros at first. */
QGPU_INTERNAL qgpu_program *qgpu_device_load(const qgpu_source *source);
QGPU_INTERNAL void qgpu_device_free(qgpu_program *program);
QGPU_INTERNAL int qgpu_device_write(qgpu_program *program, int64_t input, const void *data);
QGPU_INTERNAL int qgpu_device_run(qgpu_program *program);
QGPU_INTERNAL int qgpu_device_read(qgpu_program *program, int64_t output, void *data);
/* As `qgpu_measure`. */
QGPU_INTERNAL int qgpu_device_measure(qgpu_program *program, int32_t repeat, float *each, float *all);

#endif
