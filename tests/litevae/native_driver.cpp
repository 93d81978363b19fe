// Runs the kernels on random shapes in buffers of exactly the size that they may touch, against plain loops, so that
// AddressSanitizer and UndefinedBehaviorSanitizer see each access beyond them. Compiled together with native.cpp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>

extern "C" {
int64_t packed_size(int64_t in, int64_t out);
void pack(const float* weights, int64_t in, int64_t out, float* packed);
int convolve(const float* x, const float* packed, const float* bias, const float* added, float* y, int64_t n, int64_t h,
             int64_t w, int64_t in, int64_t out);
int normalise(const float* x, const float* scale, const float* shift, float* y, int64_t n, int64_t pixels,
              int64_t channels, int64_t groups, float eps, int activate);
}

std::mt19937 generator(0);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// `offset` floats before the values: pointers of PyTorch's slices are aligned to 4 bytes only.
struct Values {
  std::unique_ptr<float[]> memory;
  float* at;
  explicit Values(int64_t size, int64_t offset = between(0, 3)) : memory(new float[size + offset]) {
    at = memory.get() + offset;
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; i++) at[i] = normal(generator);
  }
};

double convolution_error() {
  const int64_t n = between(1, 3), h = between(1, 21), w = between(1, 21), in = between(1, 70), out = between(1, 70);
  Values x(n * h * w * in), weights(out * in * 9), bias(out), added(n * h * w * out), y(n * h * w * out);
  Values packed(packed_size(in, out));
  const bool biased = between(0, 1), adds = between(0, 1);
  pack(weights.at, in, out, packed.at);
  if (convolve(x.at, packed.at, biased ? bias.at : nullptr, adds ? added.at : nullptr, y.at, n, h, w, in, out)) return 1;
  double worst = 0, largest = 0;
  for (int64_t i = 0; i < n * h * w; i++)
    for (int64_t o = 0; o < out; o++) {
      const int64_t row = i / w % h, column = i % w;
      double sum = (biased ? bias.at[o] : 0) + (double)(adds ? added.at[i * out + o] : 0);
      for (int64_t r = -1; r <= 1; r++)
        for (int64_t s = -1; s <= 1; s++) {
          if (row + r < 0 || row + r >= h || column + s < 0 || column + s >= w) continue;
          for (int64_t c = 0; c < in; c++)
            sum += (double)x.at[(i + r * w + s) * in + c] * weights.at[(o * in + c) * 9 + (r + 1) * 3 + s + 1];
        }
      worst = std::max(worst, std::abs(sum - y.at[i * out + o]));
      largest = std::max(largest, std::abs(sum));
    }
  return worst / std::max(largest, 0.1);
}

double normalisation_error() {
  const int64_t groups = between(1, 9), channels = groups * between(1, 9), n = between(1, 3), pixels = between(1, 700);
  Values x(n * pixels * channels), scale(channels), shift(channels), y(n * pixels * channels);
  const bool affine = between(0, 1);
  if (normalise(x.at, affine ? scale.at : nullptr, affine ? shift.at : nullptr, y.at, n, pixels, channels, groups, 1e-3f, 1))
    return 1;
  const int64_t width = channels / groups;
  double worst = 0, largest = 0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t g = 0; g < groups; g++) {
      double mean = 0, variance = 0;
      auto value = [&](int64_t p, int64_t c) { return (double)x.at[(i * pixels + p) * channels + g * width + c]; };
      for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < width; c++) mean += value(p, c) / (pixels * width);
      for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < width; c++) variance += std::pow(value(p, c) - mean, 2) / (pixels * width);
      for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < width; c++) {
          const int64_t k = g * width + c;
          double z = (value(p, c) - mean) / std::sqrt(variance + (double)1e-3f);
          if (affine) z = z * scale.at[k] + shift.at[k];
          z /= 1 + std::exp(-z);
          worst = std::max(worst, std::abs(z - y.at[(i * pixels + p) * channels + k]));
          largest = std::max(largest, std::abs(z));
        }
    }
  return worst / std::max(largest, 0.1);
}

int main() {
  for (int run = 0; run < 60; run++) {
    const double one = convolution_error(), two = normalisation_error();
    if (!(one < 1e-4 && two < 1e-4)) {
      std::printf("run %d: errors %g and %g\n", run, one, two);
      return 1;
    }
  }
  std::puts("all equal");
}
