// Reads rows of a file by several threads at once, and computes bundles, on memory of exactly its size, for the sanitizers.
#include <fcntl.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "bundle_mlp.h"
#include "common.h"
#include "read_rows.h"
#include "sparse_mlp.h"

#ifndef READS_ALONE
namespace effjax {
const SparseMlpKernel* const kSparseMlpAvx2 = nullptr;  // the kernels are sanitized elsewhere, in every variant
const SparseMlpKernel* const kSparseMlpAvx512 = nullptr;
}  // namespace effjax
#endif

namespace {

using effjax::ReadPiece;
using effjax::ReadRequest;

void Check(bool holds, const char* what) {
  if (!holds && ++failures < 10) std::printf("%s\n", what);
}

struct File {
  explicit File(int64_t size) : content(static_cast<size_t>(size)) {
    std::mt19937 bytes(1);
    for (uint8_t& byte : content) byte = static_cast<uint8_t>(bytes());
    char name[] = "rows_XXXXXX";
    fd = mkstemp(name);
    unlink(name);
    Check(write(fd, content.data(), content.size()) == size, "the file cannot be written");
  }
  ~File() { close(fd); }
  std::vector<uint8_t> content;
  int fd;
};

// Random requests of `pieces` rows each: without gaps and in order, so that they are read straight, or not.
void ReadSome(effjax::Pool& pool, const File& file, int seed) {
  std::mt19937 generator(static_cast<unsigned>(seed));
  auto draw = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); };
  const int64_t count = draw(0, 12), stride = draw(1, 300), rows = 5;
  const bool straight = draw(0, 1);
  Exact<uint8_t> buffer(count * rows * stride);
  std::vector<ReadRequest> requests;
  std::vector<ReadPiece> pieces;
  std::vector<int64_t> from;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t offset = draw(0, static_cast<int64_t>(file.content.size()) - 2 * rows * stride);
    requests.push_back({offset, (straight ? rows : 2 * rows) * stride, r * rows, rows});
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = straight ? i * stride : 2 * i * stride;
      pieces.push_back({at, ((r * rows + i) * 7 % (count * rows)) * stride, stride});  // 7 and 5 share no factor
      from.push_back(offset + at);
    }
  }
  if (count % 7 == 0 && count > 0) return;  // 7 would send two rows to one place
  const effjax::ReadError error =
      effjax::ReadRows(pool, file.fd, requests.data(), count, pieces.data(), buffer.get(), {1, draw(0, 1)});
  Check(error.code == 0, "a read failed");
  for (size_t i = 0; i < pieces.size(); ++i) {
    Check(std::memcmp(buffer.get() + pieces[i].to, file.content.data() + from[i], static_cast<size_t>(stride)) == 0,
          "a row is not that of the file");
  }
}

void Reads() {
  const File file(20000);
  effjax::Pool pool(3), none(0);
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) ReadSome(i % 10 ? pool : none, file, 50 * t + i);
    });
  }
  for (std::thread& caller : callers) caller.join();
  cases += 200;
  // Beyond the end, and from a descriptor that is none: told, and the others of the call are not waited for in vain.
  Exact<uint8_t> buffer(30);
  const ReadPiece pieces[] = {{0, 0, 10}, {0, 10, 10}, {0, 20, 10}};
  const ReadRequest beyond[] = {{0, 10, 0, 1}, {19995, 10, 1, 1}, {100, 10, 2, 1}};
  const effjax::ReadError end = effjax::ReadRows(pool, file.fd, beyond, 3, pieces, buffer.get(), {1, 0});
  Check(end.code == effjax::kEndOfFile && end.request == 1, "the end of the file is not told");
  Check(effjax::ReadRows(pool, -1, beyond, 3, pieces, buffer.get(), {1, 0}).code == EBADF, "a bad file is not told");
  cases += 2;
}

#ifndef READS_ALONE
void Bundles() {
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  effjax::Pool pool(2);
  for (const int64_t gated : {0, 1}) {
    for (const int64_t count : {0, 1, 7, 40}) {
      for (const int64_t width : {1, 33, 64}) {
        const int64_t parts = 2 + gated, stride = parts * width * 4;
        Exact<float> rows(count * parts * width), biases(2 * count), x(width), y(width);
        for (int64_t i = 0; i < count * parts * width; ++i) rows[i] = normal(generator);
        for (int64_t i = 0; i < 2 * count; ++i) biases[i] = normal(generator);
        for (int64_t i = 0; i < width; ++i) x[i] = normal(generator);
        std::vector<double> expected(static_cast<size_t>(width));
        for (int64_t n = 0; n < count; ++n) {
          auto dot = [&](int64_t part) {
            double sum = 0;
            for (int64_t i = 0; i < width; ++i) sum += double{rows[(n * parts + part) * width + i]} * x[i];
            return sum;
          };
          const double up = dot(gated) + biases[count + n];
          const double h = gated ? std::max(0.0, dot(0) + biases[n]) * up : std::max(0.0, up);
          for (int64_t i = 0; i < width; ++i) {
            expected[static_cast<size_t>(i)] += h * rows[(n * parts + parts - 1) * width + i];
          }
        }
        effjax::BundleMlp call = {};
        call.rows = reinterpret_cast<const uint8_t*>(rows.get());
        call.biases = biases.get();
        call.x = x.get();
        call.y = y.get();
        call.count = call.slots = count;
        call.stride = stride;
        call.gate = gated ? 0 : -1;
        call.up = gated * width * 4;
        call.down = (1 + gated) * width * 4;
        call.width = width;
        call.helpers = 2;
        Check(effjax::RunBundleMlp(pool, call), "no portable kernel");
        for (int64_t i = 0; i < width; ++i) {
          Check(std::abs(y[i] - expected[static_cast<size_t>(i)]) < 1e-3, "a bundle's product is off");
        }
        ++cases;
      }
    }
  }
}
#endif

}  // namespace

int main() {
  Reads();
#ifndef READS_ALONE
  Bundles();
#endif
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
