// Precompiled for the targets that include LibTorch in several files.
#include <torch/torch.h>
