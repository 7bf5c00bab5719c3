// What the programs under the sanitizers share: random numbers, memory of exactly its size, and the count of what is off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>

inline std::mt19937 generator(7);
inline int failures = 0, cases = 0;

inline int64_t Draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
inline float Normal() { return std::normal_distribution<float>()(generator); }

// Memory of exactly n elements, so that one element further is not ours.
template <typename T>
struct Exact {
  explicit Exact(int64_t n) : data(new T[static_cast<size_t>(n)]()) {}
  T* get() { return data.get(); }
  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  std::unique_ptr<T[]> data;
};

inline void Compare(const char* name, float got, double expected, double magnitude, double tolerance) {
  if (!(std::abs(got - expected) <= tolerance * (magnitude + 1e-30))) {
    ++failures;
    if (failures < 10) std::printf("%s: %g instead of %g\n", name, static_cast<double>(got), expected);
  }
}

// Each runs every variant that this processor has.
void CheckMatmuls();
void CheckNomad();
void CheckAttention();
void CheckRepresenter();
void CheckLabels();
void CheckSparseMlp();
