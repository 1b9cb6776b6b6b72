#include "launch.h"

namespace ial {

IAL_KERNELS(, float)

}  // namespace ial
