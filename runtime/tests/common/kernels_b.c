// The same names as in kernels.c, another meaning: to see which object a session really runs.
#include <stdint.h>
void relu(char **b, const int64_t *d, int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; i++) ((float *)b[1])[i] = 42;
}
