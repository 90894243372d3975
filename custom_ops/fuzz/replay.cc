// Where libFuzzer is not (GCC): runs the kept inputs, then random changes of them.
//
//     abi_fuzz FOLDER [SEED COUNT]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

using Input = std::vector<uint8_t>;

namespace {

std::mt19937 rng;

size_t below(size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(rng); }

// Exactly as many bytes on the heap as the input has.
void run(const Input& input) { LLVMFuzzerTestOneInput(Input(input).data(), input.size()); }

void change(Input* input, const std::vector<Input>& others) {
  const Input& other = others[below(others.size())];
  const auto any = [] { return static_cast<uint8_t>(below(256)); };
  for (size_t count = 1 + below(4); count > 0; --count) {
    if (input->empty() || below(8) == 0) input->push_back(any());
    const auto at = input->begin() + static_cast<std::ptrdiff_t>(below(input->size()));
    switch (below(5)) {
      case 0: *at = any(); break;
      case 1: *at = static_cast<uint8_t>(*at ^ 1u << below(8)); break;
      case 2: input->insert(at, any()); break;
      case 3: input->erase(at); break;
      default: std::copy(other.begin(), other.begin() + std::min<std::ptrdiff_t>(input->end() - at, other.end() - other.begin()), at);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 4) return 2;
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());  // a folder has no order of its own
  std::vector<Input> inputs;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  if (inputs.empty()) return 2;
  for (const Input& input : inputs) run(input);
  const long count = argc == 4 ? std::atol(argv[3]) : 0;
  if (argc == 4) rng.seed(static_cast<unsigned>(std::atoi(argv[2])));
  for (long i = 0; i < count; ++i) {
    Input input = inputs[below(inputs.size())];
    change(&input, inputs);
    run(input);
  }
  std::printf("%zu inputs and %ld changed ones\n", inputs.size(), count);
}
