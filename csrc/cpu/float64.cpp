#include "launch.h"

namespace ial {

IAL_KERNELS(, double)

}  // namespace ial
