/* device.h without a device: the simulator at the other end of the queue.
 *
 * It shows that a driver loses nothing on the way: a bundle built with queue_driver.c and this file gives the bits of
 * one built with the simulator. Replace it by code for your chip.
 */
#include "device.h"

/* The simulator's functions under other names, for the driver has these; its log keeps its names. */
#define qrt_open sim_open
#define qrt_bind sim_bind
#define qrt_close sim_close
#define qrt_layer sim_layer
#define qrt_alloc sim_alloc
#define qrt_free sim_free
#define qrt_dma sim_dma
#define qrt_fill sim_fill
#define qrt_barrier sim_barrier
#define qrt_ifm sim_ifm
#define qrt_ofm sim_ofm
#define qrt_wrap sim_wrap
#define qrt_kernel sim_kernel
#define qrt_weights sim_weights
#define qrt_scales sim_scales
#define qrt_conv sim_conv
#define qrt_conv_transpose sim_conv_transpose
#define qrt_max_pool sim_max_pool
#define qrt_average_pool sim_average_pool
#define qrt_add sim_add
#define qrt_mul sim_mul
#define qrt_requantize sim_requantize
#define qrt_lookup sim_lookup
#define qrt_softmax sim_softmax
#define qrt_resize_nearest sim_resize_nearest
#define qrt_resize_linear sim_resize_linear
#include "npu_sim.c"

static int32_t bound;

void device_begin(int32_t region, int32_t scratchpad_bytes) {
    bound = 0;
    sim_open(region, scratchpad_bytes);
}

uint64_t device_map(void *pointer, int64_t bytes) {
    (void)bytes;
    return (uint64_t)(uintptr_t)pointer; /* the simulator sees the host's own addresses */
}

void device_fail(const char *message) { fail("%s", message); }
void device_wait(void) {} /* commands execute as they are submitted */
void device_end(void) { sim_close(); }

/* Execute the command at `w` and return how many words it has. */
static int32_t execute(const int32_t *w) {
    switch (w[0]) {
        case LAYER: sim_layer(w[1]); return 2;
        case ALLOC: sim_alloc(w[1], w[2]); return 3;
        case FREE: sim_free(w[1], w[2]); return 3;
        case DMA: sim_dma(w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]); return 12;
        case FILL: sim_fill(w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]); return 9;
        case BARRIER: sim_barrier(); return 1;
        case IFM: sim_ifm(w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]); return 12;
        case OFM: sim_ofm(w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]); return 12;
        case WRAP: sim_wrap(w[1], w[2], w[3]); return 4;
        case KERNEL: sim_kernel(w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]); return 9;
        case WEIGHTS: sim_weights(w[1], w[2], w[3], w[4], w[5]); return 6;
        case SCALES: sim_scales(w[1], w[2], w[3]); return 4;
        case CONV: sim_conv(w[1], w[2]); return 3;
        case CONV_TRANSPOSE: sim_conv_transpose(w[1], w[2]); return 3;
        case MAX_POOL: sim_max_pool(); return 1;
        case AVERAGE_POOL: sim_average_pool(w[1]); return 2;
        case ADD: sim_add(w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]); return 9;
        case MUL: sim_mul(); return 1;
        case REQUANTIZE: sim_requantize(); return 1;
        case LOOKUP: sim_lookup(w[1], w[2]); return 3;
        case SOFTMAX: sim_softmax(w[1], w[2], w[3]); return 4;
        case RESIZE_NEAREST: sim_resize_nearest(w[1], w[2], w[3], w[4]); return 5;
        case RESIZE_LINEAR: sim_resize_linear(w[1], w[2], w[3], w[4], w[5], w[6]); return 7;
        default: fail("the queue holds no command but %d", w[0]); return 0;
    }
}

void device_submit(const int32_t *words_in, int32_t count, const device_buffer *table, int32_t table_size) {
    for (; bound < table_size; ++bound) /* all bindings come before the first command */
        if (table[bound].address != 0)
            sim_bind(bound + 1, (void *)(uintptr_t)table[bound].address, table[bound].bytes);
    for (int32_t at = 0; at < count;) at += execute(words_in + at);
}
