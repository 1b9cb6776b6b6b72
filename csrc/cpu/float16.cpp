#include "launch.h"

namespace ial {

IAL_KERNELS(, at::Half)

}  // namespace ial
