// Runs the kernels on random problems, each number beside its definition, for the sanitizers.
#include <cstdio>

#include "common.h"

int main() {
  CheckLabels();
  CheckSparseMlp();
  CheckRepresenter();
  CheckNomad();
  CheckMatmuls();
  CheckAttention();
  std::printf("%d cases, %d numbers off\n", cases, failures);
  return failures != 0;
}
