#include "cpu/simd.h"
