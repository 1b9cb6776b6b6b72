#include "launch.h"

namespace ial {

IAL_KERNELS(, at::BFloat16)

}  // namespace ial
