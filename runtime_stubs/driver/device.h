/* What queue_driver.c asks of the platform: the functions to write for a chip. */
#ifndef DEVICE_H
#define DEVICE_H

#include <stdint.h>

/* A buffer of the host as the device addresses it. Command words name it by its base, 1, 2…; base 0 is the scratchpad. */
typedef struct { uint64_t address; int64_t bytes; } device_buffer;

/* A region begins: power up, take the lock, empty the scratchpad. It needs this many bytes of scratchpad. */
void device_begin(int32_t region, int32_t scratchpad_bytes);
/* Make host memory visible to the device (IOMMU, cache clean and invalidate) and return where the device sees it. */
uint64_t device_map(void *pointer, int64_t bytes);
/* Let the device execute whole commands, after those submitted before. The words may be overwritten on return, so copy
 * them into the device's queue; wait for room there, not for the commands. */
void device_submit(const int32_t *words, int32_t count, const device_buffer *buffers, int32_t buffer_count);
/* Return when everything submitted is complete and the host may read the results. */
void device_wait(void);
/* The region is over: undo device_begin and device_map. */
void device_end(void);
/* Give up: the program asks for what the driver cannot do. Does not return. */
void device_fail(const char *message);

#endif
