// Kernels for the runtime's tests: k(bufs, dims, lo, hi) on lo..hi of one dimension.
#include <stdint.h>
#define KERNEL(name) void name(char **b, const int64_t *d, int64_t lo, int64_t hi)
#define F(i) ((float *)b[i])
#define I(i) ((int64_t *)b[i])

KERNEL(add) { for (int64_t i = lo; i < hi; i++) F(2)[i] = F(0)[i] + F(1)[i]; }
KERNEL(relu) { for (int64_t i = lo; i < hi; i++) F(1)[i] = F(0)[i] > 0 ? F(0)[i] : 0; }
KERNEL(scale) { for (int64_t i = lo; i < hi; i++) F(2)[i] = F(0)[i] * F(1)[0]; }
KERNEL(add_relu_scale) {
    for (int64_t i = lo; i < hi; i++) {
        float s = F(0)[i] + F(1)[i];
        F(3)[i] = (s > 0 ? s : 0) * F(2)[0];
    }
}
// Rows of d[0] elements: out[r] = sum of the row, through scratch.
KERNEL(row_sum) {
    float *scratch = F(2);
    for (int64_t r = lo; r < hi; r++) {
        for (int64_t j = 0; j < d[0]; j++) scratch[j] = F(0)[r * d[0] + j];
        float sum = 0;
        for (int64_t j = 0; j < d[0]; j++) sum += scratch[j];
        F(1)[r] = sum;
    }
}
// How many of d[0] elements are positive.
KERNEL(count_positive) {
    int64_t n = 0;
    for (int64_t i = 0; i < d[0]; i++) n += F(0)[i] > 0;
    I(1)[0] = n;
}
KERNEL(take_positive) {
    int64_t n = 0;
    for (int64_t i = 0; i < d[0]; i++) if (F(0)[i] > 0) F(1)[n++] = F(0)[i];
}
// Is the sum of d[0] elements below that of b[1][0]?
KERNEL(sum_below) {
    float sum = 0;
    for (int64_t i = 0; i < d[0]; i++) sum += F(0)[i];
    b[2][0] = sum < F(1)[0];
}
KERNEL(index_as_float) { F(1)[0] = (float)I(0)[0]; }
// out = the d[0] elements of b[0], then the one of b[1].
KERNEL(append) {
    for (int64_t i = 0; i < d[0]; i++) F(2)[i] = F(0)[i];
    F(2)[d[0]] = F(1)[0];
}
KERNEL(always) { b[0][0] = 1; }
