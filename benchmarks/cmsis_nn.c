/* One convolution or fully connected layer through CMSIS-NN, checked and counted: see mcu.py, which writes layer.h. */
#include <stdint.h>

#include "arm_nnfunctions.h"
#include "board.h"
#include "layer.h"

static int8_t output[OUTPUT_ELEMENTS];
static int32_t sums[LAYER_O];
static _Alignas(16) int8_t scratch[64 * 1024];

static void print_number(uint64_t number) {
    char text[21];
    char *digit = text + sizeof text - 1;
    *digit = 0;
    do {
        *--digit = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    board_print(digit);
}

int main(void) {
    const cmsis_nn_dims x = {LAYER_N, LAYER_H, LAYER_W, LAYER_C}, y = {LAYER_N, LAYER_OH, LAYER_OW, LAYER_O};
    const cmsis_nn_dims bias = {1, 1, 1, LAYER_O};
    const cmsis_nn_per_channel_quant_params quant = {(int32_t *)layer_multiplier, (int32_t *)layer_shift};
    cmsis_nn_context context = {scratch, sizeof scratch}, kernel_sums = {sums, sizeof sums};
    arm_cmsis_nn_status status;
#if LAYER_DEPTHWISE
    const cmsis_nn_dims w = {1, LAYER_KH, LAYER_KW, LAYER_O};
    const cmsis_nn_dw_conv_params params = {-(LAYER_X_ZERO), LAYER_Y_ZERO, 1, {LAYER_SX, LAYER_SY},
                                            {LAYER_LEFT, LAYER_TOP}, {1, 1}, {LAYER_LOW, LAYER_HIGH}};
    const uint64_t start = board_ticks();
    status = arm_depthwise_conv_wrapper_s8(&context, &params, &quant, &x, layer_x, &w, layer_w, &bias, layer_bias, &y,
                                           output);
#elif LAYER_GEMM
    const cmsis_nn_dims w = {LAYER_C, 1, 1, LAYER_O}, flat = {LAYER_N, 1, 1, LAYER_C}, out = {LAYER_N, 1, 1, LAYER_O};
    const cmsis_nn_fc_params params = {-(LAYER_X_ZERO), 0, LAYER_Y_ZERO, {LAYER_LOW, LAYER_HIGH}};
    arm_vector_sum_s8(sums, LAYER_C, LAYER_O, layer_w, -(LAYER_X_ZERO), 0, layer_bias);
    const uint64_t start = board_ticks();
    status = arm_fully_connected_per_channel_s8(&kernel_sums, &params, &quant, &flat, layer_x, &w, layer_w, &bias,
                                                layer_bias, &out, output);
    (void)x, (void)y, (void)context;
#else
    const cmsis_nn_dims w = {LAYER_O, LAYER_KH, LAYER_KW, LAYER_C};
    const cmsis_nn_conv_params params = {-(LAYER_X_ZERO), LAYER_Y_ZERO, {LAYER_SX, LAYER_SY}, {LAYER_LEFT, LAYER_TOP},
                                         {1, 1}, {LAYER_LOW, LAYER_HIGH}};
    const uint64_t start = board_ticks();
    status = arm_convolve_wrapper_s8(&context, &params, &quant, &x, layer_x, &w, layer_w, &bias,
                                     layer_bias, &y, output);
#endif
    const uint64_t ticks = board_ticks() - start;
    int differing = status != ARM_CMSIS_NN_SUCCESS;
    for (uint32_t i = 0; i < OUTPUT_ELEMENTS; i++) differing += output[i] != layer_expected[i];
    (void)kernel_sums;
    board_print("differing ");
    print_number((uint64_t)differing);
    board_print("\ninstructions ");
    print_number(ticks * board_tick_numerator() / board_tick_denominator());
    board_print("\n");
    board_exit(differing != 0);
    return 0;
}
